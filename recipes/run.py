"""A whole run: what is checked before it, where it goes on, the training, and what it leaves."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from composer import Event, State, Trainer
from composer.algorithms import EMA
from composer.utils import dist, get_device

from data.errors import DataError
from data.open import open_split_pair
from data.sampler import PositionSampler
from data.source import Source, subset
from data.stage import bring
from data.text import escape
from data.wait import WaitingLoader
from data.wordnet import class_names
from data.workers import end_workers
from recipes.checkpoints.claim import Owner, on_first
from recipes.checkpoints.find import Identity
from recipes.checkpoints.interrupt import EXIT_NOT_UPLOADED, Interrupt, Interrupted, SpotNotices
from recipes.checkpoints.resume import Resume, find_resume
from recipes.checkpoints.save import CheckpointManager, upload_finished
from recipes.checkpoints.store import Places
from recipes.checkpoints.upload import CONFIG
from recipes.cli import require_launched
from recipes.config import RunConfig
from recipes.divergence import StopOnNan
from recipes.errors import DivergedError, InputError
from recipes.preflight import require_ready
from recipes.resolved import config_digest, resolved
from recipes.results import SUMMARY, parse_summary
from recipes.trainer import FixedBuckets, build_trainer, device_name
from recipes.watch.build import Watchers, build_watchers
from recipes.watch.files import replace_text
from recipes.watch.profile import build_profiler
from recipes.watch.text_log import TextLog

log = logging.getLogger(__name__)

FILE_ONLY = {"file_only": True}


def start_processes(config: RunConfig) -> None:
    """Join the other processes of the run, and share a CPU's cores with those on this machine.

    Raises:
        InputError: The environment tells of other processes, but not where they are.
    """
    require_launched()
    if dist.get_world_size() == 1:
        return
    device = device_name(config.device)
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_local_world_size()))
    dist.initialize_dist(get_device(device), timeout=300.0)


def open_data(config: RunConfig) -> tuple[Source, Source]:
    """The training and the evaluation images.

    Raises:
        DataError: They cannot be used as they are.
    """
    train, val = open_split_pair(config.data.path, config.data.cache_folder)
    if config.data.train_samples is not None:
        try:
            train = subset(train, config.data.train_samples, config.seed)
        except DataError as error:
            raise DataError(f"data.train_samples: {error}") from error
    return train, val


def final_weights(state: State) -> dict[str, torch.Tensor]:
    """The weights that a finished run stands for: EMA's average where it is on, else the trained ones."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.ema_started and not algorithm.ema_weights_active:
            algorithm.get_ema_model(state.model)
    return state.get_model_state_dict()


def fit(trainer: Trainer, checkpoints: CheckpointManager, watchers: Watchers) -> int:
    """Train to the end, unless the run has been trained, and write what a finished run leaves; the exit status.

    Raises:
        Interrupted: The process was asked to stop.
    """
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
    else:  # which Composer refuses to fit (trainer/trainer.py:2128)
        trainer.engine.run_event(Event.FIT_START)
    status = checkpoints.finish()
    digest = watchers.summary.finish(final_weights(trainer.state))
    log.info("finished: weights_sha256 %s", digest)
    folder = watchers.summary.path.parent
    page = report(folder)
    say(f"results: {watchers.summary.path}; pictures: {folder / 'images'}")
    say(f"curves: tensorboard --logdir {folder}")
    if page is not None:
        say(f"report: {page}")
    return status


def has_summary(folder: Path) -> bool:
    """Whether the last thing that a run writes is there, which one that died after its last checkpoint lacks."""
    with suppress(OSError, ValueError):
        return bool(parse_summary((folder / SUMMARY).read_bytes()).get("weights_sha256"))
    return False


def report(folder: Path) -> Path | None:
    """Write the run's page on the first process; whatever goes wrong is a warning, for the run itself is finished.

    Returns:
        The page; None where there is none.
    """
    if dist.get_global_rank() != 0:
        return None
    try:
        from recipes.report.page import REPORT, write_report

        write_report([folder], folder / REPORT)
        return folder / REPORT
    except Exception as error:
        log.warning("the report cannot be written: %s; try: python -m recipes.report %s", error, folder)
        return None


def run(config: RunConfig) -> int:
    """Train, or go on training, as a config says.

    Returns:
        The exit status: 0 finished, 75 interrupted with the state saved, 74 finished but not uploaded, 1 anything else.

    Raises:
        InputError: The config or the data cannot be used, or the run is being trained; nothing was trained.
        DataError: Likewise.
    """
    interrupt = Interrupt()
    interrupt.install()
    # Composer says so where a run goes on from the end of an epoch, which is in order.
    warnings.filterwarnings("ignore", message="No batches were trained")
    text_log = TextLog(Path(config.runs_folder) / config.run_name / "log.txt", sys.stdout, config.run_name)
    text_log.hold()
    with ExitStack() as held:
        held.callback(text_log.end)
        return _run(config, interrupt, text_log, held)


def _run(config: RunConfig, interrupt: Interrupt, text_log: TextLog, held: ExitStack) -> int:
    start_processes(config)
    train, val, plan = require_ready(config, dist.get_world_size(), lambda: open_data(config))
    sampler = PositionSampler(len(train), plan, config.seed, dist.get_global_rank(), dist.get_world_size())
    try:
        batches = [sampler.batches(epoch) for epoch in range(config.epochs)]
        algorithms = [*config.algorithms.build(sum(batches), config.epochs), FixedBuckets()]
    except ValueError as error:  # Composer's own checks of what stands under `composer:`
        raise InputError(*str(error).strip().splitlines()) from None
    identity = Identity.of(config, dist.get_world_size(), len(train), train.classes)
    saving = config.checkpoints
    places = Places.of(saving.folder, config.runs_folder, config.run_name)
    folder = places.run_folder
    owner = held.enter_context(Owner(places, config.run_name))
    resume = find_resume(config, places, identity, algorithms)
    kept = True
    if resume.finished:
        if dist.get_global_rank() == 0 and not (folder / CONFIG).exists():
            replace_text(folder / CONFIG, resolved(config))
        kept = upload_finished(config, places=places, owner=owner, resume=resume)
    if resume.finished and on_first(lambda: has_summary(folder)):
        say(f"{config.run_name} is finished, see {folder / 'summary.json'}; a new run needs another run_name")
        return 0 if kept else EXIT_NOT_UPLOADED
    where, leader = config.data, dist.get_local_rank() == 0
    bring(where.path, where.cache_folder, where.cache_gb, first=where.stage_first, leader=leader)
    sizes = [entry.size for entry in plan]
    names = class_names(train.classes)
    watchers = watch(config, folder, [(len(train), size) for size in sizes], resume, (train.classes, names), text_log)
    text_log.open()
    shown = ", ".join(map(escape, names[:5])) + (" ..." if len(names) > 5 else "")
    log.info("%d training and %d validation images in %d classes: %s", len(train), len(val), len(names), shown)
    checkpoints = CheckpointManager(
        config,
        places=places,
        identity=identity,
        owner=owner,
        resume=resume,
        interrupt=interrupt,
        top1=lambda state: float(state.eval_metrics[f"eval_{config.eval.sizes[-1]}"]["top1"].compute()),
    )
    trainer = build_trainer(
        config,
        train=train,
        val=val,
        sampler=sampler,
        algorithms=algorithms,
        callbacks=[*watchers.callbacks, checkpoints],
        loggers=[*watchers.loggers, *([StopOnNan()] if config.stop_on_nan else [])],
        gate=checkpoints.gate,
        profiler=build_profiler(folder / "profile", list(zip(sizes, batches, strict=True))) if config.profile else None,
    )
    if saving.metadata is not None:
        SpotNotices(saving.metadata, interrupt).start()
    try:
        status = fit(trainer, checkpoints, watchers)
        return status if kept else EXIT_NOT_UPLOADED
    except Interrupted as stop:
        log.info("%s", stop, extra=FILE_ONLY)
        close(trainer)  # which ends the progress bar's line: what is said next begins one of its own
        say(str(stop))
        return stop.status
    except DivergedError as error:
        log.error("%s", error)
        return 1
    except (InputError, DataError) as error:
        log.error("the run ends here: %s", error, extra=FILE_ONLY)
        raise
    except Exception:
        log.exception("the run ends here", extra=FILE_ONLY)  # for log.txt, which outlives the terminal
        raise
    finally:
        close(trainer)


def close(trainer: Trainer) -> None:
    """Close the Trainer, whatever state its loader's workers are in."""
    if end_workers() and isinstance(trainer.state.train_dataloader, WaitingLoader):
        trainer.state.train_dataloader.abandon()
    trainer.close()
    if dist.get_world_size() > 1:
        # The launcher sends SIGTERM as soon as the first has left with a status. Python takes its handlers away as it
        # exits: this process would die of that, and -15 be the launcher's status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def watch(
    config: RunConfig,
    folder: Path,
    plan: Sequence[tuple[int, int]],
    resume: Resume,
    classes: tuple[Sequence[str], Sequence[str]],
    text_log: TextLog,
) -> Watchers:
    """What shows and records the run; `config.yaml` is there from the start. `classes`: folders, and names."""
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in (CONFIG, "log.txt", "metrics.jsonl", "summary.json")):
            if path.is_symlink() or (path.exists() and not path.is_file()):  # leads elsewhere, or blocks for ever
                raise InputError(f"{path}: is no regular file; move it away")
        replace_text(folder / CONFIG, resolved(config))
    return build_watchers(
        run_folder=folder,
        run_name=config.run_name,
        plan=plan,
        mean=config.data.mean,
        std=config.data.std,
        max_bad_fraction=config.data.max_bad_fraction,
        config_digest=config_digest(config, dist.get_world_size()),
        eval_sizes=config.eval.sizes,
        resumed_from=[resume.resumed_from] if resume.resumed_from else [],
        classes=classes[0],
        class_names=classes[1],
        stream=sys.stdout,
        text_log=text_log,
        **config.loggers.model_dump(),
    )


def say(line: str) -> None:
    """Tell the user, once, and log.txt while it is open."""
    if dist.get_global_rank() == 0:
        log.info("%s", line, extra=FILE_ONLY)
        print(escape(line), flush=True)
