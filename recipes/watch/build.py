"""All that watches a run, from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from composer import Callback
from composer.loggers import LoggerDestination

from recipes.watch.bad_images import BadImages
from recipes.watch.clock import Clock
from recipes.watch.external import mlflow_logger, wandb_logger
from recipes.watch.figures import Figures
from recipes.watch.images import TrainingImages
from recipes.watch.metrics_file import MetricsFile
from recipes.watch.predictions import Predictions
from recipes.watch.progress import Progress
from recipes.watch.summary import Summary
from recipes.watch.text_log import TextLog

PLAIN_LINE_SECONDS = 30.0
"""Time between two lines of progress where the console is no terminal."""


class Watchers(NamedTuple):
    """For the Trainer: `loggers` and, before the callback that saves checkpoints, `callbacks`.

    `summary.finish(state_dict)` is called when `fit` has returned; `text_log.open()` may be called before the Trainer
    is made, so that what happens until then is logged.
    """

    loggers: list[LoggerDestination]
    callbacks: list[Callback]
    summary: Summary
    text_log: TextLog


def build_watchers(
    *,
    run_folder: Path,
    run_name: str,
    plan: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    interval: int,
    progress_bar: bool,
    tensorboard: bool,
    wandb: Mapping[str, Any] | None,
    mlflow: Mapping[str, Any] | None,
    max_bad_fraction: float,
    config_digest: str,
    eval_sizes: Sequence[int],
    resumed_from: Sequence[str],
    classes: Sequence[str],
    class_names: Sequence[str],
    stream: TextIO,
    text_log: TextLog | None = None,
) -> Watchers:
    """Make the watchers of a run.

    Args:
        run_folder: Receives log.txt, metrics.jsonl, summary.json, predictions.npz, images/ and tensorboard/.
        run_name: The run's name.
        plan: (training images over all processes, size in pixels) of each epoch.
        mean: Mean per channel (R, G, B) of images in [0, 1].
        std: Standard deviation per channel.
        interval: Batches between two sets of figures.
        progress_bar: Show one, or plain lines where `stream` is no terminal.
        tensorboard: Write event files.
        wandb: Arguments of Composer's WandBLogger; None: off.
        mlflow: Arguments of Composer's MLFlowLogger; None: off.
        max_bad_fraction: Share of a split's images, in [0, 1], that may be undecodable.
        config_digest: For summary.json.
        eval_sizes: In pixels; those of evaluators labelled `eval_SIZE`.
        resumed_from: Name of the checkpoint that this process goes on from; empty where it starts from zero.
        classes: Class folder names in label order.
        class_names: Their names for people.
        stream: The console.
        text_log: One that holds already what was logged; None: a new one.

    Raises:
        InputError: W&B or MLflow is asked for and not installed, or given an unknown argument.
    """
    samples = plan[0][0]
    clock = Clock()
    figures = Figures(clock, samples, interval)
    bad_images = BadImages(max_bad_fraction)
    summary = Summary(
        run_folder / "summary.json",
        run_name=run_name,
        figures=figures,
        bad_images=bad_images,
        eval_sizes=eval_sizes,
        resumed_from=resumed_from,
        config_digest=config_digest,
    )
    text_log = text_log or TextLog(run_folder / "log.txt", stream, run_name)
    text_log.resumed_from = list(resumed_from)
    loggers: list[LoggerDestination] = [text_log, MetricsFile(run_folder / "metrics.jsonl", clock, samples)]
    if progress_bar:
        loggers.append(Progress(figures, plan, eval_sizes[-1], stream, PLAIN_LINE_SECONDS))
    if tensorboard:
        from recipes.watch.tensorboard import TensorBoard

        loggers.append(TensorBoard(run_folder / "tensorboard"))
    if wandb is not None:
        loggers.append(wandb_logger(wandb, run_name, run_folder))
    if mlflow is not None:
        loggers.append(mlflow_logger(mlflow, run_name))
    images = TrainingImages(run_folder / "images", mean, std)
    predictions = Predictions(run_folder / "predictions.npz", eval_sizes[-1], classes, class_names)
    return Watchers(loggers, [figures, images, bad_images, predictions, summary], summary, text_log)
