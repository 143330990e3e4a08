"""The parts that save a run, put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from composer import State
from composer.utils import dist

from recipes.checkpoints.find import Identity
from recipes.checkpoints.interrupt import Interrupt
from recipes.checkpoints.mirror import FOLDER, Mirror
from recipes.checkpoints.owner import Owner
from recipes.checkpoints.places import Places
from recipes.checkpoints.resume import Resume
from recipes.checkpoints.s3 import open_s3
from recipes.checkpoints.save import Checkpoints
from recipes.checkpoints.store import LocalStore
from recipes.checkpoints.upload import Uploader
from recipes.checkpoints.write import Writer

DISK_PATIENCE = 60.0
"""Seconds that training waits for the local disk before it drops a checkpoint."""


def build_checkpoints(
    *,
    places: Places,
    interval: str,
    keep: int,
    keep_remote: int,
    patience: float,
    identity: Identity,
    owner: Owner,
    resume: Resume,
    interrupt: Interrupt,
    top1: Callable[[State], float | None],
    stop_on_nan: bool = True,
) -> Checkpoints:
    """The callback that saves a run, on every process; list it after all other callbacks.

    Args:
        places: Where the run's checkpoints lie.
        interval: Time between two of them: `1ep`, `500ba`, `30s`, `10m`, `1h`.
        keep: How many of the newest stay on disk.
        keep_remote: How many of the newest stay in the bucket.
        patience: Seconds that the end of a run waits for its last upload.
        identity: Whose checkpoints these are.
        owner: Who may write to the bucket.
        resume: From where the run goes on.
        interrupt: Says whether the process was asked to stop.
        top1: Reads the top-1 accuracy in [0, 1] of the evaluation that has just ended, if there is one.
        stop_on_nan: End the run where a state that is to be saved is not finite.
    """
    writer, mirror = None, None
    if dist.get_global_rank() == 0:
        local, uploader = LocalStore(places.local), None
        if places.remote is not None:
            mirror = Mirror(
                places.run_folder,
                places.local,
                open_s3(f"{places.remote}/{FOLDER}"),
                may_copy=lambda: not owner.superseded,
            )
            mirror.start()
            uploader = _uploader(places.remote, local, keep_remote, resume, owner, mirror.sync)
        writer = Writer(local, identity, keep, verified=resume.manifest, damaged=resume.damaged, uploader=uploader)
    return Checkpoints(
        interval=interval,
        writer=writer,
        mirror=mirror,
        interrupt=interrupt,
        top1=top1,
        goes_on=resume.resumable,
        disk_patience=DISK_PATIENCE,
        upload_patience=patience,
        resume=resume,
        stop_on_nan=stop_on_nan,
    )


def settle(*, places: Places, keep_remote: int, patience: float, owner: Owner, resume: Resume) -> bool:
    """For a run that had finished before: bring its last state to the bucket if it is not there yet.

    Args:
        places: Where the run's checkpoints lie.
        keep_remote: How many of the newest stay in the bucket.
        patience: Seconds to wait for the upload.
        owner: Who may write to the bucket.
        resume: What was found.

    Returns:
        Whether the last state is where it belongs; the same on all processes.
    """
    done = [True]
    if dist.get_global_rank() == 0 and places.remote is not None and resume.manifest is not None:
        assert resume.load_path is not None  # it comes with the manifest
        local = LocalStore(Path(resume.load_path).parent)
        uploader = _uploader(places.remote, local, keep_remote, resume, owner, before=lambda: None)
        uploader.start()
        uploader.offer(resume.manifest)
        done = [uploader.wait(resume.manifest.stem, patience)]
    dist.broadcast_object_list(done, src=0)
    return done[0]


def _uploader(
    remote: str, local: LocalStore, keep: int, resume: Resume, owner: Owner, before: Callable[[], None]
) -> Uploader:
    return Uploader(local, open_s3(remote), remote, keep, damaged=resume.damaged, owner=owner, before=before)
