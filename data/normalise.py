"""From uint8 images on the device to what the model takes, and back to something to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Normalise:
    """A batch transform for Composer's `DataSpec(microbatch_transforms=...)`: images travel as a quarter of the bytes.

    Args:
        mean: mean of each channel (R, G, B) of images in [0, 1].
        std: standard deviation of each channel of images in [0, 1], above 0.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._offset = torch.tensor(mean, dtype=torch.float32).mul(255).view(1, -1, 1, 1)
        self._scale = torch.tensor(std, dtype=torch.float32).mul(255).reciprocal().view(1, -1, 1, 1)
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """Normalise a batch on the device where it is.

        Args:
            batch: (images, labels), images uint8 of shape (N, C, H, W) and values 0 to 255.

        Returns:
            (images, labels), images (x / 255 - mean) / std as float32 in channels_last memory.
        """
        images, labels = batch
        if images.device not in self._on_device:
            self._on_device[images.device] = (self._offset.to(images.device), self._scale.to(images.device))
        offset, scale = self._on_device[images.device]
        images = images.to(dtype=torch.float32, memory_format=torch.channels_last)
        return images.sub_(offset).mul_(scale), labels


def denormalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The pictures that normalised images were made from, to be shown.

    Args:
        images: float of shape (N, C, H, W), as `Normalise` makes them, mixed or not.
        mean: as given to `Normalise`.
        std: as given to `Normalise`.

    Returns:
        uint8 of shape (N, C, H, W) on the CPU; what lies outside [0, 255] is clipped.
    """
    images = images.detach().to("cpu", torch.float32)
    shape = (1, len(mean), 1, 1)
    pictures = images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return pictures.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
