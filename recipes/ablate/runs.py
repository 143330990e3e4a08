"""The runs at work, one process (or one launcher) after the other; and how they are stopped."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from tqdm import tqdm

from data.text import escape
from recipes.ablate.plan import Plan, PlannedRun, state
from recipes.checkpoints.interrupt import EXIT_INTERRUPTED, EXIT_NOT_UPLOADED
from recipes.errors import InputError
from recipes.read_run import ReadRun, read_run
from recipes.resolved import resolved
from recipes.watch.files import replace_file

ENTRYPOINT = Path(__file__).resolve().parents[2] / "entrypoint.py"
POLL = 0.5
"""Seconds between two looks at how far a run is."""
TAIL = 16384
"""Bytes at the end of metrics.jsonl in which its last line lies."""


class Outcome(NamedTuple):
    """What became of a run."""

    planned: PlannedRun
    run: ReadRun | None
    """What it left, if it finished."""
    failure: str | None = None
    """Why it failed, if it did; a run without both was not reached."""


class Stop:
    """Takes SIGINT, SIGTERM and SIGHUP, and hands them on to the run at work, which saves its state.

    The run has a process group of its own, so that a Ctrl-C reaches it once, from here. A second one kills it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """While this lasts, the signals come here; those that are ignored, as under nohup, stay so."""
        before = {number: signal.getsignal(number) for number in self.SIGNALS}
        taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in taken:
            signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again, self.requested = self.requested, True
        if again and number == signal.SIGINT:
            self._send(signal.SIGKILL)
            return
        if not again:
            os.write(2, b"\nstopping: the run at work saves its state; press Ctrl-C again to kill it\n")
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)  # the launcher hands it on to its ranks

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """From now on this is the run at work."""
        self._process = process
        if self.requested:  # between the last run and this one
            self._send(signal.SIGTERM)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep other ablations out of a folder, also while a run of a killed ablation is still at work in it.

    The runs inherit the lock, and the system lets go of it when the last process that holds it is gone.

    Yields:
        The file descriptor that a run must inherit.

    Raises:
        InputError: The folder cannot be written, or another process is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another ablation, or a run that it started, is at work there") from None
        yield file.fileno()


def command(config: Path, processes: int) -> list[str]:
    """What starts a run."""
    if processes == 1:
        return [sys.executable, str(ENTRYPOINT), str(config)]
    return [sys.executable, "-m", "composer.cli.launcher", "-n", str(processes), str(ENTRYPOINT), str(config)]


def work(plan: Plan, stop: Stop, lock: int, tell: Callable[[str], None]) -> list[Outcome]:
    """Do the runs that are not finished, in order; a run that fails does not keep the others from their turn.

    Args:
        plan: The ablation.
        stop: Asked between the runs and while one is at work.
        lock: See `locked`.
        tell: Prints a line.

    Returns:
        One outcome per run, up to an interruption.
    """
    outcomes, total, epochs = [], len(plan.runs), plan.recipe.epochs
    ahead = sum(state(run) != "finished" for run in plan.runs) * epochs
    with tqdm(total=ahead, unit="ep", unit_scale=True, file=sys.stderr, disable=None, smoothing=0) as bar:
        for number, run in enumerate(plan.runs, 1):
            if state(run) == "finished":
                outcomes.append(Outcome(run, read_run(run.folder)))
                continue
            if stop.requested:
                break
            bar.set_description(run.label)
            before = bar.n

            def advance(epoch: float, before: float = before) -> None:
                bar.update(before + epoch - bar.n)

            status = execute(run, plan.processes, stop, lock, advance)
            outcome = judge(run, status)
            if outcome.run is None and (stop.requested or status == EXIT_INTERRUPTED):
                stop.requested = True  # the run was told by others, such as a spot notice, that the machine goes
                break
            bar.update(before + epochs - bar.n)
            outcomes.append(outcome)
            tell(f"[{number}/{total}] {run.label}: {_told(outcome)}")
            if status == EXIT_NOT_UPLOADED:
                tell(f"its last state could not be uploaded; {run.console} says why")
    return outcomes


def _told(outcome: Outcome) -> str:
    if outcome.run is None:
        return f"failed: {outcome.failure}"
    summary, size = outcome.run.summary, outcome.planned.config.eval.sizes[-1]
    return f"top-1 {100 * summary['top1']:.2f} % at {size} px, {summary['wall_seconds']:.0f} s"


def execute(run: PlannedRun, processes: int, stop: Stop, lock: int, progress: Callable[[float], object]) -> int:
    """Start a run, or let it go on, and wait for its end; its exit status.

    Args:
        run: Its `config.yaml` is written first, and its output is added to its `console.txt`.
        processes: Of the run.
        stop: Gets the process.
        lock: See `locked`.
        progress: Called with the epochs done.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    config, metrics = run.folder / "config.yaml", run.folder / "metrics.jsonl"
    replace_file(config, [resolved(run.config).encode()])
    with run.console.open("ab") as console:
        process = subprocess.Popen(
            command(config, processes),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
        stop.watch(process)
        while True:
            try:
                return process.wait(POLL)
            except subprocess.TimeoutExpired:
                progress(epochs_done(metrics))


def epochs_done(metrics: Path) -> float:
    """The epoch of the last whole line of a metrics.jsonl; 0 where there is none yet."""
    try:
        with metrics.open("rb") as file:
            _from_end(file, TAIL)
            lines = file.read().split(b"\n")
    except OSError:
        return 0.0
    for line in reversed(lines[:-1]):
        try:
            return float(json.loads(line)["epoch"])
        except (ValueError, TypeError, KeyError):
            continue
    return 0.0


def _from_end(file: IO[bytes], count: int) -> None:
    file.seek(max(file.seek(0, os.SEEK_END) - count, 0))


def judge(run: PlannedRun, status: int) -> Outcome:
    """What a process that ended with some status left."""
    try:
        found = read_run(run.folder)
    except InputError:
        found = None
    if status in (0, EXIT_NOT_UPLOADED) and found is not None and found.summary.get("finished") is True:
        return Outcome(run, found)
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return Outcome(run, None, f"{how}: {escape(last_line(run.console))}; see {run.console}")


def last_line(path: Path) -> str:
    """The last line that a run printed, at most 120 characters of it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    text = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return text if len(text) <= 120 else text[:117] + "..."


def outcomes_of(plan: Plan, done: Sequence[Outcome]) -> list[Outcome]:
    """An outcome for each run of the plan, those not reached included; finished ones after them count too."""
    known = {outcome.planned.folder: outcome for outcome in done}
    found = []
    for run in plan.runs:
        finished = read_run(run.folder) if run.folder not in known and state(run) == "finished" else None
        found.append(known.get(run.folder) or Outcome(run, finished))
    return found
