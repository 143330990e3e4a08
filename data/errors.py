"""What is wrong with a dataset, in words for its owner; and names from outside, made fit to be read."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Text from outside for people to read: control and format characters become escapes, undecodable bytes `\xNN`.

    What is printable already stays as it is, so that a name may pass twice.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escape(one) for one in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that os.fsdecode could not decode
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def is_plain_name(name: str) -> bool:
    """Whether a name from outside is one path component that any disk can hold."""
    size = len(name.encode(errors="surrogateescape"))
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and size < 256


class DataError(Exception):
    """A dataset cannot be used as it is: the message names the folder or the image, and what is expected, in one line.

    Names inside the message may come from anywhere: it is made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
