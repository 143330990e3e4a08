"""Shared memory in which workers hand batches to the training process, used again as soon as a batch is released.

Fresh shared memory for each batch costs a page fault every 4 kB and a descriptor sent over a socket: a sixth of all
work at 128 px. So each worker keeps a few buffers. The last byte of a buffer says whether it is in use: its worker sets
it before it writes, and the training process clears it when nothing refers to the batch any more, neither a tensor nor
a view of one. A worker that finds all its buffers in use takes fresh memory: it never waits, and never writes over a
batch that somebody holds.
"""

from __future__ import annotations

import math
import os
import uuid
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

Batch = tuple[torch.Tensor, torch.Tensor]

_HEADROOM = 8
"""A buffer is larger than needed by a part in this many: batches of a stage differ by an image, and memory that is
never touched costs nothing."""


def shared_bytes(size: int) -> torch.Tensor:
    """Fresh shared memory, uint8 of shape (size,), made as torch's own default_collate does."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


class Buffer:
    """One piece of a worker's shared memory, with its place among the worker's."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.memory = shared_bytes(capacity + 1)
        self.bytes = self.memory.numpy()
        self.is_known = False  # whether the training process has been sent the memory


class Message(NamedTuple):
    """A batch on its way from a worker: where it lies. Unpickled, it is the batch itself."""

    key: str
    place: tuple[int, int]  # worker, and which of its buffers
    memory: torch.Tensor | None  # the buffer, where it is sent for the first time
    shape: tuple[int, ...]  # of the images, uint8: (N, H, W, 3)
    labels: NDArray[np.int64]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _receive, tuple(self)


class SharedBuffers:
    """The buffers of one loader's workers, as its dataset holds them in each of its processes.

    In a worker it hands out the worker's buffers; in the training process it keeps those that arrived mapped, and lets
    them go with the loader. `per_worker` counts those that wait, that are filled and that the model works on; 0 where
    workers are too short-lived to use one twice.
    """

    def __init__(self, per_worker: int) -> None:
        self._per_worker = per_worker
        self._key = uuid.uuid4().hex
        self._own: list[Buffer] = []
        self._received: dict[tuple[int, int], NDArray[np.uint8]] = {}
        _OPEN[self._key] = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": [], "_received": {}}

    def take(self, size: int) -> Buffer | None:
        """A worker's buffer of at least `size` bytes, from now on in use; None where all are in use, and elsewhere."""
        if get_worker_info() is None:
            return None
        free = next((buffer for buffer in self._own if not buffer.bytes[-1]), None)
        if free is None and len(self._own) == self._per_worker:
            return None
        if free is None or len(free.bytes) <= size:
            number = len(self._own) if free is None else free.number
            free = Buffer(number, size + size // _HEADROOM)
            self._own[number : number + 1] = [free]  # the place of the one that was too small, or the next
        free.bytes[-1] = 1
        return free

    def message(self, buffer: Buffer, shape: tuple[int, ...], labels: torch.Tensor) -> Message:
        """What a worker sends in place of a batch of that shape, whose pixels are in `buffer`."""
        memory = None if buffer.is_known else buffer.memory
        buffer.is_known = True
        worker = get_worker_info()
        assert worker is not None  # only `take` in a worker gives a buffer
        return Message(self._key, (worker.id, buffer.number), memory, shape, labels.numpy())

    def receive(self, place: tuple[int, int], memory: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """In the training process, the images at a place; the buffer is free again when they are released."""
        if memory is not None:
            self._received[place] = memory.numpy()
        whole = self._received[place]
        lease = whole[: math.prod(shape)]
        # A tensor's storage, which all its views share, holds this very array: it goes with the last of them.
        weakref.finalize(lease, _give_back, whole, os.getpid()).atexit = False
        return torch.from_numpy(lease).view(shape)


_OPEN: weakref.WeakValueDictionary[str, SharedBuffers] = weakref.WeakValueDictionary()
"""By their keys: unpickling has nothing else to find them by."""


def _receive(key: str, place: tuple[int, int], memory: Any, shape: tuple[int, ...], labels: NDArray[np.int64]) -> Batch:
    return _OPEN[key].receive(place, memory, shape).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _give_back(whole: NDArray[np.uint8], process: int) -> None:
    if os.getpid() == process:  # a fork's copy of the batch says nothing about the original
        whole[-1] = 0
