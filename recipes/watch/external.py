"""Weights & Biases and MLflow: Composer's loggers, made from the YAML's arguments."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger
from packaging.specifiers import SpecifierSet

from recipes.errors import InputError

VERSIONS = {"wandb": ">=0.19.11,<0.28", "mlflow": ">=2.14.1,<3"}
"""What goes with Composer 0.32.1, whose WandBLogger calls what wandb 0.30 no longer has, and with the lock's protobuf,
which wandb before 0.19.11 would replace by one that TensorBoard cannot use."""


def _require(package: str) -> None:
    wanted = f'"{package}{VERSIONS[package]}"'
    if importlib.util.find_spec(package) is None:
        raise InputError(f"loggers.{package}: {package} is not installed; run: pip install {wanted}, or leave it out")
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:  # installed under another name, such as mlflow-skinny
        return
    if not SpecifierSet(VERSIONS[package]).contains(found, prereleases=True):
        raise InputError(f"loggers.{package}: {package} {found} does not go with Composer; run: pip install {wanted}")


def _check(kind: type[LoggerDestination], package: str, arguments: Mapping[str, Any]) -> None:
    allowed = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    unknown = [name for name in arguments if name not in allowed]
    if unknown:
        raise InputError(*(f"loggers.{package}.{name}: unknown; allowed: {', '.join(allowed)}" for name in unknown))
    _require(package)


def _can_log_in() -> bool:
    """A key is known, or a person can be asked for one."""
    import wandb

    return wandb.api.api_key is not None or sys.stdin.isatty()


def wandb_logger(arguments: Mapping[str, Any], run_name: str, run_folder: Path) -> LoggerDestination:
    """Composer's WandBLogger, on rank 0.

    A run that goes on continues the same W&B run (its id is the run's name, unless `init_kwargs` sets another).
    Without a network: `init_kwargs: {mode: offline}`, or WANDB_MODE=offline in the environment; files go to RUN/wandb.

    Args:
        arguments: WandBLogger's, such as {"project": "resnet"}.
        run_name: Name and id unless the arguments say otherwise.
        run_folder: The run's folder.

    Raises:
        InputError: An argument is unknown, or the package is missing or does not go with Composer, or
            no API key is known.
    """
    _check(WandBLogger, "wandb", arguments)
    init = {"id": run_name, "resume": "allow", "dir": str(run_folder)} | dict(arguments.get("init_kwargs") or {})
    mode = init.get("mode") or os.environ.get("WANDB_MODE") or "online"
    if mode == "online" and not _can_log_in():
        raise InputError(
            "loggers.wandb: no API key; run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline to work without"
        )
    return WandBLogger(**{"name": run_name, **arguments, "init_kwargs": init})


def mlflow_logger(arguments: Mapping[str, Any], run_name: str) -> LoggerDestination:
    """Composer's MLFlowLogger, on rank 0; a run that goes on continues the MLflow run of its name.

    Without a network: `tracking_uri`, or MLFLOW_TRACKING_URI in the environment, set to a local folder.

    Args:
        arguments: MLFlowLogger's, such as {"experiment_name": "resnet"}.
        run_name: Name unless the arguments say otherwise.

    Raises:
        InputError: An argument is unknown, or the package is missing or of a version that does not go with Composer.
    """
    _check(MLFlowLogger, "mlflow", arguments)
    return MLFlowLogger(**{"run_name": run_name, "resume": True, **arguments})
