"""Where encoded images come from: the interface every dataset offers, and a part of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError


class Source(Protocol):
    """One split of a dataset, addressed by position.

    A source is sent to the loader's workers, so it pickles, and it holds arrays rather than a Python object per image:
    the reference counts of a million objects would copy their pages into every forked worker.
    """

    classes: list[str]
    """Class folder names in label order."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of each image, int64 of shape (len(self),)."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image; raises OSError or BadImage where it cannot be read."""
        ...

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """What reads images for pictures of `size` pixels, as `read`, at the smallest resolution that suffices.

        Those at `indices`, a batch's, will all be read: what is far away may be fetched at once.
        """
        ...

    def name(self, index: int) -> str:
        """What the image is called in messages, escaped."""
        ...


class Subset:
    """A view of some images of a source."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self.classes = source.classes
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)
        self.labels = np.asarray(source.labels)[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        return self._source.read(int(self._indices[index]))

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """What reads images of the whole source, by their index in this part."""
        read = self._source.reader(size, self._indices[np.asarray(indices, dtype=np.int64)].tolist())
        return lambda index: read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """The image's name in the whole source."""
        return self._source.name(int(self._indices[index]))


class Renumbered:
    """A view of a source with the labels of another list of classes."""

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        """Number the classes anew.

        Args:
            source: all its images are kept.
            classes: in label order; must hold every class that the source has images of.

        Raises:
            DataError: the source has images of a class that is not among them.
        """
        self.classes = list(classes)
        self._source = source
        label_of = {name: label for label, name in enumerate(classes)}
        labels = np.asarray(source.labels)
        unknown = [source.classes[label] for label in np.unique(labels) if source.classes[label] not in label_of]
        if unknown:
            raise DataError(
                f"{source.name(0)} and others: {len(unknown)} of their classes are not among the {len(classes)} "
                f"classes known: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}"
            )
        self.labels = np.array([label_of.get(name, -1) for name in source.classes], dtype=np.int64)[labels]

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        return self._source.read(index)

    def reader(self, size: int, indices: Sequence[int]) -> Callable[[int], bytes]:
        """The source's own."""
        return self._source.reader(size, indices)

    def name(self, index: int) -> str:
        """The image's name in the source."""
        return self._source.name(index)


def subset(source: Source, samples: int, seed: int) -> Source:
    """A fixed choice of images, spread over the classes as evenly as they allow.

    The numbers of images that two classes give differ by at most one, unless a class has no more to give. The same
    arguments choose the same images, and a smaller choice is contained in a larger one of the same seed.

    Args:
        source: the whole split.
        samples: how many images to keep, from 1 to len(source).
        seed: chooses the images.

    Returns:
        A view of `source` in its order; `source` itself where all its images are asked for.

    Raises:
        DataError: `samples` is below 1 or above len(source).
    """
    total = len(source)
    if not 1 <= samples <= total:
        raise DataError(f"a subset of {samples} images was asked for; the training set allows 1 to {total}")
    if samples == total:
        return source
    rng = np.random.default_rng([seed, 0x5B5E7])
    labels = source.labels
    shuffled = rng.permutation(total)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels, minlength=len(source.classes))
    turn = np.concatenate([np.arange(size) for size in sizes])  # how many of its class come before each image
    class_turn = rng.permutation(len(source.classes))[labels[by_class]]
    chosen = by_class[np.lexsort((class_turn, turn))[:samples]]
    return Subset(source, np.sort(chosen))
