import re

import pytest
import torch
from torch import nn

from data.config import EpochPlan
from recipes.config import RunConfig
from recipes.load import load_config
from recipes.memory import activation_memory, check_memory, step_memory, with_microbatches
from recipes.model import build_network, planned_network
from recipes.preflight import chosen_precision
from recipes.schedule import epoch_plan
from tests.support import ROOT

V100, A10G, RTX3090, A100 = 15.78 * 2**30, 22.2 * 2**30, 23.70 * 2**30, 79.1 * 2**30
HALF = {"run_name": "a", "data": {"path": "x"}, "device_batch_size": 8, "precision": "amp_fp16"}
CLASSIFIER = {"algorithms": {"fixres": {"train": "classifier"}}}


def on_meta(name, classes=1000):
    with torch.device("meta"):
        return build_network(name, classes)


def problems(network, stages, device_bytes, processes=1, crop="random", **changes):
    """What is wrong with stages of (size, images per device) on one device."""
    plan = [EpochPlan(size, crop, images * processes) for size, images in stages]
    return check_memory(network, RunConfig.model_validate(HALF | changes), processes, plan, device_bytes)


def fits(network, size, images, device_bytes, **changes):
    return not problems(network, [(size, images)], device_bytes, **changes)


# pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: train_batch_size is the first of 512,
# 384, 256, 192, ... that did not run out of memory.
TIMM = {"resnet50": (512, None), "resnet50d": (384, 512), "seresnet50": (384, 512), "resnet101": (256, 384)}
TIMM["resnet152"] = (192, 256)


@pytest.mark.parametrize(("name", "found"), TIMM.items())
def test_what_fits_an_rtx_3090_in_timms_benchmark(name, found):
    network, (most, too_many) = on_meta(f"timm/{name}"), found
    assert fits(network, 224, most, RTX3090)
    assert too_many is None or not fits(network, 224, too_many, RTX3090)


def test_what_nvidia_trains_on_a_v100():
    # DeepLearningExamples, resnet50v1.5/training/{AMP,FP32}/DGX1_RN50_*_90E.sh: -b 256 --amp, -b 128.
    network = on_meta("resnet50")
    assert fits(network, 224, 256, V100, processes=8)
    assert fits(network, 224, 128, V100, processes=8, precision="fp32")
    assert not fits(network, 224, 256, V100, processes=8, precision="fp32")


@pytest.mark.parametrize(
    ("profile", "processes", "memory"),
    [
        *[("p3", 8, V100), ("g5", 4, A10G), ("mosaic-medium", 8, V100), ("a100", 8, A100), ("h100", 8, A100)],
        ("tiny-imagenet", 1, 8e9),
    ],
)
def test_the_profiles_fit_their_devices_with_room_to_spare(profile, processes, memory):
    config = load_config(ROOT / "yamls" / f"{profile}.yaml")
    network = planned_network(config, 1000)
    assert check_memory(network, config, processes, epoch_plan(config, processes), 0.9 * memory) == []


# What yamls/gpu.yaml says of these cards.
TAKEN = {8: (256, 64, 32), 12: (384, 128, 64), 16: (384, 128, 128), 24: (768, 256, 128), 32: (768, 256, 256)}


@pytest.mark.parametrize(("gigabytes", "images"), TAKEN.items())
def test_auto_takes_the_largest_microbatches_that_fit(gigabytes, images):
    config = load_config(ROOT / "yamls" / "gpu.yaml")
    network, plan, memory = planned_network(config, 1000), epoch_plan(config, 1), gigabytes * 1e9
    taken = with_microbatches(config, network, 1, plan, memory)
    assert taken.device_microbatch_size == dict(zip((128, 224, 288), images, strict=True))
    assert with_microbatches(config, network, 1, plan, memory) == taken
    assert check_memory(network, taken, 1, plan, 0.9 * memory) == []
    for entry in set(plan):
        own = taken.device_microbatch_size[entry.size]
        fixed, per_image = step_memory(network, config, 1, entry.size)
        assert entry.global_batch_size % own == 0
        larger = (
            count for count in range(own + 1, entry.global_batch_size + 1) if entry.global_batch_size % count == 0
        )
        assert all(fixed + count * per_image > 0.9 * memory for count in larger)


def test_auto_where_the_memory_is_unknown_or_too_small():
    network, plan = on_meta("resnet50"), [EpochPlan(224, "random", 8)]
    config = RunConfig.model_validate(HALF | {"device_microbatch_size": "auto"})
    assert with_microbatches(config, network, 1, plan, None).device_microbatch_size is None
    taken = with_microbatches(config, network, 1, plan, 1e8)
    assert taken.device_microbatch_size == {224: 1}
    (line,) = check_memory(network, taken, 1, plan, 1e8)
    assert line.startswith("device_microbatch_size: 1 images of 224 px need about 1.")
    # The stage that needs more decides, where two have one size.
    both = [EpochPlan(224, crop, 256) for crop in ("center", "random")]
    config = RunConfig.model_validate(HALF | CLASSIFIER | {"device_microbatch_size": "auto"})
    found = [
        with_microbatches(config, network, 1, plan, 1e10).device_microbatch_size for plan in (both[:1], both, both[1:])
    ]
    assert found == [{224: 256}, {224: 128}, {224: 128}]


def test_auto_precision():
    assert [chosen_precision("gpu", bf16) for bf16 in (True, False)] == ["amp_bf16", "amp_fp16"]
    assert [chosen_precision(device, False) for device in ("cpu", "mps")] == ["fp32", "fp32"]


def test_a_line_says_how_many_fit():
    network = on_meta("resnet50")
    stages = [(288, 512), (32, 8), (288, 512)]
    (line,) = problems(network, stages, V100, device_batch_size=None, global_batch_size=8)
    pattern = r"(.*) about ([0-9.]+) GB, the device has 16.9 GB; at most (\d+) fit"
    start, needed, most = re.fullmatch(pattern, line).groups()
    assert start == "global_batch_size: 512 images of 288 px need"
    assert float(needed) == pytest.approx(512 * 72.3e-3 * 1.06 + 2, rel=0.02)
    assert (fits(network, 288, int(most), V100), fits(network, 288, int(most) + 1, V100)) == (True, False)
    (line,) = problems(network, [(32, 1)], 1e8)
    assert line.endswith("at most 0 fit")


def bytes_kept(network, images):
    """What autograd really keeps on the CPU, by unique storages, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(images)
        nn.functional.cross_entropy(logits, torch.zeros_like(logits))
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


@pytest.mark.parametrize(("name", "blurpool"), [("resnet18", False), ("resnet50", True)])
def test_the_meta_device_keeps_what_the_cpu_keeps(name, blurpool):
    from composer.algorithms.blurpool import apply_blurpool

    meta, real = on_meta(name, 10), build_network(name, 10)
    if blurpool:
        apply_blurpool(real)
        with torch.device("meta"):
            apply_blurpool(meta)
    found = activation_memory(meta, 64, half=False, frozen=False, checkpointing=False)
    assert bytes_kept(real, torch.randn(6, 3, 64, 64)) == pytest.approx(found.fixed + 6 * found.per_image, rel=0.01)


def test_a_frozen_stage_needs_little():
    network = on_meta("resnet50")
    assert not fits(network, 288, 512, V100)
    assert fits(network, 288, 512, V100, crop="center", **CLASSIFIER)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert next(network.parameters()).dtype == torch.float32
