"""From an encoded image to upright RGB pixels, at the required scale.

Plain JPEGs (8 bits, baseline or progressive, grey or three channels) go through libjpeg-turbo, which can skip the fine
DCT coefficients; raw pixels (a binary PPM) are used where they lie, without a copy; everything else goes through
Pillow, in full. The last two are then averaged down to the same scale. EXIF orientation is honoured.

In a plain JPEG, rows that a crop does not need can be left out: entropy decoding is two thirds of the work, and libjpeg
does it from the first row on. A lower height in the header ends it after the last row needed. If each row of blocks
ends in a restart marker, as in images written by data.prepare, the rows above can be cut out too. The result is an
ordinary JPEG, whose rows decode to the same pixels.
"""

from __future__ import annotations

import re
import struct
import warnings
from contextlib import suppress
from enum import IntEnum
from io import BytesIO
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs, a quarter of a gigabyte of RGB
MAX_BYTES = 2**28  # of a file: the size of the largest picture, uncompressed
# Of all scans of a JPEG: a scan costs a few bytes and takes 3 ns per pixel. Cameras and encoders write at most a dozen.
MAX_PASSED_PIXELS = 50 * MAX_PIXELS
# What Pillow may read. Some other formats are programs (EPS, WMF), and all are code that no photo needs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# libjpeg's other scales, n/8, cost more than they save: 5/8 and above take longer than decoding in full.
REDUCTIONS = (8, 4, 2)
Encoded = bytes | memoryview  # an image's bytes, or their place in a memory-mapped file
# A PPM of 8-bit RGB without comments: width and height (https://netpbm.sourceforge.net/doc/ppm.html).
_PPM = re.compile(rb"P6\s([1-9]\d{0,4})\s([1-9]\d{0,4})\s255\s")


class Fault(IntEnum):
    """Why an image cannot be used, as a number and in words; 0: it can."""

    reason: str

    def __new__(cls, value: int, reason: str = "") -> Fault:  # noqa: D102
        member = int.__new__(cls, value)
        member._value_, member.reason = value, reason
        return member

    NONE = 0, ""
    MISSING = 1, "the file is missing"
    UNREADABLE = 2, "the file cannot be read"
    EMPTY = 3, "the file is empty"
    NOT_AN_IMAGE = 4, "not an image, or of an unknown format"
    TRUNCATED = 5, "truncated"
    CORRUPT = 6, "corrupt"
    TOO_LARGE = 7, f"more than {MAX_PIXELS} pixels"
    NOT_A_FILE = 8, "not a regular file"
    BROKEN_LINK = 9, "a broken link"
    TOO_MANY_BYTES = 10, f"more than {MAX_BYTES} bytes"


class BadImage(Exception):
    """An image cannot be decoded; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault

    def __reduce__(self) -> tuple[type[BadImage], tuple[Fault]]:
        return BadImage, (self.fault,)


def fault_of(error: BadImage | OSError) -> Fault:
    """Why an image could not be read or decoded."""
    if isinstance(error, BadImage):
        return error.fault
    return Fault.MISSING if isinstance(error, FileNotFoundError) else Fault.UNREADABLE


class Picture:
    """An encoded image with known size (upright, at full scale), to be decoded at a scale chosen later.

    BadImage: it is not an image of one of `FORMATS`, or too large; from the other methods, truncated or corrupt.
    """

    def __init__(self, data: Encoded) -> None:
        if not data:
            raise BadImage(Fault.EMPTY)
        if len(data) > MAX_BYTES:
            raise BadImage(Fault.TOO_MANY_BYTES)
        self._pixels = _raw_pixels(data)
        self._data = data = b"" if self._pixels is not None else bytes(data)
        self._jpeg = read_header(data)
        if self._jpeg is None:
            self._pixels = _decode_with_pillow(data) if self._pixels is None else self._pixels
            self.height, self.width = self._pixels.shape[:2]
            return
        self.height, self.width = self._jpeg.height, self._jpeg.width
        _require_size(data, self.height * self.width, may_have_scans=not self._jpeg.scan)
        if self._jpeg.orientation > 4:
            self.height, self.width = self.width, self.height

    @property
    def is_plain_upright_jpeg(self) -> bool:
        """Whether the loader's fast path decodes it, without rotation."""
        return self._jpeg is not None and self._jpeg.orientation == 1

    def decode(self, reduction: int, *, smooth_colours: bool = True) -> NDArray[np.uint8]:
        """The upright picture at scale 1 / reduction (1, 2, 4 or 8).

        Colours that a JPEG stores at a lower resolution are interpolated or, without `smooth_colours`, repeated.
        Returns RGB, uint8 of shape (ceil(height / reduction), ceil(width / reduction), 3).
        """
        pixels = None
        if self._jpeg is not None and self._pixels is None:
            pixels = _decode_jpeg(self._data, self._jpeg, self._jpeg.height, reduction, smooth_colours, strict=True)
            pixels = None if pixels is None else _upright(pixels, self._jpeg.orientation)
        if pixels is None:
            if self._pixels is None:
                self._pixels = _decode_with_pillow(self._data)  # it is more tolerant, and reports what is wrong
            pixels = _averaged(self._pixels, reduction)
        if pixels.shape[:2] != (-(-self.height // reduction), -(-self.width // reduction)):
            raise BadImage(Fault.CORRUPT)  # two headers that contradict each other
        return pixels

    def decode_rows(self, reduction: int, top: int, bottom: int) -> tuple[NDArray[np.uint8], int]:
        """At least the rows [top, bottom) of the upright picture at scale 1 / reduction, as from `decode`.

        Colours are repeated, not smoothed: that is up to 7 % faster and needs no rows outside; it costs 0.03 grey
        levels against Pillow's pictures (`benchmarks.picture_quality`). In a plain JPEG with an end marker, other rows
        are left out if that saves time; damage inside it then goes unnoticed, as with Pillow.

        Returns RGB, uint8 of shape (rows, ceil(width / reduction), 3), and the index of the first row in the picture.
        """
        header = self._jpeg
        if header is None and self._pixels is not None:
            return _averaged(self._pixels[top * reduction : bottom * reduction], reduction), top
        if header is None or header.orientation != 1 or not header.scan or self._pixels is not None:
            return self.decode(reduction, smooth_colours=False), 0
        data, begin, height = only_rows(self._data, header, top * reduction, bottom * reduction)
        strict = data is self._data or header.has_row_restarts  # else libjpeg warns of bytes after the last row
        pixels = _decode_jpeg(data, header, height, reduction, smooth_colours=False, strict=strict)
        if pixels is None or pixels.shape[:2] != (-(-height // reduction), -(-self.width // reduction)):
            return self.decode(reduction, smooth_colours=False), 0
        return pixels, begin // reduction


def is_damaged(data: Encoded) -> bool:
    """Whether a plain JPEG decodes but has invalid codes, so that part of the picture is noise or grey.

    Training and evaluation accept such pictures, as Pillow and torchvision do. Extra bytes after the picture's last
    block, which some cameras write, do not count.
    """
    if isinstance(data, memoryview) or read_header(data) is None:
        return False
    try:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as warning:  # the first warning of libjpeg
        return "extraneous bytes" not in str(warning)
    return False


class Header(NamedTuple):
    """The header of a plain JPEG: 8 bits, baseline, extended or progressive, grey or three channels."""

    height: int  # as stored, before the picture is turned upright
    width: int
    orientation: int  # EXIF orientation, 1 (upright) to 8
    frame: int  # offset of the frame marker
    scan: int  # offset of the first coded byte; 0 if rows cannot be left out: several scans, or no end marker
    block_rows: int  # pixel rows in a row of blocks (MCU)
    has_row_restarts: bool  # whether a restart marker ends each row of blocks


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG; None for anything that Pillow must read."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    orientation, interval, frame, at, end = 1, 0, 0, 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        # These have no length, unlike all others: libjpeg would read on at another offset.
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if marker > 0xC2 or precision != 8 or components not in (1, 3) or not height or not width:
                return None  # lossless, hierarchical, arithmetic, 12 bits, CMYK, ...
            frame = at
        elif marker == 0xDA:
            return _header(data, frame, at, orientation, interval) if frame else None
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
        elif marker == 0xDD:
            interval = int.from_bytes(data[at + 4 : at + 6], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _header(data: bytes, frame: int, scan: int, orientation: int, interval: int) -> Header:
    height, width, components = struct.unpack_from(">HHB", data, frame + 5)
    sampling = data[frame + 11 : frame + 10 + 3 * components : 3] if components == 3 else b"\x11"
    across, down = max(one >> 4 for one in sampling), max(one & 15 for one in sampling)
    whole = data[frame + 1] != 0xC2 and data[scan + 4] == components and data.rfind(b"\xff\xd9", -64) > 0
    begin = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big") if whole else 0
    restarts = interval > 0 and interval == -(-width // (8 * max(across, 1)))
    return Header(height, width, orientation, frame, begin, 8 * max(down, 1), restarts)


def _orientation(exif: bytes) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 if it is absent or invalid."""
    with suppress(Exception), warnings.catch_warnings():  # Pillow raises and warns of many things in a broken block
        warnings.simplefilter("ignore")
        tags = Image.Exif()
        tags.load(exif)
        return int(tags[0x0112]) if tags[0x0112] in range(1, 9) else 1
    return 1


def only_rows(data: bytes, header: Header, top: int, bottom: int) -> tuple[bytes, int, int]:
    """A JPEG of the pixel rows [top, bottom), as stored, and few others; its first row in the picture; its height.

    They equal the whole picture's rows if lower-resolution colours are repeated; smoothing would use neighbouring rows.
    """
    rows = -(-header.height // header.block_rows)
    first = top // header.block_rows if header.has_row_restarts else 0
    last = min(rows, -(-bottom // header.block_rows))
    if not header.scan or last - first >= rows:
        return data, 0, header.height
    begin, height = first * header.block_rows, min(last * header.block_rows, header.height) - first * header.block_rows
    at = header.frame + 5
    start, end = data[:at] + struct.pack(">H", height), data[at + 2 : header.scan]
    if not header.has_row_restarts:
        return start + data[at + 2 :], 0, height
    coded = _rows_between_restarts(data, header.scan, first, last)
    return (data, 0, header.height) if coded is None else (b"".join((start, end, coded, b"\xff\xd9")), begin, height)


def _rows_between_restarts(data: bytes, start: int, first: int, last: int) -> bytearray | None:
    """The rows of blocks [first, last) with their markers counted from 0; None where a marker is missing."""
    begin, ends = start, []
    for row in range(last):
        mark = data.find(b"\xff" + bytes([0xD0 + row % 8]), start)
        if mark < 0:  # the last row of the picture has none
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
    return rows


def _decode_jpeg(
    data: bytes, header: Header, height: int, reduction: int, smooth_colours: bool, *, strict: bool
) -> NDArray[np.uint8] | None:
    """Decode to RGB with libjpeg-turbo; None if it fails or, when `strict`, warns."""
    size = {"min_height": -(-height // reduction), "min_width": -(-header.width // reduction)}
    with suppress(ValueError):
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastupsample=not smooth_colours, strict=strict, **size))
    return None


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation (EXIF 2.3, tag 0x0112)."""
    if orientation == 1:
        return pixels
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _averaged(pixels: NDArray[np.uint8], reduction: int) -> NDArray[np.uint8]:
    """Average blocks of reduction x reduction pixels; edge pixels are repeated to fill the last blocks."""
    if reduction == 1:
        return pixels
    height, width = (-(-side // reduction) for side in pixels.shape[:2])
    below, right = height * reduction - pixels.shape[0], width * reduction - pixels.shape[1]
    padded = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _raw_pixels(data: Encoded) -> NDArray[np.uint8] | None:
    """A read-only view of a PPM's pixels; None for anything that is not a plain PPM."""
    header = _PPM.match(data)
    if header is None:
        return None
    width, height = int(header[1]), int(header[2])
    _require_size(b"", width * height)
    if len(data) < header.end() + 3 * width * height:
        raise BadImage(Fault.TRUNCATED)
    return np.frombuffer(data, np.uint8, 3 * width * height, header.end()).reshape(height, width, 3)


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    """Any format to upright RGB, the first frame of several."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tolerable flaws, and about sizes, which are checked here
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _require_size(data, image.width * image.height, may_have_scans=data[:2] == b"\xff\xd8")
                image.load()
                turned = image
                with suppress(Exception):  # a broken EXIF block does not affect the picture
                    turned = ImageOps.exif_transpose(image)
                return np.array(_to_rgb(turned))  # a copy, because torch needs it writable
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(Fault.TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise BadImage(Fault.NOT_AN_IMAGE) from error
    except Exception as error:  # on invalid data Pillow raises OSError, SyntaxError, IndexError, ...
        raise BadImage(Fault.TRUNCATED if "truncated" in str(error).lower() else Fault.CORRUPT) from error


def _require_size(data: bytes, pixels: int, *, may_have_scans: bool = False) -> None:
    """Refuse too many pixels, and a JPEG with too many scans over them."""
    if pixels > MAX_PIXELS:
        raise BadImage(Fault.TOO_LARGE)
    if may_have_scans and pixels * data.count(b"\xff\xda") > MAX_PASSED_PIXELS:
        raise BadImage(Fault.CORRUPT)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB; transparency becomes white; more than 8 bits are read as [0, 1] or [0, 65535]."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        scaled = np.rint(values * (255 if values.max() <= 1 else 255 / 65535))
        image = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
