"""The checkpoint that process 0 chose, on the disk of every node: those that lack it get it over the network."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from composer.utils import dist

from recipes.checkpoints.find import adopt
from recipes.checkpoints.manifest import DamagedError, Manifest, verify
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.errors import InputError

_CHUNK = 32 * 2**20
"""Bytes of a message: a checkpoint need not fit a device's memory twice."""


def on_every_node(first: Path, manifest: Manifest, local: LocalStore) -> Path:
    """Have a checkpoint on each node; every process calls it.

    It comes from process 0 and not from the bucket, where it may not have arrived: what a node's death interrupts is
    often an upload, and the newest checkpoint is then on the disk of process 0 alone.

    Args:
        first: The verified file of process 0.
        manifest: The checkpoint's.
        local: The run's folder on this node.

    Returns:
        Where this node has it.

    Raises:
        InputError: On every process: a node cannot write it.
    """
    leader = dist.get_local_rank() == 0
    here = _at_hand(first, manifest, local) if leader else None
    if any(dist.all_gather_object(leader and here is None)):
        here, complaint = _received(first, here, manifest, local, wanted=leader and here is None)
        if lines := [line for line in dist.all_gather_object(complaint) if line]:
            raise InputError(*lines)
    node, places = dist.get_node_rank(), dist.all_gather_object((dist.get_node_rank(), here))
    return next(path for where, path in places if where == node and path is not None)


def _at_hand(first: Path, manifest: Manifest, local: LocalStore) -> Path | None:
    """Where this node has the file already."""
    if dist.get_global_rank() == 0:
        return first
    path = local.path(manifest.files[0].name)
    with suppress(DamagedError, StoreError, OSError):
        verify(path, manifest.files[0])
        return path
    return None


def _received(
    first: Path, here: Path | None, manifest: Manifest, local: LocalStore, *, wanted: bool
) -> tuple[Path | None, str | None]:
    """Send process 0's file to all, of whom those keep it that want it: (where it is now, what went wrong)."""
    fetched = local.path(f".{manifest.files[0].name}.fetched") if wanted else None
    complaint = _transfer(first if dist.get_global_rank() == 0 else None, fetched)
    if fetched is None:
        return here, complaint
    try:
        return (adopt(fetched, manifest, local), None) if complaint is None else (None, complaint)
    except (DamagedError, StoreError) as error:
        return None, f"{manifest.stem}: {error}"
    finally:
        with suppress(OSError):
            fetched.unlink(missing_ok=True)


def _transfer(source: Path | None, target: Path | None) -> str | None:
    """Copy a file from process 0, which alone has a `source`, to every process with a `target`; what went wrong here.

    All take part to the end, whatever happens to one of them, as none may wait for another for ever.
    """
    complaint = None
    with ExitStack() as files:
        try:
            reader = files.enter_context(source.open("rb")) if source else None
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
            writer = files.enter_context(target.open("wb", buffering=0)) if target else None
        except OSError as error:
            reader, writer, complaint = None, None, str(error)
        while True:
            chunk = [b""]
            try:
                chunk = [reader.read(_CHUNK) if reader else b""]
            except OSError as error:
                complaint = str(error)
            dist.broadcast_object_list(chunk, src=0)
            if not chunk[0]:
                return complaint
            try:
                if writer:
                    writer.write(chunk[0])
            except OSError as error:
                writer, complaint = None, str(error)
