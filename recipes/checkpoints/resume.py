"""Where a run goes on: process 0 decides, all others follow, each node has the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from composer import Algorithm
from composer.utils import dist

from recipes.checkpoints.begin import Named, begin, begins_anew, how_it_begins
from recipes.checkpoints.find import Identity, Search, newest, survey
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import DamagedError, Manifest
from recipes.checkpoints.mirror import FOLDER, restore_logs
from recipes.checkpoints.patience import patiently
from recipes.checkpoints.places import Places
from recipes.checkpoints.s3 import S3Store
from recipes.checkpoints.spread import on_every_node
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.errors import InputError

log = logging.getLogger(__name__)

_PROBE = "write-test"
Answer = TypeVar("Answer")


@dataclass
class Resume:
    """From where a run goes on."""

    load_path: str | None = None
    """The verified checkpoint on this node's disk; None: from zero."""
    manifest: Manifest | None = None
    resumed_from: str | None = None
    """Where the checkpoint was found, for people."""
    damaged: tuple[str, ...] = ()
    """Stems that were passed over."""
    content: dict[str, Any] | None = field(default=None, repr=False)
    """The checkpoint's, as `read_state` gives it; None once `Checkpoints` has restored it, as it is large."""
    resumable: bool = True
    """Whether the same command can go on after an interruption."""

    @property
    def finished(self) -> bool:
        """Whether the run has nothing left to train."""
        return self.manifest is not None and self.manifest.finished

    @property
    def verified(self) -> str | None:
        """Stem of the checkpoint."""
        return None if self.manifest is None else self.manifest.stem


def find_resume(
    *,
    places: Places,
    identity: Identity,
    algorithms: Sequence[Algorithm],
    autoresume: bool,
    resume: str | None,
    restart: bool,
    patience: float,
    resumable: bool = True,
) -> Resume:
    """Decide where the run goes on; every process calls it and gets the same answer.

    Args:
        places: Where the run's checkpoints lie.
        identity: Whose checkpoints count.
        algorithms: The run's own, to compare with the checkpoint's.
        autoresume: Go on from the newest checkpoint of the run; off: only if the run began with this off.
        resume: Begin with this checkpoint: a file or the folder that holds it, on disk or `s3://`.
        restart: Start from zero where checkpoints seem to exist but none can be used.
        patience: Seconds to wait for a bucket that is out of reach.
        resumable: Whether the run's algorithms can go on; if not, autoresume must be off, and it begins anew each time.

    Raises:
        InputError: On every process: a checkpoint of another recipe; none that can be used; a store out of reach.
    """
    local, how, content = LocalStore(places.local), how_it_begins(autoresume, resume), None

    def search(remote: S3Store | None) -> Resume:
        anew = begins_anew([local] if remote is None else [local, remote], how, resumable=resumable)
        chosen = _chosen(resume, identity, algorithms, patience) if anew and resume is not None else None
        try:
            begin(local, remote, how, identity, anew=anew, restart=restart, named=chosen)
        except DamagedError as error:
            raise InputError(f"resume: {resume}: {error}") from None
        return _resume(newest(local, remote, identity, restart=restart, algorithms=algorithms))

    def look() -> Resume:
        if (opener := places.opener) is None:
            return search(None)
        try:
            return patiently(lambda: _of_both(search, _writable(opener()), places.run_folder), patience)
        except StoreError as error:
            if error.mistake:
                raise
            log.error("the bucket is out of reach: %s", error)
            reason = str(error)
        if not restart and (begins_anew([local], how, resumable=resumable) or not survey(local).complete):
            raise InputError(
                reason,
                f"{places.local}: no checkpoint here, and the bucket, which may hold some, is out of reach; "
                "try again later, or start from zero with checkpoints.restart=true",
            )
        log.error("going on with what is on the local disk; uploads are tried again while training runs")
        return search(None)

    def decide() -> Resume:
        nonlocal content
        found = look()
        content = found.content  # Each process reads its own disk: 300 MB are not sent around.
        return replace(found, content=None)

    answer = on_first(decide)
    if answer.manifest and answer.load_path and dist.get_world_size() > dist.get_local_world_size():
        answer = replace(answer, load_path=str(on_every_node(Path(answer.load_path), answer.manifest, local)))
    return replace(answer, content=content or _read_here(answer, algorithms), resumable=resumable)


def _read_here(answer: Resume, algorithms: Sequence[Algorithm]) -> dict[str, Any] | None:
    """The chosen checkpoint's content, from this node's disk."""
    if answer.manifest is None or answer.load_path is None:
        return None
    try:
        return read_state(Path(answer.load_path), answer.manifest, algorithms)
    except DamagedError as error:
        raise InputError(f"{answer.load_path}: {error}") from None


def _of_both(search: Callable[[S3Store | None], Resume], store: S3Store, run_folder: Path) -> Resume:
    resume = search(store)
    if resume.load_path is not None and (fetched := restore_logs(run_folder, store.below(FOLDER))):
        log.info("fetched the logs of the run: %s", ", ".join(fetched))
    return resume


def _writable(store: S3Store) -> S3Store:
    """Find out before training, not at the first save, that uploads are not allowed; a full store may get room yet.

    Raises:
        StoreError: Writing is refused for a reason that waiting does not mend.
    """
    try:
        store.put(_PROBE, b"may this run write here?")
        store.delete([_PROBE])
    except StoreError as error:
        if error.mistake:
            raise
        log.error("the bucket does not take uploads now: %s", error)
    return store


def _resume(search: Search) -> Resume:
    if search.found is None:
        return Resume(damaged=tuple(search.skipped))
    found = search.found
    log.info("going on from %s at %s", found.manifest.describe(), found.location)
    return Resume(str(found.path), found.manifest, found.location, tuple(search.skipped), content=found.content)


def _chosen(path: str, identity: Identity, algorithms: Sequence[Algorithm], patience: float) -> Named:
    """The checkpoint that the user named."""
    try:
        return patiently(lambda: Named.of(path, identity, algorithms), patience)
    except (DamagedError, StoreError) as error:
        raise InputError(f"resume: {path}: {error}") from None


def on_first(decide: Callable[[], Answer]) -> Answer:
    """Process 0's answer on every process.

    Raises:
        InputError: On every process, if it or StoreError was raised on the first.
    """
    outcome: list[Any] = [None]
    if dist.get_global_rank() == 0:
        outcome = [_attempt(decide)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    answer: Answer = _unpack(outcome[0])
    return answer


def _attempt(action: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", action()
    except InputError as error:
        return "refused", error.lines
    except StoreError as error:
        return "refused", (str(error),)


def _unpack(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind == "refused":
        raise InputError(*value)
    return value
