"""What a JPEG's header says, and JPEGs without the rows that a crop does not need.

Entropy decoding is two thirds of the work, and libjpeg does it from the first row on. A lower height in the header ends
it after the last row that is needed. Where each row of blocks ends in a restart marker, as in what data.prepare writes,
the rows above can go too. Either way the result is an ordinary JPEG, whose rows decode to the same pixels.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class Header(NamedTuple):
    """Of a plain JPEG: 8 bits, baseline, extended or progressive, grey or three channels."""

    height: int
    """As stored, before the picture is turned upright."""
    width: int
    orientation: int
    """EXIF's, 1 (upright) to 8."""
    frame: int
    """Offset of the frame's marker."""
    scan: int
    """Offset of the first coded byte; 0 where rows cannot be left out: several scans, or no end marker."""
    block_rows: int
    """Pixel rows in a row of blocks (MCU)."""
    has_row_restarts: bool
    """A restart marker ends each row of blocks."""


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG; None for anything that another decoder had better look at."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    orientation, interval, frame, at, end = 1, 0, 0, 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # has no length, unlike all others: libjpeg would go on elsewhere
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker > 0xC2 or not _is_plain(data, at):  # lossless, hierarchical, arithmetic, 12 bits, CMYK, ...
                return None
            frame = at
        elif marker == 0xDA:
            return _header(data, frame, at, orientation, interval) if frame else None
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
        elif marker == 0xDD:
            interval = int.from_bytes(data[at + 4 : at + 6], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _is_plain(data: bytes, frame: int) -> bool:
    precision, height, width, components = struct.unpack_from(">BHHB", data, frame + 4)
    return precision == 8 and components in (1, 3) and height > 0 and width > 0


def _header(data: bytes, frame: int, scan: int, orientation: int, interval: int) -> Header:
    height, width, components = struct.unpack_from(">HHB", data, frame + 5)
    sampling = data[frame + 11 : frame + 10 + 3 * components : 3] if components == 3 else b"\x11"
    across, down = max(one >> 4 for one in sampling), max(one & 15 for one in sampling)
    whole = data[frame + 1] != 0xC2 and data[scan + 4] == components and data.rfind(b"\xff\xd9", -64) > 0
    begin = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big") if whole else 0
    restarts = interval > 0 and interval == -(-width // (8 * max(across, 1)))
    return Header(height, width, orientation, frame, begin, 8 * max(down, 1), restarts)


def only_rows(data: bytes, header: Header, top: int, bottom: int) -> tuple[bytes, int, int]:
    """A JPEG of the rows [top, bottom) and as few others as can be.

    They are what the whole picture's are where colours at a lower resolution are repeated; smoothing would look across.

    Args:
        data: the JPEG.
        header: its header.
        top: first row, in pixels as stored.
        bottom: row after the last one.

    Returns:
        (the JPEG, its first row in the picture, its height).
    """
    rows = -(-header.height // header.block_rows)
    first = top // header.block_rows
    last = min(rows, -(-bottom // header.block_rows))
    if not header.has_row_restarts:
        first = 0
    if not header.scan or last - first >= rows:
        return data, 0, header.height
    begin, height = first * header.block_rows, min(last * header.block_rows, header.height) - first * header.block_rows
    size = struct.pack(">H", height)
    at = header.frame + 5
    if not header.has_row_restarts:
        return data[:at] + size + data[at + 2 :], 0, height
    cut = _between_restarts(data, header, first, last, size)
    return (data, 0, header.height) if cut is None else (cut, begin, height)


def _between_restarts(data: bytes, header: Header, first: int, last: int, size: bytes) -> bytes | None:
    """The header with another height, and the rows of blocks [first, last) with their markers counted from 0.

    None where a marker is missing.
    """
    start, begin, ends = header.scan, header.scan, []
    for row in range(last):
        mark = data.find(b"\xff" + bytes([0xD0 + row % 8]), start)
        if mark < 0:  # the picture's last row has none
            mark = data.rfind(b"\xff\xd9")
        if mark < start:
            return None
        if row >= first:
            ends.append(mark - begin)
        else:
            begin = mark + 2
        start = mark + 2
    rows = bytearray(data[begin : begin + ends[-1]])
    for row, end in enumerate(ends[:-1]):
        rows[end + 1] = 0xD0 + row % 8
    at = header.frame + 5
    return b"".join((data[:at], size, data[at + 2 : header.scan], rows, b"\xff\xd9"))


def _orientation(tiff: bytes) -> int:
    """EXIF orientation, 1 (upright) to 8, of a TIFF header; 1 where it is absent or nonsense."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
