"""When to take a checkpoint, what goes into it, and how it is written to disk while training continues."""

from __future__ import annotations

import datetime
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from composer import Callback, Logger, State
from composer.utils import dist, reproducibility

from data.errors import DataError, InputError, StoreError
from data.files import file_sha256
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.format import encode, pack, restore, restore_generators, to_save
from recipes.checkpoints.interrupt import EXIT_NOT_UPLOADED, GRACE, Interrupt, Interrupted
from recipes.checkpoints.manifest import SUFFIX, FileEntry, Identity, Manifest, prune, publish, stem_of
from recipes.checkpoints.resume import Resume
from recipes.checkpoints.store import LocalStore, Places
from recipes.checkpoints.upload import LogMirror, Uploader
from recipes.config import RunConfig, seconds
from recipes.divergence import diverged, is_finite
from recipes.processes import on_first
from recipes.step import mean_loss

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds that training waits for the local disk before it drops a checkpoint
_LAST_LOGS = 20.0  # seconds allowed for the last copy of the logs


def parse_interval(text: str) -> tuple[float, str]:
    """Read `1ep`, `500ba`, `30s`, `10m` or `1h` as a number and `ep`, `ba` or `s`."""
    return (int(text[:-2]), text[-2:]) if text.endswith(("ep", "ba")) else (seconds(text), "s")


class Snapshot(NamedTuple):
    """A run's state at one position, serialised."""

    payload: Sequence[memoryview]  # the file's bytes, in pieces; empty on every process but the first
    about: dict[str, Any]  # the fields of its manifest, except the file

    @property
    def stem(self) -> str:
        """Name of the checkpoint."""
        return stem_of(self.about["epoch"], self.about["batch"])

    def manifest(self) -> Manifest:
        """The manifest that is stored with it."""
        digest = hashlib.sha256()
        for piece in self.payload:
            digest.update(piece)
        file = FileEntry(name=f"{self.stem}{SUFFIX}", size=sum(map(len, self.payload)), sha256=digest.hexdigest())
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Manifest(**self.about, created_at=now, files=(file,))


class Writer:
    """Writes snapshots to the run's folder, one at a time, in the background; only process 0 has one.

    A snapshot that cannot be written is logged and dropped; training continues.
    """

    def __init__(self, store: LocalStore, keep: int, resume: Resume, uploader: Uploader | None = None) -> None:
        self._store, self._keep, self._damaged, self._uploader = store, keep, set(resume.damaged), uploader
        self._thread: threading.Thread | None = None
        self._complete: dict[str, Manifest] = {}  # verified ones by stem, the newest last
        if resume.manifest is not None:
            self._completed(resume.manifest)

    def write(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot once the previous one is written; drop it if that takes too long."""
        if not self.wait():
            log.error("checkpoint %s dropped: the previous one is still being written", snapshot.stem)
        elif snapshot.stem not in self._complete:  # else it is on disk: a run's state is a function of its position
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoints", daemon=True)
            self._thread.start()

    def wait(self, patience: float = _PATIENCE) -> bool:
        """Whether nothing is left to write, after at most `patience` seconds."""
        if self._thread is not None:
            self._thread.join(patience)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Let a write in progress finish, and stop uploading."""
        self.wait()
        if self._uploader is not None:
            self._uploader.close()

    def exit_status(self, stem: str, patience: float, interrupt: Interrupt | None = None) -> int:
        """The status of a run that ends with this checkpoint, after its upload: 0, `EXIT_NOT_UPLOADED` or 1."""
        self.wait()
        if stem not in self._complete:
            return 1
        return 0 if self._uploader is None or self._uploader.wait(stem, patience, interrupt) else EXIT_NOT_UPLOADED

    def upload_now(self, stem: str, patience: float) -> tuple[bool, str]:
        """Upload a written checkpoint if there is a bucket; returns whether it is saved at all, and where, in words."""
        manifest = self._complete.get(stem)
        if manifest is None:
            return False, f"{stem} could NOT be saved"
        if self._uploader is None:
            return True, f"{stem} saved in {self._store.location}"
        if self._uploader.upload_now(manifest, patience):
            return True, f"{stem} saved in {self._uploader.location}"
        return True, f"{stem} saved in {self._store.location}, but NOT uploaded to {self._uploader.location}"

    def _write(self, snapshot: Snapshot) -> None:
        manifest = snapshot.manifest()
        put = partial(self._store.put, manifest.file.name, snapshot.payload)
        try:
            try:
                publish(self._store, manifest, put)
            except StoreError as error:
                if not self._prune(keep=1):
                    raise
                # The newest state matters most.
                log.warning("%s; retrying after removing older checkpoints", error)
                publish(self._store, manifest, put)
            if file_sha256(self._store.path(manifest.file.name)) != manifest.file.sha256:
                raise StoreError("the file differs from what was written")
        except (StoreError, OSError) as error:
            log.error("checkpoint %s could not be saved; retrying at the next interval: %s", manifest.stem, error)
            return
        log.info("saved checkpoint %s", manifest.describe())
        self._completed(manifest)
        self._prune(self._keep)

    def _completed(self, manifest: Manifest) -> None:
        self._damaged.discard(manifest.stem)
        self._complete[manifest.stem] = manifest
        if self._uploader is not None:
            self._uploader.submit(manifest)

    def _prune(self, keep: int) -> list[str]:
        protect = {*(self._uploader.pending() if self._uploader else ()), *list(self._complete)[-1:]}
        try:
            removed = prune(self._store, keep, protect=protect, ignore=self._damaged)
        except StoreError as error:
            log.warning("old checkpoints could not be removed: %s", error)
            return []
        for stem in removed:
            self._complete.pop(stem, None)
        return removed


class CheckpointManager(Callback):
    """Restores the run; saves it when due, at its end, and on an interruption. It must be the last callback.

    Training pauses while the state is copied to memory; process 0 writes it in the background. Composer's
    CheckpointSaver is not the base class, because EMA swaps in the averaged weights for it: here `model` holds the
    training weights, and EMA's state the average. `top1` returns the top-1 accuracy in [0, 1] of the evaluation that
    has just ended, if any.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        places: Places,
        identity: Identity,
        owner: Owner,
        resume: Resume,
        interrupt: Interrupt,
        top1: Callable[[State], float | None],
    ) -> None:
        saving = config.checkpoints
        self._config, self._identity, self._interrupt, self._top1 = config, identity, interrupt, top1
        self._resume = resume
        self._every, self._unit = parse_interval(saving.interval)
        self._saved_at = time.monotonic()
        self._evaluated_batch: int | None = None
        self._held: Snapshot | None = None
        self._state: State | None = None
        self._rng: list[dict[str, Any]] | None = None
        self._final: str | None = None
        self.writer: Writer | None = None  # on process 0
        self._mirror: LogMirror | None = None
        if dist.get_global_rank() == 0:
            uploader = None
            if places.remote is not None:
                self._mirror = LogMirror(places, owner)
                uploader = Uploader(places, saving.keep_remote, resume.damaged, owner, self._mirror)
            self.writer = Writer(LocalStore(places.local), saving.keep, resume, uploader)

    def before_load(self, state: State, logger: Logger) -> None:
        """Fill in the saved state when Composer would load it: after surgery, before the model is wrapped."""
        if (content := self._resume.content) is not None:
            restore(state, content["state"], logger, self._resume.resumed_from or "")
            self._rng, self._resume.content = content["rng"], None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Restore the random generators; raise InputError now, not at the first save, if a state cannot be saved."""
        if self._rng is not None:
            restore_generators(self._rng, self._resume.resumed_from or "")
        self._state = state
        for part in (*state.algorithms, *state.callbacks):
            try:
                encode(part.state_dict(), "", {})
            except TypeError as error:
                raise InputError(f"the state of {type(part).__name__} cannot be saved: {error}") from None
        # Resumed from before an evaluation: with no batch left, `batch_checkpoint` would not hold the state.
        self._held = self._snapshot(state) if _before_evaluation(state) else None

    def gate(self, ready: bool, trouble: str | DataError | None) -> bool:
        """While waiting for a loader, stop if any process was asked to or will get no batch (data/wait.py's Gate).

        No process begins a step before every process has its batch. So none waits inside a step for another's loader,
        and all are in the state after the last step. Returns whether every process has its batch. InputError, after
        saving: the data of any process cannot be used any more, such as that of a disk that was removed.
        """
        assert self._state is not None  # since fit_start; a loader is iterated within `fit` only
        stop, wait = _any_process(self._state, [self._interrupt.requested or trouble is not None, not ready])
        if stop:
            troubles = list(filter(None, dist.all_gather_object(trouble)))
            for line in troubles:
                if isinstance(line, str):
                    log.error("%s", line)
                    self._interrupt.request(line, GRACE)
            unusable = next((one for one in troubles if isinstance(one, DataError)), None)
            if int(self._state.timestamp.batch) == 0:
                if unusable is not None:
                    raise unusable
                raise Interrupted(
                    True, f"interrupted ({self._reason()}) before the first step; run the same command to start again"
                )
            self._stop(self._held or self._snapshot(self._state), unusable)
        return not wait

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """After each batch: stop if any process was asked to, save if due."""
        waited = time.monotonic() - self._saved_at
        late = self._unit == "s" and dist.get_global_rank() == 0 and waited >= self._every
        stop, late = _any_process(state, [self._interrupt.requested, late])
        due = late or (self._unit == "ba" and int(state.timestamp.batch) % self._every == 0)
        # An evaluation may follow and take minutes: keep the state from before it, in case it is interrupted.
        self._held = self._snapshot(state) if stop or due or _before_evaluation(state) else None
        if self._held is not None and stop:
            self._stop(self._held)
        if self._held is not None and due:
            self._save(self._held)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """After each batch of an evaluation within `fit`: stop if asked to, with the state from before it."""
        # All processes agree on whether there is one: `_held` is set and cleared in step.
        if self._held is not None and _any_process(state, [self._interrupt.requested])[0]:
            self._stop(self._held)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Until the next batch, the metrics belong to the current weights."""
        self._evaluated_batch = int(state.timestamp.batch)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """After each epoch and its evaluation: save if due, or at the end of the run."""
        self._held = None
        finished = state.max_duration is not None and state.timestamp >= state.max_duration
        due = self._unit == "ep" and int(state.timestamp.epoch) % self._every == 0
        if due or finished:
            snapshot = self._snapshot(state, finished=finished)
            self._final = snapshot.stem if finished else None
            self._save(snapshot)

    def finish(self) -> int:
        """After `fit`: wait until the last state is written and uploaded; the run's exit status, on all processes."""
        return on_first(self._exit_status)

    def _exit_status(self) -> int:
        if self.writer is None or self._final is None:
            return 0
        status = self.writer.exit_status(self._final, seconds(self._config.checkpoints.patience), self._interrupt)
        if status:
            where = "on this disk only, not in the bucket" if status == EXIT_NOT_UPLOADED else "NOT saved"
            log.error("the run is finished, but its last checkpoint %s is %s", self._final, where)
        return status

    def close(self, state: State, logger: Logger) -> None:
        """Let a write in progress finish, even when training failed, and copy the logs a last time."""
        if self.writer is not None:
            if self._held is not None and not self._interrupt.requested:
                self.writer.write(self._held)  # an evaluation failed: the epoch before it is not lost
            self.writer.close()
        if self._mirror is not None:
            limit = min(_LAST_LOGS, self._interrupt.seconds_left())
            self._mirror.copy_last(limit, finished=self._final is not None)

    def _snapshot(self, state: State, *, finished: bool = False) -> Snapshot:
        """The run's state, from every process; all raise DivergedError if it is not finite."""
        loss = mean_loss(state) if state.total_loss_dict else 0.0  # no step yet
        if self._config.stop_on_nan and _any_process(state, [not is_finite(state, loss)])[0]:
            raise diverged(state, loss)
        content = {"state": to_save(state.state_dict()), "rng": reproducibility.get_rng_state()}
        payload = [] if self.writer is None else pack(content)
        now = state.timestamp
        at = {"epoch": now.epoch, "batch_in_epoch": now.batch_in_epoch, "batch": now.batch, "samples": now.sample}
        about = self._identity.model_dump() | {name: int(count) for name, count in at.items()}
        about |= {"top1": self._top1(state) if self._evaluated_batch == int(now.batch) else None, "finished": finished}
        return Snapshot(payload, about)

    def _save(self, snapshot: Snapshot) -> None:
        self._saved_at = time.monotonic()
        if self.writer is not None:
            self.writer.write(snapshot)

    def _reason(self) -> str:
        return self._interrupt.reason or "another process"

    def _stop(self, held: Snapshot, unusable: DataError | None = None) -> NoReturn:
        """Save the held snapshot on process 0, and raise Interrupted, or the data's error, with the outcome on all."""
        saved, words = on_first(partial(self._save_last, held))
        again = "start again" if self._config.algorithms.not_resumable else "resume"
        then = f"; run the same command to {again}" if saved else ""
        if unusable is not None:
            raise InputError(*unusable.lines, f"{words}{then}")
        raise Interrupted(saved, f"interrupted ({self._reason()}): {words}{then}")

    def _save_last(self, held: Snapshot) -> tuple[bool, str]:
        assert self.writer is not None  # on process 0
        self._save(held)
        self.writer.wait(self._interrupt.seconds_left())
        return self.writer.upload_now(held.stem, self._interrupt.seconds_left())


def _before_evaluation(state: State) -> bool:
    """Whether the epoch's steps are done, so that an evaluation may follow."""
    return bool(state.evaluators) and int(state.timestamp.batch_in_epoch) >= len(state.dataloader)


def _any_process(state: State, flags: Sequence[bool]) -> list[bool]:
    """Each flag, true on all processes if true on any."""
    if dist.get_world_size() == 1:
        return list(flags)
    tensor = state.device.tensor_to_device(torch.tensor(flags, dtype=torch.uint8))
    dist.all_reduce(tensor, reduce_operation="MAX")
    return [bool(flag) for flag in tensor.tolist()]


def upload_finished(
    config: RunConfig, *, places: Places, owner: Owner, resume: Resume, interrupt: Interrupt, with_logs: bool
) -> bool:
    """For a finished run: upload its last state, if necessary, and its logs; returns whether the state is in place."""

    def upload() -> bool:
        if places.remote is None or resume.manifest is None:
            return True
        logs = LogMirror(places, owner) if with_logs else None
        uploader = Uploader(places, config.checkpoints.keep_remote, resume.damaged, owner, logs)
        uploader.submit(resume.manifest)
        return uploader.wait(resume.manifest.stem, seconds(config.checkpoints.patience), interrupt)

    return on_first(upload)
