"""Weights & Biases and MLflow: Composer's loggers, made from the YAML's arguments."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from composer import Logger
from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger
from composer.utils import dist
from packaging.specifiers import SpecifierSet

from data.errors import InputError
from data.text import first_line
from recipes.config import LoggersConfig, RunConfig
from recipes.resolved import determining_values

log = logging.getLogger(__name__)

_EXTERNAL: dict[str, tuple[type[LoggerDestination], str]] = {
    "wandb": (WandBLogger, ">=0.19.11,<0.28"),
    "mlflow": (MLFlowLogger, ">=2.14.1,<3"),
}
"""Versions that work with Composer 0.32.1, whose WandBLogger calls functions that wandb 0.30 removed, and with the
lock's protobuf, which wandb before 0.19.11 would replace by a version that TensorBoard cannot use."""


def logger_problems(loggers: LoggersConfig) -> Iterator[str]:
    """Unknown arguments, and packages that are not installed or do not work with Composer, one line each."""
    for package, (kind, versions) in _EXTERNAL.items():
        if getattr(loggers, package) is None:
            continue
        allowed = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
        for name in getattr(loggers, package):
            if name not in allowed:
                yield f"loggers.{package}.{name}: unknown; allowed: {', '.join(allowed)}"
        wanted = f'run: pip install "{package}{versions}", or set loggers.{package}=off'
        if importlib.util.find_spec(package) is None:
            yield f"loggers.{package}: {package} is not installed; {wanted}"
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):  # installed under another name, such as mlflow-skinny
            found = metadata.version(package)
            if not SpecifierSet(versions).contains(found, prereleases=True):
                yield f"loggers.{package}: {package} {found} does not work with Composer; {wanted}"


def external_loggers(loggers: LoggersConfig, run_name: str, folder: Path) -> list[LoggerDestination]:
    """Composer's WandBLogger and MLFlowLogger, if requested; a resumed run continues the run with its name.

    Without a network: for W&B `init_kwargs: {mode: offline}`, or WANDB_MODE=offline in the environment (files go to
    RUN/wandb); for MLflow `tracking_uri`, or MLFLOW_TRACKING_URI in the environment, set to a local folder. InputError:
    W&B has no API key.
    """
    made: list[LoggerDestination] = []
    for_wandb: dict[str, Any] | None = loggers.wandb
    for_mlflow: dict[str, Any] | None = loggers.mlflow
    if for_wandb is not None:
        init = {"id": run_name, "resume": "allow", "dir": str(folder), **(for_wandb.get("init_kwargs") or {})}
        if (init.get("mode") or os.environ.get("WANDB_MODE") or "online") == "online":
            import wandb

            if wandb.api.api_key is None and not sys.stdin.isatty():  # and nobody can be asked
                how = "run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline to work without"
                raise InputError(f"loggers.wandb: no API key; {how}")
        made.append(WandBLogger(**{"name": run_name, **for_wandb, "init_kwargs": init}))
    if for_mlflow is not None:
        made.append(MLFlowLogger(**{"run_name": run_name, "resume": True, **for_mlflow}))
    return made


def log_config(logger: Logger, config: RunConfig) -> None:
    """Send the keys that determine the weights to W&B and MLflow, as hyperparameters of the run."""
    with _tracking("the config"):
        logger.log_hyperparameters(determining_values(config.model_dump(mode="json"), dist.get_world_size()))


def log_evaluation(logger: Logger, by_size: Mapping[str, Mapping[str, float]], batch: int) -> None:
    """Send W&B and MLflow the last evaluation as a table, a row for each image size in pixels."""
    columns = ["size", "top1", "top5", "loss"]
    rows = [[int(size), *(figures[name] for name in columns[1:])] for size, figures in by_size.items()]
    with _tracking("the table of the evaluation"):
        logger.log_table(columns, rows, "evaluation", step=batch)


@contextlib.contextmanager
def _tracking(what: str) -> Iterator[None]:
    """A tracker that refuses something, such as a value that differs from an earlier run's, does not end the run."""
    try:
        yield
    except Exception as error:  # each tracker raises its own
        log.warning("%s was not sent to a tracker: %s", what, first_line(error))
