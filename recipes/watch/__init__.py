"""Watching a run: `build_watchers` creates it all, figures.py computes what the others show and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from composer import Callback
from composer.loggers import LoggerDestination

from recipes.config import RunConfig
from recipes.results import METRICS, PREDICTIONS, SUMMARY
from recipes.watch.figures import Figures
from recipes.watch.pictures import BadImages, Predictions, TrainingImages
from recipes.watch.progress import Progress
from recipes.watch.sinks import MetricsFile, TextLog
from recipes.watch.summary import Summary
from recipes.watch.trackers import external_loggers


class Watchers(NamedTuple):
    """For the Trainer: `loggers` and, before the callback that saves checkpoints, `callbacks`."""

    loggers: list[LoggerDestination]
    callbacks: list[Callback]
    summary: Summary  # its `finish` is called when `fit` has returned


def build_watchers(
    config: RunConfig,
    text_log: TextLog,
    *,
    samples: int,
    sizes: Sequence[int],
    classes: Sequence[str],
    class_names: Sequence[str],
    resumed_from: str | None,
) -> Watchers:
    """Create the watchers of a run, which write to the folder of `text_log`, and open the log.

    `samples` are the training images in an epoch, over all processes; `sizes` has the image size in pixels of each
    epoch; `classes` are folder names in label order, `class_names` are human-readable. InputError: W&B has no API key.
    """
    folder, loggers, main_size = text_log.path.parent, config.loggers, config.eval.sizes[-1]
    figures, bad_images = Figures(samples, loggers.interval), BadImages(config.data.max_bad_fraction)
    summary = Summary(folder / SUMMARY, config, figures, bad_images, resumed_from)
    text_log.resumed_from = resumed_from
    events = folder / "tensorboard" if loggers.tensorboard else None
    destinations: list[LoggerDestination] = [text_log, MetricsFile(folder / METRICS, figures.clock, samples, events)]
    if loggers.progress_bar:
        destinations.append(Progress(figures, sizes, main_size, text_log.stream))
    destinations += external_loggers(loggers, config.run_name, folder)
    images = TrainingImages(folder / "images", config.data)
    predictions = Predictions(folder / PREDICTIONS, main_size, classes, class_names)
    text_log.open()
    return Watchers(destinations, [figures, images, bad_images, predictions, summary], summary)
