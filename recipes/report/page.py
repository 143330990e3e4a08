"""The report: the values for report.html.jinja, and writing the page."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data.decode import BadImage, Picture
from data.errors import DataError, InputError
from data.files import open_regular, replace_text, writing
from data.open import open_evaluation
from data.source import Source
from recipes.config import RunConfig
from recipes.output import ABSENT, Table, render_page
from recipes.report import PHASES, POINTS, Run, SavedPredictions, charts, read_run, section
from recipes.resolved import resolved_values
from recipes.results import clock_time, short_commit

REPORT = "report.html"  # the page's name in a run's folder
GRIDS, ERRORS = 8, 24  # at most this many pictures of one run; of several runs, half as many each
# Pixels: the longest side of a grid, that of a small grid after enlarging, and that of a thumbnail.
GRID_WIDTH, GRID_ENLARGED, THUMBNAIL = 1060, 640, 150


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write the page about runs, given their folders in the order of display; creates the page's folder.

    Raises:
        InputError: A folder is not a run's, or the page cannot be written.
    """
    if os.path.isdir(output):  # noqa: PTH112 - Path's raises for a name that is too long
        raise InputError(f"{output}: cannot be written: is a directory; allowed: a file, such as {output / REPORT}")
    text = render([read_run(folder) for folder in folders])
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, text)


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side."""
    names = Counter(run.name for run in runs)
    runs = [run if names[run.name] == 1 else replace(run, name=str(run.folder)) for run in runs]
    title, subtitle = f"{len(runs)} runs", ", ".join(run.name for run in runs)
    if len(runs) == 1:
        title, subtitle = f"Run {runs[0].name}", _state(runs[0])
        if runs[0].summary.get("top1"):
            size = f" at {runs[0].predictions.size} px" if runs[0].predictions else ""
            subtitle += f"; top-1 {_percent(runs[0].summary['top1'])} %{size}"
    timed, share = [run for run in runs if run.seconds], len(runs[:2])
    return render_page(
        title,
        subtitle,
        "report/report.html.jinja",
        runs=runs,
        **{"inline": _inline, "number": _number, "percent": _percent, "clock": _clock, "state": _state},
        lines=[charts.line_of(index) for index in range(len(runs))],
        differences=_differences(runs),
        settings=[_settings(run) for run in runs],
        versions=_versions(runs),
        longest=(longest := max(len(run.training["batch"]) for run in runs)),
        points=POINTS,
        training=charts.training_curves(runs) if longest else None,
        accuracy=charts.accuracy_over_time(runs) if any(run.sizes for run in runs) else None,
        throughput=charts.throughput_curves(runs) if any(run.stages for run in runs) else None,
        timed=timed,
        time=charts.time_spent(timed) if timed else None,
        phases=PHASES,
        grids=[_grids(run, GRIDS // share) for run in runs],
        errors=[run.predictions and _errors(run, run.predictions, ERRORS // share) for run in runs],
    )


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else ABSENT


def _percent(value: Any) -> str:
    return _number(100 * value, ".2f") if isinstance(value, int | float) else ABSENT


def _clock(value: Any) -> str:
    return clock_time(value) if isinstance(value, int | float) else ABSENT


def _state(run: Run) -> str:
    """The progress of a run."""
    epochs = run.summary.get("epochs")
    if run.finished:
        return f"finished, {_number(epochs, ',')} epochs"
    if len(run.training["epoch"]):
        epochs = f"{run.training['epoch'][-1]:.4g}"
    planned = str(run.setting("max_duration") or "unknown").removesuffix("ep")
    return f"not finished: {'no' if epochs is None else epochs} of {planned} epochs"


def _settings(run: Run) -> dict[str, Any]:
    """What was trained: the techniques with their settings, the keys that differ from their defaults, and all keys."""
    prefix, keys, usual = "algorithms.", _keys(run.config), _defaults()
    techniques = [[key.removeprefix(prefix), text] for key, text in keys.items() if key.startswith(prefix)]
    differing = [[key, text] for key, text in keys.items() if not key.startswith(prefix) and usual.get(key) != text]
    return {
        "techniques": Table(["technique", "settings"], [row for row in techniques if row[1] not in ("off", "null")]),
        "differing": Table(["key", "value"], differing),
        "text": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100),
    }


def _keys(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as text by key path, `a.b`; a technique, a list, or a mapping of numbers in one line."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        is_technique = prefix.startswith("algorithms.") and path != "algorithms.composer"
        of_numbers = isinstance(value, dict) and value and all(str(one).isdecimal() for one in value)
        if isinstance(value, dict) and not is_technique and not of_numbers:
            flat |= _keys(value, f"{path}.")
        else:
            flat[path] = _inline(value)
    return flat


def _compared(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A row for each key: the key, and its value in each column."""
    return [[key, *(column.get(key, ABSENT) for column in columns)] for key in dict.fromkeys(chain(*columns))]


def _differences(runs: Sequence[Run]) -> Table:
    """The config keys in which several runs differ."""
    rows = [
        row for row in _compared([_keys(run.config) for run in runs]) if row[0] != "run_name" and len(set(row[1:])) > 1
    ]
    return Table(["key", *(run.name for run in runs)], rows)


def _versions(runs: Sequence[Run]) -> Table:
    """Versions and hardware, a column per run."""
    columns = []
    for run in runs:
        versions = section(run.summary, "versions").items()
        column = {key: short_commit(str(value or ABSENT)) for key, value in versions}
        keys = (
            ("device", "precision", "data.workers", "deterministic", "cudnn_benchmark", "compile") if run.config else ()
        )
        columns.append(column | {f"{key} (config)": _inline(run.setting(key)) for key in keys})
    return Table(["", *(run.name for run in runs)], _compared(columns))


def _defaults() -> dict[str, str]:
    """The defaults of the config's keys, flattened; those without one are left out."""
    least = {"run_name": "x", "data": {"path": "x"}, "device_batch_size": 1}
    flat = _keys(resolved_values(RunConfig.model_validate(least)))
    return {key: value for key, value in flat.items() if key not in ("run_name", "data.path", "device_batch_size")}


def _inline(value: Any) -> str:
    """A value in one line, as in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_inline(item)}" for key, item in value.items()) or "no settings"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _grids(run: Run, limit: int) -> list[tuple[str, str, Any]]:
    """(caption, error, picture) of the run's saved grids of training images, spread over the run."""
    shown: list[tuple[str, str, Any]] = []
    for at in np.unique(np.linspace(0, len(run.pictures) - 1, limit).astype(int)) if run.pictures else ():
        path = run.pictures[at]
        epoch, _, size = path.stem.removeprefix("ep").partition("-")
        caption = f"{size.removesuffix('px')} px, from epoch {int(epoch) if epoch.isdecimal() else epoch} on"
        try:
            with os.fdopen(open_regular(path), "rb") as file, Image.open(file, formats=["PNG"]) as image:
                shown.append((caption, "", _embed(image, GRID_WIDTH, GRID_ENLARGED)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
            shown.append((caption, f"{path.name} cannot be shown: {error}", None))
    return shown


def _errors(run: Run, found: SavedPredictions, limit: int) -> dict[str, Any]:
    """The wrong predictions with the highest probability, with their images if these still exist."""
    source, problem, shown = None, "", []
    chosen = found.most_confident_errors(limit)
    try:
        source = _evaluated_images(run, found) if chosen else None
    except (DataError, OSError, ValueError) as error:
        problem = f"The images cannot be shown: {error}."
    for index in chosen:
        broken, picture = "", None
        try:
            if source is not None:
                image = Image.fromarray(Picture(source.read(index)).decode(1))
                picture = _embed(image, THUMBNAIL, THUMBNAIL)
        except (BadImage, DataError, OSError) as reason:
            broken = f"cannot be shown: {reason}"
        words = f"{found.name(int(found.label[index]))}, predicted as {found.name(int(found.predicted[index]))}"
        chances = f"{100 * found.probability[index]:.0f} % against {100 * found.label_probability[index]:.0f} %"
        shown.append((words, chances, broken, picture))
    return {"problem": problem, "shown": shown}


def _evaluated_images(run: Run, found: SavedPredictions) -> Source:
    """The images that the predictions are for; DataError: they no longer exist, or have been replaced by others."""
    path, cache = run.setting("data.path"), run.setting("data.cache_folder")
    if not isinstance(path, str):
        raise DataError("the config does not say where the images are")
    source = open_evaluation(path, cache if isinstance(cache, str) else "cache", found.classes)
    decoded = found.label >= 0
    if len(source) != len(decoded) or not np.array_equal(source.labels[decoded], found.label[decoded]):
        raise DataError(f"{path}: holds other images now than those that were evaluated")
    return source


def _embed(image: Image.Image, longest: int, enlarged: int) -> dict[str, Any]:
    """An image for the page, a few kilobytes: a large image is reduced and compressed, a small one shown enlarged.

    Its longer side has at most `longest` pixels on the page; the browser enlarges a small image to at most `enlarged`
    pixels, by an integer factor without smoothing.
    """
    image, buffer = image.convert("RGB"), io.BytesIO()
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    factor = enlarged // max(image.size)
    kind, options = ("JPEG", {"quality": 85}) if factor < 2 else ("PNG", {"optimize": True})
    image.save(buffer, kind, **options)
    address = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"address": address, "width": None if factor < 2 else image.width * factor}
