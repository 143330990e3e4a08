"""Pictures for the page, small enough that it stays a few megabytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from data.decode import BadImage, Picture
from data.errors import DataError
from data.imagefolder import ImageFolder
from data.open import open_split_pair
from data.remote import is_remote
from data.shards import MANIFEST
from data.source import Source
from recipes.page.html import picture
from recipes.report.read import Predictions

GRID_WIDTH, GRID_ENLARGED = 1060, 640
"""Pixels: the page's width, and what a grid of small images is enlarged to at most."""
THUMBNAIL = 150
"""Pixels of a thumbnail's longer side."""


def embedded(image: Image.Image, longest: int, alt: str, enlarged: int) -> Markup:
    """An image for the page: a larger one is reduced and compressed, a small one enlarged without smoothing.

    Args:
        image: RGB or grey.
        longest: Pixels of its longer side on the page.
        alt: What it shows.
        enlarged: Pixels up to which a small one is enlarged, by a whole factor.
    """
    image, buffer = image.convert("RGB"), io.BytesIO()
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    factor = enlarged // max(image.size)
    if factor < 2:
        image.save(buffer, "JPEG", quality=85)
        return picture(buffer.getvalue(), alt, "image/jpeg")
    image.save(buffer, "PNG", optimize=True)
    return picture(buffer.getvalue(), alt, width=image.width * factor)


def grid(path: Path, alt: str) -> Markup:
    """A grid of training images from its file.

    Raises:
        OSError: It cannot be read, or is no image.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return embedded(image, GRID_WIDTH, alt, GRID_ENLARGED)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow makes of a damaged PNG
        raise OSError(str(error)) from error


def thumbnail(data: bytes, alt: str) -> Markup:
    """A whole evaluation image, small.

    Raises:
        BadImage: It cannot be decoded.
    """
    image = Picture(data)
    reduction = next((one for one in (8, 4, 2) if max(image.height, image.width) // one >= THUMBNAIL), 1)
    return embedded(Image.fromarray(image.decode(reduction)), THUMBNAIL, alt, THUMBNAIL)


def evaluated_images(path: str, cache_folder: str, predictions: Predictions) -> Source:
    """The images that the predictions are of.

    Args:
        path: `data.path` of the run.
        cache_folder: `data.cache_folder` of the run.
        predictions: Of that run.

    Raises:
        DataError: They are not there any more, or others are.
    """
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        source: Source = open_split_pair(path, cache_folder)[1]
    else:
        source = ImageFolder(Path(path) / "val", predictions.classes)  # the training images need not be listed
    decoded = predictions.label >= 0
    if len(source) != len(decoded) or not np.array_equal(source.labels[decoded], predictions.label[decoded]):
        raise DataError(f"{path}: holds other images now than those that were evaluated")
    return source


def error_picture(source: Source, index: int, alt: str) -> Markup:
    """The thumbnail of an evaluation image, or what is wrong with it in words."""
    try:
        return thumbnail(source.reader(THUMBNAIL, [index])(index), alt)
    except (BadImage, DataError, OSError) as error:
        return Markup('<span class="note">{}</span>').format(f"cannot be shown: {error}")
