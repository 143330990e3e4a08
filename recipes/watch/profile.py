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
from recipes.results import to_json

WARM_UP = 10
"""Steps at an image size, or of a process, before tracing: by then kernels are chosen and workers have started."""
STEPS = 3  # steps whose times are added up; the trace holds one more before them, in which the profiler itself starts
OPERATORS = 10
LEAVES = {
    "event/dataloader": "waiting for the loader",
    "event/forward": "forward pass",
    "event/loss": "loss",
    "event/backward": "backward pass",
}
"""Marks that contain no other marks, like the algorithms', `algorithm/CLASS/event/EVENT`."""
INPUT, OPTIMIZER, REST = (
    "to the device, normalisation, gradients to zero",
    "optimizer, loss to the host",
    "figures, checkpoints, the rest",
)
ORDER = ("waiting for the loader", INPUT, "forward pass", "loss", "backward pass", OPTIMIZER, "algorithm ", REST)
NOTES = """\
Rank 0 only. The profiler slows a step down, and on a GPU each part waits for the device so that its time is counted to
it: compare the shares, not the milliseconds. The total time waiting for the loader is in metrics.jsonl.

The traces beside this file, `SIZEpx.pt.trace.json.gz`, open in Perfetto (ui.perfetto.dev) as they are, and in
TensorBoard with its plugin (`pip install torch-tb-profiler`; `tensorboard --logdir` with this folder)."""

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """One mark; times in seconds."""

    name: str
    begin: float
    end: float


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
        self._size = 0
        self._first = 0.0
        self._seen = 0
        self._open: dict[str, tuple[float, Any]] = {}
        self._spans: list[Span] = []
        self._starts: list[float] = []
        self._plain: list[float] = []
        self._began: float | None = None
        self._images = 0

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
            self._starts.append(self._now())
            if len(self._starts) == STEPS + 2 or batch == batches:
                self._stop(int(state.timestamp.batch))
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
            self._spans, self._starts = [], [self._now()]
        self._seen += 1

    def _first_traced(self, epoch: int, batch: int) -> float:
        """Steps of this size before the first traced one; infinite if there is a trace."""
        if self._data_file().exists():
            return math.inf
        left = -batch
        for size, batches in self.plan[epoch:]:
            if size != self._size:
                break
            left += batches
        return max(0, min(WARM_UP, left - (STEPS + 1)))

    def _stop(self, batches_done: int) -> None:
        """End the trace, and write it with the step times."""
        assert self._torch is not None
        for _, mark in reversed(self._open.values()):
            mark.__exit__(None, None, None)
        self._open.clear()
        traced, self._torch = self._torch, None
        traced.stop()
        # Exclude the step in which the profiler starts, unless it is the only one.
        counted = self._starts[1:] if len(self._starts) > 2 else self._starts
        begin, end = counted[0], counted[-1]
        stage = StageProfile(
            size=self._size,
            images=self._images,
            batch=batches_done,
            steps=len(counted) - 1,
            seconds=end - begin,
            plain_step_seconds=statistics.median(self._plain) if self._plain else None,
            device=self._device,
            shares=shares([span for span in self._spans if span.begin >= begin], begin, end),
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
        self,
        name: str,
        categories: list[str] | tuple[str, ...],
        is_start: bool,
        timestamp: Timestamp,
        wall_clock_time_ns: int,
    ) -> None:
        """A mark of Composer's profiler begins or ends; marks that began before the trace are ignored."""
        if self._torch is None:
            return
        if is_start:
            mark = record_function(name)
            self._open[name] = (self._now(), mark)
            mark.__enter__()
        elif name in self._open:
            begin, mark = self._open.pop(name)
            end = self._now()
            mark.__exit__(None, None, None)
            self._spans.append(Span(name, begin, end))

    def _now(self) -> float:
        """The time in seconds, once the device has finished its work."""
        if self._device == "gpu":
            torch.cuda.synchronize()
        elif self._device == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def _operators(traced: profile, device: str) -> list[tuple[str, float, int]]:
    """The operators with the most self time: (name, share of all operators' time, calls)."""
    key = "self_device_time_total" if device == "gpu" else "self_cpu_time_total"
    # Kernels have their own entries, in addition to those of the operators that launched them.
    events = [event for event in traced.key_averages() if event.device_type == DeviceType.CPU and "/" not in event.key]
    events = [event for event in events if not event.is_user_annotation]
    total = sum(getattr(event, key) for event in events) or 1.0
    largest = sorted(events, key=lambda event: -getattr(event, key))[:OPERATORS]
    return [(event.key, getattr(event, key) / total, event.count) for event in largest]


def shares(spans: Sequence[Span], begin: float, end: float) -> dict[str, float]:
    """Split the time from `begin` to `end`, in seconds, into the parts of a step.

    Each instant counts to the innermost mark around it. Time in no leaf is, inside `event/train_batch`, the transfer
    and preparation of the images; else inside `event/batch`, the optimizer's; else the rest.

    Args:
        spans: Marks inside that time, nested or disjoint, as Composer makes them: `event/batch` around
            `event/train_batch` around the leaves.
        begin: When the first step begins.
        end: When the last one ends.

    Returns:
        Seconds by part, at least 0, which add up to `end - begin`.
    """
    outer = [span for span in spans if span.name == "event/batch"]
    inner = [span for span in spans if span.name == "event/train_batch"]
    found: dict[str, float] = dict.fromkeys((*LEAVES.values(), INPUT, OPTIMIZER), 0.0)
    leaves: list[Span] = []
    for span in spans:
        part = f"algorithm {span.name.split('/')[1]}" if span.name.startswith("algorithm/") else LEAVES.get(span.name)
        if part is not None:
            found[part] = found.get(part, 0.0) + span.end - span.begin
            leaves.append(span)
    in_train = [span for span in leaves if _inside(span, inner)]
    in_batch = [span for span in leaves if _inside(span, outer) and not _inside(span, inner)]
    found[INPUT] = max(_length(inner) - _length(in_train), 0.0)
    found[OPTIMIZER] = max(_length(outer) - _length(inner) - _length(in_batch), 0.0)
    found[REST] = max(end - begin - sum(found.values()), 0.0)
    return found


def _inside(span: Span, outer: Sequence[Span]) -> bool:
    return any(one.begin <= span.begin and span.end <= one.end for one in outer)


def _length(spans: Sequence[Span]) -> float:
    return sum(span.end - span.begin for span in spans)


def summary(stages: Sequence[StageProfile]) -> str:
    """The summary, as Markdown."""

    def row(name: str, seconds: Sequence[float]) -> str:
        cells = (
            f"{1000 * own / stage.steps:.2f} | {own / stage.seconds:.1%}"
            for own, stage in zip(seconds, stages, strict=True)
        )
        return f"| {name} | {' | '.join(cells)} |"

    lines = ["# Where a step goes", ""]
    for stage in stages:
        plain = stage.plain_step_seconds
        lines.append(
            f"- {stage.size} px: {stage.steps} steps of {stage.images} images a device up to batch {stage.batch}, "
            f"{1000 * stage.seconds / stage.steps:.1f} ms each"
            + ("" if plain is None else f", {1000 * plain:.1f} ms without the profiler")
        )
    lines += ["", "| ms of a step | " + " | ".join(f"{stage.size} px | share" for stage in stages) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(stages))
    rank = {
        name: ORDER.index("algorithm " if name.startswith("algorithm ") else name) for s in stages for name in s.shares
    }
    for name in sorted(rank, key=lambda name: (rank[name], name)):
        lines.append(row(name, [stage.shares.get(name, 0.0) for stage in stages]))
    lines.append(row("all", [stage.seconds for stage in stages]))
    lines += ["", NOTES, "", "## Operators with most time of their own", ""]
    for stage in stages:
        kernel = "GPU" if stage.device == "gpu" else "CPU"
        lines += [f"{stage.size} px, share of all operators' {kernel} time:", ""]
        lines += ["| operator | share | calls |", "| --- | ---: | ---: |"]
        lines += [f"| `{name}` | {share:.1%} | {calls} |" for name, share, calls in stage.operators]
        lines.append("")
    return "\n".join(lines)


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
