"""Every recipe that we ship trains, can be interrupted in the middle of an epoch, and ends with the same weights."""

import shutil

import pytest

from recipes.load import load_config
from recipes.resolved import config_digest
from tests.support import ROOT

YAMLS = sorted((ROOT / "yamls").rglob("*.yaml"))


def small(path):
    """Overrides that keep what a YAML says, and make images, batches and duration tiny."""
    config = load_config(path)
    overrides = [
        "device=cpu",
        "precision=fp32",
        "max_duration=3ep",
        "global_batch_size=null",
        "device_batch_size=8",
        "device_microbatch_size=null",
        "data.train_size=32",
        "data.workers=0",
        "eval.sizes=[32]",
        "eval.device_batch_size=8",
        "checkpoints.interval=5ba",
        "checkpoints.keep=100",
        "loggers.progress_bar=false",
    ]
    overrides += ["model.weights=null"] if config.model.weights else []  # those of another network, to be downloaded
    overrides += ["model.name=timm/test_resnet"] if config.model.name == "resnet50" else []
    return overrides + (["algorithms.fixres.size=40"] if config.algorithms.fixres else [])


RECIPES = {config_digest(load_config(path, small(path))): path for path in YAMLS}
"""One YAML of each recipe: a profile differs from its recipe in what `small` sets."""


def test_there_are_recipes_to_test():
    assert {path.stem for path in RECIPES.values()} >= {"demo", "cifar10", "p3", "mosaic-medium", "fixres", "finetune"}


@pytest.mark.parametrize("path", RECIPES.values(), ids=lambda path: path.stem)
def test_a_recipe_trains_saves_resumes_and_ends_with_the_same_weights(path, train, tmp_path):
    status, whole = train(path, *small(path), "run_name=whole")
    assert (status, whole["finished"], whole["batches"], whole["samples"]) == (0, True, 9, 72)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    kept = part / "checkpoints" / "ep001-ba000005.safetensors"
    assert kept.exists()
    for file in (part / "checkpoints").iterdir():
        if file.stem != kept.stem:
            file.unlink()
    shutil.rmtree(part / "tensorboard", ignore_errors=True)
    status, resumed = train(path, *small(path), "run_name=part", f"resume={kept}")
    assert status == 0
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["eval_by_size"] == whole["eval_by_size"]
    assert kept.stem in resumed["resumed_from"][0]
