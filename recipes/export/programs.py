"""The network as a program: torch.export's and ONNX, each run again and compared with the network."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from composer.algorithms.blurpool.blurpool_layers import BlurMaxPool2d
from torch import Tensor, nn

from recipes.errors import InputError
from recipes.export.session import open_onnx, run_onnx
from recipes.export.weights import TOLERANCE, difference

OPSET = 17
"""ONNX operator set, of ONNX 1.12 (2022); onnxruntime runs it since its own 1.12."""


class FixedBlurMaxPool(nn.Module):
    """Composer's BlurMaxPool2d for a known number of channels: ONNX has no convolution of a kernel of unknown shape.

    Args:
        original: Gives the pooling's fields and the blur's kernel.
        channels: Of the images that it gets.
    """

    kernel: Tensor

    def __init__(self, original: BlurMaxPool2d, channels: int) -> None:
        super().__init__()
        fields = {"padding": original.padding, "dilation": original.dilation, "ceil_mode": original.ceil_mode}
        self.pool = nn.MaxPool2d(original.kernel_size, stride=1, **fields)
        self.stride, self.channels = original.stride, channels
        self.register_buffer("kernel", original.filt2d.repeat(channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Maxima (N, C, H, W), blurred and subsampled."""
        return F.conv2d(self.pool(images), self.kernel, stride=self.stride, padding=1, groups=self.channels)


def fixed_blurs(network: nn.Module, probe: Tensor) -> nn.Module:
    """A copy of the network whose blurred max-pooling layers know their number of channels.

    Args:
        network: In evaluation mode; left as it is.
        probe: Images (N, 3, H, W) to find the numbers with.
    """
    fixed = copy.deepcopy(network)
    for name, pool in [(name, one) for name, one in fixed.named_modules() if isinstance(one, BlurMaxPool2d)]:
        seen: list[int] = []
        handle = pool.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1]))
        with torch.no_grad():
            fixed(probe[:1])
        handle.remove()
        fixed.set_submodule(name, FixedBlurMaxPool(pool, seen[0]))
    return fixed.eval()


def write_torch_export(network: nn.Module, path: Path, probe: Tensor) -> float:
    """Write the program of `torch.export`, for batches of any size, and compare it with the network.

    Args:
        network: In evaluation mode.
        path: The file, `.pt2`.
        probe: Images (N, 3, H, W), N at least 2; H and W are the program's.

    Returns:
        The largest difference of a logit, as `difference` counts.

    Raises:
        InputError: The network cannot be exported, or the program's logits differ.
    """
    try:
        # torch.export takes a size of 1 for a constant, hence two images.
        program = torch.export.export(network, (probe[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
        run = torch.export.load(path).module()
    except Exception as error:  # torch raises many kinds
        raise _refused(path, error) from None
    return _compared(lambda images: run(images), network, path, probe)


def write_onnx(network: nn.Module, path: Path, probe: Tensor) -> float:
    """Write the network as ONNX, for batches of any size, and compare it with the network through onnxruntime.

    Input `images`, float32 (batch, 3, H, W); output `logits`, float32 (batch, num_classes).

    Args:
        network: In evaluation mode.
        path: The file, `.onnx`.
        probe: As in `write_torch_export`.

    Returns:
        The largest difference of a logit, as `difference` counts.

    Raises:
        InputError: The network cannot be exported, or the program's logits differ.
    """
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints whole graphs
            warnings.simplefilter("ignore")  # of constants in traced code: the comparison below decides
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
        session = open_onnx(path)
    except Exception as error:  # torch, onnx and onnxruntime each have their own
        raise _refused(path, error) from None
    return _compared(lambda images: torch.from_numpy(run_onnx(session, images.numpy())), network, path, probe)


def _compared(run: Callable[[Tensor], Tensor], network: nn.Module, path: Path, probe: Tensor) -> float:
    """Compare on one image and on all of them."""
    worst = 0.0
    with torch.no_grad():
        for images in (probe[:1], probe):
            worst = max(worst, difference(run(images), network(images)))
    if not worst <= TOLERANCE:
        raise InputError(f"{path.name}: its logits differ from the network's by {worst:.2g}, allowed {TOLERANCE:g}")
    return worst


def _refused(path: Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InputError(f"{path.name}: this network cannot be exported so: {reason}; choose other --formats")
