import os

import pytest
import torch

from recipes.errors import InputError
from recipes.load import load_config
from recipes.preflight import require_ready
from recipes.run import open_data
from tests.support import ROOT, write_images

MEDIUM = ROOT / "yamls" / "medium.yaml"
TINY = ["data.train_size=32", "eval.sizes=[32]", "algorithms.fixres=off", "device=cpu", "device_batch_size=8"]
TINY += ["model.name=resnet18"]
LARGE = [
    "model.name=resnet50",
    "data.train_size=224",
    "eval.sizes=[224]",
    "algorithms.fixres={start: 0.9, size: 288}",
    "device_batch_size=512",
]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lines(tmp_path, images):
    """`lines(*overrides, world_size=1)`: what is wrong with the recipe on the tiny images."""

    def lines(*overrides, world_size=1):
        config = load_config(MEDIUM, [f"data.path={images}", f"runs_folder={tmp_path}", *TINY, *overrides])
        try:
            train, val, _ = require_ready(config, world_size, lambda: open_data(config))
        except InputError as error:
            return list(error.lines)
        assert len(train) > len(val) > 0
        return []

    return lines


def test_a_sound_run_passes(lines, tmp_path):
    assert lines() == []
    assert lines("device_batch_size=null", "global_batch_size=8", "device_microbatch_size=2", world_size=2) == []
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


@pytest.mark.parametrize("precision", ["amp_fp16", "amp_bf16"])
def test_half_precision_needs_a_gpu(precision, lines):
    assert lines(f"precision={precision}") == [
        f"precision: {precision} needs a GPU, and this run is on the cpu; allowed: fp32"
    ]


def test_the_layers_that_fixres_and_binary_cross_entropy_need(lines):
    plain = ["model.name=vgg11", "algorithms.blurpool=off", "algorithms.fixres={size: 32, train: classifier}"]
    assert lines(*plain) == ["algorithms.fixres.train: classifier: the model has no BatchNorm"]
    assert lines("model.name=squeezenet1_1", "loss.name=binary_cross_entropy", "algorithms.blurpool=off") == [
        "loss.name: binary_cross_entropy: the model has no linear layer that could be its classifier"
    ]


@pytest.mark.parametrize("device", ["gpu", "mps"])
def test_a_device_must_be_available(device, lines):
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = lines(f"device={device}")
    if available[device]:
        assert found == []
    else:
        (line,) = found
        assert line.startswith(f"device: {device} is not available here; available: auto, cpu")


def test_batches_divide_at_every_size(lines):
    sizes = ["data.train_size=64", "device_batch_size=null"]
    assert lines(*sizes, "global_batch_size={32: 9, 64: 8}", world_size=2) == [
        "global_batch_size: 9 images at 32 px are not divisible by 2 processes; allowed: a multiple of 2"
    ]
    assert lines(*sizes, "global_batch_size={32: 10, 64: 8}", "device_microbatch_size=4", world_size=2) == [
        "device_microbatch_size: 4 does not divide the device's batch of 5 images of 32 px; allowed: a divisor of 5"
    ]
    assert lines("device_microbatch_size=16") == []


def test_data_that_is_missing(lines, tmp_path):
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
        f"model.num_classes: 2, but {images} has 3 classes; allowed: at least 3, or null"
    ]
    assert lines("model.num_classes=5") == []
    (line,) = lines("data.train_samples=25")
    assert line.startswith("data.train_samples: got 25; allowed: 1 to 24")
    train, val = lines(world_size=32)
    assert "24 training images" in train
    assert "9 validation images for 32 devices" in val


def test_models(lines):
    (line,) = lines("model.name=resnet51")
    assert line.startswith("model.name: 'resnet51' is not a classifier of torchvision")
    (line,) = lines("model.name=timm/vit_tiny_patch16_224", "algorithms.blurpool=off")
    assert line.startswith("model.name: timm/vit_tiny_patch16_224 does not accept images of 32 px: Input height (32)")


def test_memory_is_checked_at_every_stage(lines):
    found = lines(*LARGE, "device_memory_gb=50")
    assert [line.split(" need about")[0] for line in found] == [
        f"device_batch_size: 512 images of {size} px" for size in (224, 288)
    ]
    portions = [*LARGE, "device_memory_gb=16", "device_microbatch_size=128"]
    (line,) = lines(*portions)
    assert line.startswith("device_microbatch_size: 128 images of 288 px need about ")
    assert lines(*portions, "device_microbatch_size=64") == []
    assert lines(*portions, "algorithms.fixres.train=classifier") == []
    assert lines(*portions, "model.activation_checkpointing=true") == []


def test_folders_must_be_writable(lines, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = lines(f"runs_folder={tmp_path}/file/x", f"checkpoints.folder={tmp_path}/c")
    assert line == f"runs_folder: {tmp_path}/file/x/medium cannot be written: {tmp_path}/file: Not a directory"
    (line,) = lines("checkpoints.folder=/proc/c")
    assert line.startswith("checkpoints.folder: /proc/c cannot be written: /proc: ")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    found = lines(f"checkpoints.folder={locked}/c")
    # Root may write anywhere.
    denied = [f"checkpoints.folder: {locked}/c cannot be written: {locked}: Permission denied"] if os.geteuid() else []
    assert found == denied


def test_all_lines_come_at_once(lines):
    found = lines(
        "precision=amp_fp16",
        "data.path=/nowhere",
        "model.name=resnet51",
        "device_microbatch_size=5",
        "runs_folder=/proc",
    )
    starts = [line.split(":")[0] for line in found]
    folders = ["runs_folder", "checkpoints.folder"]
    assert starts == ["precision", "device_microbatch_size", *folders, "/nowhere", "model.name"]


def test_a_network_with_several_outputs_in_training(lines, monkeypatch):
    plain = ["algorithms.blurpool=off", "device_memory_gb=100"]
    assert lines(*plain, "model.name=googlenet") == []
    small = lines(*plain, "model.name=inception_v3", "data.train_size=128", "eval.sizes=[128]")
    assert small[-1].startswith("model.name: inception_v3 does not accept images of 128 px")
    whole = ["data.train_size=299", "algorithms.progressive_resizing=off"]
    assert lines(*plain, *whole, "model.name=inception_v3", "eval.sizes=[128]") == []
    monkeypatch.setattr("recipes.preflight.AUXILIARY_WEIGHTS", {})
    assert lines(*plain, "model.name=googlenet") == [
        "model.name: googlenet has several outputs in training, which is not supported"
    ]
