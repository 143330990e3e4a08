"""The memory that a training step needs on a device, computed before anything is trained.

The network runs on torch's meta device, which computes shapes without values, and every tensor that autograd keeps for
the backward pass is counted. In mixed precision the network is cast to half for the count: for convolutions, BatchNorm
and ReLU, autocast keeps the same tensors in the same types, and its half-precision copies of the weights are added.
Networks with LayerNorm or softmax keep some tensors in FP32, and need more than is computed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from algorithms.fixres import freeze, hold_statistics
from data.config import EpochPlan
from recipes.config import RunConfig, at_size
from recipes.model import heads, residual_blocks
from recipes.optimizer import state_copies
from recipes.trainer import device_name

CONTEXT_BYTES = 0.7e9  # CUDA's context and the handles of cuDNN and cuBLAS
NCCL_BYTES = 0.4e9  # NCCL's buffers, where several processes train; an assumption, not a measurement
OVERHEAD = 1.06
"""Bytes allocated per byte of activations: gradients in the backward pass, cuDNN's workspace, fragmentation.

With CONTEXT_BYTES it predicts which batches fit an RTX 3090 (23.70 GiB) in timm's AMP training benchmark, which tries
512, 384, 256, 192, ... (pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv): resnet50,
which fits at 512, shows that it is at most 1.075; resnetaa50, which does not, that it is above 1.05. It agrees with
NVIDIA's ResNet-50 v1.5 on a V100-16GB (DeepLearningExamples). VGG, whose first layers are its largest, needs 5 % more.
"""


class Memory(NamedTuple):
    """Peak bytes that one device needs: `fixed + per_image * images`."""

    fixed: float
    per_image: float


def device_bytes(config: RunConfig) -> float | None:
    """Memory of one device, from the config or from the GPU; None if neither gives it."""
    if config.device_memory_gb is not None:
        return config.device_memory_gb * 1e9
    if device_name(config.device) != "gpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory


def check_memory(
    network: nn.Module, config: RunConfig, world_size: int, plan: Sequence[EpochPlan], available: float
) -> list[str]:
    """Errors for the stages that do not fit: `network` is of `planned_network`, `available` the bytes of one device."""
    keys = ("device_microbatch_size", "global_batch_size", "device_batch_size")
    key = next(key for key in keys if getattr(config, key) is not None)
    lines: list[str] = []
    for entry, (fixed, per_image) in _stages(network, config, world_size, plan):
        images = microbatch_images(config, entry, world_size)
        needed = fixed + per_image * images
        if needed > available:
            lines.append(
                f"{key}: {images} images of {entry.size} px need about {needed / 1e9:.1f} GB, the device has "
                f"{available / 1e9:.1f} GB; at most {max(0, int((available - fixed) / per_image))} fit"
            )
    return lines


FILLED = 0.9
"""Share of a device's memory that `device_microbatch_size: auto` fills by this estimate.

On one H100, it was 0 to 8 % above what was reserved (16.3, 16.6 and 26.4 GB against 15.7, 15.3 to 16.0 and
26.3), so the rest is for the driver, and for networks that need more than it says.
"""


def with_microbatches(
    config: RunConfig, network: nn.Module, world_size: int, plan: Sequence[EpochPlan], available: float | None
) -> RunConfig:
    """The config with the largest microbatches that fit, by image size, in place of `device_microbatch_size: auto`.

    A microbatch is a divisor of the device's batch that fills at most `FILLED` of `available`, the bytes of one device,
    or one image if none does. Nothing but the arguments counts, in particular not what else is in the memory now, so a
    resume takes the same. `available` None: whole batches. `network`: of `planned_network`.
    """
    if available is None:
        return config.model_copy(update={"device_microbatch_size": None})
    chosen: dict[int, int] = {}
    for entry, (fixed, per_image) in _stages(network, config, world_size, plan):
        images = entry.global_batch_size // world_size
        divisors = (count for count in range(images, 1, -1) if images % count == 0)
        most = next((count for count in divisors if fixed + per_image * count <= FILLED * available), 1)
        chosen[entry.size] = min(most, chosen.get(entry.size, most))
    return config.model_copy(update={"device_microbatch_size": chosen})


def _stages(
    network: nn.Module, config: RunConfig, world_size: int, plan: Sequence[EpochPlan]
) -> Iterator[tuple[EpochPlan, Memory]]:
    """The plan's entries that differ, each with what a step of it needs."""
    for entry in dict.fromkeys(plan):
        yield entry, step_memory(network, config, world_size, entry.size, entry.crop == "center")


def microbatch_images(config: RunConfig, entry: EpochPlan, world_size: int) -> int:
    """Images in one forward and backward pass of a device; of the whole batch where the config says `auto`."""
    images, size = entry.global_batch_size // world_size, config.device_microbatch_size
    return images if size is None or isinstance(size, str) else min(images, at_size(size, entry.size))


def step_memory(network: nn.Module, config: RunConfig, world_size: int, size: int, fixres: bool = False) -> Memory:
    """Memory that one device needs for a training step; `network`: of `planned_network`; `fixres`: in its stage."""
    frozen = fixres and config.algorithms.fixres is not None and config.algorithms.fixres.train == "classifier"
    half = config.precision != "fp32"
    saving = config.model.activation_checkpointing
    kept = activation_memory(network, size, half=half, frozen=frozen, checkpointing=saving)
    copies = sum(getattr(config.algorithms, name) is not None for name in ("ema", "swa", "sam", "distillation"))
    together = world_size > 1
    # Weight, gradient, optimizer's state, copies; DDP's buckets are a second gradient, autocast's copies half a weight.
    times = 2 + state_copies(config.optimizer) + copies + together + (0.5 if half else 0)
    weights = 4 * times * sum(parameter.numel() for parameter in network.parameters())
    fixed = weights + CONTEXT_BYTES + (NCCL_BYTES if together else 0)
    # The images in FP32, and the uint8 they came in.
    return Memory(fixed + kept.fixed * OVERHEAD, kept.per_image * OVERHEAD + 3 * size**2 * 5)


def activation_memory(network: nn.Module, size: int, *, half: bool, frozen: bool, checkpointing: bool) -> Memory:
    """What autograd keeps for the backward pass; in a frozen stage, also the peak of the forward pass.

    The network is on the meta device. `half`: mixed precision; `frozen`: only the classifier and the last BatchNorm are
    trained; `checkpointing`: residual blocks keep their inputs only.
    """
    network = copy.deepcopy(network).train()
    if frozen:
        freeze(network)
        hold_statistics(network)
    if half:
        network = network.half()
    (two, _), (four, largest) = (_kept_bytes(network, images, size, checkpointing) for images in (2, 4))
    per_image = (four - two) / 2
    # A forward pass that keeps nothing holds a block's input, and a layer's input and output.
    return Memory(two - 2 * per_image, per_image + (3 * largest / 4 if frozen else 0))


def _kept_bytes(network: nn.Module, images: int, size: int, checkpointing: bool) -> tuple[int, int]:
    """What a step keeps of so many images, and the largest output of a layer."""
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    blocks = residual_blocks(network) if checkpointing else []
    kept: dict[nn.Module | None, dict[int, Tensor]] = {None: {}, **{block: {} for block in blocks}}
    current: list[nn.Module | None] = [None]
    outputs: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own and storage not in kept[None]:
            kept[current[-1]][storage] = tensor  # kept alive, so that no other storage gets its address
        return tensor

    def enter(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[None].update({tensor.untyped_storage()._cdata: tensor for tensor in inputs})
        current.append(block)

    def leave(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        current.pop()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.untyped_storage().nbytes())

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    handles += [layer.register_forward_hook(note) for layer in network.modules() if not list(layer.children())]
    batch = torch.empty(images, 3, size, size, device="meta", dtype=next(network.parameters()).dtype)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, auxiliary = heads(network(batch))
        for one in (logits, *auxiliary):
            nn.functional.cross_entropy(one.float(), torch.empty_like(one, dtype=torch.float32))
    for handle in handles:
        handle.remove()
    # A block that recomputes its activations holds them all at once, one block at a time.
    again = max((_bytes(tensors) for block, tensors in kept.items() if block is not None), default=0)
    return _bytes(kept[None]) + again, max(outputs, default=0)


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
