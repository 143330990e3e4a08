"""What only the network itself can tell, its FLOPs by image size and its memory; imports torch and Composer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.epoch_plan import EpochPlan
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.plan.compute import REFERENCE_SIZE, Stage, Work
from recipes.preflight import pass_images, step_memory


def flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of a forward pass over one image: convolutions and matrix products, as torch counts.

    Args:
        network: On the meta device; maps (N, 3, size, size) to logits.
        size: Side of the image in pixels.

    Raises:
        InputError: The network takes no images of this size.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            network.eval()(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.name: the network takes no images of {size} px: {reason}") from None
    return counter.get_total_flops()


def work_of(network: nn.Module) -> Work:
    """Compute by image size, as FLOPs of the network over those at 224 px."""
    reference = flops(network, REFERENCE_SIZE)
    return cache(lambda size: flops(network, size) / reference)


def memory_gb(network: nn.Module, config: RunConfig, stages: Sequence[Stage], devices: int) -> dict[Stage, float]:
    """Memory that one device needs in each stage, in GB (1e9 bytes); see recipes/preflight.py.

    Args:
        network: On the meta device, after surgery.
        config: The run.
        stages: The run's.
        devices: Processes of the run.
    """
    found = {}
    for stage in stages:
        images = pass_images(config, EpochPlan(stage.loader_size, stage.crop, stage.global_batch_size), devices)
        fixed, per_image = step_memory(network, config, devices, stage.size, stage.crop == "center")
        found[stage] = (fixed + per_image * images) / 1e9
    return found
