"""When to take a checkpoint, and what goes into it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from composer import Callback, Logger, State
from composer.utils import dist, reproducibility

from recipes.checkpoints.format import pack, restore, restore_generators, to_save
from recipes.checkpoints.interrupt import EXIT_NOT_UPLOADED, GRACE, Interrupt, Interrupted
from recipes.checkpoints.manifest import Position
from recipes.checkpoints.mirror import Mirror
from recipes.checkpoints.patience import seconds
from recipes.checkpoints.resume import Resume
from recipes.checkpoints.write import Snapshot, Writer
from recipes.divergence import diverged, is_finite
from recipes.errors import InputError

log = logging.getLogger(__name__)


_LAST_LOGS = 20.0
"""Seconds that the last copy of the logs may take."""


class Interval(NamedTuple):
    """Time between two checkpoints: `value` epochs (`ep`), batches (`ba`) or seconds (`s`)."""

    value: int
    unit: str

    @classmethod
    def of(cls, text: str) -> Interval:
        """Read `1ep`, `500ba`, `30s`, `10m` or `1h`."""
        if text.endswith(("ep", "ba")):
            return cls(int(text[:-2]), text[-2:])
        return cls(int(seconds(text)), "s")


class Checkpoints(Callback):
    """Restores the run, and saves it when it is due, at its end, and when it is interrupted; list it after all others.

    The state is copied to memory while training stands still; process 0 writes it in the background. Composer's own
    CheckpointSaver is not its base, because EMA swaps the averaged weights in for that one: here `model` holds the
    training weights, and EMA's state the average.

    Args:
        interval: `1ep`, `500ba`, `30s`, `10m`, `1h`.
        writer: Writes snapshots; None on every process but the first.
        mirror: Copies the logs to the bucket, if there is one; on the first process.
        interrupt: Says whether the process was asked to stop.
        top1: Reads the top-1 accuracy in [0, 1] of the evaluation that has just ended, if there is one.
        goes_on: Whether the same command goes on from an interruption.
        disk_patience: Seconds that training waits for the disk before it drops a checkpoint.
        upload_patience: Seconds that the end of a run waits for its last upload.
        resume: The checkpoint that the run goes on from.
        stop_on_nan: End the run where a state that is to be saved is not finite.
    """

    def __init__(
        self,
        *,
        interval: str,
        writer: Writer | None,
        mirror: Mirror | None,
        interrupt: Interrupt,
        top1: Callable[[State], float | None],
        goes_on: bool,
        disk_patience: float,
        upload_patience: float,
        resume: Resume,
        stop_on_nan: bool,
    ) -> None:
        self._interval = Interval.of(interval)
        self._writer = writer
        self._mirror = mirror
        self._interrupt = interrupt
        self._top1 = top1
        self._goes_on = goes_on
        self._disk_patience = disk_patience
        self._upload_patience = upload_patience
        self._stop_on_nan = stop_on_nan
        self._saved_at = time.monotonic()
        self._evaluated_batch: int | None = None
        self._held: Snapshot | None = None
        self._state: State | None = None
        self._resume = resume
        self._rng: list[dict[str, Any]] | None = None
        self._final: str | None = None

    def before_load(self, state: State, logger: Logger) -> None:
        """Fill in the saved state where Composer would load it: after surgery, before the model is wrapped."""
        if (content := self._resume.content) is not None:
            restore(state, content["state"], logger, self._resume.resumed_from or "")
            self._rng, self._resume.content = content["rng"], None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Restore the random number generators.

        Raises:
            InputError: A part's state cannot be saved: told now, and not when the first checkpoint is due.
        """
        del logger
        if self._rng is not None:
            restore_generators(self._rng, self._resume.resumed_from or "")
        self._state = state
        for part in (*state.algorithms, *state.callbacks):
            try:
                pack(part.state_dict())
            except TypeError as error:
                raise InputError(f"the state of {type(part).__name__} cannot be saved: {error}") from None

    def gate(self, ready: bool, trouble: str | None) -> bool:
        """While a loader is waited for: stop if any process was asked to, or will get no batch (data/wait.py's Gate).

        No process begins a step before each has its batch. So nowhere does one wait inside a step for another's loader,
        and the state of all is that after the last step.

        Returns:
            Whether every process has its batch.
        """
        assert self._state is not None  # since fit_start; a loader is iterated within `fit` only
        stop, wait = agree(self._state, [self._interrupt.requested or trouble is not None, not ready])
        if stop:
            for line in filter(None, dist.all_gather_object(trouble)):
                log.error("%s", line)
                self._interrupt.request(line, GRACE)
            if int(self._state.timestamp.batch) == 0:
                reason = self._interrupt.reason or "another process"
                raise Interrupted(True, f"interrupted ({reason}) before the first step; the same command begins again")
            self._stop(self._held or self._snapshot(self._state))
        return not wait

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After each batch: stop if any process was asked to, save if it is time."""
        del logger
        stop, late = agree(state, [self._interrupt.requested, self._late()])
        batch = int(state.timestamp.batch)
        due = late or (self._interval.unit == "ba" and batch % self._interval.value == 0)
        # An evaluation may follow and take minutes: keep the state from before it, to save if interrupted in it.
        hold = bool(state.evaluators) and _is_last_of_epoch(state)
        self._held = self._snapshot(state) if stop or due or hold else None
        if self._held is None:
            return
        if stop:
            self._stop(self._held)
        if due:
            self._save(self._held)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """After each batch of an evaluation within `fit`: stop with the state from before it."""
        del logger
        # The flag of a moment is the same on all processes: `_held` is set and cleared in step.
        if self._held is not None and agree(state, [self._interrupt.requested])[0]:
            self._stop(self._held)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """The metrics are those of these weights until the next batch."""
        del logger
        self._evaluated_batch = int(state.timestamp.batch)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """After each epoch and its evaluation: save if it is time, or the end."""
        del logger
        self._held = None
        finished = state.max_duration is not None and state.timestamp >= state.max_duration
        due = self._interval.unit == "ep" and int(state.timestamp.epoch) % self._interval.value == 0
        if due or finished:
            snapshot = self._snapshot(state, finished=finished)
            self._final = snapshot.stem if finished else None
            self._save(snapshot)

    def finish(self) -> int:
        """After `fit`: wait until the last state is written and uploaded.

        Returns:
            The exit status, the same on all processes: 0, `EXIT_NOT_UPLOADED`, or 1 where it is not on disk either.
        """
        status = [0]
        if self._writer is not None and self._final is not None:
            self._writer.wait(self._disk_patience)
            status = [self._writer.deliver(self._final, self._upload_patience)]
            if status[0]:
                where = "on this disk only" if status[0] == EXIT_NOT_UPLOADED else "NOT saved"
                log.error("the run is finished, but its last state %s is not where it belongs: %s", self._final, where)
        dist.broadcast_object_list(status, src=0)
        return status[0]

    def close(self, state: State, logger: Logger) -> None:
        """Let a write that has begun end, also when training failed, and copy the last logs."""
        del state, logger
        if self._writer is not None:
            self._writer.close(self._disk_patience)
        if self._mirror is not None:
            limit = min(_LAST_LOGS, self._interrupt.seconds_left())
            self._mirror.close(limit, finished=self._final is not None)

    def _late(self) -> bool:
        return (
            self._interval.unit == "s"
            and dist.get_global_rank() == 0
            and time.monotonic() - self._saved_at >= self._interval.value
        )

    def _snapshot(self, state: State, *, finished: bool = False) -> Snapshot:
        """The run's state; every process takes part, and only the first one's holds bytes.

        Raises:
            DivergedError: On every process: it is not worth keeping.
        """
        if self._stop_on_nan and agree(state, [not is_finite(state)])[0]:
            raise diverged(state)
        content = self._content(state)
        payload = [] if self._writer is None else pack(content)
        time_ = state.timestamp
        position = Position(int(time_.epoch), int(time_.batch_in_epoch), int(time_.batch), int(time_.sample))
        evaluated = self._evaluated_batch == position.batch
        return Snapshot(payload, position, dist.get_world_size(), self._top1(state) if evaluated else None, finished)

    def _content(self, state: State) -> dict[str, Any]:
        """What a checkpoint holds; every process takes part."""
        return {"state": to_save(state.state_dict()), "rng": reproducibility.get_rng_state()}

    def _save(self, snapshot: Snapshot) -> None:
        self._saved_at = time.monotonic()
        if self._writer is not None:
            self._writer.put(snapshot, self._disk_patience)

    def _stop(self, held: Snapshot) -> None:
        """Save the held snapshot on process 0, tell the others how that went, and raise on all."""
        outcome: list[Any] = [None]
        if self._writer is not None:
            self._save(held)
            self._writer.wait(self._interrupt.seconds_left())
            saved, words = self._writer.leave(held.stem, self._interrupt.seconds_left())
            then = f"; the same command {'goes on' if self._goes_on else 'begins anew'}" if saved else ""
            outcome = [(saved, f"interrupted ({self._interrupt.reason or 'another process'}): {words}{then}")]
        dist.broadcast_object_list(outcome, src=0)
        raise Interrupted(*outcome[0])


def agree(state: State, flags: Sequence[bool]) -> list[bool]:
    """Each flag, true on all processes if it is on any."""
    if dist.get_world_size() == 1:
        return list(flags)
    tensor = state.device.tensor_to_device(torch.tensor(flags, dtype=torch.uint8))
    dist.all_reduce(tensor, reduce_operation="MAX")
    return [bool(flag) for flag in tensor.tolist()]


def _is_last_of_epoch(state: State) -> bool:
    return int(state.timestamp.batch_in_epoch) >= len(state.dataloader)
