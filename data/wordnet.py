"""What ImageNet's class folders are called in English."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_WORDNET_ID = re.compile(r"n\d{8}")


def class_names(folders: Sequence[str]) -> list[str]:
    """Human names for class folders: n01440764 becomes "tench"; any other name stays as it is.

    The names are the WordNet lemmas that timm ships for the 21,841 synsets of ImageNet (`timm.data.ImageNetInfo`); they
    are read on the first folder that looks like a WordNet id. Where two folders would get the same name (ImageNet has
    two cranes), both keep their id behind it.

    Args:
        folders: class folder names.

    Returns:
        One name per folder, in order.
    """
    names = [_lemma(folder) if _WORDNET_ID.fullmatch(folder) else folder for folder in folders]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [f"{name} ({folder})" if name in twice else name for name, folder in zip(names, folders, strict=True)]


def _lemma(wordnet_id: str) -> str:
    """The first lemma of a synset, or the id where timm does not know it."""
    try:
        description: str = _info().label_name_to_description(wordnet_id)
    except KeyError:
        return wordnet_id
    return description.split(", ")[0]


@lru_cache(maxsize=1)
def _info() -> Any:
    from timm.data.imagenet_info import ImageNetInfo  # timm imports torch: only where a folder needs it

    return ImageNetInfo("imagenet-22k")
