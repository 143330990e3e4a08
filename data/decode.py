"""From an encoded image to upright RGB pixels, at the scale that is needed.

Plain JPEGs (8 bits, baseline or progressive, grey or three channels) go through libjpeg-turbo, which can leave out the
fine DCT coefficients; everything else goes through Pillow, in full, and is then averaged down to the same scale. Both
turn the picture upright by its EXIF orientation, which torchvision's ImageFolder does not.
"""

from __future__ import annotations

import struct
import warnings
from enum import IntEnum
from io import BytesIO
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""A larger picture is refused: Pillow's limit against decompression bombs, a quarter of a gigabyte of RGB."""

REDUCTIONS = (8, 4, 2)
"""Scales 1/8, 1/4 and 1/2, smallest first. The other n/8 that libjpeg offers cost more than they save: 5/8 and above
take longer than decoding in full."""


class Fault(IntEnum):
    """Why an image cannot be used; 0 means that it can."""

    NONE = 0
    MISSING = 1
    UNREADABLE = 2
    EMPTY = 3
    NOT_AN_IMAGE = 4
    TRUNCATED = 5
    CORRUPT = 6
    TOO_LARGE = 7

    @property
    def reason(self) -> str:
        """The fault in words."""
        return _REASONS[self]


_REASONS = {
    Fault.NONE: "",
    Fault.MISSING: "the file is missing",
    Fault.UNREADABLE: "the file cannot be read",
    Fault.EMPTY: "the file is empty",
    Fault.NOT_AN_IMAGE: "not an image, or of an unknown format",
    Fault.TRUNCATED: "truncated",
    Fault.CORRUPT: "corrupt",
    Fault.TOO_LARGE: f"more than {MAX_PIXELS} pixels",
}


class BadImage(Exception):
    """An image cannot be decoded; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault

    def __reduce__(self) -> tuple[type[BadImage], tuple[Fault]]:
        return BadImage, (self.fault,)


class _Jpeg(NamedTuple):
    """What a plain JPEG's header says: its size as stored, before it is turned upright."""

    height: int
    width: int
    orientation: int


class Picture:
    """An image of known size that is decoded when its scale is known.

    Attributes:
        height: of the upright picture in pixels, at full scale.
        width: of the upright picture in pixels, at full scale.
    """

    def __init__(self, data: bytes) -> None:
        """Read the header.

        Args:
            data: an encoded image of any format that Pillow reads.

        Raises:
            BadImage: it is not an image, or too large.
        """
        self._data = data
        self._jpeg = _read_header(data)
        self._pixels: np.ndarray | None = None
        if self._jpeg is None:
            self._pixels = _decode_with_pillow(data)
            self.height, self.width = self._pixels.shape[:2]
            return
        self.height, self.width, orientation = self._jpeg
        if self.height * self.width > MAX_PIXELS:
            raise BadImage(Fault.TOO_LARGE)
        if orientation > 4:
            self.height, self.width = self.width, self.height

    def decode(self, reduction: int) -> np.ndarray:
        """The upright picture at scale 1 / reduction.

        Args:
            reduction: 1, 2, 4 or 8.

        Returns:
            RGB, uint8 of shape (ceil(height / reduction), ceil(width / reduction), 3).

        Raises:
            BadImage: the image is truncated or corrupt.
        """
        pixels = self._decode(reduction)
        if pixels.shape[:2] != (-(-self.height // reduction), -(-self.width // reduction)):
            raise BadImage(Fault.CORRUPT)  # two headers that contradict each other
        return pixels

    def _decode(self, reduction: int) -> np.ndarray:
        if self._jpeg is not None and self._pixels is None:
            height, width, orientation = self._jpeg
            try:
                pixels = simplejpeg.decode_jpeg(
                    self._data, "RGB", min_height=-(-height // reduction), min_width=-(-width // reduction)
                )
            except ValueError:  # libjpeg warned or failed; Pillow is more patient, and says what is wrong
                self._pixels = _decode_with_pillow(self._data)
            else:
                return _upright(pixels, orientation)
        assert self._pixels is not None
        return _averaged(self._pixels, reduction)


def decode(data: bytes) -> np.ndarray:
    """The whole picture in RGB, upright, uint8 of shape (H, W, 3); raises BadImage."""
    return Picture(data).decode(1)


def _read_header(data: bytes) -> _Jpeg | None:
    """Size and orientation of a plain JPEG, or None for anything that Pillow had better look at."""
    if not data:
        raise BadImage(Fault.EMPTY)
    if data[:3] != b"\xff\xd8\xff":
        return None
    orientation, at, end = 1, 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):  # a frame: baseline, extended or progressive
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            plain = precision == 8 and components in (1, 3) and height and width
            return _Jpeg(height, width, orientation) if plain else None
        if 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8):  # lossless, hierarchical or arithmetic
            return None
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


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


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
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


def _averaged(pixels: np.ndarray, reduction: int) -> np.ndarray:
    """Average blocks of reduction x reduction pixels; those at the edge are repeated to fill the last blocks."""
    if reduction == 1:
        return pixels
    height, width = (-(-side // reduction) for side in pixels.shape[:2])
    below, right = height * reduction - pixels.shape[0], width * reduction - pixels.shape[1]
    padded = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
    return cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Any format to upright RGB, the first frame of several."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow can live with, and of sizes, which are checked here
            with Image.open(BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(Fault.TOO_LARGE)
                image.load()
                return np.array(_to_rgb(_turned(image)))  # a copy, as torch wants it writable
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(Fault.TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise BadImage(Fault.NOT_AN_IMAGE) from error
    except Exception as error:  # Pillow's readers raise nearly everything on nonsense: OSError, SyntaxError, IndexError
        raise BadImage(Fault.TRUNCATED if "truncated" in str(error).lower() else Fault.CORRUPT) from error


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; what is transparent becomes white, 16 bits are scaled, floats taken as [0, 1]."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image).astype(np.float64)))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale [0, 1] or [0, 65535] to [0, 255]; any other range is stretched to it."""
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        low, high = low, max(high, low + 1)
    else:
        low, high = 0, 1 if high <= 1 else 65535
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
