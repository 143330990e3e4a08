"""From an encoded image to upright RGB pixels, at the required scale.

Plain JPEGs (8 bits, baseline or progressive, grey or three channels) go through libjpeg-turbo, which can skip the fine
DCT coefficients; raw pixels (a binary PPM) are used where they lie, without a copy; everything else goes through
Pillow, in full. The last two are then averaged down to the same scale. EXIF orientation is honoured.

Of a plain JPEG, only what a crop needs is decoded (data/jpeg.py).
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from enum import IntEnum
from io import BytesIO

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data.jpeg import Box, cut_out, read_header

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
