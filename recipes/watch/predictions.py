"""predictions.npz: what the finished model says of each evaluation image, for the report's confusions and errors."""

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

from recipes.watch.figures import EVAL_LABEL
from recipes.watch.files import replace_file

UNSEEN = -1
"""Prediction for an image that no process evaluated."""

log = logging.getLogger(__name__)


class Predictions(Callback):
    """Keeps the answers of the run's last evaluation at its main size, from all processes, and writes them on rank 0.

    It reads the logits that the evaluation computes anyway: EMA's where EMA is on. Per image four numbers stay, on the
    device until the evaluation's end. The file is an uncompressed npz without pickles:

    - `label`, int32 (N,): in the order of the evaluation set; negative where the image could not be decoded;
    - `predicted`, int32 (N,): the class with the highest logit;
    - `probability` and `label_probability`, float32 (N,): softmax of the logits at `predicted` and at `label`;
    - `classes` and `names`, text (C,): folders in label order, and what people call them;
    - `size`, in pixels, and `batch`, the run's position: int64 scalars.

    Args:
        path: The file.
        size: Image size in pixels whose evaluator, labelled `eval_SIZE`, is listened to.
        classes: Class folder names in label order.
        names: Their names for people.
    """

    def __init__(self, path: Path, size: int, classes: Sequence[str], names: Sequence[str]) -> None:
        self.path = path
        self.size = size
        self.classes = list(classes)
        self.names = list(names)
        self._answers: list[torch.Tensor] = []
        self._listening = False

    def eval_start(self, state: State, logger: Logger) -> None:
        """Listen to the last evaluation of the run."""
        del logger
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        self._listening = last and state.dataloader_label == f"{EVAL_LABEL}{self.size}"
        self._answers = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Reduce the logits of a microbatch to four numbers per image."""
        del logger
        if self._listening:
            assert isinstance(state.outputs, torch.Tensor)  # our model's logits
            self._answers.append(answers(state.outputs, state.batch[1]))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Put together what all processes saw, and write it."""
        del logger
        if not self._listening:
            return
        self._listening = False
        # The evaluation's sampler is a list of requests in the order of its batches, the same each time it is asked.
        indices = np.concatenate([getattr(one, "indices", one) for one in state.dataloader.batch_sampler])
        mine = (indices, torch.cat(self._answers).cpu().numpy())
        self._answers = []
        parts = dist.all_gather_object(mine) if dist.get_world_size() > 1 else [mine]
        if dist.get_global_rank() == 0:
            self._write(in_order(parts, len(state.dataloader.dataset)), int(state.timestamp.batch))

    def _write(self, columns: dict[str, NDArray[Any]], batch: int) -> None:
        buffer = io.BytesIO()
        about: dict[str, Any] = {
            **columns,
            "classes": np.array(self.classes, np.str_),
            "names": np.array(self.names, np.str_),
        }
        np.savez(buffer, **about, size=np.int64(self.size), batch=np.int64(batch))
        try:
            replace_file(self.path, [buffer.getbuffer()])
        except OSError as error:
            log.warning("%s cannot be written: %s; the training goes on", self.path, error)


def answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Label, prediction and their probabilities, without waiting for the device.

    Args:
        logits: (N, C), floating point.
        labels: int64 (N,); a negative one has no probability.

    Returns:
        float32 (N, 4), exact up to class 2**24: label, predicted class, its probability, the label's (nan without one).
    """
    probabilities = torch.softmax(logits.detach().float(), dim=1)
    top, predicted = probabilities.max(dim=1)
    own = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    own = torch.where(labels >= 0, own, torch.full_like(own, float("nan")))
    return torch.stack([labels.float(), predicted.float(), top, own], dim=1)


def in_order(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]], samples: int) -> dict[str, NDArray[Any]]:
    """The answers of all processes in the order of the evaluation set.

    Args:
        parts: Of each process: indices (n,) and `answers` (n, 4).
        samples: Images in the evaluation set.

    Returns:
        The four columns of the file.
    """
    table = np.full((samples, 4), (UNSEEN, UNSEEN, np.nan, np.nan))
    for indices, rows in parts:
        table[indices] = rows
    return {
        "label": table[:, 0].astype(np.int32),
        "predicted": table[:, 1].astype(np.int32),
        "probability": table[:, 2].astype(np.float32),
        "label_probability": table[:, 3].astype(np.float32),
    }
