"""How much memory of a device a training step needs, told before it is tried.

The network runs on torch's meta device, which computes shapes and no numbers, and every tensor that autograd keeps
for the backward pass is counted. Where half precision is automatic (amp_fp16, amp_bf16), the network is cast to half
for the count: for convolutions, BatchNorm and ReLU autocast keeps the same tensors in the same types, and its half
copies of the weights are added. Networks with LayerNorm or softmax keep some of theirs in FP32, and need more than is
said here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from algorithms.fixres import freeze, hold_statistics
from recipes.model import heads, residual_blocks

CONTEXT_BYTES = 0.7e9
"""CUDA's context and the handles of cuDNN and cuBLAS."""
NCCL_BYTES = 0.4e9
"""NCCL's buffers, where several processes train; an assumption, not a measurement."""
OVERHEAD = 1.06
"""Bytes taken for each byte of activations: gradients on their way back, cuDNN's workspace, fragments.

With CONTEXT_BYTES it tells which batches fit an RTX 3090 (23.70 GiB) in timm's AMP training benchmark, which tries
512, 384, 256, 192, ... (pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv): from resnet50,
which fits at 512, it is at most 1.075; from resnetaa50, which does not, more than 1.05. It agrees with NVIDIA's
ResNet-50 v1.5, which trains 256 images per V100-16GB in AMP and 128 in FP32 (DeepLearningExamples,
PyTorch/Classification/ConvNets/resnet50v1.5/training). VGG, whose first layers are its largest, needs about 5 % more.
"""


class Load(NamedTuple):
    """What one device works on at a time in a stage."""

    size: int
    """Side of the images in pixels."""
    images: int
    """Images in one forward and backward pass."""
    frozen: bool = False
    """Only the classifier and the last BatchNorm are trained (FixRes with `train: classifier`)."""


class Activations(NamedTuple):
    """Bytes at their most: `fixed + per_image * images`."""

    fixed: float
    per_image: float


class Setting(NamedTuple):
    """What needs memory besides the images."""

    half: bool
    """Mixed precision."""
    copies: int
    """Further copies of the weights: EMA's and SWA's averages, SAM's perturbation."""
    processes: int
    """Devices that train together."""
    checkpointing: bool
    """Residual blocks keep their inputs only."""


def activations(network: nn.Module, load: Load, *, half: bool, checkpointing: bool) -> Activations:
    """What autograd keeps for the backward pass on one device; in a frozen stage, also what passes in the forward one.

    Args:
        network: Maps images (N, 3, size, size) to logits; on the meta device.
        load: The stage; its number of images does not matter.
        half: Mixed precision.
        checkpointing: Residual blocks keep their inputs only.

    Raises:
        Exception: The network cannot take images of this size; whatever the network raises.
    """
    network = copy.deepcopy(network).train()
    if load.frozen:
        freeze(network)
        hold_statistics(network)
    if half:
        network = network.half()
    two, four = (_kept_bytes(network, images, load.size, checkpointing) for images in (2, 4))
    per_image = (four - two) / 2
    fixed = two - 2 * per_image
    return Activations(fixed, per_image + _passing_bytes(network, 2, load.size) / 2 if load.frozen else per_image)


def _kept_bytes(network: nn.Module, images: int, size: int, checkpointing: bool) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    blocks = residual_blocks(network) if checkpointing else []
    kept: dict[nn.Module | None, dict[int, Tensor]] = {None: {}, **{block: {} for block in blocks}}
    current: list[nn.Module | None] = [None]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own and storage not in kept[None]:
            kept[current[-1]][storage] = tensor  # held, so that no other storage gets its address
        return tensor

    dtype = next(network.parameters()).dtype
    batch = torch.empty(images, 3, size, size, device="meta", dtype=dtype)
    with _entered(blocks, current, kept[None]), saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, auxiliary = heads(network(batch))
        for one in (logits, *auxiliary):
            nn.functional.cross_entropy(one.float(), torch.empty_like(one, dtype=torch.float32))
    # A block that computes its activations again has them all at once, one block at a time.
    again = max((_bytes(tensors) for block, tensors in kept.items() if block is not None), default=0)
    return _bytes(kept[None]) + again


def _passing_bytes(network: nn.Module, images: int, size: int) -> int:
    """What is alive at once in a forward pass that keeps nothing: a block's input, a layer's input and its output."""
    largest = [0]

    def leave(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        largest[0] = max(largest[0], output.untyped_storage().nbytes())

    hooks = [layer.register_forward_hook(leave) for layer in network.modules() if not list(layer.children())]
    with torch.no_grad():
        network(torch.empty(images, 3, size, size, device="meta", dtype=next(network.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return 3 * largest[0]


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


@contextmanager
def _entered(
    blocks: Sequence[nn.Module], current: list[nn.Module | None], outside: dict[int, Tensor]
) -> Iterator[None]:
    """Note which of the blocks runs, and what goes into each."""

    def enter(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        outside.update({tensor.untyped_storage()._cdata: tensor for tensor in inputs})
        current.append(block)

    def leave(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        current.pop()

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fixed_bytes(network: nn.Module, setting: Setting) -> float:
    """Bytes that do not depend on the batch: weights, gradients, momentum, copies, the context."""
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    together = setting.processes > 1
    # Weight, gradient and momentum; DDP's buckets are a second copy of the gradients; autocast's halves half a one.
    times = 3 + setting.copies + together + (0.5 if setting.half else 0)
    return weights * times + CONTEXT_BYTES + (NCCL_BYTES if together else 0)


def step_bytes(network: nn.Module, load: Load, setting: Setting) -> Activations:
    """All that one device needs for a step, as `fixed + per_image * images`.

    Args:
        network: On the meta device, after surgery.
        load: The stage; its number of images does not matter.
        setting: What else needs memory.
    """
    kept = activations(network, load, half=setting.half, checkpointing=setting.checkpointing)
    # The images in FP32, and the uint8 they came in.
    image = 3 * load.size**2 * 5
    return Activations(fixed_bytes(network, setting) + kept.fixed * OVERHEAD, kept.per_image * OVERHEAD + image)


def check_memory(
    network: nn.Module, loads: Sequence[Load], device_bytes: float, setting: Setting, key: str = "device_batch_size"
) -> list[str]:
    """Which stages do not fit the device, one line each.

    Args:
        network: On the meta device, after surgery.
        loads: The stages.
        device_bytes: Memory of one device.
        setting: What else needs memory.
        key: The key of the config that sets the batch size.

    Returns:
        Lines `KEY: N images of S px need about X GB, the device has Y GB; at most M fit`.
    """
    lines = list[str]()
    for load in dict.fromkeys(loads):
        constant, per_image = step_bytes(network, load, setting)
        needed = constant + per_image * load.images
        if needed > device_bytes:
            most = max(0, int((device_bytes - constant) / per_image))
            lines.append(
                f"{key}: {load.images} images of {load.size} px need about {needed / 1e9:.1f} GB, the device has "
                f"{device_bytes / 1e9:.1f} GB; at most {most} fit"
            )
    return lines
