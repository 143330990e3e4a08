import numpy as np
import pytest
import timm.data.mixup
import torch
from composer.algorithms.cutmix import cutmix_batch
from composer.algorithms.cutmix.cutmix import _rand_bbox
from composer.algorithms.label_smoothing import smooth_labels
from composer.algorithms.mixup import mixup_batch
from composer.core import Event
from hypothesis import given
from hypothesis import strategies as st
from timm.data import Mixup
from torch import nn

from algorithms.config import CutMixConfig, MixUpConfig
from algorithms.mix import Mix, Mixing, box_around, build, cutmix, draw_cutmix, draw_mixup, is_cutmix, mixup

CLASSES, COUNT, SIZE = 4, 8, 12
SHAPE = torch.Size((COUNT, 3, SIZE, SIZE))


def batch():
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randn(SHAPE, generator=generator).to(memory_format=torch.channels_last)
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
    box = tuple(map(int, timm.data.mixup.rand_bbox(pictures.shape, lam))) if use_cutmix else None
    share = (box[1] - box[0]) * (box[3] - box[2]) / SIZE**2 if box else 1 - lam
    mixing = Mixing(torch.arange(COUNT - 1, -1, -1), share, box)
    monkeypatch.setattr(Mix, "draw", lambda *_: mixing)
    run = state(nn.Conv2d(3, 1, 1))
    run.batch, run.outputs = (pictures.clone(memory_format=torch.preserve_format), labels), torch.zeros(COUNT, CLASSES)
    mix = build(MixUpConfig(alpha=0.4), CutMixConfig(), 0.1)

    mix.apply(Event.BEFORE_FORWARD, run, logger)
    torch.testing.assert_close(run.batch[0], wanted)
    assert run.batch[0].is_contiguous(memory_format=torch.channels_last)
    mix.apply(Event.BEFORE_LOSS, run, logger)
    torch.testing.assert_close(run.batch[1], wanted_targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("uniform", [False, True])
def test_pictures_and_targets_are_composers_for_the_same_draws(uniform, smoothing, state, logger):
    """Its order is to mix the labels first, then to smooth the mixed targets."""
    configs = (MixUpConfig(), None), (None, CutMixConfig(uniform_sampling=uniform))
    for number, (mixed, cut) in enumerate(configs):
        run = state(nn.Conv2d(3, 1, 1), batch=number)
        run.batch, run.outputs = batch(), torch.zeros(COUNT, CLASSES)
        pictures, labels = run.batch
        mix = build(mixed, cut, smoothing)
        mixing = mix.draw(run, pictures.shape)
        if mixed:
            wanted, others, share = mixup_batch(pictures, labels, mixing.share, indices=mixing.permutation)
        else:
            top, bottom, left, right = mixing.box
            bounds = (top, left, bottom, right)
            wanted, others, kept, _ = cutmix_batch(pictures, labels, bbox=bounds, indices=mixing.permutation)
            share = 1 - kept
        assert mixing.share == pytest.approx(share)
        mix.apply(Event.BEFORE_FORWARD, run, logger)
        torch.testing.assert_close(run.batch[0], wanted)
        mix.apply(Event.BEFORE_LOSS, run, logger)
        one_hot = nn.functional.one_hot
        targets = (1 - share) * one_hot(labels, CLASSES) + share * one_hot(others, CLASSES)
        torch.testing.assert_close(run.batch[1], smooth_labels(run.outputs, targets.float(), smoothing))


@given(st.integers(0, 40), st.integers(0, 60), st.integers(1, 41), st.integers(1, 61), st.floats(0, 1, allow_nan=False))
def test_the_box_is_that_of_the_authors(y, x, height, width, share):
    first, second, third, fourth = _rand_bbox(height, width, 1 - share, cx=y, cy=x)
    assert box_around(y, x, height, width, 1 - (1 - share)) == (first, third, second, fourth)


def test_uniform_boxes_replace_each_pixel_equally_often():
    rng, counts, draws = np.random.default_rng(0), np.zeros((SIZE, SIZE)), 8000
    config = CutMixConfig(uniform_sampling=True)
    for _ in range(draws):
        top, bottom, left, right = draw_cutmix(config, rng, SHAPE).box
        counts[top:bottom, left:right] += 1
    shares = counts / draws
    # Boxes of an odd number of pixels are rounded down, at all places alike.
    assert shares.max() - shares.min() < 5 * 2 * (0.25 / draws) ** 0.5


def test_shares_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    mixed = [draw_mixup(MixUpConfig(alpha=1.0), rng, SHAPE).share for _ in range(2000)]
    assert max(mixed) <= 0.5
    assert np.mean(mixed) == pytest.approx(0.25, abs=0.02)  # min(b, 1 - b) of a uniform b
    cut = [draw_cutmix(CutMixConfig(), rng, SHAPE) for _ in range(200)]
    for one in cut:
        top, bottom, left, right = one.box
        assert one.share == (bottom - top) * (right - left) / SIZE**2
        assert sorted(one.permutation.tolist()) == list(range(COUNT))


def test_draws_depend_on_seed_batch_and_microbatch_and_repeat_in_a_second_pass(state, logger):
    def passes(number):
        run = state(nn.Conv2d(3, 1, 1), batch=number)
        mix, found = build(MixUpConfig(), CutMixConfig(), 0.0), []
        for _ in range(2):
            mix.apply(Event.BEFORE_TRAIN_BATCH, run, logger)
            for _ in range(2):
                run.batch = batch()
                mix.apply(Event.BEFORE_FORWARD, run, logger)
                found.append(run.batch[0])
        return found

    first, second, first_again, second_again = passes(3)
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)
    assert torch.equal(passes(3)[0], first)
    assert not torch.equal(passes(4)[0], first)


def test_losses_are_interpolated_instead_of_targets(state, logger):
    mix = build(MixUpConfig(interpolate_loss=True), CutMixConfig(interpolate_loss=True), 0.0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))
    kinds = set()
    for number in range(6):
        run = state(network, batch=number)
        run.batch = batch()
        labels = run.batch[1]
        mixing = mix.draw(run, SHAPE)
        kinds.add(mixing.box is None)
        mix.apply(Event.BEFORE_FORWARD, run, logger)
        assert not mix.match(Event.BEFORE_LOSS, run)
        run.outputs = run.model(run.batch)
        plain = run.loss = run.model.loss(run.outputs, run.batch)
        mix.apply(Event.BEFORE_BACKWARD, run, logger)
        other = run.model.loss(run.outputs, (run.batch[0], labels[mixing.permutation]))
        torch.testing.assert_close(run.loss, (1 - mixing.share) * plain + mixing.share * other)
    assert kinds == {True, False}


def test_a_share_of_nothing_changes_nothing():
    pictures, permutation = batch()[0], torch.arange(COUNT - 1, -1, -1)
    assert torch.equal(mixup(pictures, permutation, 0.0), pictures)
    assert torch.equal(cutmix(pictures, permutation, (3, 3, 0, SIZE)), pictures)
