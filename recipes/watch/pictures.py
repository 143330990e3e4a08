"""What is recorded image by image: pictures of the training, undecodable images, and the final predictions."""

from __future__ import annotations

import io
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
from torchvision.utils import make_grid

from data.errors import InputError
from data.files import replace_file
from recipes.config import DataConfig
from recipes.watch.figures import EVAL_LABEL
from recipes.watch.sinks import IMAGES_NAME, or_warn

GRID_IMAGES, GRID_COLUMNS = 32, 8
NAMED_ON_CONSOLE = 20
POLL_BATCHES = 100
"""Batches between two checks for bad images within an epoch: a check may scan a byte per image."""
UNSEEN = -1  # prediction for an image that no process evaluated

log = logging.getLogger(__name__)


def picture_grid(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Arrange normalised images (N, 3, H, W) in a grid, eight in a row, with two black pixels between them.

    Returns uint8 (rows * (H + 2) - 2, columns * (W + 2) - 2, 3).
    """
    pixels = images.detach().to("cpu", torch.float32)
    pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = torch.nan_to_num(pixels * 255).round().clamp(0, 255).to(torch.uint8)
    grid = pixels[0] if len(pixels) == 1 else make_grid(pixels, GRID_COLUMNS)[:, 2:-2, 2:-2]  # without the outer frame
    return grid.permute(1, 2, 0).numpy()


class TrainingImages(Callback):
    """Saves a grid of up to 32 training images, as the model sees them, whenever an epoch begins with a new image size.

    The grid goes to the loggers as `train/images` and to `FOLDER/epNNN-SIZEpx.png`, NNN the number of epochs done. It
    is taken after the forward pass, when the algorithms have mixed and resized the batch; with gradient
    accumulation, from the first microbatch.
    """

    def __init__(self, folder: Path, data: DataConfig) -> None:
        self.folder = folder
        self.data = data
        self._size = 0

    def after_forward(self, state: State, logger: Logger) -> None:
        """Save if an epoch's first batch has another size than the last grid."""
        images = state.batch[0]
        if int(state.timestamp.batch_in_epoch) != 0 or int(images.shape[-2]) == self._size:
            return
        self._size = int(images.shape[-2])
        if dist.get_global_rank() == 0:
            grid = picture_grid(images[:GRID_IMAGES], self.data.mean, self.data.std)
            step = int(state.timestamp.batch)
            logger.log_images(grid, IMAGES_NAME, channels_last=True, step=step, use_table=False)
            path = self.folder / f"ep{int(state.timestamp.epoch):03d}-{self._size}px.png"
            with or_warn(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grid).save(path)

    def state_dict(self) -> dict[str, Any]:
        """The size of the last grid."""
        return {"size": self._size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self._size = int(state["size"])


class BadImages(Callback):
    """Names and counts the images that the loaders could not decode and replaced; too many of them end the run.

    A dataset may have `bad`, with `new() -> list[BadSample]`: those not reported before. It is called every 100 batches
    and at the end of each epoch and evaluation; the processes then exchange what they found, so that all count the same
    and end together. `found` has the name and reason of each bad image by split (`train` or `val`), over all processes
    and resumes.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.found: dict[str, dict[str, str]] = {}

    @property
    def count(self) -> int:
        """Bad images found so far, each counted once."""
        return sum(len(names) for names in self.found.values())

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check at a fixed interval."""
        if int(state.timestamp.batch) % POLL_BATCHES == 0:
            self._look("train", state.train_dataloader)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Check after the last batch."""
        self._look("train", state.train_dataloader)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Check after each evaluator; those of several sizes read the same images."""
        self._look("val", state.dataloader)

    def state_dict(self) -> dict[str, Any]:
        """The bad images so far, as plain text."""
        return {"found": {split: dict(names) for split, names in self.found.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.found = {
            split: {str(name): str(reason) for name, reason in names.items()} for split, names in state["found"].items()
        }

    def _look(self, split: str, loader: Any) -> None:
        bad = getattr(getattr(loader, "dataset", None), "bad", None)
        met = {} if bad is None else {found.name: found.reason for found in bad.new()}
        if dist.get_world_size() > 1:
            for other in dist.all_gather_object(met):
                met = met | other
        known = self.found.setdefault(split, {})
        fresh = sorted(met.keys() - known.keys())
        for name in fresh:
            known[name] = met[name]
            if dist.get_global_rank() == 0:
                extra = {"file_only": self.count > NAMED_ON_CONSOLE}
                instead = "replaced" if split == "train" else "not counted"
                log.warning("bad image in %s, %s: %s: %s", split, instead, name, met[name], extra=extra)
                if self.count == NAMED_ON_CONSOLE:
                    log.warning("further bad images are logged in log.txt only")
        if fresh and len(known) > self.max_bad_fraction * len(loader.dataset):
            raise InputError(
                f"data.max_bad_fraction: {len(known)} of {len(loader.dataset)} images of {split} cannot be decoded, "
                f"more than the allowed share of {self.max_bad_fraction:g}; one of them: {fresh[-1]}: {met[fresh[-1]]}"
            )


class Predictions(Callback):
    """Collects the predictions of the run's last evaluation at its main size from all processes; rank 0 writes them.

    It reads the logits that the evaluation computes anyway, EMA's if EMA is on, and keeps four numbers per image, on
    the device until the end of the evaluation. The file is an uncompressed npz without pickles:

    - `label`, int32 (N,): in the order of the evaluation set; negative where the image could not be decoded;
    - `predicted`, int32 (N,): the class with the highest logit;
    - `probability` and `label_probability`, float32 (N,): softmax of the logits at `predicted` and at `label`;
    - `classes` and `names`, text (C,): folders in label order, and human-readable names;
    - `size`, in pixels, and `batch`, the run's position: int64 scalars.
    """

    def __init__(self, path: Path, size: int, classes: Sequence[str], names: Sequence[str]) -> None:
        self.path = path
        self.size = size
        self.classes = list(classes)
        self.names = list(names)
        self._kept: list[torch.Tensor] | None = None

    def eval_start(self, state: State, logger: Logger) -> None:
        """Start collecting at the last evaluation of the run."""
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        self._kept = [] if last and state.dataloader_label == f"{EVAL_LABEL}{self.size}" else None

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Reduce the logits of a microbatch to four numbers per image."""
        if self._kept is not None:
            assert isinstance(state.outputs, torch.Tensor)  # our model's logits
            self._kept.append(prediction_rows(state.outputs, state.batch[1]))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Combine the predictions of all processes, and write them."""
        if self._kept is None:
            return
        # Iterating the evaluation's sampler gives the requests in the order of its batches, the same every time.
        indices = np.concatenate([getattr(one, "indices", one) for one in state.dataloader.batch_sampler])
        mine, self._kept = (indices, torch.cat(self._kept).cpu().numpy()), None
        parts = dist.all_gather_object(mine) if dist.get_world_size() > 1 else [mine]
        if dist.get_global_rank() != 0:
            return
        content: dict[str, Any] = in_order(parts, len(state.dataloader.dataset))
        content |= {"classes": np.array(self.classes, np.str_), "names": np.array(self.names, np.str_)}
        content |= {"size": np.int64(self.size), "batch": np.int64(int(state.timestamp.batch))}
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        with or_warn(self.path):
            replace_file(self.path, [buffer.getbuffer()])


def prediction_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labels, predictions and their probabilities, without waiting for the device.

    `logits`: (N, C), floating point. `labels`: int64 (N,); a negative one has no probability. Returns float32 (N, 4),
    exact up to class 2**24: label, predicted class, its probability, the label's (nan without one).
    """
    probabilities = torch.softmax(logits.detach().float(), dim=1)
    top, predicted = probabilities.max(dim=1)
    own = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, float("nan"))
    return torch.stack([labels.float(), predicted.float(), top, own], dim=1)


def in_order(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]], samples: int) -> dict[str, NDArray[Any]]:
    """The `prediction_rows` (n, 4) of all processes, each with its indices (n,), as columns in the set's order."""
    table = np.full((samples, 4), (UNSEEN, UNSEEN, np.nan, np.nan))
    for indices, rows in parts:
        table[indices] = rows
    types = {"label": np.int32, "predicted": np.int32, "probability": np.float32, "label_probability": np.float32}
    return {name: table[:, column].astype(kind) for column, (name, kind) in enumerate(types.items())}
