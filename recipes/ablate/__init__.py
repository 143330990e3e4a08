"""What each technique of a recipe is worth: removed from the recipe, and added to the baseline without any.

Here: the variants of a recipe and the runs of an ablation, each with its config, checked before the first one starts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

from algorithms.config import AlgorithmsConfig
from data.errors import InputError
from recipes.cli import quick_imports
from recipes.config import RunConfig
from recipes.load import load_config
from recipes.resolved import config_digest, differing_keys
from recipes.results import Results, read_results


class Variant(NamedTuple):
    """A recipe with some of its techniques: key paths below `algorithms`, in the order of the config."""

    name: str  # `recipe`, `without-TECHNIQUE`, `baseline` or `with-TECHNIQUE`
    on: tuple[str, ...]
    off: tuple[str, ...]


class PlannedRun(NamedTuple):
    """One run of the ablation."""

    variant: Variant
    seed: int
    config: RunConfig
    digest: str

    @property
    def folder(self) -> Path:
        """The run's folder; its output is appended to console.txt there."""
        return Path(self.config.runs_folder) / self.config.run_name

    @property
    def state(self) -> Literal["finished", "begun", "new"]:
        """Progress of the run."""
        results = read_results(self.folder)
        return "finished" if results.finished else "begun" if results.summary else "new"


class Outcome(NamedTuple):
    """The results of a finished run, or why it failed; neither if it was not started or is not finished."""

    planned: PlannedRun
    run: Results | None = None
    failure: str | None = None


class Plan(NamedTuple):
    """An ablation."""

    recipe: RunConfig
    folder: Path  # receives the results, and holds the runs' folders
    processes: int  # of each run
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]  # seed by seed, so that a stopped ablation has compared all variants


def techniques(algorithms: AlgorithmsConfig) -> tuple[str, ...]:
    """The techniques that are on; each one under `composer` counts separately."""
    found: list[str] = []
    for name in type(algorithms).model_fields:
        value = getattr(algorithms, name)
        if name == "composer":
            found += [f"composer.{inner}" for inner in value]
        elif value is not None:
            found.append(name)
    return tuple(found)


def choose_variants(names: Sequence[str], words: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The recipe, the recipe without each technique, the baseline without any, the baseline with each alone.

    Equal variants occur once: of two techniques, `without-a` is `with-b` as well. `words` choose variants, or
    techniques, each of which stands for both of its variants; none: all. What they are compared with is included: the
    baseline, and the recipe if one of its techniques is removed. InputError: a word is neither.
    """
    labels: dict[str, tuple[str, ...]] = {
        "recipe": tuple(names),
        **{f"without-{name}": tuple(other for other in names if other != name) for name in names},
        "baseline": (),
        **{f"with-{name}": (name,) for name in names},
    }
    known = {label: {label} for label in labels} | {name: {f"without-{name}", f"with-{name}"} for name in names}
    allowed = f"allowed: {', '.join(['recipe', 'baseline', *names])}, and without-TECHNIQUE, with-TECHNIQUE"
    if wrong := [word for word in words if word not in known]:
        raise InputError(*(f"--only: {word} is not a variant or a technique; {allowed}" for word in wrong))
    chosen = {"baseline"}.union(*(known[word] for word in words)) if words else set(labels)
    if any(label.startswith("without-") for label in chosen):
        chosen.add("recipe")
    wanted = {labels[label] for label in chosen}
    first: dict[tuple[str, ...], str] = {}
    for label, on in labels.items():
        if on in wanted and (on or label == "baseline"):
            first.setdefault(on, label)
    return tuple(Variant(label, on, tuple(name for name in names if name not in on)) for on, label in first.items())


def make_plan(
    path: Path, overrides: Sequence[str], *, seeds: Sequence[int], only: Sequence[str], processes: int
) -> Plan:
    """Read the recipe and make a config for each variant and seed; nothing is written, and torch is not imported.

    `only` are words for `choose_variants`. InputError: all that is wrong with any of the configs, or with what an
    earlier ablation left.
    """
    recipe = load_config(path, overrides)
    names = techniques(recipe.algorithms)
    lines = []
    if not names:
        lines.append(f"{path}: algorithms: no technique is on, so there is nothing to compare")
    if any(word.startswith("seed=") for word in overrides):
        lines.append("seed: an ablation takes its seeds from --seeds")
    if recipe.resume is not None:
        lines.append("resume: the runs of an ablation start from scratch; allowed: null")
    if "{run_name}" not in recipe.checkpoints.folder:
        lines.append("checkpoints.folder: each run needs a folder of its own; write {run_name} in it")
    if lines:
        raise InputError(*lines)
    folder, variants = Path(recipe.runs_folder) / f"{recipe.run_name}-ablate", choose_variants(names, only)
    runs: list[PlannedRun] = []
    wrong: list[tuple[str, Sequence[str]]] = []
    for seed in seeds:
        for variant in variants:
            off = [f"algorithms.{name}=off" for name in variant.off]
            own = [f"seed={seed}", f"runs_folder={folder}", "loggers.progress_bar=false"]
            own.append(f"run_name={recipe.run_name}-{variant.name}-seed{seed}")
            try:
                config = load_config(path, [*overrides, *off, *own])
                runs.append(PlannedRun(variant, seed, config, config_digest(config, processes)))
            except InputError as error:
                wrong.append((variant.name, error.lines))
    _raise_all(wrong, len(variants))
    if lines := [line for run in runs for line in conflicts(run, processes)]:
        raise InputError(*lines)
    return Plan(recipe, folder, processes, variants, tuple(seeds), tuple(runs))


def _raise_all(found: Iterable[tuple[str, Sequence[str]]], variants: int) -> None:
    """Raise the errors in the named variants, each line once, with its variants unless it is about all of them."""
    named: dict[str, dict[str, None]] = {}
    for name, lines in found:
        for line in lines:
            named.setdefault(line, {})[name] = None
    if named:
        raise InputError(*(ln if len(of) == variants else f"{', '.join(of)}: {ln}" for ln, of in named.items()))


def conflicts(run: PlannedRun, processes: int) -> list[str]:
    """Why a run's folder cannot be used for that run; empty if it can."""
    summary, here, there = read_results(run.folder).summary, run.config, None
    instead = "delete that folder, or choose another run_name"
    if summary:
        with suppress(InputError):
            there = load_config(run.folder / "config.yaml")
            # `auto` is no difference: there stands what was chosen for the device.
            here = here.model_copy(update={key: getattr(there, key) for key in here.automatic})
            if here.model.weights_sha256 is None:  # nor is what there was found
                here = here.started_from(there.model.weights_sha256)
        if summary.get("config_digest") != config_digest(here, processes):
            difference = "its config.yaml cannot be read"
            if there is not None:
                values = here.model_dump(mode="json"), there.model_dump(mode="json")
                difference = "; ".join(differing_keys(*values, processes, processes)) or "another number of processes"
            return [f"{run.folder}: holds a run of another config ({difference}); {instead}"]
    missing = {str(size) for size in run.config.eval.sizes} - set(summary.get("eval_by_size") or {})
    if summary.get("finished") is True and missing:
        return [f"{run.folder}: finished without evaluation at {', '.join(sorted(missing))} px; {instead}"]
    return []


def preflight(runs: Sequence[PlannedRun], processes: int) -> None:
    """Raise all errors that would make a run fail at its start on this machine, before any is started.

    In a process of its own, since it imports torch and may look at the GPU, whose memory the runs need.
    """
    first = {run.variant.name: run.config for run in runs}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(_problems, list(first.values()), processes).result()
    _raise_all(zip(first, found, strict=True), len(first))


def _problems(configs: Sequence[RunConfig], processes: int) -> list[list[str]]:
    """The errors of each run's start, in the run's own words; all runs use the same images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which waits for the answer, handles Ctrl-C
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    with quick_imports():
        from recipes.preflight import prepare_run
        from recipes.run import open_data
        from recipes.trainer import build_algorithms

    data = lru_cache(lambda: open_data(configs[0]))  # lists a million files only once
    found: list[list[str]] = []
    for config in configs:
        try:
            prepare_run(config, processes, data)
            build_algorithms(config, [1] * config.epochs)
            found.append([])
        except InputError as error:
            found.append(list(error.lines))
    return found
