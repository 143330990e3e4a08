"""Write a network to files; each is read or run again and compared with the original network."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import safetensors.torch
import torch
import torch.nn.functional as F
from composer.algorithms.blurpool.blurpool_layers import BlurConv2d, BlurMaxPool2d
from torch import Tensor, nn

from data.errors import InputError
from data.text import first_line
from recipes.export import open_onnx
from recipes.model import build_network
from recipes.trained import Trained

TOLERANCE = 1e-4  # largest allowed `difference` between a program's logits and the network's
OPSET = 17  # ONNX operator set of ONNX 1.12 (2022); onnxruntime supports it since version 1.12


def examples(size: int, count: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images for comparing two networks: smooth coloured patterns with some noise, always the same.

    Normalised by the mean and deviation of images in [0, 1]; float32 (count, 3, size, size).
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1).mul(255).round().div(255)
    normalised: Tensor = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return normalised


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference between logits, relative to the largest logit if that is above one."""
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))


class Architecture(NamedTuple):
    """How a network differs from the one of the same name in torchvision or timm."""

    plain: bool  # the weights load strictly into that network, which then gives the same logits
    blurred: tuple[str, ...]  # names of the convolutions that blur their input or output
    blurred_pools: tuple[str, ...]  # names of the blurred max-pooling layers
    blur_first: bool  # whether blurring comes before the convolution rather than after it
    techniques: tuple[str, ...]  # fields of `algorithms` that changed the architecture; empty if it is plain


def takes_weights(plain: nn.Module, network: nn.Module, probe: Tensor) -> bool:
    """Load a network's weights strictly into another; whether they fit, and give the same logits of `probe`."""
    try:
        plain.eval().load_state_dict(network.state_dict())
    except RuntimeError:
        return False
    with torch.no_grad():
        return difference(plain(probe), network(probe)) <= TOLERANCE


def architecture(trained: Trained, probe: Tensor) -> Architecture:
    """Load the weights into the plain network of the same name, and compare the logits of the images `probe`."""
    network, techniques = trained.network, trained.config.algorithms
    same = takes_weights(build_network(trained.config.model.name, trained.num_classes), network, probe)
    blurs = {path: module for path, module in network.named_modules() if isinstance(module, BlurConv2d)}
    pools = tuple(path for path, module in network.named_modules() if isinstance(module, BlurMaxPool2d))
    changed = [field for field in ("blurpool", "squeeze_excite") if getattr(techniques, field) is not None]
    changed += [f"composer.{field}" for field in techniques.composer]
    first = all(module.blur_first for module in blurs.values())
    return Architecture(same, tuple(blurs), pools, first, () if same else tuple(changed))


def fixed_blurs(network: nn.Module, probe: Tensor) -> nn.Module:
    """A copy whose blurred max-pooling layers have a kernel for each channel: an ONNX convolution needs a known shape.

    In the network all channels share one kernel. The number of channels is seen with the images `probe`.
    """

    def repeat(pool: Any, inputs: tuple[Tensor]) -> None:
        pool.filt2d = pool.filt2d[:1].repeat(inputs[0].shape[1], 1, 1, 1)

    fixed = copy.deepcopy(network).eval()
    hooks = [one.register_forward_pre_hook(repeat) for one in fixed.modules() if isinstance(one, BlurMaxPool2d)]
    with torch.no_grad():
        fixed(probe[:1])
    for hook in hooks:
        hook.remove()
    return fixed


def write_weights(network: nn.Module, path: Path, about: dict[str, str]) -> None:
    """Write `model.safetensors`, with `about` as metadata, or `model.pth`, and read it back."""
    # On the CPU, in row-major memory, each tensor with its own memory.
    tensors = {name: one.detach().cpu().contiguous().clone() for name, one in network.state_dict().items()}
    if path.suffix == ".pth":
        torch.save(tensors, path)
        found = torch.load(path, weights_only=True)
    else:
        # Not with safetensors' save_file, which makes files that only their owner can read.
        path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"} | about))
        found = safetensors.torch.load_file(path)
    if found.keys() != tensors.keys() or any(not torch.equal(found[name], tensors[name]) for name in tensors):
        raise InputError(f"{path.name}: what was read back is not what was written")


def write_program(network: nn.Module, path: Path, probe: Tensor) -> float:
    """Write `model.pt2` or `model.onnx`, for batches of any size, run it, and compare its logits with the network's.

    `probe` are at least 2 images (N, 3, H, W); H and W become the program's. Returns the largest `difference` of the
    logits; raises InputError if the network cannot be exported, or the program's logits differ.
    """
    try:
        run = (_write_onnx if path.suffix == ".onnx" else _write_torch_export)(network, path, probe)
    except Exception as error:  # torch, onnx and onnxruntime each raise their own
        reason = f"this network cannot be exported in this format: {first_line(error)[:200]}; choose other --formats"
        raise InputError(f"{path.name}: {reason}") from None
    with torch.no_grad():  # one image, and all of them
        found = [difference(run(images), network(images)) for images in (probe[:1], probe)]
    if not all(one <= TOLERANCE for one in found):  # nor NaN
        by = f"{max(found):.2g}, allowed {TOLERANCE:g}"
        raise InputError(f"{path.name}: its logits differ from the network's by {by}")
    return max(found)


def _write_torch_export(network: nn.Module, path: Path, probe: Tensor) -> Callable[[Tensor], Tensor]:
    # torch.export treats a size of 1 as a constant, hence two images.
    program = torch.export.export(network, (probe[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(network: nn.Module, path: Path, probe: Tensor) -> Callable[[Tensor], Tensor]:
    """Input `images`, float32 (batch, 3, H, W); output `logits`, float32 (batch, num_classes)."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the exporter prints whole graphs
        warnings.simplefilter("ignore")  # about constants in traced code: the comparison decides
        torch.onnx.export(
            network,
            (probe[:2],),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path), full_check=True)
    run = open_onnx(path)
    return lambda images: torch.from_numpy(run(images.numpy()))
