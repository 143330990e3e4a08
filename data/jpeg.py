"""The header of a JPEG, and JPEGs of a part of a picture.

Of a plain JPEG, what a crop does not need is left out: entropy decoding is two thirds of the work, and libjpeg decodes
all that comes before the last row needed. A lower height in the header ends it after that row. If restart markers
divide the rows of blocks evenly, as in images written by data.prepare, the segments above, left and right are cut out
too. The result is an ordinary JPEG that decodes to the same pixels.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from PIL import Image

# An APP9 segment of data.prepare: the bytes of each segment between restart markers, as uint16 in little endian.
INDEX = b"restarts\0"


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns, to index an image with."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Header(NamedTuple):
    """The header of a plain JPEG: 8 bits, baseline, extended or progressive, grey or three channels."""

    height: int  # as stored, before the picture is turned upright
    width: int
    orientation: int  # EXIF orientation, 1 (upright) to 8
    frame: int  # offset of the frame marker
    scan: int  # offset of the first coded byte; 0 if nothing can be left out: several scans, or no end marker
    block_rows: int  # pixel rows in a row of blocks (MCU)
    segment: int  # pixel columns between two restart markers, which divide each row of blocks evenly; 0: they do not
    restarts: bytes  # the index of the restart markers that data.prepare writes; empty in other JPEGs


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG; None for anything that Pillow must read."""
    orientation, interval, frame, restarts = 1, 0, 0, b""
    for marker, at, end in _marker_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", data, at)
            if marker > 0xC2 or precision != 8 or components not in (1, 3) or not height or not width:
                return None  # lossless, hierarchical, arithmetic, 12 bits, CMYK, ...
            frame = at - 4
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", at):
            orientation = _orientation(data[at:end])
        elif marker == 0xE9 and data.startswith(INDEX, at):
            restarts = data[at + len(INDEX) : end]
        elif marker == 0xDD:
            interval = int.from_bytes(data[at : at + 2], "big")
        elif marker == 0xDA:
            return _header(data, frame, at - 4, orientation, interval, restarts) if frame else None
    return None


def _marker_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """A JPEG's marker segments up to the first scan: marker, begin and end of what follows its length."""
    at, last = 2, len(data) - 9
    if data[:3] != b"\xff\xd8\xff":
        return
    while at < last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        # These have no length, unlike all others: libjpeg would read on at another offset.
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            return
        begin, at = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, begin, at
        if marker == 0xDA:
            return


def _header(data: bytes, frame: int, scan: int, orientation: int, interval: int, restarts: bytes) -> Header:
    height, width, components = struct.unpack_from(">HHB", data, frame + 5)
    sampling = data[frame + 11 : frame + 10 + 3 * components : 3] if components == 3 else b"\x11"
    across, down = max(one >> 4 for one in sampling), max(one & 15 for one in sampling)
    whole = data[frame + 1] != 0xC2 and data[scan + 4] == components and data.rfind(b"\xff\xd9", -64) > 0
    begin = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big") if whole else 0
    block_columns = 8 * max(across, 1)
    segment = interval * block_columns if interval and -(-width // block_columns) % interval == 0 else 0
    return Header(height, width, orientation, frame, begin, 8 * max(down, 1), segment, restarts)


def _orientation(exif: bytes) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 if it is absent or invalid."""
    with suppress(Exception), warnings.catch_warnings():  # Pillow raises and warns of many things in a broken block
        warnings.simplefilter("ignore")
        tags = Image.Exif()
        tags.load(exif)
        return int(tags[0x0112]) if tags[0x0112] in range(1, 9) else 1
    return 1


def cut_out(data: bytes, header: Header, box: Box) -> tuple[bytes, Box]:
    """A JPEG of the pixels in `box`, as stored, and few others, and its place in the picture.

    They equal the whole picture's pixels if lower-resolution colours are repeated; smoothing would use neighbours.
    `box` may end outside the picture. Needs `header.scan`.
    """
    whole = Box(0, 0, header.height, header.width)
    tall, wide = header.block_rows, header.segment or header.width
    down, across = -(-header.height // tall), -(-header.width // wide)
    top, left = (box.top // tall, box.left // wide) if header.segment else (0, 0)
    bottom, right = min(-(-(box.top + box.height) // tall), down), min(-(-(box.left + box.width) // wide), across)
    height, width = min(bottom * tall, header.height) - top * tall, min(right * wide, header.width) - left * wide
    part = Box(top * tall, left * wide, height, width)
    if part == whole:
        return data, whole
    sides = header.frame + 5
    start = data[:sides] + struct.pack(">HH", height, width) + data[sides + 4 : header.scan]
    if not header.segment:
        return start + data[header.scan :], part
    lengths = struct.unpack_from(f"<{len(header.restarts) // 2}H", header.restarts) or segment_lengths(data, header)
    begins = list(accumulate(lengths, initial=header.scan))
    if len(lengths) != down * across or begins[-1] > len(data):  # a marker is missing, or the index is wrong
        return data, whole
    kept = [slice(row * across + left, row * across + right) for row in range(top, bottom)]
    coded = bytearray().join(data[begins[row.start] : begins[row.stop]] for row in kept)
    at = -1
    for count, length in enumerate(chain.from_iterable(lengths[row] for row in kept)):
        at += length
        if coded[at - 1] != 0xFF:
            return data, whole
        coded[at] = 0xD0 + count % 8  # restart markers are numbered
    coded[-1] = 0xD9  # the end marker
    return start + coded, part


def with_index(data: bytes) -> bytes:
    """A JPEG with an index of its restart markers, so that `cut_out` need not search them; without any, as it is."""
    header = read_header(data)
    lengths = segment_lengths(data, header) if header and header.segment else []
    size = 2 + len(INDEX) + 2 * len(lengths)
    if not lengths or max(lengths) >= 2**16 or size >= 2**16:
        return data
    return b"".join(
        (data[:2], b"\xff\xe9", struct.pack(">H", size), INDEX, struct.pack(f"<{len(lengths)}H", *lengths), data[2:])
    )


def segment_lengths(data: bytes, header: Header) -> list[int]:
    """Bytes of each segment, the restart or end marker after it included."""
    coded = np.frombuffer(data[header.scan : data.find(b"\xff\xd9", header.scan) + 2], np.uint8)
    at = np.flatnonzero(coded[:-1] == 0xFF)
    lengths: list[int] = np.diff(at[coded[at + 1] >= 0xD0] + 2, prepend=0).tolist()
    return lengths
