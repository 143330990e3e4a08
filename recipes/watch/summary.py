"""summary.json: what a run came to, for people, scripts and CI."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from recipes.json_text import to_json
from recipes.watch.bad_images import BadImages
from recipes.watch.figures import Figures
from recipes.watch.files import replace_text
from recipes.watch.fingerprint import weights_sha256
from recipes.watch.versions import versions

log = logging.getLogger(__name__)


class Summary(Callback):
    """Writes summary.json at the start, at each checkpoint and epoch's end, and through `finish` at the end; rank 0.

    `top1`, `top5` and `loss` are those of the last evaluation, in [0, 1], null before the first. `wall_seconds` counts
    all processes that led to the state: training, waiting, evaluation, checkpoints. `images_per_second` leaves the last
    two out. `weights_sha256` (see fingerprint.py) is null until the run is finished.

    Args:
        path: The file; its folder is made.
        run_name: The run's.
        figures: Clock and last evaluation.
        bad_images: Those found.
        eval_sizes: In pixels; `top1` and `top5` are the last one's.
        resumed_from: The checkpoint that this process goes on from, or none.
        config_digest: The config's.
    """

    def __init__(
        self,
        path: Path,
        *,
        run_name: str,
        figures: Figures,
        bad_images: BadImages,
        eval_sizes: Sequence[int],
        resumed_from: Sequence[str],
        config_digest: str,
    ) -> None:
        self.path = path
        self.run_name = run_name
        self.figures = figures
        self.bad_images = bad_images
        self.eval_sizes = tuple(eval_sizes)
        self.resumed_from = list(resumed_from)
        self.config_digest = config_digest
        self._state: State | None = None
        self._versions: dict[str, str | None] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Position and device are known."""
        del logger
        self._state = state
        if dist.get_global_rank() == 0:
            self._versions = self._versions or versions(state.device.name)
        self.write()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """An epoch and its evaluation are over."""
        self.write()

    def finish(self, weights: Mapping[str, object]) -> str:
        """The run is over.

        Args:
            weights: The final model's state dict, as saved for use.

        Returns:
            Its `weights_sha256`.
        """
        digest = weights_sha256(weights)
        self.write(finished=True, weights_digest=digest)
        return digest

    def write(self, finished: bool = False, weights_digest: str | None = None) -> None:
        """Write the file; a full disk is a warning, except at the end."""
        if self._state is None or dist.get_global_rank() != 0:
            return
        text = to_json(self.content(self._state, finished, weights_digest), indent=2)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, text + "\n")
        except OSError as error:
            if finished:
                raise
            log.warning("%s cannot be written: %s; the training goes on", self.path, error)

    def content(self, state: State, finished: bool, weights_digest: str | None) -> dict[str, Any]:
        """The summary as it goes into the file."""
        seconds, working = self.figures.clock.read(), self.figures.clock.working
        evaluations = self.figures.evaluations
        main = evaluations.get(str(self.eval_sizes[-1]), {})
        samples = int(state.timestamp.sample)
        return {
            "run_name": self.run_name,
            "finished": finished,
            "epochs": int(state.timestamp.epoch),
            "batches": int(state.timestamp.batch),
            "samples": samples,
            "wall_seconds": round(sum(seconds.values()), 3),
            "images_per_second": round(samples / working, 3) if samples and working else None,
            "top1": main.get("top1"),
            "top5": main.get("top5"),
            "eval_by_size": {str(size): evaluations[str(size)] for size in self.eval_sizes if str(size) in evaluations},
            "weights_sha256": weights_digest,
            "resumed_from": self.resumed_from,
            "config_digest": self.config_digest,
            "versions": self._versions,
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
            "bad_images": self.bad_images.count,
        }

    def state_dict(self) -> dict[str, Any]:
        """The names of the checkpoints that the run went on from; a checkpoint is an occasion to write, too."""
        self.write()
        return {"resumed_from": list(self.resumed_from)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run's earlier resumes come before this process's."""
        self.resumed_from = [*map(str, state["resumed_from"]), *self.resumed_from]
