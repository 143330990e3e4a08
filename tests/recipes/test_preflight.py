import os
from unittest.mock import Mock

import pytest
import torch

from data.errors import InputError
from recipes.load import load_config
from recipes.preflight import DEFAULT_KERNELS, NEW_KERNELS, kernel_problem, prepare_run
from recipes.run import open_data
from tests.support import ROOT, write_images

MEDIUM = ROOT / "yamls" / "medium.yaml"
TINY = ["data.train_size=32", "eval.sizes=[32]", "algorithms.fixres=off", "device=cpu", "device_batch_size=8"]
TINY += ["model.name=resnet18"]
LARGE = ["model.name=resnet50", "data.train_size=224", "eval.sizes=[224]", "device_batch_size=512"]
LARGE += ["algorithms.fixres={start: 0.9, size: 288}"]


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
            _, train, val, _ = prepare_run(config, world_size, lambda: open_data(config))
        except InputError as error:
            return list(error.lines)
        assert len(train) > len(val) > 0
        return []

    return lines


def test_a_sound_run_passes(lines, tmp_path):
    assert lines() == []
    assert lines("device_batch_size=null", "global_batch_size=8", "device_microbatch_size=2", world_size=2) == []
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


def test_the_layers_that_fixres_and_binary_cross_entropy_need(lines):
    plain = ["model.name=vgg11", "algorithms.blurpool=off", "algorithms.fixres={size: 32, train: classifier}"]
    assert lines(*plain) == ["algorithms.fixres.train: classifier: the model has no BatchNorm"]
    (line,) = lines("model.name=squeezenet1_1", "loss.name=binary_cross_entropy", "algorithms.blurpool=off")
    assert line == "loss.name: binary_cross_entropy: the model has no linear layer that could be its classifier"


def test_the_device_and_its_precision(lines):
    for precision in ("amp_fp16", "amp_bf16"):
        wrong = f"precision: {precision} needs a GPU, and this run is on the cpu; allowed: fp32"
        assert lines(f"precision={precision}") == [wrong]
    for device, available in {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items():
        found = lines(f"device={device}")
        assert (
            found == [] if available else found[0].startswith(f"device: {device} is not available here; available: a")
        )


def test_batches_divide_at_every_size(lines):
    sizes = ["data.train_size=64", "device_batch_size=null"]
    (line,) = lines(*sizes, "global_batch_size={32: 9, 64: 8}", world_size=2)
    assert line.startswith("global_batch_size: 9 images at 32 px are not divisible by 2 processes; allowed: a multiple")
    (line,) = lines(*sizes, "global_batch_size={32: 10, 64: 8}", "device_microbatch_size=4", world_size=2)
    assert line.startswith("device_microbatch_size: 4 does not divide the device's batch of 5 images of 32 px; allowed")
    assert lines("device_microbatch_size=16") == []


def test_data(lines, images, tmp_path):
    (line,) = lines(f"data.path={tmp_path}/nowhere")
    assert line.startswith(f"{tmp_path}/nowhere: no such folder")
    folder = write_images(tmp_path / "more")
    (folder / "val" / "classX").mkdir()
    (line,) = lines(f"data.path={folder}")
    assert "lacks: classX" in line
    few = f"model.num_classes: 2, but {images} has 3 classes; allowed: at least 3, or null"
    assert lines("model.num_classes=2") == [few]
    assert lines("model.num_classes=5") == []
    (line,) = lines("data.train_samples=25")
    assert line.startswith("data.train_samples: got 25; allowed: 1 to 24")
    train, val = lines(world_size=32)
    assert "24 training images" in train
    assert "9 validation images for 32 devices" in val


def test_models(lines):
    (line,) = lines("model.name=timm/vit_tiny_patch16_224", "algorithms.blurpool=off")
    assert line.startswith("model.name: timm/vit_tiny_patch16_224 does not accept images of 32 px: Input height (32)")


def test_memory_is_checked_at_every_stage(lines):
    found = lines(*LARGE, "device_memory_gb=50")
    needs = [line.split(" need about")[0] for line in found]
    assert needs == [f"device_batch_size: 512 images of {size} px" for size in (224, 288)]
    portions = [*LARGE, "device_memory_gb=16", "device_microbatch_size=128"]
    (line,) = lines(*portions)
    assert line.startswith("device_microbatch_size: 128 images of 288 px need about ")
    assert lines(*portions, "device_microbatch_size=64") == []
    assert lines(*portions, "algorithms.fixres.train=classifier") == []
    assert lines(*portions, "model.activation_checkpointing=true") == []


def test_what_is_automatic_gets_a_value_for_this_device(images, tmp_path):
    keys = [f"data.path={images}", f"runs_folder={tmp_path}", *TINY, "precision=auto", "device_microbatch_size=auto"]

    def chosen(*overrides):
        config = load_config(MEDIUM, [*keys, *overrides])
        ready = prepare_run(config, 1, lambda: open_data(config)).config
        assert ready.automatic == []
        return ready.precision, ready.device_microbatch_size

    assert chosen() == ("fp32", None)
    assert chosen(*LARGE, "device_memory_gb=50") == ("fp32", {128: 512, 224: 256, 288: 128})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.preflight.heads", Mock(side_effect=NotImplementedError))
        with pytest.raises(
            InputError, match="device_microbatch_size: auto: the memory of resnet18 is not known; set a n"
        ):
            chosen()


def test_folders_must_be_writable(lines, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (line,) = lines(f"runs_folder={tmp_path}/file/x", f"checkpoints.folder={tmp_path}/c")
    assert line == f"runs_folder: {tmp_path}/file/x/medium cannot be written: {tmp_path}/file: Not a directory"
    (line,) = lines("checkpoints.folder=/proc/c")
    assert line.startswith("checkpoints.folder: /proc/c cannot be written: /proc: ")
    long = tmp_path / ("long" * 100)
    (line,) = lines(f"checkpoints.folder={long}")
    assert line == f"checkpoints.folder: {long} cannot be written: {long}: File name too long"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    found = lines(f"checkpoints.folder={locked}/c")
    # Root may write anywhere.
    denied = [f"checkpoints.folder: {locked}/c cannot be written: {locked}: Permission denied"] if os.geteuid() else []
    assert found == denied
    # A bucket is no folder of this machine: the working directory, which a run need not write, is not asked.
    monkeypatch.chdir("/proc")
    assert lines("checkpoints.folder=s3://bucket/{run_name}") == []


def test_compile_needs_a_compiler(lines, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert lines("compile=true") == [
        "compile: needs g++ or clang++; install one, set CXX to another, or set compile to false"
    ]
    monkeypatch.setenv("CXX", "/opt/bin/c++")
    assert lines("compile=true") == lines() == []


def test_all_lines_come_at_once(lines):
    wrong = ["precision=amp_fp16", "data.path=/nowhere", "model.name=resnet51", "device_microbatch_size=5"]
    found = lines(*wrong, "runs_folder=/proc")
    starts = [line.split(":")[0] for line in found]
    folders = ["runs_folder", "checkpoints.folder"]
    assert starts == ["precision", "device_microbatch_size", *folders, "/nowhere", "model.name"]


def test_a_network_with_several_outputs_in_training(lines, monkeypatch):
    plain = ["algorithms.blurpool=off", "device_memory_gb=100"]
    assert lines(*plain, "model.name=googlenet") == []
    plain += ["algorithms.progressive_resizing=off", "eval.sizes=[128]"]
    (line,) = lines(*plain, "model.name=inception_v3", "data.train_size=128")
    assert line.startswith("model.name: inception_v3 does not accept images of 128 px")
    assert lines(*plain, "model.name=inception_v3", "data.train_size=299") == []
    monkeypatch.setattr("recipes.preflight.AUXILIARY_WEIGHTS", {})
    (line,) = lines(*plain, "model.name=googlenet")
    assert line == "model.name: googlenet has several outputs in training, which is not supported"


@pytest.mark.parametrize(
    ("card", "capability", "default", "new"),
    [
        ("GTX 980", (5, 2), True, False),
        ("V100", (7, 0), True, False),
        ("T4", (7, 5), True, True),
        ("A10G", (8, 6), True, True),
        ("L40S", (8, 9), True, True),
        ("H100", (9, 0), True, True),
        ("B200", (10, 0), False, True),
        ("B300", (10, 3), False, True),
        ("RTX 5090", (12, 0), False, True),
        ("K80", (3, 7), False, False),
        ("a later one", (13, 0), False, False),
    ],
)
def test_a_card_without_kernels_is_told_what_to_install(card, capability, default, new):
    for architectures, runs, other, command in (
        (DEFAULT_KERNELS, default, new, "install the other: make install TORCH=new"),
        (NEW_KERNELS, new, default, "install the other: make install"),
    ):
        line = kernel_problem(card, capability, architectures.split())
        if runs:
            assert line is None
            continue
        version = f"sm_{capability[0]}{capability[1]}"
        start = f"device: the installed torch {torch.__version__} has no kernels for {card} ({version}); "
        assert line == start + (command if other else "nor has the other of `make install`; allowed: device=cpu")


def test_which_kernels_run_on_a_card():
    assert kernel_problem("later", (13, 0), ["sm_90", "compute_90"]) is None, "PTX is compiled for any later card"
    assert kernel_problem("earlier", (8, 0), ["sm_90", "compute_90"]) is not None
    assert kernel_problem("A100", (8, 0), ["sm_86"]) is not None, "a later minor version"
    assert kernel_problem("H100", (9, 0), ["sm_90a"]) is None
    assert kernel_problem("B300", (10, 3), ["sm_100a", "compute_100a"]) is not None, "for sm_100 alone"
    assert kernel_problem("MI300X", (9, 4), ["gfx942"]) is None
    assert kernel_problem("none", (9, 0), []) is None


def test_the_kernels_are_those_of_the_locks():
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    if flags is None or os.uname().machine != "x86_64":
        pytest.skip("a torch without CUDA, or for another processor")
    assert flags in (DEFAULT_KERNELS, NEW_KERNELS)


def test_a_run_ends_on_a_card_without_kernels(lines, monkeypatch):
    answers = {"is_available": True, "device_count": 1, "get_device_capability": (13, 0), "get_device_name": "Rubin"}
    for name, answer in (answers | {"get_arch_list": ["sm_90"], "is_bf16_supported": True}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    found = lines("device=gpu", "device_memory_gb=80")
    assert [line.partition(";")[0] for line in found] == [
        f"device: the installed torch {torch.__version__} has no kernels for Rubin (sm_130)"
    ]
