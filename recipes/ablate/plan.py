"""The runs of an ablation, each with its config: all of it checked before the first one starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from recipes.ablate.variants import Variant, all_variants, choose, techniques
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.load import load_config
from recipes.read_run import read_run
from recipes.resolved import config_digest, differing_keys

if TYPE_CHECKING:
    from data.source import Source

State = Literal["finished", "begun", "new"]


class PlannedRun(NamedTuple):
    """One run of the ablation."""

    variant: Variant
    seed: int
    config: RunConfig
    digest: str

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.variant.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.runs_folder) / self.config.run_name

    @property
    def console(self) -> Path:
        """What the run printed."""
        return self.folder / "console.txt"


class Plan(NamedTuple):
    """An ablation."""

    recipe: RunConfig
    folder: Path
    """Where the results go, with the runs' folders in it."""
    processes: int
    """Of each run."""
    runs: tuple[PlannedRun, ...]
    """Seed by seed, so that an ablation that is stopped has compared all variants once."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those chosen."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those chosen."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))


def make_plan(
    path: Path, overrides: Sequence[str], *, seeds: Sequence[int], only: Sequence[str], processes: int
) -> Plan:
    """Read the recipe and make a config for every run; nothing is written, and torch is not imported.

    Args:
        path: The recipe's YAML.
        overrides: `key.path=value`.
        seeds: One run of each variant for each.
        only: Variants and techniques to choose; none: all.
        processes: Of each run.

    Raises:
        InputError: All that is wrong with any of the configs, or with what an earlier ablation left.
    """
    recipe = load_config(path, overrides)
    names = techniques(recipe.algorithms)
    errors = []
    if not names:
        errors.append(f"{path}: algorithms: no technique is on, so there is nothing to compare")
    if any(override.startswith("seed=") for override in overrides):
        errors.append("seed: an ablation takes its seeds from --seeds")
    if recipe.resume is not None:
        errors.append("resume: the runs of an ablation start from zero; allowed: null")
    if "{run_name}" not in recipe.checkpoints.folder:
        errors.append("checkpoints.folder: each run needs a folder of its own; write {run_name} in it")
    if errors:
        raise InputError(*errors)
    folder = Path(recipe.runs_folder) / f"{recipe.run_name}-ablate"
    variants = choose(all_variants(names), only)

    def planned(variant: Variant, seed: int) -> PlannedRun:
        own = [
            f"seed={seed}",
            f"runs_folder={folder}",
            f"run_name={recipe.run_name}-{variant.name}-seed{seed}",
            "loggers.progress_bar=false",
        ]
        config = load_config(path, [*overrides, *variant.overrides, *own])
        return PlannedRun(variant, seed, config, config_digest(config, processes))

    runs: list[PlannedRun] = []
    wrong: dict[str, list[str]] = {}
    for seed in seeds:
        for variant in variants:
            try:
                runs.append(planned(variant, seed))
            except InputError as error:
                _note(wrong, variant.name, error.lines)
    _refuse(wrong, len(variants))
    _refuse({line: [] for run in runs for line in conflicts(run, processes)}, 0)
    return Plan(recipe, folder, processes, tuple(runs))


def state(run: PlannedRun) -> State:
    """How far a run is."""
    try:
        return "finished" if read_run(run.folder).summary.get("finished") is True else "begun"
    except InputError:
        return "new"


def conflicts(run: PlannedRun, processes: int) -> list[str]:
    """Why what lies in a run's folder cannot count as that run; nothing: it can."""
    try:
        summary = read_run(run.folder).summary
    except InputError:
        return []
    instead = "delete that folder, or choose another run_name"
    if summary.get("config_digest") != run.digest:
        return [f"{run.folder}: is a run of another config ({_difference(run, processes)}); {instead}"]
    sizes = {str(size) for size in run.config.eval.sizes}
    missing = sizes - set(summary.get("eval_by_size") or {})
    if summary.get("finished") is True and missing:
        return [f"{run.folder}: finished without evaluation at {', '.join(sorted(missing))} px; {instead}"]
    return []


def _difference(run: PlannedRun, processes: int) -> str:
    try:
        there = load_config(run.folder / "config.yaml").model_dump(mode="json")
    except InputError:
        return "its config.yaml cannot be read"
    lines = differing_keys(run.config.model_dump(mode="json"), there, processes, processes)
    return "; ".join(lines) or "another number of processes"


def preflight(runs: Sequence[PlannedRun], processes: int) -> None:
    """Find what would make a run fail at its start on this machine, before any is started.

    In a process of its own, since it imports torch and may look at the GPU, whose memory the runs need.

    Raises:
        InputError: All that is wrong, each line with the variants that it is about.
    """
    first: dict[Variant, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.variant, run)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(problems, [run.config for run in first.values()], processes).result()
    wrong: dict[str, list[str]] = {}
    for run, lines in zip(first.values(), found, strict=True):
        _note(wrong, run.variant.name, lines)
    _refuse(wrong, len(first))


def problems(configs: Sequence[RunConfig], processes: int) -> list[list[str]]:
    """What would make each run fail at its start, as a run itself would say it; meant for a process of its own.

    Args:
        configs: Of runs on the same images.
        processes: Of each run, all on this machine.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which waits for the answer
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    from data.errors import DataError
    from recipes.preflight import require_ready
    from recipes.run import open_data

    opened: list[tuple[Source, Source]] = []

    def once(config: RunConfig) -> Callable[[], tuple[Source, Source]]:
        def data() -> tuple[Source, Source]:
            if not opened:  # a million files are listed once
                opened.append(open_data(config))
            return opened[0]

        return data

    found: list[list[str]] = []
    for config in configs:
        try:
            require_ready(config, processes, once(config))
            config.algorithms.build(total_batches=config.epochs, epochs=config.epochs)
        except InputError as error:
            found.append(list(error.lines))
        except (DataError, ValueError) as error:  # ValueError: Composer's own checks
            found.append(str(error).strip().splitlines())
        else:
            found.append([])
    return found


def _note(wrong: dict[str, list[str]], variant: str, lines: Sequence[str]) -> None:
    for line in lines:
        names = wrong.setdefault(line, [])
        if variant not in names:
            names.append(variant)


def _refuse(wrong: dict[str, list[str]], of: int) -> None:
    """Raise what was found; a line that is about all variants does not name them."""
    lines = [line if len(names) in (0, of) else f"{', '.join(names)}: {line}" for line, names in wrong.items()]
    if lines:
        raise InputError(*lines)


def listing(plan: Plan) -> str:
    """A line per run, for `--list`: its state, variant, seed and folder."""
    rows = [("STATE", "VARIANT", "SEED", "FOLDER")]
    rows += [(state(run), run.variant.name, str(run.seed), run.folder.name) for run in plan.runs]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
    left = sum(row[0] != "finished" for row in rows[1:])
    return "\n".join([*lines, "", f"{left} of {len(plan.runs)} runs to do, in {plan.folder}"])
