"""Where a run goes on: process 0 decides, all others follow, each node has the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from composer import Algorithm
from composer.utils import dist

from recipes.checkpoints.find import Found, Identity, Search, bring, load_manifest, newest, require_same, survey
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import DamagedError, Manifest
from recipes.checkpoints.mirror import FOLDER, restore_logs
from recipes.checkpoints.patience import patiently
from recipes.checkpoints.places import Places, named
from recipes.checkpoints.s3 import S3Store
from recipes.checkpoints.spread import on_every_node
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.errors import InputError

log = logging.getLogger(__name__)

_PROBE = "write-test"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
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
    """The checkpoint's, as `read_state` gives it."""

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
) -> Resume:
    """Decide where the run goes on; every process calls it and gets the same answer.

    Args:
        places: Where the run's checkpoints lie.
        identity: Whose checkpoints count.
        algorithms: The run's own, to compare with the checkpoint's.
        autoresume: Go on from the newest checkpoint of the run.
        resume: Start from this checkpoint instead: a file or the folder that holds it, on disk or `s3://`.
        restart: Start from zero where checkpoints seem to exist but none can be used.
        patience: Seconds to wait for a bucket that is out of reach.

    Raises:
        InputError: On every process: a checkpoint of another recipe; none that can be used; a store out of reach.
    """
    local, content = LocalStore(places.local), None

    def decide() -> Resume:
        nonlocal content
        found = look()
        content = found.content  # Each process reads its own disk: 300 MB are not sent around.
        return replace(found, content=None)

    def look() -> Resume:
        if resume is not None:
            return _chosen(resume, local, identity, algorithms, patience)
        if not autoresume:
            _require_same_recipe(local, identity)
            return Resume()
        search = partial(newest, local, identity=identity, restart=restart, algorithms=algorithms)
        return _newest(search, places, restart=restart, patience=patience)

    answer = on_first(decide)
    if answer.manifest and answer.load_path and dist.get_world_size() > dist.get_local_world_size():
        answer = replace(answer, load_path=str(on_every_node(Path(answer.load_path), answer.manifest, local)))
    if answer.manifest and answer.load_path and content is None:
        try:
            content = read_state(Path(answer.load_path), answer.manifest, algorithms)
        except DamagedError as error:
            raise InputError(f"{answer.load_path}: {error}") from None
    return replace(answer, content=content)


def _newest(search: Callable[..., Search], places: Places, *, restart: bool, patience: float) -> Resume:
    """The run's own newest checkpoint of both stores; of the local one alone where the bucket stays out of reach."""
    opener = places.opener
    try:
        if opener is None:
            return _resume(search(remote=None))
        return patiently(lambda: _of_both(search, _writable(opener()), places.run_folder), patience)
    except StoreError as error:
        if opener is None or error.mistake:
            raise InputError(str(error)) from None
        reason = str(error)
    log.error("the bucket is out of reach: %s", reason)
    outcome = search(remote=None)
    if outcome.found is None and not restart:
        raise InputError(
            reason,
            f"{places.local}: no checkpoint here, and the bucket, which may hold some, is out of reach; "
            "try again later, or start from zero with checkpoints.restart=true",
        )
    log.error("going on with what is on the local disk; uploads are tried again while training runs")
    return _resume(outcome)


def _of_both(search: Callable[..., Search], store: S3Store, run_folder: Path) -> Resume:
    resume = _resume(search(remote=store))
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
    return Resume(str(found.path), found.manifest, found.location, tuple(search.skipped), found.content)


def _require_same_recipe(local: LocalStore, identity: Identity) -> None:
    """With autoresume off, do not mix two recipes' checkpoints in one folder."""
    for stem in survey(local).complete[-1:]:
        try:
            require_same(load_manifest(local, stem), identity, local.location)
        except DamagedError:
            continue


def _chosen(
    path: str, local: LocalStore, identity: Identity, algorithms: Sequence[Algorithm], patience: float
) -> Resume:
    """The checkpoint that the user named: of any run name, but of this recipe; a damaged one is refused."""
    try:
        return patiently(lambda: _take_named(path, local, identity, algorithms), patience)
    except (DamagedError, StoreError) as error:
        raise InputError(f"resume: {path}: {error}") from None


def _take_named(path: str, local: LocalStore, identity: Identity, algorithms: Sequence[Algorithm]) -> Resume:
    store, stem = named(path)
    stems = survey(store).complete
    if stem is None and stems:
        stem = stems[-1]
    if stem not in stems:
        raise InputError(f"resume: {store.location} holds no complete checkpoint{f' {stem}' if stem else ''}")
    manifest = load_manifest(store, stem)
    require_same(manifest, replace(identity, run_name=manifest.run_name), store.location)
    file = bring(store, manifest, store if isinstance(store, LocalStore) else local)
    content = read_state(file, manifest, algorithms)
    return _resume(Search(Found(manifest, file, content, f"{store.location.rstrip('/')}/{file.name}")))


def on_first(decide: Callable[[], Answer]) -> Answer:
    """Process 0's answer on every process.

    Raises:
        InputError: On every process, if it was raised on the first.
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


def _unpack(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind == "refused":
        raise InputError(*value)
    return value
