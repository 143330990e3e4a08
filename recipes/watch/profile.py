"""`profile: true`: a trace of a few steps at each image size, and a summary of where the time of a step goes.

Composer's profiler marks the events of a step and each algorithm; our trace handler puts these marks into
torch.profiler's trace and adds up their times. It draws no random numbers and does not change training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer import Event, Logger, State
from composer.core import Timestamp
from composer.profiler import Profiler, ProfilerAction, TraceHandler
from composer.utils import dist
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch gives it on from torch._C
from torch.profiler import ProfilerActivity, profile, record_function

from data.files import replace_text
from recipes.output import Table
from recipes.results import to_json

WARM_UP = 10
"""Steps at an image size, or of a process, before tracing: by then kernels are chosen and workers have started."""
STEPS = 3  # steps whose times are added up; the trace holds one more before them, in which the profiler itself starts
OPERATORS = 10
REST = "figures, checkpoints, the rest"
PARTS = {
    "event/dataloader": "waiting for the loader",
    "event/train_batch": "to the device, normalisation, gradients to zero",
    "event/forward": "forward pass",
    "event/loss": "loss",
    "event/backward": "backward pass",
    "event/batch": "optimizer, loss to the host",
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


class StepTrace(TraceHandler):
    """Traces STEPS steps of each image size into FOLDER/SIZEpx.pt.trace.json.gz, and keeps FOLDER/summary.md; rank 0.

    A size that already has a trace, from an earlier process of the run, is skipped. If the folder cannot be written,
    training continues. `plan` has (image size in pixels, batches) of each epoch.
    """

    def __init__(self, folder: Path, plan: Sequence[tuple[int, int]]) -> None:
        self.folder = folder
        self.plan = plan
        self._torch: profile | None = None
        self._device = "cpu"
        self._size = self._images = 0
        self._first = 0.0  # steps of this size before the first traced one
        self._seen = 0  # steps of this size so far
        self._steps = 0  # traced
        self._marks: dict[str, Any] = {}  # open ones, the innermost last
        self._parts: dict[str, float] = {}  # seconds of the traced steps by part
        self._charged = 0.0  # until when `_parts` counts
        self._plain: list[float] = []
        self._began: float | None = None

    def action(self, state: State) -> ProfilerAction:
        """For Composer's profiler: whether the current step is recorded."""
        return ProfilerAction.SKIP if self._torch is None else ProfilerAction.ACTIVE

    def fit_start(self, state: State, logger: Logger) -> None:
        """If a run resumes inside an epoch, begin the epoch's mark.

        Composer begins it at EPOCH_START, which does not fire then, and fails to end it at EPOCH_END.
        """
        if int(state.timestamp.batch_in_epoch) > 0:
            assert state.profiler is not None
            state.profiler.marker(f"event/{Event.EPOCH_START.canonical_name}").start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A step ends here, and the next begins."""
        if dist.get_global_rank() != 0:
            return
        epoch, batch = int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch)
        size, batches = self.plan[epoch]
        self._device = state.device.name
        if self._torch is not None:
            self._charge()
            self._steps += 1
            if self._steps == STEPS + 1 or batch == batches:
                self._stop(self._torch, int(state.timestamp.batch))
            elif self._steps == 1:  # the step in which the profiler starts does not count, unless it is the only one
                self._parts = dict.fromkeys((*PARTS.values(), REST), 0.0)
        elif self._began is not None and self._seen > 1:
            self._plain.append(time.perf_counter() - self._began)
        if size != self._size:
            self._size, self._seen, self._plain = size, 0, []
            self._first = self._first_traced(epoch, batch)
        self._began = None if batch == batches else time.perf_counter()
        if batch == batches:  # there is no further batch
            return
        if self._torch is None and self._seen >= self._first and batches - batch >= min(STEPS + 1, batches):
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device == "gpu" else [])]
            self._first = math.inf
            self._torch = profile(activities=activities, acc_events=True)
            self._torch.start()
            self._parts, self._steps, self._charged = dict.fromkeys((*PARTS.values(), REST), 0.0), 0, self._now()
        self._seen += 1

    def _first_traced(self, epoch: int, batch: int) -> float:
        """Steps of this size before the first traced one; infinite if there is a trace."""
        if self._data_file().exists():
            return math.inf
        left = sum(batches for _, batches in takewhile(lambda entry: entry[0] == self._size, self.plan[epoch:])) - batch
        return max(0, min(WARM_UP, left - (STEPS + 1)))

    def _stop(self, traced: profile, batches_done: int) -> None:
        """End the trace, and write it with the step times."""
        for mark in reversed(self._marks.values()):
            mark.__exit__(None, None, None)
        self._marks.clear()
        self._torch = None
        traced.stop()
        stage = StageProfile(
            size=self._size,
            images=self._images,
            batch=batches_done,
            steps=max(self._steps - 1, 1),
            seconds=sum(self._parts.values()),
            plain_step_seconds=statistics.median(self._plain) if self._plain else None,
            device=self._device,
            shares=self._parts,
            operators=_operators(traced, self._device),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(self.folder / f"{self._size}px.pt.trace.json.gz"))
            replace_text(self._data_file(), to_json(stage._asdict(), indent=2) + "\n")
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

    def _data_file(self) -> Path:
        return self.folder / f"{self._size}px.json"

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch has arrived."""
        self._images = len(state.batch[1])

    def process_duration_event(
        self, name: str, categories: Any, is_start: bool, timestamp: Timestamp, wall_clock_time_ns: int
    ) -> None:
        """A mark of Composer's profiler begins or ends; marks that began before the trace are ignored."""
        if self._torch is None or not (is_start or name in self._marks):
            return
        self._charge()
        if is_start:
            self._marks[name] = record_function(name)
            self._marks[name].__enter__()
        else:
            self._marks.pop(name).__exit__(None, None, None)

    def _charge(self) -> None:
        """Count the time since the last mark began or ended to the part of the step that it belonged to."""
        before, self._charged = self._charged, self._now()
        part = part_of(list(self._marks))
        self._parts[part] = self._parts.get(part, 0.0) + self._charged - before

    def _now(self) -> float:
        """The time in seconds, once the device has finished its work."""
        if self._device == "gpu":
            torch.cuda.synchronize()
        elif self._device == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


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


def part_of(marks: Sequence[str]) -> str:
    """The part of a step that the time inside these open marks, the innermost last, belongs to."""
    for name in reversed(marks):
        if name.startswith("algorithm/"):
            return f"algorithm {name.split('/')[1]}"
        if name in PARTS:
            return PARTS[name]
    return REST


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
