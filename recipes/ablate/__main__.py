"""`python -m recipes.ablate YAML [key=value ...]`: what each technique of a recipe is worth."""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from data.errors import InputError
from data.files import replace_file, writing
from data.text import escape
from recipes.ablate import Outcome, Plan, PlannedRun, make_plan, preflight
from recipes.checkpoints.interrupt import EXIT_INTERRUPTED, EXIT_NOT_UPLOADED
from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.output import Table, show
from recipes.resolved import resolved
from recipes.results import CONFIG, SUMMARY, read_results, read_summary

DESCRIPTION = """Train the recipe, the recipe without each technique, the baseline without any,
and the baseline with each technique alone, and compare them: accuracy, time,
images/s, time to an accuracy. Finished runs are not repeated: after an
interruption (Ctrl-C, SIGTERM: status 75) the same command resumes the ablation.
A run that fails does not stop the others; the exit status is then 1."""
EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml --list
  %(prog)s yamls/demo.yaml model.name=timm/resnet10t \\
      max_duration=6ep data.train_samples=600 eval.interval=1
  %(prog)s yamls/p3.yaml max_duration=16ep \\
      checkpoints.keep=1 --processes 8 --seeds 0 1 2 --only ema without-mixup

Of T techniques and S seeds there are S * (2 T + 2) runs. Results and runs are
written to RUNS_FOLDER/RUN_NAME-ablate."""
ENTRYPOINT = Path(__file__).resolve().parents[2] / "entrypoint.py"
POLL_SECONDS = 0.5


def _parse_arguments() -> argparse.Namespace:
    parser = command_parser("ablate", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    text = "seeds; each variant is trained once per seed (default: 0 1)"
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help=text)
    text = "only these variants (recipe, without-X, baseline, with-X), or a technique X for both of its variants; "
    text += "what they are compared with is included (default: all)"
    add("--only", nargs="+", default=[], metavar="NAME", help=text)
    text = "top-1 in (0, 1] whose time is compared (default: the baseline's final mean)"
    add("--target", type=float, metavar="TOP1", help=text)
    add("--size", type=int, metavar="PX", help="the one of eval.sizes at which to compare (default: the last)")
    add("--processes", type=int, default=1, metavar="N", help="processes of each run, as composer -n N")
    add("--list", action="store_true", help="show the runs and their progress, and exit")
    given = parser.parse_intermixed_args(sys.argv[1:])
    if given.target is not None and not 0 < given.target <= 1:
        parser.error(f"--target: got {given.target:g}; allowed: a share above 0 and at most 1, such as 0.97")
    if given.processes < 1:
        parser.error(f"--processes: got {given.processes}; allowed: at least 1")
    given.yaml, given.overrides = yaml_and_overrides(parser, given.words)
    return given


def main() -> int:
    """Run the ablation and show the results; returns the exit status."""
    given = _parse_arguments()
    seeds = list(dict.fromkeys(given.seeds))
    plan = make_plan(given.yaml, given.overrides, seeds=seeds, only=given.only, processes=given.processes)
    sizes = plan.recipe.eval.sizes
    size = sizes[-1] if given.size is None else given.size
    if size not in sizes:
        raise InputError(f"--size: got {size}; allowed: one of eval.sizes, {', '.join(map(str, sizes))}")
    if given.list:
        rows = [(run.state, run.variant.name, run.seed, run.folder.name) for run in plan.runs]
        left = sum(state != "finished" for state, *_ in rows)
        table = Table(("state", "variant", "seed", "folder"), rows)
        show({f"Ablation of {plan.recipe.run_name}": [table, f"{left} of {len(rows)} runs to do, in {plan.folder}"]})
        return 0
    with locked(plan.folder) as lock:
        stop = Stop()
        todo = [run for run in plan.runs if run.state != "finished"]
        if todo:
            _say(f"{len(todo)} of {len(plan.runs)} runs to do, in {plan.folder}; checking all of them first")
            preflight(todo, given.processes)
        outcomes = _do_runs(plan, todo, stop, lock)
        from recipes.ablate.compare import compare, describe, write

        comparison = compare(plan.variants, outcomes, sizes, size, given.target)
        command = shlex.join(["python", "-m", "recipes.ablate", *sys.argv[1:]])
        show(describe(plan, outcomes, comparison, [*[px for px in sizes if px != size][-1:], size]))
        sys.stdout.flush()
        if comparison.most_seeds:  # if no run is finished, existing files stay
            with writing(plan.folder):
                files = write(plan, outcomes, comparison, command)
            # flushed, so that in a pipe with stderr it comes before the last lines there
            print(f"\n{plan.folder}: {', '.join(files)}", flush=True)
    if stop.requested:
        _say("interrupted; run the same command again to resume")
        return EXIT_INTERRUPTED
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def _say(line: str) -> None:
    """Print to stderr, above the progress bar."""
    tqdm.write(line, file=sys.stderr)


class Stop:
    """Handles SIGINT, SIGTERM and SIGHUP by stopping the current run, which saves its state.

    The run has its own process group, so that a Ctrl-C reaches it only once, from here. A second one kills it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if not again:
            os.write(2, b"\nstopping: the current run saves its state; press Ctrl-C again to kill it\n")
            self.watch(self._process)
        elif number == signal.SIGINT and self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def watch(self, process: subprocess.Popen[bytes] | None) -> None:
        """Make this the current run, which is stopped at once if that was requested before."""
        self._process = process
        if self.requested and process is not None:
            process.terminate()  # if it is alive; the launcher forwards it to its ranks


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock a folder against other ablations, even while a run of a killed ablation is still active in it.

    Yields the file descriptor that the runs must inherit: the system releases the lock when the last process holding it
    ends. InputError: the folder cannot be written, or another process is active there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another ablation, or a run that it started, is active there") from None
        yield file.fileno()


def _do_runs(plan: Plan, todo: Sequence[PlannedRun], stop: Stop, lock: int) -> list[Outcome]:
    """Run all unfinished runs in order; one that fails does not stop the others."""
    outcomes, epochs = [], plan.recipe.epochs
    folders = {run.folder for run in todo}
    with tqdm(total=len(todo) * epochs, unit="ep", unit_scale=True, file=sys.stderr, disable=None, smoothing=0) as bar:
        for number, run in enumerate(plan.runs, 1):
            if run.folder not in folders or stop.requested:
                outcomes.append(Outcome(run, None if run.folder in folders else read_results(run.folder)))
                continue
            before = bar.n
            status = _execute(run, plan.processes, stop, lock, bar)
            outcome, words = _judge(run, status)
            if outcome.failure and (stop.requested or status == EXIT_INTERRUPTED):
                stop.requested = True  # stopped by something else, such as a spot notice that the run itself received
                outcomes.append(Outcome(run))
                continue
            bar.update(before + epochs - bar.n)
            outcomes.append(outcome)
            _say(f"[{number}/{len(plan.runs)}] {run.variant.name} seed {run.seed}: {words}")
            if status == EXIT_NOT_UPLOADED:
                _say(f"its last state could not be uploaded; see {run.folder / 'console.txt'}")
    return outcomes


def _execute(run: PlannedRun, processes: int, stop: Stop, lock: int, bar: tqdm[Any]) -> int:
    """Start or resume a run, and wait for its end; returns its exit status.

    Its `config.yaml` is written first, its output is appended to `console.txt`, and the bar counts its epochs.
    """
    before = bar.n
    bar.set_description(f"{run.variant.name} seed {run.seed}")
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        replace_file(run.folder / CONFIG, [resolved(run.config).encode()])
        console = (run.folder / "console.txt").open("ab")
    launcher = [] if processes == 1 else ["-m", "composer.cli.launcher", "-n", str(processes)]
    command = [sys.executable, *launcher, str(ENTRYPOINT), str(run.folder / CONFIG)]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with console:
        process = subprocess.Popen(command, stdout=console, **streams, start_new_session=True, pass_fds=[lock])
        stop.watch(process)
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(OSError, ValueError, KeyError):  # there is none yet
                    bar.update(before + read_summary(run.folder / SUMMARY)["epochs"] - bar.n)


def _judge(run: PlannedRun, status: int) -> tuple[Outcome, str]:
    """The outcome of a run whose process ended with this exit status, and a line about it."""
    found, console = read_results(run.folder), run.folder / "console.txt"
    if status in (0, EXIT_NOT_UPLOADED) and found.finished:
        top1, seconds = (found.summary[name] for name in ("top1", "wall_seconds"))
        return Outcome(run, found), f"top-1 {100 * top1:.2f} % at {run.config.eval.sizes[-1]} px, {seconds:.0f} s"
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = console.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    failure = f"{how}: {escape(last if len(last) <= 120 else last[:117] + '...')}; see {console}"
    return Outcome(run, None, failure), f"failed: {failure}"


if __name__ == "__main__":
    sys.exit(run_command(main))
