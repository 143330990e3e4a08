"""The report: the values for report.html.jinja, and writing the page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data.decode import BadImage, Picture
from data.errors import DataError
from data.files import replace_text
from data.source import Source, open_evaluation
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.output import ABSENT, Table, render_page
from recipes.report import POINTS, Confusions, Predictions, Run, charts, read_run
from recipes.resolved import resolved_values
from recipes.results import clock_time, short_commit

REPORT = "report.html"  # the page's name in a run's folder
GRIDS, ERRORS = 8, 24  # at most this many pictures of one run; of several runs, half as many each
MATRIX, PAIRS, HARDEST = 12, 15, 10  # classes in the table of confusions, and rows in the lists below it
# Pixels: the longest side of a grid, that of a small grid after enlarging, and that of a thumbnail.
GRID_WIDTH, GRID_ENLARGED, THUMBNAIL = 1060, 640, 150


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write the page about runs, given their folders in the order of display; creates the page's folder.

    Raises:
        InputError: A folder is not a run's, or the page cannot be written.
    """
    if output.is_dir():
        raise InputError(f"{output}: cannot be written: is a directory; allowed: a file, such as {output / REPORT}")
    text = render([read_run(folder) for folder in folders])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, text)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side."""
    names = Counter(run.name for run in runs)
    runs = [run if names[run.name] == 1 else replace(run, name=str(run.results.folder)) for run in runs]
    several, first = len(runs) > 1, runs[0]
    title, subtitle = f"{len(runs)} runs", ", ".join(run.name for run in runs)
    if not several:
        title, subtitle = f"Run {first.name}", _state(first)
        if first.summary.get("top1"):
            size = f" at {first.predictions.size} px" if first.predictions else ""
            subtitle += f"; top-1 {_percent(first.summary['top1'])} %{size}"
    return render_page(
        title,
        subtitle,
        "report/report.html.jinja",
        runs=runs,
        several=several,
        lines=[charts.line_of(index) for index in range(len(runs))],
        results=_results(runs),
        differences=_differences(runs) if several else None,
        settings=[_settings(run) for run in runs],
        versions=_versions(runs),
        curves=_curves(runs),
        accuracy=_accuracy(runs),
        throughput=_throughput(runs),
        time=_time(runs),
        grids=[_grids(run, GRIDS // len(runs[:2])) for run in runs],
        confusions=[_confusions(run.predictions) if run.predictions else None for run in runs],
        errors=[_errors(run, run.predictions, ERRORS // len(runs[:2])) if run.predictions else None for run in runs],
    )


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else ABSENT


def _percent(value: Any) -> str:
    return _number(100 * value, ".2f") if isinstance(value, int | float) else ABSENT


def _section(value: Any) -> dict[str, Any]:
    """A dict; empty if a damaged file holds something else."""
    return value if isinstance(value, dict) else {}


def _state(run: Run) -> str:
    """The progress of a run."""
    epochs = run.summary.get("epochs")
    if run.results.finished:
        return f"finished, {_number(epochs, ',')} epochs"
    if len(run.training["epoch"]):
        epochs = f"{run.training['epoch'][-1]:.4g}"
    planned = str(run.setting("max_duration") or "unknown").removesuffix("ep")
    return f"not finished: {'no' if epochs is None else epochs} of {planned} epochs"


def _results(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        summary, seconds = run.summary, run.summary.get("wall_seconds")
        time = clock_time(seconds) if isinstance(seconds, int | float) else ABSENT
        sources = summary.get("resumed_from")
        resumed = (len(sources) if isinstance(sources, list) else 0) if summary else ABSENT
        shares = [_percent(summary.get(name)) for name in ("top1", "top5")]
        rows.append([run.name, _state(run), *shares, time, _number(summary.get("images_per_second"), ",.1f"), resumed])
    headers = ["run", "state", "top-1 (%)", "top-5 (%)", "time (h:mm:ss)", "images/s", "resumes"]
    return Table(headers, rows, range(2, 7))


def _settings(run: Run) -> dict[str, Any]:
    """What was trained: the techniques with their settings, the keys that differ from their defaults, and all keys."""
    rest = {key: value for key, value in run.config.items() if key != "algorithms"}
    techniques = {name: value for name, value in _techniques(run.config).items() if isinstance(value, dict)}
    usual = _defaults()
    rate = _inline(run.setting("optimizer.lr"))
    if run.setting("optimizer.lr_batch_size") is not None:
        rate += f" per {_inline(run.setting('optimizer.lr_batch_size'))} images of a step"
    names = ("model.name", "data.path", "max_duration", "loss.name", "optimizer.name", "scheduler.name", "seed")
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return {
        "known": {name.replace(".", "_"): _inline(run.setting(name)) for name in names} | {"rate": rate},
        "techniques": Table(["technique", "settings"], [[name, _inline(value)] for name, value in techniques.items()]),
        "differing": Table(["key", "value"], [item for item in _flat(rest).items() if usual.get(item[0]) != item[1]]),
        "text": text,
    }


def _techniques(config: Mapping[str, Any]) -> dict[str, Any]:
    named = dict(_section(config.get("algorithms")))
    others = _section(named.pop("composer", None))
    return named | {f"composer.{name}": value for name, value in others.items()}


def _differences(runs: Sequence[Run]) -> Table:
    """The config keys in which several runs differ, each technique with its settings in one line."""
    flats = []
    for run in runs:
        flat = _flat({key: value for key, value in run.config.items() if key not in ("algorithms", "run_name")})
        flats.append(flat | {f"algorithms.{name}": _inline(value) for name, value in _techniques(run.config).items()})
    rows = [[key, *(flat.get(key, ABSENT) for flat in flats)] for key in dict.fromkeys(key for f in flats for key in f)]
    return Table(["key", *(run.name for run in runs)], [row for row in rows if len(set(row[1:])) > 1])


def _versions(runs: Sequence[Run]) -> Table:
    """Versions and hardware, a column per run."""
    columns, rows = [_section(run.summary.get("versions")) for run in runs], []
    for key in dict.fromkeys(key for column in columns for key in column):
        texts = [str(column.get(key) or ABSENT) for column in columns]
        rows.append([key, *(short_commit(text) if key == "commit" else text for text in texts)])
    for name in ("device", "precision", "data.workers", "deterministic", "compile"):
        if any(run.setting(name) is not None for run in runs):
            rows.append([f"{name} (config)", *(_inline(run.setting(name)) for run in runs)])
    return Table(["", *(run.name for run in runs)], rows)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as text by key path, `a.b`; lists and mappings of numbers in one line."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value and not all(str(one).isdecimal() for one in value):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _inline(value)
    return flat


@lru_cache(maxsize=1)
def _defaults() -> dict[str, str]:
    """The defaults of the config's keys, flattened; those without one are left out."""
    least = {"run_name": "x", "data": {"path": "x"}, "device_batch_size": 1}
    flat = _flat(resolved_values(RunConfig.model_validate(least)))
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


def _curves(runs: Sequence[Run]) -> dict[str, Any]:
    drawn = [run for run in runs if len(run.training["epoch"])]
    if not drawn:
        return {}
    lost = []
    for run in drawn:
        loss, batches = run.training["train/loss"], run.training["batch"]
        missing = np.flatnonzero(np.isnan(loss))
        if len(missing):
            lost.append((run.name, len(missing), len(loss), f"{batches[missing[0]]:.0f}"))
    resumes = [[run.name, _number(one.epoch, ".2f"), one.batch, one.source] for run in runs for one in run.resumes]
    longest = max(len(run.training["batch"]) for run in drawn)
    return {
        "chart": charts.training_curves(runs),
        "averaged": longest >= 50,
        "stages": charts.same_stages(runs) and len(drawn[0].stages) > 1,
        "points": -(-longest // POINTS),
        "not_finite": lost,
        "resumes": Table(["run", "resumed at epoch", "after batch", "from"], resumes, (1, 2)),
    }


def _accuracy(runs: Sequence[Run]) -> dict[str, Any]:
    rows = []
    for run in runs:
        for size, figures in _section(run.summary.get("eval_by_size")).items():
            if isinstance(figures, dict):
                shares = [_percent(figures.get(name)) for name in ("top1", "top5")]
                rows.append([run.name, size, *shares, _number(figures.get("loss"), ".4f")])
    errors = []
    for run, found in ((run, run.predictions) for run in runs if run.predictions is not None):
        kept = found.evaluated
        right = float(np.mean(found.label[kept] == found.predicted[kept])) if len(kept) else 0.0
        error = 100 * (right * (1 - right) / max(1, len(kept))) ** 0.5
        errors.append((run.name, f"{len(kept):,}", found.size, f"{error:.2f}"))
    return {
        "table": Table(["run", "size (px)", "top-1 (%)", "top-5 (%)", "loss"], rows, range(1, 5)),
        "chart": charts.accuracy_over_time(runs) if any(run.results.sizes for run in runs) else None,
        "errors": errors,
    }


def _throughput(runs: Sequence[Run]) -> dict[str, Any]:
    rows: list[list[object]] = []
    for run in runs:
        for stage in run.stages:
            speed, wait = f"{stage.images_per_second:,.1f}", f"{100 * stage.wait_fraction:.1f}"
            epochs = f"{stage.first:.4g} to {stage.last:.4g}"
            rows.append([run.name, epochs, stage.size, stage.batch_size or ABSENT, speed, wait])
    headers = ["run", "epochs", "size (px)", "batch size", "images/s", "loader wait (%)"]
    return {"table": Table(headers, rows, range(2, 6)), "chart": charts.throughput_curves(runs) if rows else None}


def _time(runs: Sequence[Run]) -> dict[str, Any]:
    """Where the time went, according to summary.json."""
    found = []
    for run in runs:
        spent = _section(run.summary.get("seconds"))
        known = {name: float(spent[name]) for name in charts.PHASES if isinstance(spent.get(name), int | float)}
        if min(known.values(), default=0) >= 0 < sum(known.values()) < float("inf"):
            found.append((run.name, known))
    rows = []
    for name, known in found:
        whole, shares = sum(known.values()), [known.get(phase, 0.0) for phase in charts.PHASES]
        cells = [f"{clock_time(share)} ({100 * share / whole:.1f} %)" for share in shares]
        rows.append([name, *cells, clock_time(whole)])
    headers = ["run", *(label for label, _ in charts.PHASES.values()), "in all (h:mm:ss)"]
    return {"table": Table(headers, rows, range(1, 6)), "chart": charts.time_spent(found) if found else None}


def _confusions(found: Predictions) -> dict[str, Any]:
    """The most confused classes against each other, the most frequent confusions, the hardest classes."""
    kept = found.evaluated
    confusions = Confusions(found.label[kept], found.predicted[kept])
    classes = confusions.most_confused(MATRIX)
    matrix = confusions.matrix(classes)
    others = any(row[-1] for row in matrix)  # if the table has all classes, there are none
    strongest = max((row[j] for i, row in enumerate(matrix) for j in range(len(classes)) if i != j), default=1) or 1
    pairs = [
        [found.name(label), found.name(predicted), count, total, f"{100 * count / total:.1f}"]
        for label, predicted, count, total in confusions.pairs[:PAIRS]
    ]
    hardest = [[found.name(one), f"{100 * right / of:.1f}", of] for one, right, of in confusions.hardest(HARDEST)]
    return {
        "words": f"{sum(pair[2] for pair in confusions.pairs):,} of {len(kept):,} images at {found.size} px were "
        "predicted as another class.",
        "letters": ascii_uppercase[: len(classes)],
        "others": others,
        "matrix": [(found.name(one), row if others else row[:-1]) for one, row in zip(classes, matrix, strict=True)],
        "strongest": strongest,
        "pairs": Table(["images of", "predicted as", "times", "of", "share (%)"], pairs, (2, 3, 4)),
        "hardest": Table(["hardest classes", "top-1 (%)", "images"], hardest, (1, 2)),
    }


def _grids(run: Run, limit: int) -> list[tuple[str, str, Any]]:
    """(caption, error, picture) of the run's saved grids of training images, spread over the run."""
    shown: list[tuple[str, str, Any]] = []
    for at in np.unique(np.linspace(0, len(run.pictures) - 1, limit).astype(int)) if run.pictures else ():
        path = run.pictures[at]
        epoch, _, size = path.stem.removeprefix("ep").partition("-")
        caption = f"{size.removesuffix('px')} px, from epoch {int(epoch) if epoch.isdecimal() else epoch} on"
        try:
            with Image.open(path, formats=["PNG"]) as image:
                shown.append((caption, "", _embed(image, GRID_WIDTH, GRID_ENLARGED)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
            shown.append((caption, f"{path.name} cannot be shown: {error}", None))
    return shown


def _errors(run: Run, found: Predictions, limit: int) -> dict[str, Any]:
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
            picture = None if source is None else _thumbnail(source.reader(THUMBNAIL, [index])(index))
        except (BadImage, DataError, OSError) as reason:
            broken = f"cannot be shown: {reason}"
        words = f"{found.name(int(found.label[index]))}, predicted as {found.name(int(found.predicted[index]))}"
        chances = f"{100 * found.probability[index]:.0f} % against {100 * found.label_probability[index]:.0f} %"
        shown.append((words, chances, broken, picture))
    return {"problem": problem, "shown": shown}


def _evaluated_images(run: Run, found: Predictions) -> Source:
    """The images that the predictions are for; DataError: they no longer exist, or have been replaced by others."""
    path, cache = run.setting("data.path"), run.setting("data.cache_folder")
    if not isinstance(path, str):
        raise DataError("the config does not say where the images are")
    source = open_evaluation(path, cache if isinstance(cache, str) else "cache", found.classes)
    decoded = found.label >= 0
    if len(source) != len(decoded) or not np.array_equal(source.labels[decoded], found.label[decoded]):
        raise DataError(f"{path}: holds other images now than those that were evaluated")
    return source


def _thumbnail(data: bytes) -> dict[str, Any]:
    """An evaluation image, reduced but not cropped; BadImage: it cannot be decoded."""
    image = Picture(data)
    reduction = next((one for one in (8, 4, 2) if max(image.height, image.width) // one >= THUMBNAIL), 1)
    return _embed(Image.fromarray(image.decode(reduction)), THUMBNAIL, THUMBNAIL)


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
