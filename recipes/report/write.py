"""From runs' folders to the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes.errors import InputError
from recipes.page.html import page
from recipes.report.about import percent, state_of
from recipes.report.read import Run, read_run
from recipes.report.sections import sections
from recipes.watch.files import replace_text

REPORT = "report.html"
"""The page's name in a run's folder."""


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side."""
    runs = _told_apart(runs)
    if len(runs) > 1:
        return page(f"{len(runs)} runs", ", ".join(run.name for run in runs), sections(runs))
    run = runs[0]
    size = run.predictions.size if run.predictions is not None else None
    top1 = run.summary.get("top1")
    words = [state_of(run), *([f"top-1 {percent(top1)} %" + (f" at {size} px" if size else "")] if top1 else [])]
    return page(f"Run {run.name}", "; ".join(words), sections(runs))


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Read runs and write their report; its folder is made.

    Args:
        folders: Of the runs, in the order in which they are shown.
        output: The page.

    Raises:
        InputError: A folder is no run's, or the page cannot be written.
    """
    if output.is_dir():
        raise InputError(f"{output}: cannot be written: is a folder; allowed: a file, such as {output / REPORT}")
    text = render([read_run(folder) for folder in folders])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, text)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name are called by their folders."""
    counts = Counter(run.name for run in runs)
    return [run if counts[run.name] == 1 else replace(run, name=str(run.folder)) for run in runs]
