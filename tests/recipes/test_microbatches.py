"""A step in portions: the gradients of the whole step, in the memory of a portion."""

import json

import pytest
import torch

from recipes import trainer
from recipes.trainer import split
from tests.support import ROOT

# Without BatchNorm, whose statistics are a portion's, and without what draws at random for each portion.
OVERRIDES = [
    "model.name=timm/test_nfnet",
    "max_duration=2ep",
    "data.workers=0",
    "loggers.tensorboard=off",
    "loggers.interval=1",
    *(f"algorithms.{name}=off" for name in ("mixup", "cutmix", "blurpool", "ema")),
]


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_portions_by_size_add_up_to_the_whole_step(train, tmp_path, monkeypatch):
    largest = {}

    def noted(batch, images):
        parts = split(batch, images)
        if torch.is_grad_enabled():  # not in an evaluation
            size = batch[0].shape[-1]
            largest[size] = max(largest.get(size, 0), *(len(part[0]) for part in parts))
        return parts

    monkeypatch.setattr(trainer, "split", noted)
    whole, _ = train(ROOT / "yamls" / "demo.yaml", *OVERRIDES, "run_name=whole")
    assert set(largest.values()) == {24}
    largest.clear()
    portions = "device_microbatch_size={32: 8, 36: 4}"
    parted, _ = train(ROOT / "yamls" / "demo.yaml", *OVERRIDES, "run_name=parted", portions)
    assert largest == {32: 8, 36: 4}
    assert (whole, parted) == (0, 0)
    assert losses(tmp_path / "parted") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
