"""The recipes of others are what their authors published: rates, sizes, augmentation, loss and optimizer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.core import Time, Timestamp
from composer.optim import CosineAnnealingWithWarmupScheduler
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import StepLR

from recipes.load import load_config
from recipes.model import build_classifier
from recipes.optimizer import build_optimizer, exempt_norms_and_biases
from recipes.plan import network_size, schedule_of
from recipes.schedule import epoch_plan
from tests.support import ROOT

IMAGES = 1_281_167


def load(name, *overrides):
    return load_config(ROOT / "yamls" / f"{name}.yaml", overrides)


def rates_of(config):
    """(learning rate, momentum) at the beginning of each epoch."""
    _, rate_at = schedule_of(config, epoch_plan(config, 8), IMAGES)
    return [rate_at(epoch, 0) for epoch in range(config.epochs)]


def timm_rates(lr):
    def rates(epochs):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4)
        return [scheduler.step(epoch) or optimizer.param_groups[0]["lr"] for epoch in range(epochs)]

    return rates


def torchvision_rates(epochs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rates = StepLR(optimizer, step_size=30, gamma=0.1), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ffcv_rates(epochs):
    return [1.7 * np.interp(epoch, [0, 2, epochs], [1e-4, 1, 0]) for epoch in range(epochs)]


def mosaic_rates(epochs):
    scheduler = CosineAnnealingWithWarmupScheduler(t_warmup="8ep", alpha_f=0.0)

    def at(epoch):
        state = SimpleNamespace(
            max_duration=Time.from_timestring(f"{epochs}ep"),
            dataloader_len=Time.from_timestring("625ba"),
            timestamp=Timestamp(epoch=epoch, batch=epoch * 625),
            get_elapsed_duration=lambda: Time.from_timestring(f"{epoch / epochs}dur"),
        )
        return 2.048 * scheduler(state)

    return [at(epoch) for epoch in range(epochs)]


SGD = {"name": "sgd", "lr": 1.7, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_norm_and_bias": False}
DECOUPLED = {"name": "decoupled_sgdw", "lr": 2.048, "momentum": 0.875, "nesterov": False, "weight_decay": 5e-4}
DECOUPLED |= {"decay_norm_and_bias": True}
LAMB = {"name": "timm/lamb", "lr": 5e-3, "weight_decay": 0.02, "decay_norm_and_bias": False}
CROSS = {"name": "cross_entropy", "mean_over_classes": False, "target_threshold": None}
BINARY = CROSS | {"name": "binary_cross_entropy"}
BLURPOOL = {"replace_convs": True, "replace_maxpools": True, "blur_first": True, "min_channels": 16}
MOSAIC = {
    "blurpool": BLURPOOL,
    "channels_last": {},
    "progressive_resizing": {"where": "batch", "initial_scale": 0.5, "delay_fraction": 0.4, "finetune_fraction": 0.2},
    "label_smoothing": {"smoothing": 0.1},
    "mixup": {"alpha": 0.2, "interpolate_loss": False},
    "ema": {"half_life": "100ba", "update_interval": "20ba"},
    "sam": {"rho": 0.5, "epsilon": 1e-12, "interval": 10},
}
DEPTH = {"stochastic_method": "sample", "drop_distribution": "linear", "target_layer_name": "ResNetBottleneck"}
TIMM = {
    "channels_last": {},
    "stochastic_depth": DEPTH | {"drop_rate": 0.05},
    "randaugment": {"timm": "rand-m7-mstd0.5-inc1"},
    "mixup": {"alpha": 0.1},
    "cutmix": {"alpha": 1.0, "switch_prob": 0.5},
}


def without(techniques, *names):
    return {name: fields for name, fields in techniques.items() if name not in names}


PUBLISHED = {
    # pytorch/vision, references/classification/train.py: its defaults on 8 GPUs
    "torchvision-v1": {
        "epochs": 90,
        "images": 8 * 32,
        "rates": torchvision_rates,
        "optimizer": SGD | {"lr": 0.1, "decay_norm_and_bias": True},
        "loss": CROSS,
        "techniques": {},
        "repeats": 1,
        "train": (224, 224),
        "eval": ([224], 256),
    },
    # libffcv/ffcv-imagenet, rn50_configs/rn50_88_epochs.yaml
    "ffcv": {
        "epochs": 88,
        "images": 8 * 512,
        "rates": ffcv_rates,
        "optimizer": SGD,
        "loss": CROSS,
        "techniques": {
            "blurpool": BLURPOOL | {"replace_maxpools": False},
            "channels_last": {},
            "progressive_resizing": {"where": "loader"},
            "label_smoothing": {"smoothing": 0.1},
        },
        "repeats": 1,
        "train": (160, 192),
        "eval": ([256], 292),
    },
    # mosaicml/examples, blogs/resnet/recipes
    "mosaic-mild": {
        "epochs": 36,
        "images": 2048,
        "rates": mosaic_rates,
        "optimizer": DECOUPLED,
        "loss": BINARY,
        "techniques": without(MOSAIC, "mixup", "sam") | {"label_smoothing": {"smoothing": 0.08}},
        "repeats": 1,
        "train": (88, 176),
        "eval": ([224], 232),
    },
    "mosaic-medium": {
        "epochs": 90,
        "images": 2048,
        "rates": mosaic_rates,
        "optimizer": DECOUPLED,
        "loss": BINARY,
        "techniques": MOSAIC,
        "repeats": 1,
        "train": (88, 176),
        "eval": ([224], 232),
    },
    "mosaic-hot": {
        "epochs": 270,
        "images": 2048,
        "rates": mosaic_rates,
        "optimizer": DECOUPLED | {"weight_decay": 3e-4},
        "loss": BINARY,
        "techniques": MOSAIC
        | {
            "progressive_resizing": {"initial_scale": 0.6, "delay_fraction": 0.2, "finetune_fraction": 0.2},
            "label_smoothing": {"smoothing": 0.13},
            "mixup": {"alpha": 0.25},
            "sam": {"rho": 0.5, "interval": 5},
            "colout": {"p_row": 0.05, "p_col": 0.05, "batch": True},
            "randaugment": {"depth": 1, "severity": 10, "augmentation_set": "all", "timm": None},
            "stochastic_depth": DEPTH | {"drop_rate": 0.1, "drop_warmup": 0.0},
        },
        "repeats": 1,
        "train": (104, 176),
        "eval": ([224], 232),
    },
    # Wightman et al. 2021, table 2
    "timm-a1": {
        "epochs": 600,
        "images": 2048,
        "rates": timm_rates(5e-3),
        "optimizer": LAMB | {"weight_decay": 0.01},
        "loss": BINARY | {"mean_over_classes": True},
        "techniques": TIMM | {"mixup": {"alpha": 0.2}, "label_smoothing": {"smoothing": 0.1}},
        "repeats": 3,
        "train": (224, 224),
        "eval": ([224], 235),
    },
    "timm-a2": {
        "epochs": 300,
        "images": 2048,
        "rates": timm_rates(5e-3),
        "optimizer": LAMB,
        "loss": BINARY | {"mean_over_classes": True, "target_threshold": 0.2},
        "techniques": TIMM,
        "repeats": 3,
        "train": (224, 224),
        "eval": ([224], 235),
    },
    "timm-a3": {
        "epochs": 100,
        "images": 2048,
        "rates": timm_rates(8e-3),
        "optimizer": LAMB | {"lr": 8e-3},
        "loss": BINARY | {"mean_over_classes": True, "target_threshold": 0.2},
        "techniques": without(TIMM, "stochastic_depth") | {"randaugment": {"timm": "rand-m6-mstd0.5-inc1"}},
        "repeats": 1,
        "train": (160, 160),
        "eval": ([224], 235),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_what_was_published(name):
    config, published = load(name), PUBLISHED[name]
    plan = epoch_plan(config, 8)
    assert (config.model.name, config.epochs) == ("resnet50", published["epochs"])
    assert {entry.global_batch_size for entry in plan} == {published["images"]}
    trained = [network_size(config, epoch, entry.size) for epoch, entry in enumerate(plan)]
    assert (trained[0], trained[-1]) == (min(trained), max(trained)) == published["train"]
    sizes, resized = published["eval"]
    assert (list(config.eval.sizes), int(sizes[0] / config.eval.crop_ratio + 1e-9)) == (sizes, resized)
    assert config.loss.model_dump() == published["loss"]
    assert config.optimizer.model_dump().items() >= published["optimizer"].items()
    augment = config.data.augment
    assert (augment.area, augment.flip, augment.color_jitter, augment.random_erasing) == ((0.08, 1.0), 0.5, None, None)
    assert augment.repeats == published["repeats"]
    techniques = config.algorithms.model_dump(exclude_none=True, exclude={"composer"})
    assert techniques.keys() == published["techniques"].keys()
    for technique, fields in published["techniques"].items():
        assert config.algorithms.model_dump()[technique].items() >= fields.items(), technique


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_rates_are_those_of_the_published_schedule(name):
    config, published = load(name), PUBLISHED[name]
    expected = published["rates"](config.epochs)
    # One-Cycle reaches its peak a step before the epoch ends, as torch's does: a third of a per cent.
    found = [rate.lr for rate in rates_of(config)]
    assert found == pytest.approx(expected, rel=4e-3, abs=1e-4 * max(expected))
    assert max(found) == pytest.approx(max(expected), rel=4e-3)


@pytest.mark.parametrize(
    ("epochs", "begin", "end", "earlier"),
    [
        (16, 11, 13, True),
        (24, 17, 20, True),
        (32, 23, 27, True),
        (40, 29, 34, False),
        (56, 41, 48, False),
        (88, 65, 76, False),
    ],
)
def test_ffcvs_other_lengths_are_overrides(epochs, begin, end, earlier):
    resizing = "algorithms.progressive_resizing"
    words = [f"max_duration={epochs}ep", f"scheduler.warmup={2 / epochs}"]
    words += [f"{resizing}.delay_fraction=0.78", f"{resizing}.finetune_fraction=0.22"] if earlier else []
    config = load("ffcv", *words)
    # train_imagenet.py, get_resolution
    sizes = np.interp(np.arange(epochs), [begin, end], [160, 192])
    expected = (np.round(sizes / 32) * 32).astype(int).tolist()
    assert [entry.size for entry in epoch_plan(config, 8)] == expected
    rates = rates_of(config)
    assert [rate.lr for rate in rates] == pytest.approx(ffcv_rates(epochs), rel=4e-3, abs=2e-4)
    assert {rate.momentum for rate in rates} == {0.9}


def test_a3s_first_steps_are_those_of_a_hand_written_loop():
    """timm's own parts: loss, optimizer with groups, and rates; images, labels and weights are the same."""
    config = load("timm-a3", "model.name=timm/test_resnet", "device_batch_size=null")
    torch.manual_seed(1)
    ours = build_classifier(config, 10, "cpu").train()
    theirs = build_classifier(config, 10, "cpu").train()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(config.optimizer, ours.parameters(), config.optimizer.lr)
    exempt_norms_and_biases(optimizer)
    original = create_optimizer_v2(theirs.module, "lamb", lr=8e-3, weight_decay=0.02)
    loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2)
    for step in range(4):
        images, targets = torch.randn(8, 3, 32, 32), torch.softmax(4 * torch.randn(8, 10), 1)
        for group in optimizer.param_groups:
            group["lr"] = rates_of(config)[step].lr
        for group in original.param_groups:
            group["lr"] = timm_rates(8e-3)(100)[step]
        for model, chosen, criterion in ((ours, optimizer, None), (theirs, original, loss)):
            chosen.zero_grad()
            logits = model((images, targets))
            (model.loss(logits, (images, targets)) if criterion is None else criterion(logits, targets)).backward()
            chosen.step()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_published_figure_names_its_source():
    for name in PUBLISHED:
        lines = (ROOT / "yamls" / f"{name}.yaml").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("# Published: "))
        assert "% top-1" in line
        assert line.endswith(")")
