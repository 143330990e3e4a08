"""Where encoded images come from: the interface of a dataset, views of one, and bad images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.decode import Encoded, Fault
from data.errors import DataError


class Source:
    """One split of a dataset, addressed by position.

    It can be pickled, for the loader's workers, and holds arrays rather than a Python object per image: reference
    counting on a million objects would copy their pages into every forked worker.
    """

    classes: list[str]  # class folder names in label order
    labels: NDArray[np.int64]  # of each image

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Encoded:
        """The encoded image; raises OSError or BadImage if it cannot be read."""
        raise NotImplementedError

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], Encoded]:
        """A function like `read` for pictures of `size` pixels, which reads the smallest resolution that suffices.

        All images at `indices`, those of a batch, will be read, so remote ones may be fetched concurrently.
        """
        return self.read

    def name(self, index: int) -> str:
        """The image's name for messages, escaped."""
        raise NotImplementedError


class Subset(Source):
    """A view of some images of a source, with other `labels` if its classes are numbered differently (`classes`)."""

    def __init__(
        self,
        source: Source,
        indices: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.classes = classes or source.classes
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self.labels = np.asarray(source.labels)[self._indices] if labels is None else labels

    def read(self, index: int) -> Encoded:
        """The encoded image."""
        return self._source.read(int(self._indices[index]))

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], Encoded]:
        """A function that reads images of the whole source, by their index in this view."""
        read = self._source.reader(size, self._indices[np.asarray(indices, dtype=np.int64)].tolist())
        return lambda index: read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """The image's name in the whole source."""
        return self._source.name(int(self._indices[index]))


def subset(source: Source, samples: int, seed: int) -> Source:
    """A fixed choice of images, spread over the classes as evenly as possible; `source` itself if it is all of them.

    The numbers of images from two classes differ by at most one, unless a class has no more images. The same arguments
    choose the same images, and a smaller choice is contained in a larger one with the same seed. Raises DataError if
    there are not so many.
    """
    total = len(source)
    if not 1 <= samples <= total:
        raise DataError(f"got {samples}; allowed: 1 to {total}, the number of training images")
    if samples == total:
        return source
    rng = np.random.default_rng([seed, 0x5B5E7])
    labels = source.labels
    shuffled = rng.permutation(total)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=len(source.classes))
    turn = np.concatenate([np.arange(size) for size in sizes])  # each image's number within its class
    class_turn = rng.permutation(len(source.classes))[labels[by_class]]
    chosen = by_class[np.lexsort((class_turn, turn))[:samples]]
    return Subset(source, np.sort(chosen))


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be used."""

    index: int
    name: str
    reason: str


class FaultTable:
    """The bad images of a split found so far: a byte per image, shared by a loader's processes."""

    def __init__(self, source: Source) -> None:
        import torch  # takes seconds to import, and commands that only read do not need it

        self._source = source
        self._reported: set[int] = set()
        self.faults = torch.zeros(len(source), dtype=torch.uint8).share_memory_()
        """`Fault` of each image, uint8 of shape (len(source),); ranks can be merged by taking the maximum."""

    def new(self) -> list[BadSample]:
        """The bad images that no earlier call returned."""
        found = [index for index in self.faults.nonzero().flatten().tolist() if index not in self._reported]
        self._reported.update(found)
        return [BadSample(index, self._source.name(index), Fault(int(self.faults[index])).reason) for index in found]
