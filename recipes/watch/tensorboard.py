"""TensorBoard: our figures and our pictures, and nothing else.

Composer's TensorboardLogger writes every name that anyone logs (`time/batch`, `trainer/device_train_microbatch_size`,
hyperparameters again after each evaluation), begins a new file of events at each flush, and doubles the points between
a checkpoint and a death. So this one is ours, over torch's SummaryWriter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from recipes.watch.images import IMAGES_NAME
from recipes.watch.sink import FigureSink

FLUSH_SECONDS = 30
"""A process that is killed loses the points of so many seconds at most, none of them older than its last checkpoint."""


class TensorBoard(FigureSink):
    """Writes event files that TensorBoard shows as one run.

    On a resume at batch B a new file begins that tells readers to drop the points from B on (`purge_step`), and writes
    those of B that belong to the checkpoint again.

    Args:
        folder: Where the event files lie.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def start(self, batch: int, figures: dict[str, float]) -> None:
        """Begin a file of events at this batch."""
        self.shut()
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self.write(batch, figures)
            self.flush()

    def write(self, batch: int, figures: dict[str, float]) -> None:
        """Add one point per figure."""
        with self._open(batch) as writer:
            for name, value in figures.items():
                writer.add_scalar(name, value, global_step=batch)

    def log_images(
        self, images: Any, name: str = "Images", channels_last: bool = False, *rest: Any, **more: Any
    ) -> None:
        """Add our grid of training images, uint8 (H, W, 3); `step` is the batch."""
        step = rest[0] if rest else more["step"]
        if name == IMAGES_NAME and self.state is not None and dist.get_global_rank() == 0:
            self.attempt(self._add_picture, np.asarray(images), step, "HWC" if channels_last else "CHW")

    def flush(self) -> None:
        """Hand all events to the system."""
        if self._writer is not None:
            with self._open(0) as writer:
                writer.flush()

    def shut(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with self._open(0) as writer:
                self._writer = None
                writer.close()

    def _add_picture(self, picture: NDArray[np.uint8], batch: int, form: str) -> None:
        with self._open(batch) as writer:
            writer.add_image(IMAGES_NAME, picture, global_step=batch, dataformats=form)

    @contextmanager
    def _open(self, batch: int) -> Iterator[SummaryWriter]:
        """The writer; a new one where there is none, or where the last one failed, for it never writes again."""
        if self._writer is None:
            # With a short queue the training waits for the disk.
            self._writer = SummaryWriter(str(self.folder), purge_step=batch, max_queue=1000, flush_secs=FLUSH_SECONDS)
        try:
            yield self._writer
        except OSError:
            self._writer = None
            raise
