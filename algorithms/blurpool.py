"""BlurPool: anti-aliased strided convolutions and max-pooling."""

from __future__ import annotations

import torch.nn.functional as F
from composer.algorithms import BlurPool as ComposersBlurPool
from composer.algorithms.blurpool import BlurConv2d, BlurMaxPool2d
from composer.core import Event, State
from composer.loggers import Logger
from torch import Tensor, nn

from algorithms.config import BlurPoolConfig

Stride = int | tuple[int, int]


def blur(images: Tensor, kernel: Tensor, stride: Stride) -> Tensor:
    """Blur each channel of images (N, C, H, W) with a 3x3 kernel (C or 1, 1, 3, 3), zero-padded, and subsample.

    Composer's `blur_2d` computes the padding from tensors, so that the host waits for the device in each forward pass,
    and neither torch.compile nor torch.export can follow it.
    """
    if len(kernel) == 1:
        kernel = kernel.expand(images.shape[1], 1, 3, 3)
    return F.conv2d(images, kernel, stride=stride, padding=1, groups=len(kernel))


class BlurredConv2d(BlurConv2d):  # type: ignore[misc]  # Composer's module is untyped
    """Composer's layer with its names of weights and buffers, blurring by `blur`."""

    def forward(self, input: Tensor) -> Tensor:
        """Blur, then convolve; the other way round with `blur_first: false`."""
        if self.blur_first:
            convolved: Tensor = self.conv(blur(input, self.blur_filter, self.blur_stride))
            return convolved
        return blur(self.conv(input), self.blur_filter, self.blur_stride)


class BlurredMaxPool2d(BlurMaxPool2d):  # type: ignore[misc]  # Composer's module is untyped
    """Composer's layer with its names of buffers, blurring by `blur`."""

    def forward(self, input: Tensor) -> Tensor:
        """Maxima at stride 1, then blur and subsample."""
        maxima = F.max_pool2d(input, self.kernel_size, 1, self.padding, self.dilation, self.ceil_mode)
        return blur(maxima, self.filt2d, self.stride)


class BlurPool(ComposersBlurPool):
    """Composer's surgery, with layers of one graph that ask the device nothing."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the strided layers."""
        super().apply(event, state, logger)
        replace_forward(state.model)


def replace_forward(network: nn.Module) -> None:
    """Give Composer's blurring layers the forward pass of this module, in place."""
    for layer in network.modules():
        if type(layer) is BlurConv2d:
            layer.__class__ = BlurredConv2d
        elif type(layer) is BlurMaxPool2d:
            layer.__class__ = BlurredMaxPool2d


def build(config: BlurPoolConfig) -> BlurPool:
    """The algorithm with these fields."""
    return BlurPool(**config.model_dump())
