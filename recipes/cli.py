"""What all commands share: the command line (a YAML, overrides and a few flags), and how a command ends."""

from __future__ import annotations

import argparse
import atexit
import gc
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from data.errors import InputError, Parser, run_main
from recipes.load import YAMLS, load_config

_FIRST_PRINTS_WITHIN = 20.0  # seconds that a machine's other processes leave its first one to print an error
_SET_BY_LAUNCHER = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What Composer's launcher sets besides WORLD_SIZE (composer/cli/launcher.py)."""
EXAMPLES = """examples:
  composer -n 8 entrypoint.py yamls/p3.yaml
  %(prog)s yamls/p3.yaml max_duration=16ep algorithms.mixup=off
  %(prog)s yamls/p3.yaml device_batch_size='{128: 256, 288: 128}'
  %(prog)s yamls/local.yaml --lr 0.5 --show

Values are written as in YAML. algorithms.NAME=off removes a technique,
algorithms.NAME=on adds it with its defaults. --show prints every key and its
value."""


class Arguments(NamedTuple):
    """What a command line asks for."""

    path: Path | None  # of the YAML; None only with `--list-configs`
    overrides: list[str]  # `key.path=value`; those from flags come last
    show: bool
    list_configs: bool


class _Parser(Parser):
    """Takes a YAML and overrides anywhere between the options."""

    def __init__(self, prog: str | None, description: str, epilog: str, words: bool = True) -> None:
        super().__init__(prog, description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        if words:
            about = "the config, and overrides of keys"
            self.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help=about)

    def parse_intermixed_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Accept `key=value` as an override even after an option with several values: `--seeds 0 1 seed=3`.

        Directly after an option it is that option's value: `--output a=b`.
        """
        free = [_is_override(word) and not last.startswith("--") for last, word in pairwise(["", *args])]
        first = [word for word, moved in zip(args, free, strict=True) if moved]
        rest = [word for word, moved in zip(args, free, strict=True) if not moved]
        return super().parse_intermixed_args([*first, *rest])


def command_parser(command: str, description: str, epilog: str = "", *, words: bool = True) -> argparse.ArgumentParser:
    """A parser for `python -m recipes.COMMAND`, with `words` (YAML and overrides); add its own arguments to it."""
    return _Parser(f"python -m recipes.{command}", description, epilog, words)


def add_checkpoint_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--checkpoint` and `--weights`, for every command that loads a trained network."""
    text = """a checkpoint file, its folder, or another project's state dict for the YAML's network (default: the run's
    newest)"""
    command.add_argument("--checkpoint", metavar="PATH|s3://...", help=text)
    text = "the EMA average or the trained weights (default: the average if there is one)"
    command.add_argument("--weights", choices=("ema", "raw"), help=text)


def pixels(text: str) -> int:
    """The type of an option that takes an image size in pixels."""
    if not re.fullmatch("[0-9]{1,4}", text) or not 8 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 8 to 4096")
    return int(text)


def ratio(text: str) -> float:
    """The type of an option that takes a crop ratio such as eval.crop_ratio."""
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text}; allowed: above 0, at most 1")


def yaml_and_overrides(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[Path, list[str]]:
    """The YAML file and the overrides among the positional arguments; InputError unless there is exactly one file."""
    files, overrides = yamls_and_overrides(parser, words)
    if len(files) > 1:
        parser.error(f"one YAML file at a time, got {' and '.join(map(str, files))}; an override is key.path=value")
    return files[0], overrides


def yamls_and_overrides(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The YAML files and the overrides among the positional arguments; InputError: there is no file."""
    files = [Path(word) for word in words if not _is_override(word)]
    if not files:
        parser.error("no YAML file given, such as yamls/demo.yaml (python entrypoint.py --list-configs lists them)")
    return files, [word for word in words if _is_override(word)]


def parse(argv: Sequence[str], description: str, prog: str | None = None) -> Arguments:
    """Read `YAML [key=value ...] [--lr X] [--resume [PATH]] [--show] [--list-configs]`."""
    parser = _Parser(prog, description, EXAMPLES)
    parser.add_argument("--lr", metavar="X", help="same as optimizer.lr=X")
    text = """resume from this checkpoint, a file or its folder (same as resume=PATH); without a path, from the newest
    checkpoint of this run_name (the default, same as autoresume=true)"""
    parser.add_argument("--resume", nargs="?", const="", metavar="PATH|s3://...", help=text)
    parser.add_argument("--show", action="store_true", help="print the resolved config with every default, and exit")
    parser.add_argument("--list-configs", action="store_true", help="list the YAML files in yamls/, and exit")
    argv = list(argv)
    for at, (word, following) in enumerate(pairwise(argv)):
        # The YAML or an override after `--resume` is not its checkpoint.
        if word == "--resume" and (_is_override(following) or following.endswith((".yaml", ".yml"))):
            argv[at] = "--resume="
    given = parser.parse_intermixed_args(argv)
    path, overrides = (None, given.words) if given.list_configs else yaml_and_overrides(parser, given.words)
    if given.lr is not None:
        overrides.append(f"optimizer.lr={given.lr}")
    if given.resume is not None:
        overrides.append(f"resume={given.resume}" if given.resume else "autoresume=true")
    return Arguments(path, overrides, given.show, given.list_configs)


def _is_override(word: str) -> bool:
    # Path's `is_file` raises for a word that is longer than a file's name.
    return re.match(r"[\w.-]+=", word) is not None and not os.path.isfile(word)  # noqa: PTH113


def list_configs(folder: Path = YAMLS) -> str:
    """A table of every YAML below a folder: path, model, epochs, hardware, and its first comment line or error."""
    rows = [("CONFIG", "MODEL", "EPOCHS", "HARDWARE", "")]
    for path in sorted(folder.rglob("*.y*ml")):
        relative = os.path.relpath(path)
        shown = str(path) if relative.startswith("..") else relative
        try:
            config, about = load_config(path), next(iter(_comments(path)), "")
            rows.append((shown, config.model.name, str(config.epochs), hardware_of(path), about))
        except InputError as error:
            rows.append((shown, "-", "-", "-", f"does not load: {error.lines[0]}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *cells, about in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip())
        lines += textwrap.wrap(about, shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _comments(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line[1:].strip() for line in lines if line.startswith("#")]


def stated(path: Path, name: str, otherwise: str) -> str:
    """The text of a YAML's comment line `# NAME: ...`, such as `# Hardware:`, else another text."""
    return next((line[len(name) + 1 :].strip() for line in _comments(path) if line.startswith(f"{name}:")), otherwise)


def hardware_of(path: Path) -> str:
    """The hardware that a YAML is for, else `any`."""
    return stated(path, "Hardware", "any")


def require_launched() -> None:
    """Refuse an incomplete launcher environment: this process would wait for others that nobody starts."""
    processes = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in _SET_BY_LAUNCHER if name not in os.environ]
    if processes != "1" and (missing or not processes.isdecimal()):
        lacking = f" without {', '.join(missing)}" if missing else ""
        raise InputError(
            f"WORLD_SIZE: the environment says {processes!r}{lacking}, which a launcher sets; start several processes "
            "with `composer -n N entrypoint.py ...`; for one, unset WORLD_SIZE"
        )


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports torch, Composer and timm without what takes about as long again, at the start of a command.

    Garbage collections take seconds while the imports make a million objects. timm imports W&B, if installed, only
    to know that it is; here it finds none, and our logger imports it later.
    """
    hidden = "wandb" not in sys.modules
    gc.disable()
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # how Python marks a module that cannot be imported
    try:
        yield
    finally:
        if hidden:
            sys.modules.pop("wandb", None)
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # else extensions made with nanobind report at the exit that their objects leaked


def run_command(main: Callable[[], int]) -> int:
    """Run a command and return its exit status, as `run_main` does; this may be one of several processes that do so.

    Only the first process on each machine prints errors. One of several processes, or one whose worker hangs, exits
    here instead of returning.
    """
    status = 1
    try:
        status = run_main(main, _print_error)
    except SystemExit as leave:  # from Composer's signal handler, where the run has not installed its own
        status = leave.code if isinstance(leave.code, int) else status
        raise
    finally:
        torch, hangs = sys.modules.get("torch"), end_workers()
        in_group = torch is not None and torch.distributed.is_initialized()
        if hangs or in_group:
            if (raised := sys.exc_info()[1]) is not None and not isinstance(raised, SystemExit):
                traceback.print_exc()
            if not hangs:
                atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            # Not by Python's own end, where Gloo's threads sometimes abort a process that has finished; nor by
            # destroy_process_group first, which holds Python's lock while one of these threads may wait for it.
            os._exit(status)
    return status


def end_workers(seconds: float = 2.0) -> bool:
    """Kill this process's workers: at the end of a command they have nothing left to finish.

    On exit, Python would wait for each without limit (`multiprocessing.util._exit_function`), and a worker that is
    stopped, or waits for an unreachable disk, never ends. Returns whether one is still alive after so many seconds,
    because the kernel cannot end it while it waits for a device; `os._exit` does not wait for it.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0.0))
    return any(worker.is_alive() for worker in workers)


def _print_error(text: str) -> None:
    """Print as the machine's first process; the others wait for the launcher to stop them.

    Composer's launcher sends SIGTERM to all processes as soon as one ends with an error. If another process ended
    before the first has printed the error, the first would be stopped, and its -15 become the launcher's status.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_FIRST_PRINTS_WITHIN)
