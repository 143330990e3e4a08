"""Weights under the names of torchvision's and timm's own networks, wherever the architecture is still theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from composer.algorithms.blurpool.blurpool_layers import BlurConv2d, BlurMaxPool2d
from torch import Tensor, nn

from algorithms.config import AlgorithmsConfig
from recipes.errors import InputError
from recipes.json_text import to_json
from recipes.model import build_network

TOLERANCE = 1e-4
"""Largest difference of a logit from the network's own, absolute and relative."""


class Architecture(NamedTuple):
    """How the network differs from the one of the same name in torchvision or timm."""

    plain: bool
    """Its weights load strictly into that one, and give the same logits."""
    blurred: tuple[str, ...]
    """Names of the convolutions that blur their input or output first."""
    blurred_pools: tuple[str, ...]
    """Names of the max-pooling layers that blur."""
    blur_first: bool
    """Blur before the convolution rather than after it."""
    techniques: tuple[str, ...]
    """Fields of `algorithms` that changed it; empty where it is plain."""


def examples(size: int, count: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images to compare two networks on: smooth coloured patterns with some noise, the same ones each time.

    Args:
        size: Side in pixels.
        count: How many.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].

    Returns:
        Normalised images, float32 (count, 3, size, size).
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1).mul(255).round().div(255)
    normalised: Tensor = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return normalised


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference between logits, relative to the largest logit where that is above one."""
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))


def architecture(
    network: nn.Module, name: str, num_classes: int, techniques: AlgorithmsConfig, probe: Tensor
) -> Architecture:
    """Compare a network with the plain one of its name, by loading its weights there and looking at the logits.

    Args:
        network: With its weights, in evaluation mode.
        name: As in `build_network`.
        num_classes: Its outputs.
        techniques: Those of its run.
        probe: Images (N, 3, H, W).
    """
    plain = build_network(name, num_classes).eval()
    try:
        plain.load_state_dict(network.state_dict())
        with torch.no_grad():
            same = difference(plain(probe), network(probe)) <= TOLERANCE
    except RuntimeError:
        same = False
    blurs = {path: module for path, module in network.named_modules() if isinstance(module, BlurConv2d)}
    pools = tuple(path for path, module in network.named_modules() if isinstance(module, BlurMaxPool2d))
    changed = [field for field in ("blurpool", "squeeze_excite") if getattr(techniques, field) is not None]
    changed += [f"composer.{field}" for field in techniques.composer]
    first = all(module.blur_first for module in blurs.values())
    return Architecture(same, tuple(blurs), pools, first, () if same else tuple(changed))


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state dict as files hold it: on the CPU, in row-major memory, each tensor with memory of its own."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}


def write_safetensors(network: nn.Module, path: Path, about: dict[str, str]) -> None:
    """Write the weights, and read them back.

    Args:
        network: With its weights.
        path: The file.
        about: Goes into the file's metadata.
    """
    tensors = plain_tensors(network)
    # Not by its save_file, whose files nobody else may read.
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"} | about))
    _require_equal(safetensors.torch.load_file(path), tensors, path)


def write_pth(network: nn.Module, path: Path) -> None:
    """Write the weights as a state dict that `torch.load(weights_only=True)` reads, and read them back."""
    tensors = plain_tensors(network)
    torch.save(tensors, path)
    _require_equal(torch.load(path, weights_only=True), tensors, path)


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    if found.keys() != expected.keys() or any(not torch.equal(found[name], expected[name]) for name in expected):
        raise InputError(f"{path.name}: what was read back is not what was written")


def as_json(content: object) -> bytes:
    """JSON for people: indented, with a newline at the end."""
    # A byte of a folder's name that is not UTF-8 is JSON's \\udcNN, which Python reads back as that byte.
    return (to_json(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
