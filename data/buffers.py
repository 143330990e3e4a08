"""Shared memory for passing batches from workers to the training process, reused as soon as a batch is released.

Fresh shared memory for each batch costs a page fault every 4 kB and a descriptor sent over a socket: a sixth of all
work at 128 px. So each worker keeps a few buffers. The last byte of a buffer says whether it is in use: its worker sets
it before writing, and the training process clears it when no tensor and no view refers to the batch any more. A worker
whose buffers are all in use allocates fresh memory: it never waits, and never overwrites a batch that is in use.
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
"""A buffer is larger than needed by one part in this many: batches of a stage differ by an image, and untouched memory
costs nothing."""


class Buffer:
    """One of a worker's pieces of shared memory, with its number."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.memory = _shared_bytes(capacity + 1)
        self.bytes = self.memory.numpy()
        self.is_known = False  # whether the memory has been sent to the training process


def _shared_bytes(size: int) -> torch.Tensor:
    """Fresh shared memory, uint8 of shape (size,), allocated like in torch's default_collate."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


class Message(NamedTuple):
    """Refers to a batch sent by a worker; unpickling it gives the batch itself."""

    key: str
    place: tuple[int, int]  # number of the worker, and of its buffer
    memory: torch.Tensor | None  # the buffer, when it is sent for the first time
    shape: tuple[int, ...]  # of the images, uint8: (N, H, W, 3)
    labels: NDArray[np.int64]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _receive, tuple(self)


class SharedBuffers:
    """The buffers of a loader's workers; its dataset has one of these in each process.

    In a worker it hands out the worker's buffers, at most `per_worker` (0: workers are too short-lived to reuse one);
    in the training process it keeps received ones mapped, and releases them with the loader.
    """

    def __init__(self, per_worker: int) -> None:
        self._per_worker = per_worker
        self._key = uuid.uuid4().hex
        self._own: list[Buffer] = []
        self.received: dict[tuple[int, int], NDArray[np.uint8]] = {}
        _OPEN[self._key] = self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": [], "received": {}}

    def allocate(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, Buffer | None]:
        """Memory for images, uint8 of that shape; in a worker that has a free buffer, in it, marked as in use."""
        size = math.prod(shape)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8), None
        free = next((buffer for buffer in self._own if not buffer.bytes[-1]), None)
        if free is None and len(self._own) == self._per_worker:
            return _shared_bytes(size).view(shape), None  # so that sending needs no copy
        if free is None or len(free.bytes) <= size:
            number = len(self._own) if free is None else free.number
            free = Buffer(number, size + size // _HEADROOM)
            self._own[number : number + 1] = [free]  # replaces one that was too small, or is appended
        free.bytes[-1] = 1
        return free.memory[:size].view(shape), free

    def message(self, buffer: Buffer, shape: tuple[int, ...], labels: torch.Tensor) -> Message:
        """What a worker sends instead of a batch of that shape, whose pixels are in `buffer`."""
        memory = None if buffer.is_known else buffer.memory
        buffer.is_known = True
        worker = get_worker_info()
        assert worker is not None  # only a worker has buffers
        return Message(self._key, (worker.id, buffer.number), memory, shape, labels.numpy())


_OPEN: weakref.WeakValueDictionary[str, SharedBuffers] = weakref.WeakValueDictionary()
"""By key, which is all that unpickling has to find them by."""


def _receive(key: str, place: tuple[int, int], memory: Any, shape: tuple[int, ...], labels: NDArray[np.int64]) -> Batch:
    """In the training process, the batch of a message; its buffer becomes free when the images are released."""
    received = _OPEN[key].received
    if memory is not None:
        received[place] = memory.numpy()
    lease = received[place][: math.prod(shape)]
    # A tensor's storage, shared by all its views, holds this array, which is freed with the last of them.
    weakref.finalize(lease, _give_back, received[place], os.getpid()).atexit = False
    return torch.from_numpy(lease).view(shape).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _give_back(whole: NDArray[np.uint8], process: int) -> None:
    if os.getpid() == process:  # releasing a forked process's copy does not release the original
        whole[-1] = 0
