"""Names that come from outside: from a manifest, an index, an archive or a bucket's listing."""

from __future__ import annotations

LONGEST = 255
"""Bytes of a file's name that every usual file system takes."""


def plain_name(name: object) -> str:
    """Check that a name is one component of a path, so that joined to a folder it stays in that folder.

    Returns:
        The name.

    Raises:
        ValueError: it is not; the message shows the name, escaped and cut, and says why.
    """
    reason = _reason(name) if isinstance(name, str) else "it is not text"
    if reason:
        raise ValueError(f"the name {shown(name)} is refused: {reason}")
    return str(name)


def is_file_name(name: str) -> bool:
    """Whether a name of a disk or an archive, whose bytes need not be UTF-8, is one component of a path."""
    size = len(name.encode(errors="surrogateescape"))
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and size <= LONGEST


def relative_path(path: object) -> str:
    """Check that a path, `/` between its components, leads to somewhere below the folder that it is joined to.

    Returns:
        The path.

    Raises:
        ValueError: one of its components is no plain name.
    """
    for name in path.split("/") if isinstance(path, str) else [path]:
        try:
            plain_name(name)
        except ValueError as error:
            raise ValueError(f"{error}, in {shown(path)}" if name != path else str(error)) from None
    return str(path)


def shown(name: object) -> str:
    """A name as it may be printed: quoted, everything but plain ASCII escaped, at most 100 characters."""
    text = ascii(name[:200] if isinstance(name, str | bytes) else type(name).__name__)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _reason(name: str) -> str:
    """Why a name is no component of a path; empty where it is one."""
    if name in ("", ".", ".."):
        return "it is empty" if not name else "it leads to another folder"
    if "/" in name:
        return "it is a path"
    if "\0" in name:
        return "it has a NUL character"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not UTF-8"
    return f"it has {size} bytes; allowed: {LONGEST}" if size > LONGEST else ""
