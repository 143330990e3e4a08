"""What was trained, with what, and what it came to, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml
from markupsafe import Markup

from recipes.config import RunConfig
from recipes.page.html import paragraph, table
from recipes.read_run import short_commit
from recipes.report.read import Run
from recipes.resolved import resolved_values
from recipes.watch.clock import duration

ABSENT = "-"


def number(value: Any, form: str) -> str:
    """A figure as text, or a dash where it is none."""
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else ABSENT


def percent(value: Any) -> str:
    """A share in [0, 1] as a percentage with two digits."""
    return f"{100 * value:.2f}" if isinstance(value, int | float) else ABSENT


def state_of(run: Run) -> str:
    """How far a run is, in words."""
    epochs = run.summary.get("epochs")
    planned = str(run.setting("max_duration") or "").removesuffix("ep")
    if run.summary.get("finished") is True:
        return f"finished, {number(epochs, ',')} epochs"
    if run.training["epoch"].size:
        epochs = f"{run.training['epoch'][-1]:.4g}"
    return f"not finished: {epochs if epochs is not None else 'no'} of {planned or 'unknown'} epochs"


def results(runs: Sequence[Run]) -> Markup:
    """A row per run: state, accuracy, time."""
    headers = ["run", "state", "top-1 (%)", "top-5 (%)", "time (h:mm:ss)", "images/s", "resumes"]
    rows = []
    for run in runs:
        summary = run.summary
        seconds = summary.get("wall_seconds")
        rows.append(
            [
                run.name,
                state_of(run),
                percent(summary.get("top1")),
                percent(summary.get("top5")),
                duration(seconds) if isinstance(seconds, int | float) else ABSENT,
                number(summary.get("images_per_second"), ",.1f"),
                len(run.resumed_from) if summary else ABSENT,
            ]
        )
    return table(headers, rows, numbers=(2, 3, 4, 5, 6))


def techniques(run: Run) -> Markup:
    """The techniques that were on, with their settings."""
    section = run.setting("algorithms")
    named = dict(section) if isinstance(section, dict) else {}
    others = named.pop("composer", None)
    on = {name: value for name, value in named.items() if isinstance(value, dict)}
    on |= {f"composer.{name}": value for name, value in others.items()} if isinstance(others, dict) else {}
    if not on:
        return paragraph("No technique was on." if section else "The config does not say which techniques were on.")
    return table(["technique", "settings"], [[name, _inline(value)] for name, value in on.items()])


def trained(run: Run, folded: bool) -> Markup:
    """Model, data, techniques, and the keys that are not at their defaults; all keys to unfold.

    Args:
        run: The run.
        folded: Show the keys only where the reader asks for them.
    """
    if not run.config:
        return paragraph("There is no config to show.")

    def word(key: str) -> str:
        return _inline(run.setting(key))

    rate = word("optimizer.lr")
    if run.setting("optimizer.lr_batch_size") is not None:
        rate += f" per {word('optimizer.lr_batch_size')} images of a step"
    what = (
        f"{word('model.name')} on {word('data.path')} for {word('max_duration').removesuffix('ep')} epochs: "
        f"{word('loss.name')}, {word('optimizer.name')} with a highest learning rate of {rate}, "
        f"schedule {word('scheduler.name')}, seed {word('seed')}."
    )
    plain = {key: value for key, value in run.config.items() if key != "algorithms"}
    usual = defaults()
    rows = [[key, value] for key, value in flattened(plain).items() if usual.get(key) != value]
    differing = table(["key", "value"], rows)
    if folded:
        differing = _folded("Keys that are not at their defaults", differing)
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    every = _folded("Every key", Markup("<pre>{}</pre>").format(text))
    return paragraph(what) + techniques(run) + differing + every


def _folded(title: str, body: Markup) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(title, body)


def differences(runs: Sequence[Run]) -> Markup:
    """The keys of the config in which several runs differ."""
    flats = [_by_technique(run.config) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = [[key, *(flat.get(key, ABSENT) for flat in flats)] for key in keys]
    differing = [row for row in rows if row[0] != "run_name" and len(set(row[1:])) > 1]
    if not differing:
        return paragraph("The configs are the same but for the runs' names.")
    return table(["key", *(run.name for run in runs)], differing)


def _by_technique(config: Mapping[str, Any]) -> dict[str, str]:
    """The config flattened, but each technique with its settings in one line."""
    section = config.get("algorithms")
    named = section if isinstance(section, dict) else {}
    flat = flattened({key: value for key, value in config.items() if key != "algorithms"})
    return flat | {f"algorithms.{name}": _inline(value) for name, value in named.items()}


def versions(runs: Sequence[Run]) -> Markup:
    """Versions and hardware, a column per run."""
    found = [run.summary.get("versions") for run in runs]
    columns = [one if isinstance(one, dict) else {} for one in found]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(str(column.get(key) or ABSENT) for column in columns)] for key in keys]
    for row in rows:
        if row[0] == "commit":  # short, it leaves room for other runs
            row[1:] = [short_commit(text) for text in row[1:]]
    for name in ("device", "precision", "data.workers", "deterministic", "compile"):
        if any(run.setting(name) is not None for run in runs):
            rows.append([f"{name} (config)", *(_inline(run.setting(name)) for run in runs)])
    if not rows:
        return paragraph("The run did not leave word of them.")
    return table(["", *(run.name for run in runs)], rows)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as text by key path, `a.b`; lists and mappings of numbers in one line."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value and not all(str(one).isdecimal() for one in value):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _inline(value)
    return flat


@lru_cache(maxsize=1)
def defaults() -> dict[str, str]:
    """The defaults of the config's keys, flattened; those without one are left out."""
    least = {"run_name": "x", "data": {"path": "x"}, "device_batch_size": 1}
    flat = flattened(resolved_values(RunConfig.model_validate(least)))
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
