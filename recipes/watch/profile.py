"""`profile: true`: a trace of a few steps at each image size, and a page of where a step goes.

Composer's profiler marks the events of a step and each algorithm; a trace handler of ours puts these marks into
torch.profiler's trace and adds up their times. Nothing is drawn, and nothing that is trained is touched.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Event, Logger, State
from composer.core import Timestamp
from composer.profiler import Profiler, ProfilerAction, TraceHandler
from composer.utils import dist
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch gives it on from torch._C
from torch.profiler import ProfilerActivity, profile, record_function

from recipes.json_text import to_json
from recipes.watch.files import replace_text
from recipes.watch.step_shares import Span, StageProfile, shares, summary

WARM_UP = 10
"""Steps at an image size, or of a process, before some are traced: kernels are chosen, workers have started."""
STEPS = 3
"""Steps whose time is added up; the trace holds one more before them, in which the profiler itself starts."""
OPERATORS = 10

log = logging.getLogger(__name__)


class StepTrace(TraceHandler):
    """Traces STEPS steps of each image size into FOLDER/SIZEpx.pt.trace.json.gz, and keeps FOLDER/summary.md; rank 0.

    A size that has its trace already, from an earlier process of the run, is left alone. Where the folder cannot be
    written, the training goes on.

    Args:
        folder: Made where it is needed.
        plan: (image size in pixels, batches) of each epoch.
    """

    def __init__(self, folder: Path, plan: Sequence[tuple[int, int]]) -> None:
        self.folder = folder
        self.plan = list(plan)
        self.recording = False
        self._torch: profile | None = None
        self._device = "cpu"
        self._size = 0
        self._first: int | float = 0
        self._seen = 0
        self._open: dict[str, tuple[float, Any]] = {}
        self._spans: list[Span] = []
        self._starts: list[float] = []
        self._plain: list[float] = []
        self._began: float | None = None
        self._images = 0

    def action(self, state: State) -> ProfilerAction:
        """For Composer's profiler: whether the present step is recorded."""
        del state
        return ProfilerAction.ACTIVE if self.recording else ProfilerAction.SKIP

    def fit_start(self, state: State, logger: Logger) -> None:
        """Where a run goes on inside an epoch, begin the epoch's mark.

        Composer begins it at EPOCH_START, which does not fire there, and ends it with an error at EPOCH_END.
        """
        del logger
        if int(state.timestamp.batch_in_epoch) > 0:
            assert state.profiler is not None
            state.profiler.marker(f"event/{Event.EPOCH_START.canonical_name}").start()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A step ends here, and the next begins."""
        del logger
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
        if batch == batches:  # no batch will come
            return
        if self._torch is None and self._seen >= self._first and batches - batch >= min(STEPS + 1, batches):
            self._start()
        self._seen += 1

    def _first_traced(self, epoch: int, batch: int) -> int | float:
        """Steps of this size that pass before one is traced; infinite where there is a trace."""
        if self._data_file(self._size).exists():
            return float("inf")
        left = -batch
        for size, batches in self.plan[epoch:]:
            if size != self._size:
                break
            left += batches
        return max(0, min(WARM_UP, left - (STEPS + 1)))

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device == "gpu":
            activities.append(ProfilerActivity.CUDA)
        self._first = float("inf")
        self._torch = profile(activities=activities, acc_events=True)
        self._torch.start()
        self.recording = True
        self._spans, self._starts = [], [self._now()]

    def _stop(self, batches_done: int) -> None:
        """End the trace, and write it with the times of its steps."""
        assert self._torch is not None
        for _, mark in reversed(self._open.values()):
            mark.__exit__(None, None, None)
        self._open.clear()
        traced, self._torch, self.recording = self._torch, None, False
        traced.stop()
        # Without the step in which the profiler starts, unless it is the only one.
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
            replace_text(self._data_file(self._size), to_json(stage._asdict(), indent=2) + "\n")
            replace_text(self.folder / "summary.md", summary(self._known()))
        except (OSError, RuntimeError) as error:
            log.warning("%s: the profile cannot be written: %s; the training goes on", self.folder, error)

    def _known(self) -> list[StageProfile]:
        """The sizes traced so far, the smallest first."""
        found = []
        for path in self.folder.glob("*px.json"):
            try:
                found.append(StageProfile.of(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, TypeError, KeyError):
                log.warning("%s: is no profile; it is left out of the summary", path)
        return sorted(found, key=lambda stage: stage.size)

    def _data_file(self, size: int) -> Path:
        return self.folder / f"{size}px.json"

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch is here."""
        del logger
        self._images = len(state.batch[1])

    def process_duration_event(
        self,
        name: str,
        categories: list[str] | tuple[str, ...],
        is_start: bool,
        timestamp: Timestamp,
        wall_clock_time_ns: int,
    ) -> None:
        """A mark of Composer's profiler begins or ends; what began before the trace is left out."""
        del categories, timestamp, wall_clock_time_ns
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
        """The time in seconds, when the device has done what it was given."""
        if self._device == "gpu":
            torch.cuda.synchronize()
        elif self._device == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def _operators(traced: profile, device: str) -> list[tuple[str, float, int]]:
    """The operators with most time of their own: (name, share of all operators' time, calls)."""
    key = "self_device_time_total" if device == "gpu" else "self_cpu_time_total"
    # Kernels have entries of their own, beside those of the operators that launched them.
    events = [event for event in traced.key_averages() if event.device_type == DeviceType.CPU and "/" not in event.key]
    events = [event for event in events if not event.is_user_annotation]
    total = sum(getattr(event, key) for event in events) or 1.0
    largest = sorted(events, key=lambda event: -getattr(event, key))[:OPERATORS]
    return [(event.key, getattr(event, key) / total, event.count) for event in largest]


def build_profiler(folder: Path, plan: Sequence[tuple[int, int]]) -> Profiler:
    """Composer's profiler with our trace handler, and none of its own threads and uploads.

    Args:
        folder: Where the profile goes, RUN/profile.
        plan: (image size in pixels, batches) of each epoch.
    """
    # On a machine without a GPU, Kineto reports that as an error.
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
