"""`profile: true`: a trace of a few steps at each image size, and a summary of where the time of a step goes.

Composer's profiler marks the events of a step and each algorithm; our trace handler puts these marks into
torch.profiler's trace and adds up their times. It draws no random numbers and does not change training.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer import Event, Logger, State
from composer.core import Timestamp
from composer.profiler import Profiler, ProfilerAction, TraceHandler
from composer.utils import dist
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch gives it on from torch._C
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from data.files import replace_text
from recipes.output import Table
from recipes.results import to_json

WARM_UP = 10
"""Steps at an image size, or of a process, before tracing: by then kernels are chosen and workers have started."""
STEPS = 3  # traced steps, after one in which the profiler itself starts
OPERATORS = 10
REST = "figures, checkpoints, the rest"
PARTS = {
    "event/dataloader": "waiting for the loader",
    "event/train_batch": "to the device, normalisation, gradients to zero",
    "event/forward": "forward pass",
    "event/loss": "loss",
    "event/backward": "backward pass",
    "event/batch": "optimizer",
}
"""Composer's marks: `batch` is around `train_batch`, which is around forward pass, loss and backward pass; algorithms
have marks of their own, `algorithm/CLASS/event/EVENT`. Time counts to the innermost mark, named here by what is left of
it."""
NOTES = """\
Rank 0 only. The profiler slows a step down, and on a GPU each part waits for the device so that its time is counted to
it: compare the shares, not the milliseconds. The total time waiting for the loader is in metrics.jsonl.

The traces beside this file, `SIZEpx.pt.trace.json.gz`, open in Perfetto (ui.perfetto.dev) as they are, and in
TensorBoard with its plugin (`pip install torch-tb-profiler`; `tensorboard --logdir` with this folder)."""

log = logging.getLogger(__name__)


class StageProfile(NamedTuple):
    """The measurements at one image size, stored in SIZEpx.json."""

    size: int  # side in pixels of the loader's images
    images: int  # per step on one device
    batch: int  # batches of the run done at the end of the trace
    steps: int
    seconds: float  # of all these steps
    plain_step_seconds: float | None  # median of the steps before them, without the profiler; None if there were none
    device: str
    shares: dict[str, float]  # seconds by part of the step; they add up to `seconds`
    operators: Sequence[Sequence[Any]]  # (name, share of all operators' time, calls)


def trace_starts(plan: Sequence[tuple[int, int]], epoch: int, batch: int) -> dict[int, tuple[int, int]]:
    """At which (epoch, batch) the trace of each image size begins, in a process that begins at `epoch` and `batch`.

    A trace lies within one epoch, if possible after `WARM_UP` steps of its size; a size without room for one has none.
    `plan` has (image size in pixels, batches) of each epoch.
    """
    starts: dict[int, tuple[int, int]] = {}
    for size, stretch in itertools.groupby(enumerate(plan[epoch:], epoch), key=lambda entry: entry[1][0]):
        epochs = [(number, batch if number == epoch else 0, batches) for number, (_, batches) in stretch]
        wait = min(WARM_UP, max(0, sum(batches - begin for _, begin, batches in epochs) - (1 + STEPS)))
        for number, begin, batches in epochs:
            if batches - (begin + wait) > STEPS:
                starts.setdefault(size, (number, begin + wait))
                break
            wait = max(0, wait - (batches - begin))
    return starts


class StepTrace(TraceHandler):
    """Traces STEPS steps of each image size into FOLDER/SIZEpx.pt.trace.json.gz, and keeps FOLDER/summary.md; rank 0.

    A size that already has a trace, from an earlier process of the run, is skipped. If the folder cannot be written,
    training continues. `plan` has (image size in pixels, batches) of each epoch.
    """

    def __init__(self, folder: Path, plan: Sequence[tuple[int, int]]) -> None:
        self.folder = folder
        self.plan = plan
        self._starts: dict[int, tuple[int, int]] = {}  # (epoch, batch) of the traces to come by size
        self._torch: profile | None = None
        self._marks: dict[str, Any] = {}  # open ones, the innermost last
        self._size = 0
        self._plain: list[float] = []  # seconds of the steps of this size before the trace, but for the first
        self._began: float | None = None

    def action(self, state: State) -> ProfilerAction:
        """For Composer's profiler: whether the current step is recorded."""
        return ProfilerAction.SKIP if self._torch is None else ProfilerAction.ACTIVE

    def fit_start(self, state: State, logger: Logger) -> None:
        """Plan the traces; if a run resumes inside an epoch, begin the epoch's mark.

        Composer begins it at EPOCH_START, which does not fire then, and fails to end it at EPOCH_END.
        """
        epoch, batch = int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch)
        if dist.get_global_rank() == 0:
            starts = trace_starts(self.plan, epoch, batch)
            self._starts = {size: at for size, at in starts.items() if not (self.folder / f"{size}px.json").exists()}
        if batch > 0:
            assert state.profiler is not None
            state.profiler.marker(f"event/{Event.EPOCH_START.canonical_name}").start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A step ends here, and the next begins."""
        epoch, batch = int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch)
        size, batches = self.plan[epoch]
        if self._torch is not None:
            _synchronise()
            self._torch.step()
        if size not in self._starts:
            return
        if self._began is not None:
            self._plain.append(time.perf_counter() - self._began)
        if size != self._size:
            self._size, self._plain, self._began = size, [], None
        else:
            self._began = time.perf_counter() if batch < batches else None
        if self._starts[size] == (epoch, batch):
            del self._starts[size]
            self._began = None
            self._torch = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if state.device.name == "gpu" else [])],
                schedule=schedule(wait=0, warmup=1, active=STEPS, repeat=1),
                on_trace_ready=lambda traced: self._write(traced, state),
                acc_events=True,
            )
            self._torch.start()

    def _write(self, traced: profile, state: State) -> None:
        """Write the trace, and what it tells of the steps."""
        self._torch = None
        seconds = sum(event.cpu_time_total for event in traced.events() if event.name.startswith("ProfilerStep")) / 1e6
        stage = StageProfile(
            size=self._size,
            images=len(state.batch[0]),
            batch=int(state.timestamp.batch),
            steps=STEPS,
            seconds=seconds,
            plain_step_seconds=statistics.median(self._plain) if self._plain else None,
            device=state.device.name,
            shares=seconds_by_part(traced, seconds),
            operators=_operators(traced, state.device.name),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(self.folder / f"{self._size}px.pt.trace.json.gz"))
            replace_text(self.folder / f"{self._size}px.json", to_json(stage._asdict(), indent=2) + "\n")
            replace_text(self.folder / "summary.md", summary(self._known()))
        except (OSError, RuntimeError) as error:
            log.warning("%s: the profile cannot be written: %s; training continues", self.folder, error)

    def _known(self) -> list[StageProfile]:
        """The sizes traced so far, the smallest first."""
        found = []
        for path in self.folder.glob("*px.json"):
            try:
                found.append(StageProfile(**json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, TypeError):
                log.warning("%s: not a profile; left out of the summary", path)
        return sorted(found, key=lambda stage: stage.size)

    def process_duration_event(
        self, name: str, categories: Any, is_start: bool, timestamp: Timestamp, wall_clock_time_ns: int
    ) -> None:
        """A mark of Composer's profiler begins or ends; marks that began before the trace are ignored."""
        if self._torch is not None and is_start:
            _synchronise()
            self._marks[name] = record_function(name)
            self._marks[name].__enter__()
        elif name in self._marks:
            _synchronise()
            self._marks.pop(name).__exit__(None, None, None)


def _synchronise() -> None:
    """Wait until the device has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds_by_part(traced: profile, seconds: float) -> dict[str, float]:
    """How long each part of the traced steps took, of `seconds` in all: a mark's time without the marks inside it."""
    parts = {**dict.fromkeys((*PARTS.values(), REST), 0.0), REST: seconds}
    for event in traced.events():
        if (part := part_of(event.name)) is not None and event.device_type == DeviceType.CPU:
            outer = event.cpu_parent
            while outer is not None and part_of(outer.name) is None:
                outer = outer.cpu_parent
            around = (outer and part_of(outer.name)) or REST
            parts[part] = parts.get(part, 0.0) + event.cpu_time_total / 1e6
            parts[around] -= event.cpu_time_total / 1e6
    return parts


def part_of(mark: str) -> str | None:
    """The part of a step that a mark of Composer's profiler is around; None: no mark, or one around several steps."""
    return f"algorithm {mark.split('/')[1]}" if mark.startswith("algorithm/") else PARTS.get(mark)


def _operators(traced: profile, device: str) -> list[tuple[str, float, int]]:
    """The operators with the most self time: (name, share of all operators' time, calls)."""
    key = attrgetter("self_device_time_total" if device == "gpu" else "self_cpu_time_total")
    # Kernels have their own entries, in addition to those of the operators that launched them.
    events = [
        event
        for event in traced.key_averages()
        if event.device_type == DeviceType.CPU and "/" not in event.key and not event.is_user_annotation
    ]
    total = sum(map(key, events)) or 1.0
    largest = sorted(events, key=key, reverse=True)[:OPERATORS]
    return [(event.key, key(event) / total, event.count) for event in largest]


def summary(stages: Sequence[StageProfile]) -> str:
    """The summary, as Markdown."""
    text = "# Where a step goes\n\n"
    for stage in stages:
        plain = stage.plain_step_seconds
        text += (
            f"- {stage.size} px: {stage.steps} steps of {stage.images} images a device up to batch {stage.batch}, "
            f"{1000 * stage.seconds / stage.steps:.1f} ms each"
            + ("" if plain is None else f", {1000 * plain:.1f} ms without the profiler")
            + "\n"
        )
    algorithms = sorted({name for stage in stages for name in stage.shares} - {*PARTS.values(), REST})
    rows = []
    for name in (*PARTS.values(), *algorithms, REST, "all"):
        row = [name]
        for stage in stages:
            seconds = stage.seconds if name == "all" else stage.shares.get(name, 0.0)
            row += [f"{1000 * seconds / stage.steps:.2f}", f"{seconds / stage.seconds:.1%}"]
        rows.append(row)
    headers = ["ms of a step", *(header for stage in stages for header in (f"{stage.size} px", "share"))]
    text += f"\n{Table(headers, rows, range(1, len(headers))).markdown()}\n{NOTES}\n"
    text += "\n## Operators with most time of their own\n"
    for stage in stages:
        operators = [(f"`{name}`", f"{share:.1%}", calls) for name, share, calls in stage.operators]
        text += f"\n{stage.size} px, share of all operators' {'GPU' if stage.device == 'gpu' else 'CPU'} time:\n\n"
        text += Table(["operator", "share", "calls"], operators, (1, 2)).markdown()
    return text


def build_profiler(folder: Path, plan: Sequence[tuple[int, int]]) -> Profiler:
    """Composer's profiler with a `StepTrace`, and none of its own threads and uploads."""
    # On a machine without a GPU, Kineto reports its absence as an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warnings.filterwarnings("ignore", message="The profiler is enabled")
    trace = StepTrace(folder, plan)
    return Profiler(
        schedule=trace.action,
        trace_handlers=[trace],
        sys_prof_cpu=False,
        torch_prof_profile_memory=False,
        torch_prof_with_flops=False,
        torch_prof_remote_file_name=None,
        torch_prof_memory_remote_file_name=None,
    )
