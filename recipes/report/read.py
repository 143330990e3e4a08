"""What a run left in its folder, in memory; what is missing or damaged becomes a line of text, never an error."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.text import escape
from recipes.errors import InputError
from recipes.load import read_document

FILES = ("config.yaml", "summary.json", "metrics.jsonl")
"""A folder with none of them is no run's."""
PREDICTIONS = "predictions.npz"
COLUMNS = (
    "batch",
    "epoch",
    "samples",
    "wall_seconds",
    "train/loss",
    "train/lr",
    "train/momentum",
    "train/image_size",
    "train/batch_size",
    "time/train_seconds",
    "time/loader_wait_seconds",
)
EVALUATED = ("epoch", "wall_seconds", "top1", "top5", "loss")


class Predictions(NamedTuple):
    """The last evaluation, image by image; N images, C classes (recipes/watch/predictions.py has the details)."""

    label: NDArray[np.integer[Any]]
    """int (N,); negative where the image could not be decoded."""
    predicted: NDArray[np.integer[Any]]
    """int (N,)."""
    probability: NDArray[np.floating[Any]]
    """float (N,), of `predicted`."""
    label_probability: NDArray[np.floating[Any]]
    """float (N,), of `label`."""
    classes: list[str]
    """Folder names in label order."""
    names: list[str]
    """What people call them."""
    size: int
    """In pixels."""

    def name(self, label: int) -> str:
        """A class's name; a model may have more outputs than the dataset has classes."""
        return escape(self.names[label]) if 0 <= label < len(self.names) else f"class {label}"


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path
    name: str
    config: dict[str, Any]
    """Nested, as in config.yaml; empty where it cannot be read."""
    summary: dict[str, Any]
    """summary.json; empty where it cannot be read."""
    training: dict[str, NDArray[np.float64]]
    """Figures of the training by name (COLUMNS), float64 (n,) each, in the order of the batches; nan where absent."""
    evaluations: dict[int, dict[str, NDArray[np.float64]]]
    """By image size in pixels: EVALUATED by name, float64 (n,) each."""
    pictures: tuple[Path, ...]
    """Grids of training images, in the order of the run."""
    predictions: Predictions | None
    problems: tuple[str, ...]
    """What of the folder could not be used, in words."""

    @property
    def resumed_from(self) -> list[str]:
        """The checkpoints that the run went on from, as it named them."""
        sources = self.summary.get("resumed_from")
        return [str(one) for one in sources] if isinstance(sources, list) else []

    def setting(self, key: str) -> Any:
        """A key of the config, such as `data.path`; None where it is not there."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Args:
        folder: As a run leaves it, finished or not, or parts of it.

    Raises:
        InputError: There is no such folder, or nothing in it is a run's.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; allowed: the folder of a run, such as runs/demo")
    if not any((folder / name).exists() for name in FILES):
        inside = sorted(str(path.parent) for name in FILES for path in folder.glob(f"*/{name}"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise InputError(f"{folder}: not a run's folder, it has no {', '.join(FILES[:-1])} or {FILES[-1]}{hint}")
    problems: list[str] = []
    config, summary = _config(folder / FILES[0], problems), _summary(folder / FILES[1], problems)
    training, evaluations = _metrics(folder / FILES[2], problems)
    name = summary.get("run_name") or config.get("run_name") or folder.resolve().name
    return Run(
        folder=folder,
        name=str(name),
        config=config,
        summary=summary,
        training=training,
        evaluations=evaluations,
        pictures=tuple(sorted((folder / "images").glob("ep*px.png"))),
        predictions=_predictions(folder / PREDICTIONS, problems),
        problems=tuple(problems),
    )


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config: dict[str, Any] = read_document(path).value
    except InputError as error:
        problems.append(str(error))
        return {}
    return config


def _summary(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_bytes(), parse_int=_whole)
        if isinstance(summary, dict):
            return summary
        problems.append(f"{path}: holds no JSON object")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or error}")
    except (ValueError, RecursionError):
        problems.append(f"{path}: not JSON")
    return {}


def _whole(digits: str) -> float:
    """A whole number; one that no run reaches becomes a float, which overflows to infinity and not to an error."""
    return int(digits) if len(digits) < 19 else float(digits)


def _number(value: Any) -> float:
    """A figure; nan for what is no number, null among it."""
    return float(value) if isinstance(value, float) or (type(value) is int and abs(value) < 2**63) else math.nan


def _metrics(
    path: Path, problems: list[str]
) -> tuple[dict[str, NDArray[np.float64]], dict[int, dict[str, NDArray[np.float64]]]]:
    """The figures of training and of the evaluations, one after the other, without holding the file in memory."""
    evaluated: dict[int, array[float]] = {}
    rows, torn = array("d"), 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    at = [_number(entry[name]) for name in COLUMNS[:4]]
                except (ValueError, TypeError, KeyError, RecursionError):
                    torn += 1
                    continue
                if not all(map(math.isfinite, at)):
                    torn += 1
                    continue
                if "train/loss" in entry:
                    rows.extend(at)
                    rows.extend([_number(entry.get(name)) for name in COLUMNS[4:]])
                for name in entry:
                    if name.endswith("/top1") and name.startswith("eval/") and name[5:-5].isdecimal():
                        figures = (_number(entry.get(f"{name[:-4]}{one}")) for one in EVALUATED[2:])
                        evaluated.setdefault(int(name[5:-5]), array("d")).extend([at[1], at[3], *figures])
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or error}")
    if torn:
        problems.append(f"{path}: {torn} {'line is' if torn == 1 else 'lines are'} torn or damaged, and left out")
    evaluations = {size: _columns(evaluated[size], EVALUATED) for size in sorted(evaluated)}
    return _columns(rows, COLUMNS), evaluations


def _columns(rows: array[float], names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    table: NDArray[np.float64] = np.empty((0, len(names)))
    if rows:
        table = np.frombuffer(rows, np.float64).reshape(-1, len(names))
    table = table[np.argsort(table[:, 0], kind="stable")]
    table[np.isinf(table)] = np.nan
    return {name: table[:, column] for column, name in enumerate(names)}


def _predictions(path: Path, problems: list[str]) -> Predictions | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Predictions(
                label=file["label"],
                predicted=file["predicted"],
                probability=file["probability"],
                label_probability=file["label_probability"],
                classes=[str(one) for one in file["classes"]],
                names=[str(one) for one in file["names"]],
                size=int(file["size"]),
            )
        shapes = {column.shape for column in found[:4]}
        whole = len(shapes) == 1 and found.label.ndim == 1 and len(found.classes) == len(found.names)
        kinds = "".join(column.dtype.kind for column in found[:4])
        if not whole or kinds != "iiff" or not (found.label < len(found.classes)).all():
            raise ValueError("its parts do not fit each other")
    except Exception as error:  # whatever a damaged archive makes of numpy, zipfile and zlib
        problems.append(f"{path}: damaged: {(str(error) or type(error).__name__).splitlines()[0][:200]}")
        return None
    return found
