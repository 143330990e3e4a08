"""Images that cannot be decoded: named, counted, and too many of them end the run."""

from __future__ import annotations

import logging
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from recipes.errors import InputError

NAMED_ON_CONSOLE = 20
POLL_BATCHES = 100
"""Batches between two looks within an epoch: a look may have to go over a byte per image."""

log = logging.getLogger(__name__)


class BadImages(Callback):
    """Asks the loaders' datasets for images that they could not decode and replaced.

    A dataset may have `bad`, with `new() -> list[BadSample]` (data/source.py): those not told before.
    They are asked every 100 batches and at the end of each epoch and evaluation; several processes then exchange what
    they found, so that all count the same and all end together.

    Args:
        max_bad_fraction: Share of a split, in [0, 1], above which the run fails.

    Attributes:
        found: Name and reason of each bad image of a split (`train` or `val`), over all processes and resumes.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.found: dict[str, dict[str, str]] = {}

    @property
    def count(self) -> int:
        """Bad images found so far, each counted once."""
        return sum(len(names) for names in self.found.values())

    def batch_end(self, state: State, logger: Logger) -> None:
        """Every now and then."""
        del logger
        if int(state.timestamp.batch) % POLL_BATCHES == 0:
            self._look("train", state.train_dataloader)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """After the last batch."""
        del logger
        self._look("train", state.train_dataloader)

    def eval_end(self, state: State, logger: Logger) -> None:
        """After each evaluator; those of several sizes read the same images."""
        del logger
        self._look("val", state.dataloader)

    def state_dict(self) -> dict[str, Any]:
        """What was found, as plain text."""
        return {"found": {split: dict(names) for split, names in self.found.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
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
        fresh = {name: reason for name, reason in met.items() if name not in known}
        if not fresh:
            return
        for name in sorted(fresh):
            self._name(split, name, fresh[name])
            known[name] = fresh[name]
        total = len(loader.dataset)
        if len(known) > self.max_bad_fraction * total:
            last = max(fresh)
            raise InputError(
                f"data.max_bad_fraction: {len(known)} of {total} images of {split} cannot be decoded, more than the "
                f"share of {self.max_bad_fraction:g} that is allowed; one of them: {last}: {fresh[last]}"
            )

    def _name(self, split: str, name: str, reason: str) -> None:
        if dist.get_global_rank() != 0:
            return
        before = self.count
        extra = {"file_only": before >= NAMED_ON_CONSOLE}
        log.warning("bad image in %s, replaced: %s: %s", split, name, reason, extra=extra)
        if before + 1 == NAMED_ON_CONSOLE:
            log.warning("further bad images are named in log.txt only")
