"""From an encoded image to upright RGB pixels, at the required scale.

Plain JPEGs (8 bits, baseline or progressive, grey or three channels) go through libjpeg-turbo, which can skip the fine
DCT coefficients; raw pixels (a binary PPM) are used where they lie, without a copy; everything else goes through
Pillow, in full. The last two are then averaged down to the same scale. EXIF orientation is honoured.

Of a plain JPEG, what a crop does not need is left out: entropy decoding is two thirds of the work, and libjpeg decodes
all that comes before the last row needed. A lower height in the header ends it after that row. If restart markers
divide the rows of blocks evenly, as in images written by data.prepare, the segments above, left and right are cut out
too. The result is an ordinary JPEG that decodes to the same pixels.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from io import BytesIO
from itertools import accumulate, chain
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
# An APP9 segment of data.prepare: the bytes of each segment between restart markers, as uint16 in little endian.
INDEX = b"restarts\0"
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
        _require_size(self.height * self.width)
        if not self._jpeg.scan:  # possibly several scans
            _require_few_scans(data, self.height * self.width)
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
            height, width = self._jpeg.height, self._jpeg.width
            pixels = _decode_jpeg(self._data, height, width, reduction, smooth_colours, strict=True)
            pixels = None if pixels is None else _upright(pixels, self._jpeg.orientation)
        if pixels is None:
            if self._pixels is None:
                self._pixels = _decode_with_pillow(self._data)  # it is more tolerant, and reports what is wrong
            pixels = _averaged(self._pixels, reduction)
        if pixels.shape[:2] != (-(-self.height // reduction), -(-self.width // reduction)):
            raise BadImage(Fault.CORRUPT)  # two headers that contradict each other
        return pixels

    def decode_box(self, reduction: int, box: Box) -> NDArray[np.uint8]:
        """The pixels in `box` of the upright picture at scale 1 / reduction, as from `decode`.

        Colours are repeated, not smoothed: that is up to 7 % faster and needs no pixels outside; it costs 0.03 grey
        levels against Pillow's pictures (`benchmarks.picture_quality`). In a plain JPEG with an end marker, what is
        left out to save time is not checked: damage there goes unnoticed, as Pillow's of the last rows does.

        Returns RGB, uint8 of shape (box.height, box.width, 3).
        """
        top, left, height, width = box
        stored = Box(*(reduction * side for side in box))
        if self._jpeg is None and self._pixels is not None:
            return _averaged(self._pixels[stored.slices], reduction)
        if self._jpeg is not None and self._jpeg.scan and self._jpeg.orientation == 1 and self._pixels is None:
            data, part = cut_out(self._data, self._jpeg, stored)
            strict = data is self._data or self._jpeg.segment > 0  # else libjpeg warns of bytes after the last row
            pixels = _decode_jpeg(data, part.height, part.width, reduction, smooth_colours=False, strict=strict)
            if pixels is not None and pixels.shape[:2] == (-(-part.height // reduction), -(-part.width // reduction)):
                top, left = top - part.top // reduction, left - part.left // reduction
                return pixels[top : top + height, left : left + width]
        return self.decode(reduction, smooth_colours=False)[box.slices]


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


def _decode_jpeg(
    data: bytes, height: int, width: int, reduction: int, smooth_colours: bool, *, strict: bool
) -> NDArray[np.uint8] | None:
    """Decode to RGB with libjpeg-turbo; None if it fails or, when `strict`, warns."""
    size = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
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
    _require_size(width * height)
    if len(data) < header.end() + 3 * width * height:
        raise BadImage(Fault.TRUNCATED)
    return np.frombuffer(data, np.uint8, 3 * width * height, header.end()).reshape(height, width, 3)


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    """Any format to upright RGB, the first frame of several."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tolerable flaws, and about sizes, which are checked here
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _require_size(image.width * image.height)
                if data[:2] == b"\xff\xd8":
                    _require_few_scans(data, image.width * image.height)
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


def _require_size(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise BadImage(Fault.TOO_LARGE)


def _require_few_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG with too many scans over its pixels."""
    if pixels * data.count(b"\xff\xda") > MAX_PASSED_PIXELS:
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
