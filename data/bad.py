"""The images of a split that turned out to be bad."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.decode import Fault
from data.source import Source


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be used."""

    index: int
    name: str
    reason: str


class BadImages:
    """The bad images of a split, as far as they were met: a byte per image, shared by a loader's processes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reported: set[int] = set()
        self.faults = torch.zeros(len(source), dtype=torch.uint8).share_memory_()
        """`Fault` of each image, uint8 of shape (len(source),); ranks may be merged by their maximum."""

    def count(self) -> int:
        """Bad images met so far."""
        return int(torch.count_nonzero(self.faults))

    def new(self) -> list[BadSample]:
        """Those that no earlier call returned."""
        found = [index for index in self.faults.nonzero().flatten().tolist() if index not in self._reported]
        self._reported.update(found)
        return [BadSample(index, self._source.name(index), Fault(int(self.faults[index])).reason) for index in found]
