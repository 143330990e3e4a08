import numpy as np
import pytest
import timm.data.mixup
import torch
from composer.algorithms import CutMix, LabelSmoothing, MixUp
from composer.core import Event
from timm.data import Mixup
from torch import nn

from algorithms.mix import CutMixConfig, MixUpConfig, build_mix, is_cutmix

CLASSES, COUNT, SIZE = 4, 8, 12


def batch():
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randn(COUNT, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)
    return pictures, torch.randint(0, CLASSES, (COUNT,), generator=generator)


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 0.5, 1.0])
def test_each_gets_timms_share_of_the_batches(switch_prob):
    batches = 4000
    ours = sum(is_cutmix(17, number, switch_prob) for number in range(batches))
    np.random.seed(0)
    original = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=switch_prob)
    theirs = sum(original._params_per_batch()[1] for _ in range(batches))
    # Five standard deviations of a binomial count; of the difference of two, for the comparison.
    spread = (batches * switch_prob * (1 - switch_prob)) ** 0.5
    assert abs(ours - batches * switch_prob) <= 5 * spread
    assert abs(ours - theirs) <= 5 * 2**0.5 * spread


@pytest.mark.parametrize("seed", range(8))
def test_pictures_and_targets_are_timms_for_the_same_lambda_pairs_and_box(seed, state, logger, monkeypatch):
    """timm pairs each picture with that at the other end of the batch, and draws before it mixes."""
    pictures, labels = batch()
    np.random.seed(seed)
    original = Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    wanted, wanted_targets = original(pictures.clone(), labels)

    np.random.seed(seed)
    lam, use_cutmix = original._params_per_batch()
    box = timm.data.mixup.rand_bbox(pictures.shape, lam) if use_cutmix else None
    flip = torch.arange(COUNT - 1, -1, -1)
    monkeypatch.setattr("composer.algorithms.mixup.mixup._gen_indices", lambda count: flip)
    monkeypatch.setattr("composer.algorithms.mixup.mixup._gen_mixing_coef", lambda alpha: 1 - lam)
    monkeypatch.setattr("composer.algorithms.cutmix.cutmix._gen_indices", lambda pictures: flip)
    monkeypatch.setattr(
        "composer.algorithms.cutmix.cutmix._rand_bbox",
        lambda *_, **__: (box[0], box[2], box[1], box[3]),
    )
    number = next(number for number in range(100) if is_cutmix(17, number, 0.5) == use_cutmix)
    run = state(nn.Conv2d(3, 1, 1), batch=number)
    run.batch, run.outputs = (pictures.clone(memory_format=torch.preserve_format), labels), torch.zeros(COUNT, CLASSES)
    mix, smoothing = build_mix(MixUpConfig(alpha=0.4), CutMixConfig()), LabelSmoothing(0.1)

    mix.apply(Event.BEFORE_FORWARD, run, logger)
    torch.testing.assert_close(run.batch[0], wanted)
    assert run.batch[0].is_contiguous(memory_format=torch.channels_last)
    mix.apply(Event.BEFORE_LOSS, run, logger)
    unsmoothed = run.batch[1].clone()
    smoothing.apply(Event.BEFORE_LOSS, run, logger)
    torch.testing.assert_close(run.batch[1], wanted_targets)
    smoothing.apply(Event.AFTER_LOSS, run, logger)
    assert torch.equal(run.batch[1], unsmoothed)


@pytest.mark.parametrize("event", [Event.BEFORE_LOSS, Event.BEFORE_BACKWARD])
def test_only_the_chosen_one_acts_on_the_loss(event, state, logger, monkeypatch):
    made = {}

    def keep(kind):
        def make(**fields):
            made[kind.__name__] = kind(**fields)
            return made[kind.__name__]

        return make

    for kind in (MixUp, CutMix):
        monkeypatch.setattr(f"composer.algorithms.{kind.__name__}", keep(kind))
    interpolate = event == Event.BEFORE_BACKWARD
    algorithm = build_mix(MixUpConfig(interpolate_loss=interpolate), CutMixConfig(interpolate_loss=interpolate))
    assert algorithm.match(event, state(nn.Conv2d(3, 1, 1)))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))
    for number in range(6):
        run = state(network, batch=number)
        run.batch = batch()
        labels = run.batch[1]
        algorithm.apply(Event.BEFORE_FORWARD, run, logger)
        run.outputs = run.model(run.batch)
        run.loss = run.model.loss(run.outputs, run.batch)
        plain = run.loss
        algorithm.apply(event, run, logger)
        if is_cutmix(17, number, 0.5):
            other, share = made["CutMix"]._permuted_target, 1 - made["CutMix"]._adjusted_lambda
        else:
            other, share = made["MixUp"].permuted_target, made["MixUp"].mixing
        if interpolate:
            wanted = (1 - share) * plain + share * run.model.loss(run.outputs, (run.batch[0], other))
            torch.testing.assert_close(run.loss, wanted)
        else:
            one_hot = nn.functional.one_hot
            wanted = (1 - share) * one_hot(labels, CLASSES) + share * one_hot(other, CLASSES)
            torch.testing.assert_close(run.batch[1], wanted.float())
