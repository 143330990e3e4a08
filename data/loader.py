"""DataLoaders whose workers each fill a uint8 batch, and in which every batch is a function of its position."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from typing_extensions import NotRequired, TypedDict, Unpack

from data.augment import Color, apply_color_and_erasing, eval_picture, maybe_flip, train_picture
from data.buffers import Batch, Message, SharedBuffers
from data.config import AugmentConfig
from data.decode import BadImage, Encoded, fault_of
from data.errors import DataError
from data.sampler import EvalSampler, PositionSampler, Request
from data.source import FaultTable, Source
from data.text import guard
from data.wait import WaitingLoader

Pixels = NDArray[np.uint8]  # RGB, of shape (size, size, 3)
ImageTransform = Callable[[Image.Image], Image.Image]
MakePicture = Callable[[Encoded, Request, int, "Pixels | None"], Pixels]
"""(encoded image, request, key of `Request`, out) -> picture, maybe in `out`; raises BadImage."""

IGNORED_LABEL = -100
"""Label of an evaluation image that cannot be decoded: torch's default `ignore_index`, to be excluded from metrics."""

_TRIES = 100  # replacements tried for a bad training image before the dataset is considered unusable
_NOTHING = -1
_NAMED = 4  # how many files to name if several workers hang
_BEYOND_PREFETCH = 2  # buffers of a worker besides its prefetched batches: one being filled, and one used by the model


class Loading(TypedDict):
    """How batches are loaded, which does not change their content."""

    workers: int  # worker processes; 0: load in this process
    prefetch_factor: int  # batches that each worker prepares ahead
    pin_memory: bool  # copy batches to page-locked memory, for transfers to a GPU
    limit: NotRequired[float | None]  # seconds to wait for a batch; None: forever


class BatchDataset(Dataset[Batch]):
    """A source's images as batches: `__getitems__(request)` fills one tensor.

    `bad` has the bad images found so far, in any process of the loader. `seed` chooses their replacements; with None
    they become black images with the label -100. Each of the `workers` keeps that many `buffers`.
    """

    def __init__(self, source: Source, picture: MakePicture, seed: int | None, workers: int, buffers: int) -> None:
        self.source = source
        self.bad = FaultTable(source)
        self._picture = picture
        self._seed = seed
        self._buffers = SharedBuffers(buffers)
        self._read_now = torch.full((max(workers, 1),), _NOTHING).share_memory_()
        """What each worker is reading, written in advance because a hanging worker cannot be asked."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, request: Request) -> Batch | Message:
        """Load a batch; in a worker, as a message that becomes the batch when received.

        Images are uint8 (N, 3, size, size) in channels_last memory, or smaller if a transform drops rows and columns;
        labels int64 (N,).
        """
        keys = request.indices.tolist()
        indices = [key % len(self) for key in keys]  # without the copy's number, see `Request`
        labels = torch.empty(len(indices), dtype=torch.int64)
        worker = get_worker_info()
        slot = self._read_now.numpy()[0 if worker is None else worker.id :]
        slot[0] = indices[0]  # a reader may fetch the whole batch
        reader = self.source.reader(request.size, [index for index in indices if not self.bad.faults[index]])

        def read(index: int) -> Encoded:
            slot[0] = index
            return reader(index)

        first, labels[0] = self._load(keys[0], request, read, None)
        images, buffer = self._buffers.allocate((len(indices), *first.shape))
        rows = images.numpy()
        rows[0] = first
        for row, key in enumerate(keys[1:], start=1):
            picture, labels[row] = self._load(key, request, read, out := rows[row])
            if picture is not out:
                out[:] = picture
        slot[0] = _NOTHING
        if buffer is not None:
            return self._buffers.message(buffer, tuple(images.shape), labels)
        return images.permute(0, 3, 1, 2), labels

    def reading(self, worker: int | None) -> str:
        """What a worker, or (None) all workers, are reading, in words."""
        indices = self._read_now.tolist() if worker is None else [int(self._read_now[worker])]
        names = [self.source.name(index) for index in indices if index != _NOTHING]
        if not names:
            return "it was not reading a file"
        return f"it was reading {', '.join(names[:_NAMED])}{' ...' if len(names) > _NAMED else ''}"

    def _load(
        self, key: int, request: Request, read: Callable[[int], Encoded], out: Pixels | None
    ) -> tuple[Pixels, int]:
        """The image of a key, or the one that replaces it, and its label."""
        for index in self._candidates(key, request.epoch):
            if not self.bad.faults[index]:
                try:
                    return self._picture(read(index), request, key, out), int(self.source.labels[index])
                except (BadImage, OSError) as error:
                    self.bad.faults[index] = fault_of(error)
        if self._seed is None:
            return np.zeros((request.size, request.size, 3), dtype=np.uint8), IGNORED_LABEL
        raise DataError(
            f"{self.source.name(key % len(self))} and {_TRIES} images drawn as replacements cannot be decoded"
        )

    def _candidates(self, key: int, epoch: int) -> Iterator[int]:
        yield key % len(self)
        if self._seed is not None:
            yield from sample_rng(self._seed, epoch, key, stream=1).integers(0, len(self), _TRIES).tolist()


def train_loader(
    source: Source,
    sampler: PositionSampler,
    *,
    augment: AugmentConfig,
    mean: Color,
    std: Color,
    image_transforms: Sequence[ImageTransform],
    eval_crop_ratio: float,
    seed: int,
    **loading: Unpack[Loading],
) -> DataLoader[Batch]:
    """Training batches in the sampler's order.

    A batch is a function of (seed, epoch, its images): it does not depend on the number of workers, on where an epoch
    was resumed, or on the process's random state, and loading does not change that state. A bad image is recorded in
    `loader.dataset.bad` and replaced by another, chosen by (seed, epoch, image).

    With the random crop, `image_transforms` follow the flip; they may draw from the global generators of Python, NumPy
    and torch, which are seeded for each image. With the centre crop, which uses `eval_crop_ratio`, only the flip is
    applied. `mean` and `std`, the dataset's in [0, 1], are for random erasing.
    """
    picture = _TrainingPicture(seed, augment, mean, std, tuple(image_transforms), eval_crop_ratio)
    return _loader(source, picture, seed, sampler, persistent=True, **loading)


def eval_loader(
    source: Source,
    *,
    size: int,
    crop_ratio: float,
    device_batch_size: int,
    rank: int,
    world_size: int,
    **loading: Unpack[Loading],
) -> DataLoader[Batch]:
    """Evaluation batches: each image once over all ranks, in order, no padding.

    A bad image is recorded in `loader.dataset.bad` and becomes a black image with the label -100. `crop_ratio` is the
    kept share of the resized short side. DataError: there are fewer images than ranks.
    """
    sampler = EvalSampler(len(source), size, device_batch_size, rank, world_size)
    # Starting workers takes milliseconds by fork but seconds by spawn (macOS), so there they persist. The method is
    # looked up without fixing it for the rest of the program.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return _loader(source, _EvaluationPicture(crop_ratio), None, sampler, persistent=method != "fork", **loading)


class _NoSeed(ISeedSequence):
    """Zeros instead of entropy from the system, which takes a call to it."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        return np.zeros(n_words, dtype)


_NO_SEED: Any = _NoSeed()


def sample_rng(seed: int, epoch: int, sample: int, stream: int) -> np.random.Generator:
    """The generator of one image in one epoch: independent for each (seed, epoch, sample, stream)."""
    # Philox's lowest counter word counts the draws; `epoch_order` uses key word 0. So no two streams overlap.
    philox = np.random.Philox(_NO_SEED)  # setting the state takes half the time of `Philox(key=..., counter=...)`
    state: Any = {
        "bit_generator": "Philox",
        "state": {"key": [seed, 1 + stream], "counter": [0, sample, epoch, 0]},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # it is used up
        "has_uint32": 0,
        "uinteger": 0,
    }
    philox.state = state
    return np.random.Generator(philox)


@dataclass(frozen=True)
class _TrainingPicture:
    seed: int
    augment: AugmentConfig
    mean: Color
    std: Color
    transforms: tuple[ImageTransform, ...]
    crop_ratio: float

    def __call__(self, data: Encoded, request: Request, key: int, out: Pixels | None) -> Pixels:
        rng = sample_rng(self.seed, request.epoch, key, stream=0)
        if request.crop == "center":  # the FixRes stage
            return maybe_flip(eval_picture(data, request.size, self.crop_ratio), self.augment, rng)
        image = train_picture(data, request.size, self.augment, rng, out)
        if self.transforms:
            with _global_generators_seeded(int(rng.integers(2**32))):
                picture = Image.fromarray(image)
                for transform in self.transforms:
                    picture = transform(picture)
                image = np.asarray(picture)
        return apply_color_and_erasing(image, self.augment, self.mean, self.std, rng)


@dataclass(frozen=True)
class _EvaluationPicture:
    crop_ratio: float

    def __call__(self, data: Encoded, request: Request, key: int, out: Pixels | None) -> Pixels:
        return eval_picture(data, request.size, self.crop_ratio)


@contextmanager
def _global_generators_seeded(seed: int) -> Iterator[None]:
    """Temporarily seed Python's, NumPy's and torch's CPU generators."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _loader(
    source: Source,
    picture: MakePicture,
    seed: int | None,
    sampler: Any,
    *,
    persistent: bool,
    **loading: Unpack[Loading],
) -> WaitingLoader:
    workers, prefetched = loading["workers"], loading["prefetch_factor"]
    dataset = BatchDataset(source, picture, seed, workers, prefetched + _BEYOND_PREFETCH if persistent else 0)
    if not workers:
        cv2.setNumThreads(0)
    return WaitingLoader(
        limit=loading.get("limit"),
        reading=dataset.reading,
        dataset=dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetched if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=loading["pin_memory"],
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # otherwise each iterator would draw a seed from torch's global generator
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Use one thread per worker, and leave signals to the training process, which still needs its batches.

    Ctrl-C and `scancel` reach every process of a run. SIGINT is ignored; SIGTERM is obeyed only if the training process
    sent it, to end its workers, and finding the sender takes a thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_the_parent_says, args=(os.getppid(),), daemon=True).start()
    guard()  # for processes not started by fork
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    gc.freeze()  # no garbage collection of the training process's objects, which would copy their pages


def _exit_when_the_parent_says(parent: int) -> None:
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
    else:  # macOS does not tell who sent a signal: obey any
        signal.sigwait({signal.SIGTERM})
    os._exit(0)
