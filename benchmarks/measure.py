"""Shared by the benchmarks: their options, sides that alternate, and medians."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from data.imagefolder import EXTENSIONS
from data.prepare import Settings, prepare

ROOT = Path(__file__).resolve().parent.parent


def options(doc: str | None, *positional: str, **defaults: Any) -> argparse.Namespace:
    """The command line: paths by position, and `--name` for each default, whose type it has.

    A list takes several values, a tuple holds what is allowed, its first is the default; a type has no default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in positional:
        parser.add_argument(name.lower(), type=Path, metavar=name)
    for name, default in defaults.items():
        first = default[0] if isinstance(default, list | tuple) else default
        shown = None if isinstance(default, type) else default if isinstance(default, list) else first
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=default if isinstance(default, type) else type(first),
            nargs="+" if isinstance(default, list) else None,
            choices=default if isinstance(default, tuple) else None,
            default=shown,
        )
    return parser.parse_args()


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each side's figure in each round; they take turns to go first, and a first round, which warms up, is left out."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            found[name].append(sides[name]())
    return {name: figures[1:] for name, figures in found.items()}


def show_ratio(times: Mapping[Any, Sequence[float]], one: Any, other: Any) -> float:
    """Print each side's median and range in seconds; returns the ratio of the medians of two."""
    for name, seconds in times.items():
        print(f"{name!s:12}  median {median(seconds):.3f} s  {min(seconds):.3f} to {max(seconds):.3f} s")
    return median(times[one]) / median(times[other])


def spread(values: Sequence[float | None], form: str) -> str:
    """`mean ± standard deviation`, and the number of missing values."""
    there = [value for value in values if value is not None]
    if not there:
        return "never"
    text = format(fmean(there), form) + (f" ± {format(stdev(there), form)}" if len(there) > 1 else "")
    return text if len(there) == len(values) else f"{text} ({len(values) - len(there)} of {len(values)} never)"


def markdown(head: Sequence[str], *rows: Sequence[str]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def machine() -> str:
    """What a figure was measured on."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """What was measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def photos_below(folder: Path) -> list[Path]:
    """The images in a folder and its folders."""
    return sorted(path for path in folder.rglob("*") if path.name.lower().endswith(EXTENSIONS))


def link_photos(images: Path, folder: Path, count: int | None = None) -> None:
    """An ImageFolder of links to a folder's photos, repeated up to `count`."""
    files = photos_below(images)
    for split, number_of in (("train", count or len(files)), ("val", 4)):
        for number in range(number_of):
            file = files[number % len(files)]
            link = folder / split / f"class{number % 2}" / f"{number:06}{file.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def prepare_all(
    source: Path, target: Path, sizes: Sequence[str], val: Sequence[str] = ("original",), layout: str = "mds"
) -> None:
    """Write shards of an ImageFolder's images, of JPEGs at quality 90 or, with the layout `raw`, of pixels.

    Raises:
        SystemExit: They do not read back correctly.
    """
    settings = Settings(layout, tuple(sizes), tuple(val), 90)
    if not prepare(str(source), str(target), settings, os.cpu_count() or 1, lambda _: None):
        raise SystemExit(f"{target}: the prepared images do not read back correctly")
