"""Weights & Biases and MLflow: Composer's loggers, made from the YAML's arguments."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger

from recipes.errors import InputError


def _make(kind: type[LoggerDestination], package: str, arguments: Mapping[str, Any]) -> LoggerDestination:
    allowed = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    unknown = [name for name in arguments if name not in allowed]
    if unknown:
        raise InputError(*(f"loggers.{package}.{name}: unknown; allowed: {', '.join(allowed)}" for name in unknown))
    if importlib.util.find_spec(package) is None:
        raise InputError(f"loggers.{package}: {package} is not installed; run: pip install {package}, or leave it out")
    return kind(**arguments)


def wandb_logger(arguments: Mapping[str, Any], run_name: str, run_folder: Path) -> LoggerDestination:
    """Composer's WandBLogger, on rank 0.

    A run that goes on continues the same W&B run (its id is the run's name, unless `init_kwargs` sets another).
    Without a network: `init_kwargs: {mode: offline}`, or WANDB_MODE=offline in the environment; files go to RUN/wandb.

    Args:
        arguments: WandBLogger's, such as {"project": "resnet"}.
        run_name: Name and id unless the arguments say otherwise.
        run_folder: The run's folder.

    Raises:
        InputError: An argument is unknown, or the package is missing.
    """
    init = {"id": run_name, "resume": "allow", "dir": str(run_folder)} | dict(arguments.get("init_kwargs") or {})
    return _make(WandBLogger, "wandb", {"name": run_name, **arguments, "init_kwargs": init})


def mlflow_logger(arguments: Mapping[str, Any], run_name: str) -> LoggerDestination:
    """Composer's MLFlowLogger, on rank 0; a run that goes on continues the MLflow run of its name.

    Without a network: `tracking_uri`, or MLFLOW_TRACKING_URI in the environment, set to a local folder.

    Args:
        arguments: MLFlowLogger's, such as {"experiment_name": "resnet"}.
        run_name: Name unless the arguments say otherwise.

    Raises:
        InputError: An argument is unknown, or the package is missing.
    """
    return _make(MLFlowLogger, "mlflow", {"run_name": run_name, "resume": True, **arguments})
