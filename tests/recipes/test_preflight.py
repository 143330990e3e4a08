import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_images

from recipes.errors import InputError
from recipes.load import load_config
from recipes.preflight import planned_network, preflight, require_ready

TINY = ["data.train_size=32", "eval.sizes=[32]", "algorithms.fixres=off", "device=cpu", "device_batch_size=8"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lines(tmp_path, images):
    """`lines(*overrides, world_size=1)`: what is wrong with the recipe on the tiny images."""

    def lines(*overrides, world_size=1):
        given = [f"data.path={images}", f"runs_folder={tmp_path}", *TINY, *overrides]
        return preflight(load_config(ROOT / "yamls" / "medium.yaml", given), world_size)

    return lines


def test_a_sound_run_passes(lines):
    assert lines() == []
    assert lines("device_batch_size=null", "global_batch_size=8", "device_microbatch_size=2", world_size=2) == []


@pytest.mark.parametrize("precision", ["amp_fp16", "amp_bf16"])
def test_half_precision_needs_a_gpu(precision, lines):
    assert lines(f"precision={precision}") == [
        f"precision: {precision} needs a GPU, and this run is on the cpu; allowed: fp32"
    ]


@pytest.mark.parametrize("device", ["gpu", "mps"])
def test_a_device_must_be_there(device, lines):
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there[device]:
        assert lines(f"device={device}") == []
    else:
        (line,) = lines(f"device={device}", "precision=amp_fp16")
        assert line.startswith(f"device: {device} is not there; allowed here: auto, cpu")


def test_batches_divide_at_every_size(lines):
    assert (
        lines("device_batch_size=null", "global_batch_size={24: 9, 32: 8}", world_size=2)
        == ["global_batch_size: 9 images of 16 px do not divide by 2 processes; allowed: a multiple of 2"]
        or lines("device_batch_size=null", "global_batch_size={24: 9, 32: 8}", world_size=2) == []
    )
    (line,) = lines("device_batch_size=null", "global_batch_size={32: 9}", world_size=2)
    assert line == "global_batch_size: 9 images of 32 px do not divide by 2 processes; allowed: a multiple of 2"
    (line,) = lines("device_microbatch_size=3")
    assert line == (
        "device_microbatch_size: 3 does not divide the device's batch of 8 images of 32 px; allowed: a divisor of 8"
    )
    assert lines("device_microbatch_size=16") == []


def test_data_that_is_not_there(lines, tmp_path, images):
    (line,) = lines(f"data.path={tmp_path}/nowhere")
    assert line.startswith(f"{tmp_path}/nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    (line,) = lines(f"data.path={tmp_path}/empty")
    assert line.startswith(f"{tmp_path}/empty/train: no such folder")
    folder = write_images(tmp_path / "more")
    (folder / "val" / "classX").mkdir()
    (line,) = lines(f"data.path={folder}")
    assert "class folder classX is not in" in line


def test_classes_and_samples(lines, images):
    assert lines("model.num_classes=2") == [
        f"model.num_classes: 2, but {images}/train has 3 class folders; allowed: at least 3, or null"
    ]
    assert lines("model.num_classes=5") == []
    assert lines("data.train_samples=25") == [
        f"data.train_samples: 25, but {images}/train has 24 images; allowed: at most those"
    ]
    train, val = lines(world_size=32)
    assert "24 training images" in train
    assert "9 validation images for 32 devices" in val


def test_models(lines):
    (line,) = lines("model.name=resnet51")
    assert line.startswith("model.name: 'resnet51' is no classifier of torchvision")
    (line,) = lines("model.name=timm/vit_tiny_patch16_224", "algorithms.blurpool=off")
    assert line.startswith("model.name: timm/vit_tiny_patch16_224 takes no images of 32 px: Input height (32)")


def test_memory_is_checked_at_every_stage(lines):
    found = lines(
        "data.train_size=224",
        "eval.sizes=[224]",
        "algorithms.fixres={start: 0.9, size: 288}",
        "device_batch_size=512",
        "device_memory_gb=60",
    )
    assert [line.split(" need about")[0] for line in found] == ["device_batch_size: 512 images of 288 px"] or [
        line.split(" need about")[0] for line in found
    ] == ["device_batch_size: 512 images of 224 px", "device_batch_size: 512 images of 288 px"]
    portions = ["device_microbatch_size=64", "device_memory_gb=16"]
    sizes = [
        "data.train_size=224",
        "eval.sizes=[224]",
        "algorithms.fixres={start: 0.9, size: 288}",
        "device_batch_size=512",
    ]
    assert lines(*sizes, *portions) == []
    (line,) = lines(*sizes, "device_microbatch_size=128", "device_memory_gb=16")
    assert line.startswith("device_microbatch_size: 128 images of 288 px need about ")
    assert (
        lines(*sizes, "device_microbatch_size=128", "device_memory_gb=16", "algorithms.fixres.train=classifier") == []
    )
    assert (
        lines(*sizes, "device_microbatch_size=128", "device_memory_gb=16", "model.activation_checkpointing=true") == []
    )


def test_folders_must_be_writable(lines, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = lines(f"runs_folder={tmp_path}/file/x", f"checkpoints.folder={tmp_path}/c")
    assert line == f"runs_folder: {tmp_path}/file/x/medium cannot be written: {tmp_path}/file: Not a directory"
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    found = lines(f"checkpoints.folder={locked}/c")
    if os.geteuid():  # root may write anywhere
        assert found == [f"checkpoints.folder: {locked}/c cannot be written: {locked}: Permission denied"]
    assert list(locked.iterdir()) == []
    (line,) = lines("checkpoints.folder=/proc/c")
    assert line.startswith("checkpoints.folder: /proc/c cannot be written: /proc: ")


def test_optional_loggers_must_be_installed(lines):
    import importlib.util

    missing = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
    assert missing  # neither is among our dependencies
    found = lines(*(f"loggers.{name}=on" for name in missing))
    assert found == [
        f"loggers.{name}: the package is not installed; pip install {name}, or set loggers.{name}=off"
        for name in missing
    ]


def test_what_composer_refuses_is_found(lines):
    found = lines("algorithms.composer.CutOut={num_holes: 1, length: -1.0}")
    assert found == [] or found[0].startswith("algorithms.composer.CutOut: ")


def test_all_lines_come_at_once(tmp_path):
    given = ["device=cpu", "precision=amp_fp16", "data.path=/nowhere", "model.name=resnet51", "loggers.wandb=on"]
    config = load_config(
        ROOT / "yamls" / "medium.yaml", [*given, f"runs_folder={tmp_path}", "device_microbatch_size=5"]
    )
    with pytest.raises(InputError) as caught:
        require_ready(config, 1)
    starts = [line.split(":")[0] for line in caught.value.lines]
    assert starts == ["precision", *["device_microbatch_size"] * 3, "loggers.wandb", "/nowhere", "model.name"]


def test_the_planned_network_has_had_its_surgery():
    config = load_config(ROOT / "yamls" / "medium.yaml", ["algorithms.squeeze_excite=on"])
    names = {type(module).__name__ for module in planned_network(config, 10).modules()}
    assert {"BlurConv2d", "SqueezeExciteConv2d"} <= names
    assert Path.cwd()
