"""A whole run, top to bottom: the checks before it, where it resumes, the training, and what it writes."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Thread

from composer import Event, State, Trainer
from composer.algorithms import EMA
from composer.utils import dist

from data.errors import InputError
from data.files import replace_text, writing
from data.imagefolder import class_names
from data.open import open_split_pair
from data.sampler import PositionSampler
from data.source import Source, subset
from data.stage import stage_dataset
from data.text import escape
from data.wait import WaitingLoader
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.interrupt import EXIT_NOT_UPLOADED, Interrupt, Interrupted, watch_spot_notices
from recipes.checkpoints.manifest import Identity
from recipes.checkpoints.resume import find_resume
from recipes.checkpoints.save import CheckpointManager, upload_finished
from recipes.checkpoints.store import Places
from recipes.cli import end_workers
from recipes.config import RunConfig
from recipes.divergence import DivergedError, StopOnNan
from recipes.preflight import prepare_run
from recipes.processes import on_first, start_processes
from recipes.resolved import resolved
from recipes.results import CONFIG, LOG, METRICS, SUMMARY, read_summary
from recipes.teacher import load_teacher
from recipes.trainer import FixedBuckets, build_algorithms, build_trainer
from recipes.watch import build_watchers
from recipes.watch.profile import build_profiler
from recipes.watch.sinks import TextLog
from recipes.watch.summary import Summary
from recipes.watch.trackers import log_config, log_evaluation
from recipes.weights import StartFrom, read_start

log = logging.getLogger(__name__)

FILE_ONLY = {"file_only": True}


def run(config: RunConfig) -> int:
    """Train, or resume training, as a config says; returns the exit status.

    0: finished, 75: interrupted with the state saved, 74: finished but not uploaded, 1: anything else. InputError: the
    config or the data cannot be used, or another process trains the run.
    """
    interrupt = Interrupt()
    interrupt.preparing = True
    interrupt.install()
    # Composer warns of this when a run resumes from the end of an epoch, which is fine.
    warnings.filterwarnings("ignore", message="No batches were trained")
    text_log = TextLog(Path(config.runs_folder) / config.run_name / LOG, sys.stdout, config.run_name)
    with ExitStack() as stack:
        # Runs last. Python removes its handlers as it exits: a SIGTERM then, such as the launcher's when another
        # process has ended, would replace this process's status.
        stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)
        stack.callback(text_log.close)
        return _run(config, interrupt, text_log, stack)


def _run(config: RunConfig, interrupt: Interrupt, text_log: TextLog, stack: ExitStack) -> int:
    # What is refused before anything is trained.
    start_processes(config)
    rank, world_size = dist.get_global_rank(), dist.get_world_size()
    automatic = config.automatic
    config, train, val, plan = prepare_run(config, world_size, partial(open_data, config))
    if automatic:
        chosen = ", ".join(f"{key} {getattr(config, key)}" for key in automatic)
        log.info("chosen for this device: %s", chosen.replace("None", "null"))
    sampler = PositionSampler(len(train), plan, config.seed, rank, world_size, config.data.augment.repeats)
    sizes, batches = [entry.size for entry in plan], [sampler.batches(epoch) for epoch in range(config.epochs)]
    teacher = load_teacher(config, train.classes, sizes)
    algorithms = [*build_algorithms(config, batches, teacher), FixedBuckets()]

    # Whose run it is, and where it resumes.
    identity = Identity.of(config, world_size, len(train), train.classes)
    saving = config.checkpoints
    places = Places.of(saving.folder, config.runs_folder, config.run_name)
    folder = places.run_folder
    owner = stack.enter_context(Owner(places, config.run_name))
    resume = find_resume(config, places, identity)
    start = read_start(config) if resume.manifest is None else None
    sha256 = start.sha256 if start else resume.manifest.started_from_sha256 if resume.manifest else None
    config, identity = config.started_from(sha256), identity.started_from(sha256)
    uploaded = True
    if resume.finished:
        interrupt.preparing = False
        if not on_first((folder / CONFIG).exists):
            on_first(partial(create_run_folder, config, folder))
        complete = on_first(lambda: _has_summary(folder))
        uploaded = upload_finished(
            config, places=places, owner=owner, resume=resume, interrupt=interrupt, with_logs=complete
        )
        if complete:
            _say(f"{config.run_name} is finished, see {folder / SUMMARY}; a new run needs another run_name")
            return 0 if uploaded else EXIT_NOT_UPLOADED

    # What watches it, saves it and trains it.
    data, leader = config.data, dist.get_local_rank() == 0
    stage_dataset(data.path, data.cache_folder, data.cache_gb, first=data.stage_first, leader=leader)
    on_first(partial(create_run_folder, config, folder))
    names = class_names(train.classes)
    watchers = build_watchers(
        config,
        text_log,
        samples=len(train),
        sizes=sizes,
        classes=train.classes,
        class_names=names,
        resumed_from=resume.resumed_from,
    )
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
    starting = [] if start is None else [StartFrom(start, config.model, train.classes)]
    trainer = build_trainer(
        config,
        train=train,
        val=val,
        sampler=sampler,
        algorithms=algorithms,
        callbacks=[*watchers.callbacks, *starting, checkpoints],
        loggers=[*watchers.loggers, *([StopOnNan()] if config.stop_on_nan else [])],
        profiler=build_profiler(folder / "profile", list(zip(sizes, batches, strict=True))) if config.profile else None,
    )
    log_config(trainer.logger, config)
    for loader in (trainer.state.train_dataloader, *(one.dataloader.dataloader for one in trainer.state.evaluators)):
        loader.gate = checkpoints.gate  # asked whether a batch may be delivered (data/wait.py)
    if saving.metadata is not None:
        Thread(target=watch_spot_notices, args=(saving.metadata, interrupt), name="spot notices", daemon=True).start()
    interrupt.preparing = False
    status = _train(trainer, checkpoints, watchers.summary)
    return status or (0 if uploaded else EXIT_NOT_UPLOADED)


def open_data(config: RunConfig) -> tuple[Source, Source]:
    """The training and the evaluation images; InputError: the dataset cannot be used."""
    train, val = open_split_pair(config.data.path, config.data.cache_folder)
    if config.data.train_samples is not None:
        try:
            train = subset(train, config.data.train_samples, config.seed)
        except InputError as error:
            raise InputError(f"data.train_samples: {error}") from error
    return train, val


def create_run_folder(config: RunConfig, folder: Path) -> None:
    """Create the run's folder, with config.yaml from the start.

    InputError: it cannot be written, or one of its files is not a regular file.
    """
    for path in (folder / name for name in (CONFIG, LOG, METRICS, SUMMARY)):
        if path.is_symlink() or (path.exists() and not path.is_file()):  # a link leads elsewhere, a pipe blocks forever
            raise InputError(f"{path}: not a regular file; move it away")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / CONFIG, resolved(config))


def _train(trainer: Trainer, checkpoints: CheckpointManager, summary: Summary) -> int:
    """Train to the end, unless already there, and write the results of a finished run; returns the exit status."""
    try:
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
        else:  # Composer refuses to fit a finished run (trainer/trainer.py:2128)
            trainer.engine.run_event(Event.FIT_START)
        status = checkpoints.finish()
        log_evaluation(trainer.logger, summary.figures.evaluations, int(trainer.state.timestamp.batch))
        return _finish(trainer.state, summary) or status
    except Interrupted as stop:
        log.info("%s", stop, extra=FILE_ONLY)
        _close(trainer)  # ends the line of the progress bar, so that the next output starts on a new line
        _say(str(stop))
        return stop.status
    except DivergedError as error:
        log.error("%s", error)
        return 1
    except Exception as error:  # for log.txt, which remains when the terminal is gone
        known = isinstance(error, InputError)
        log.error("the run ends here: %s", error, exc_info=not known, extra=FILE_ONLY)
        raise
    finally:
        _close(trainer)


def _finish(state: State, summary: Summary) -> int:
    """Write the results of a finished run; returns the exit status."""
    for algorithm in state.algorithms:  # the result of a finished run is EMA's average, if EMA is on
        if isinstance(algorithm, EMA) and algorithm.ema_started and not algorithm.ema_weights_active:
            algorithm.get_ema_model(state.model)
    try:
        log.info("finished: weights_sha256 %s", summary.finish(state.get_model_state_dict()))
    except OSError as error:
        reason = error.strerror or error
        log.error("%s cannot be written: %s; training is over, run the same command again", summary.path, reason)
        return 1
    folder, page = summary.path.parent, None
    if dist.get_global_rank() == 0:
        try:
            from recipes.report.page import REPORT, write_report

            page = folder / REPORT
            write_report([folder], page)
        except Exception as error:  # of any kind: the run itself is finished
            page = None
            log.warning("the report cannot be written: %s; try: python -m recipes.report %s", error, folder)
    _say(f"results: {summary.path}; pictures: {folder / 'images'}")
    _say(f"curves: tensorboard --logdir {folder}")
    if page is not None:
        _say(f"report: {page}")
    return 0


def _has_summary(folder: Path) -> bool:
    """Whether summary.json, the last file of a run, is complete; not if the run died after its last checkpoint."""
    with suppress(OSError, ValueError):
        return bool(read_summary(folder / SUMMARY).get("weights_sha256"))
    return False


def _close(trainer: Trainer) -> None:
    """Close the Trainer, even if its loader's workers hang."""
    if end_workers() and isinstance(trainer.state.train_dataloader, WaitingLoader):
        trainer.state.train_dataloader.abandon()
    trainer.close()


def _say(line: str) -> None:
    """Print a line for the user, once, and add it to log.txt while that is open."""
    if dist.get_global_rank() == 0:
        log.info("%s", line, extra=FILE_ONLY)
        print(escape(line), flush=True)
