"""Pictures of what the model is trained on: augmented, resized and mixed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.utils import dist
from numpy.typing import NDArray
from PIL import Image

IMAGES_NAME = "train/images"
LIMIT = 32
"""Images in a grid."""
COLUMNS = 8

log = logging.getLogger(__name__)


def picture_grid(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Put images side by side, eight in a row, two black pixels between.

    Args:
        images: Normalised images (N, 3, H, W), floating point, on any device.
        mean: Mean per channel of images in [0, 1].
        std: Standard deviation per channel.

    Returns:
        uint8 (rows * (H + 2) - 2, columns * (W + 2) - 2, 3).
    """
    pixels = images.detach().to("cpu", torch.float32).numpy().transpose(0, 2, 3, 1)
    pixels = (pixels * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * 255
    pixels = np.clip(np.rint(np.nan_to_num(pixels)), 0, 255).astype(np.uint8)
    count, height, width, channels = pixels.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // columns) * (height + 2), (index % columns) * (width + 2)
        grid[top : top + height, left : left + width] = picture
    return grid


class TrainingImages(Callback):
    """Saves a grid of up to 32 training images, as the model sees them, whenever an epoch begins with a new image size.

    The grid goes to the loggers as `train/images` and to `FOLDER/epNNN-SIZEpx.png`, NNN the number of epochs done. It
    is taken after the forward pass, when the algorithms have mixed, cut and resized the batch; with gradient
    accumulation, from the first microbatch.

    Args:
        folder: Where the pictures are saved.
        mean: Mean per channel (R, G, B) of images in [0, 1], as the batch was normalised.
        std: Standard deviation per channel.
    """

    def __init__(self, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
        self.folder = folder
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._size = 0
        self._batch = -1

    def after_forward(self, state: State, logger: Logger) -> None:
        """Save, where an epoch's first batch has another size than the last grid."""
        if int(state.timestamp.batch_in_epoch) != 0 or self._batch == int(state.timestamp.batch):
            return
        self._batch = int(state.timestamp.batch)
        images = state.batch[0]
        size = int(images.shape[-2])
        if size == self._size:
            return
        self._size = size
        if dist.get_global_rank() != 0:
            return
        grid = picture_grid(images[:LIMIT], self.mean, self.std)
        logger.log_images(grid, IMAGES_NAME, channels_last=True, step=self._batch, use_table=False)
        path = self.folder / f"ep{int(state.timestamp.epoch):03d}-{size}px.png"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid).save(path)
        except OSError as error:
            log.warning("%s cannot be written: %s; the training goes on", path, error)

    def state_dict(self) -> dict[str, Any]:
        """The size of the last grid."""
        return {"size": self._size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._size = int(state["size"])
