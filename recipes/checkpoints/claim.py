"""One run, one owner: a lock on the run's folders, and a note in its bucket that the owner keeps renewing."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import InputError, StoreError
from recipes.checkpoints.store import Places, S3Store
from recipes.processes import on_first

log = logging.getLogger(__name__)

NOTE, _NEVER_THERE = ".owner", ".nothing"
RENEWED_EVERY = 20.0  # seconds between two renewals of the note in the bucket
DEAD_AFTER = 90.0  # seconds without a renewal after which the note's owner counts as dead
_LAST = 2.0  # seconds allowed for removing the note from the bucket


class Owner:
    """Makes this run's processes its only owner during `with`; every process enters it, the first one acts.

    On a disk the owner holds a POSIX lock, which the system releases when the process dies in any way, and which
    children do not inherit. A bucket has no locks: it holds a note with the owner's name, renewed by a thread. An owner
    that finds another's note there, because both started at once or the bucket could not be reached, is superseded: it
    continues training, and copies nothing more to the bucket. `with` raises InputError, on every process, if another
    owner is alive, the run's folder cannot be created, or the bucket refuses writing or deleting.
    """

    def __init__(self, places: Places, run_name: str) -> None:
        self._places, self._run_name = places, run_name
        self._locks: list[int] = []
        self._me = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": _machine(),
            "started": _started(os.getpid()),
        }
        self._holds = False  # whether the note in the bucket has been ours
        self._predecessor: object = self._me["id"]
        """The id of the dead owner's note that ours replaced; a slow store may still store that one after ours."""
        self.superseded = False  # whether the bucket now belongs to another owner
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="owner", daemon=True)

    def __enter__(self) -> Owner:
        try:
            on_first(self._claim)
        except InputError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_LAST)
        for descriptor in self._locks:
            os.close(descriptor)

    def _claim(self) -> None:
        folders = {self._places.run_folder, self._places.local}
        for folder in sorted(folder for folder in folders if not folders & set(folder.parents)):
            self._lock(folder)
        if self._places.remote is not None:
            try:
                self._claim_bucket(S3Store(self._places.remote))
            except StoreError as error:
                if error.mistake:  # to be mended now, not when the first upload fails
                    raise
                log.warning("%s; who owns the run there will be checked again later", error)
            self._thread.start()

    def _lock(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / NOTE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written to: {error.strerror or error}") from None
        self._locks.append(descriptor)
        deadline = time.monotonic() + DEAD_AFTER
        while (refused := _lock_error(descriptor)) is not None:
            other = _parsed(os.pread(descriptor, 4096, 0))
            if refused not in (errno.EACCES, errno.EAGAIN) and not _lives(other):
                log.warning(
                    "%s: does not support locks (%s); do not start this run twice", folder, os.strerror(refused)
                )
                break
            # On a shared disk, the server releases a dead machine's lock only after some time.
            elsewhere = _boot(other) not in (None, _boot(self._me))
            if not elsewhere or time.monotonic() > deadline:
                raise InputError(self._refusal(other, str(folder)))
            time.sleep(1.0)
        with suppress(OSError):  # a full disk: only the lock matters
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(self._me).encode(), 0)

    def _claim_bucket(self, store: S3Store) -> None:
        """Put our note into the bucket once the owner of the existing note is certainly dead; else raise InputError."""
        store.delete([_NEVER_THERE])  # refused if the credentials may not remove what is old
        last = None
        while (found := _read(store)) is not None and not _is_dead(*found):
            other, age = found
            if _lives(other) or (last is not None and (other != last[0] or age < last[1])):
                raise InputError(self._refusal(other, store.location))
            if last is None:
                text = "%s: owned by process %s on %s, %.0f s ago; waiting up to %.0f s to see whether it is alive"
                log.warning(text, store.location, other.get("pid"), other.get("host"), age, DEAD_AFTER - age)
            last = found
            time.sleep(1.0)
        self._predecessor = self._me["id"] if found is None else found[0].get("id")
        self._write(store)
        found = _read(store)
        if found is not None and self._is_foreign(found[0]):  # both started at once
            raise InputError(self._refusal(found[0], store.location))

    def _is_foreign(self, note: dict[str, Any]) -> bool:
        # A note without an id is one whose upload was cut off, and some stores keep that part. Perhaps it was ours.
        return "id" in note and note["id"] not in (self._me["id"], self._predecessor)

    def renew(self, store: S3Store) -> None:
        """Renew our note, or notice that another's has replaced it; `StoreError` if the bucket fails."""
        found = _read(store)
        if found is not None and self._is_foreign(found[0]) and (self._holds or not _is_dead(*found)):
            if not self.superseded:
                log.error("%s; nothing more will be copied there", self._refusal(found[0], store.location))
            self.superseded = True
            return
        self._write(store)

    def _renew_until_stopped(self) -> None:
        store: S3Store | None = None
        while not self.superseded:
            stopped = self._stopped.wait(RENEWED_EVERY)
            self._me["released"] = stopped
            try:
                store = store or S3Store(str(self._places.remote))
                if self._holds or not stopped:
                    self.renew(store)
            except (StoreError, FileNotFoundError) as error:
                log.debug("the owner's note could not be renewed: %s", error)
                store = None  # the next client reads credentials again
            if stopped:
                return

    def _write(self, store: S3Store) -> None:
        store.put(NOTE, json.dumps(self._me).encode())
        self._holds = True

    def _refusal(self, other: dict[str, Any], where: str) -> str:
        who = f"process {other.get('pid', '?')} on {other.get('host', '?')}, since {other.get('since', '?')}"
        then = "wait for it to end, or choose another run_name"
        return f"{where}: another process is training {self._run_name} ({who}); {then}"


def _read(store: S3Store) -> tuple[dict[str, Any], float] | None:
    """The note in the bucket, and its age in seconds by the bucket's clock; None if there is none."""
    with suppress(FileNotFoundError):
        text, age = store.read_with_age(NOTE)
        return _parsed(text), age
    return None


def _parsed(text: bytes) -> dict[str, Any]:
    """Parse a note, which anybody may have written: a few short texts and numbers."""
    known: dict[str, Any] = {}
    with suppress(ValueError, RecursionError, AttributeError):  # not JSON, or not an object
        for name, value in json.loads(text[:4096]).items():
            if isinstance(value, str):
                known[name] = ascii(value)[1:-1][:80]
            elif isinstance(value, int) and abs(value) < 2**63:
                known[name] = value
    return known


def _machine() -> str | None:
    """Identifies this boot of this machine and this container's process namespace; None: not known on this system."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116
    except OSError:
        return None


def _boot(note: dict[str, Any]) -> str | None:
    """The part of a note's machine that all of its containers share."""
    machine = note.get("machine")
    return machine.split("/")[0] if isinstance(machine, str) else None


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if there is no such process, or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def _lock_error(descriptor: int) -> int | None:
    """Lock a file; None if it is now ours, else the error number."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return None


def _is_dead(other: dict[str, Any], age: float) -> bool:
    """Whether the owner that wrote a note `age` seconds ago is dead."""
    lives = _lives(other)
    return bool(other.get("released")) or (age > DEAD_AFTER if lives is None else not lives)


def _lives(other: dict[str, Any]) -> bool | None:
    """Whether a note's process, not this one, is alive; None if it is on another machine or in another container."""
    if _machine() is None or other.get("machine") != _machine():
        return None
    pid = other.get("pid")
    started = _started(pid) if isinstance(pid, int) else None
    return started is not None and started == other.get("started") and pid != os.getpid()
