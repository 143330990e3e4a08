"""From the outcomes of an ablation's runs to what is told about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from recipes.ablate.plan import Plan
from recipes.ablate.results import Runs, summarise
from recipes.ablate.runs import Outcome
from recipes.ablate.write import Story
from recipes.read_run import ReadRun, short_commit


def story_of(plan: Plan, outcomes: Sequence[Outcome], size: int, target: float | None, command: Sequence[str]) -> Story:
    """Put together what is shown.

    Args:
        plan: The ablation.
        outcomes: One for each of its runs.
        size: Image size in pixels at which accuracies are compared.
        target: Top-1 in [0, 1] to time; None: the baseline's mean at its end.
        command: What was typed.
    """
    recipe = plan.recipe
    runs: Runs = {variant: {} for variant in plan.variants}
    for outcome in outcomes:
        if outcome.run is not None:
            runs[outcome.planned.variant][outcome.planned.seed] = outcome.run
    failed = Counter(outcome.planned.variant for outcome in outcomes if outcome.failure)
    results = summarise(
        plan.variants, runs, failed, seeds=len(plan.seeds), sizes=recipe.eval.sizes, size=size, target=target
    )
    groups = [
        [float(run.summary["eval_by_size"][str(size)]["top1"]) for run in done.values()] for done in runs.values()
    ]
    finished = [run for done in runs.values() for run in done.values()]
    devices = sorted({str((run.summary.get("versions") or {}).get("device")) for run in finished})
    setting = (
        f"{len(plan.variants)} variants of {recipe.model.name}, {recipe.epochs} epochs each, seeds "
        f"{', '.join(map(str, plan.seeds))}: {len(finished)} of {len(plan.runs)} runs are finished"
        + (f". {', '.join(devices)}." if devices else ".")
    )
    return Story(
        f"Ablation of {recipe.run_name}",
        results,
        groups,
        recipe.eval.interval,
        setting,
        [*remarks(plan, outcomes), *unlike(finished)],
        list(command),
    )


def remarks(plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    """Runs that failed or were not reached, and techniques that lean on each other."""
    found = [f"Failed: {outcome.planned.label}, {outcome.failure}" for outcome in outcomes if outcome.failure]
    missing = sum(outcome.run is None and outcome.failure is None for outcome in outcomes)
    if missing:
        found.append(f"{missing} of {len(outcomes)} runs are not finished; the same command goes on.")
    cutmix = plan.recipe.algorithms.cutmix
    kinds = [{"mixup", "cutmix"} & set(variant.on) for variant in plan.variants]
    if cutmix is not None and any(len(kind) == 1 for kind in kinds) and any(len(kind) == 2 for kind in kinds):
        share = cutmix.switch_prob
        found.append(
            f"Where MixUp and CutMix are both on, a batch gets CutMix with probability {share:g} and MixUp otherwise; "
            "without one of them, the other acts on every batch."
        )
    return found


def unlike(runs: Sequence[ReadRun]) -> list[str]:
    """What makes times or results hard to compare: versions and devices that are not the same in all runs."""
    found = []
    versions = [run.summary.get("versions") or {} for run in runs]
    for key in dict.fromkeys(key for entry in versions for key in entry):
        counts = Counter(short_commit(str(entry.get(key))) for entry in versions)
        if len(counts) > 1:
            shares = ", ".join(f"{value} ({count} runs)" for value, count in counts.most_common())
            found.append(f"Not the same in all runs: {key}: {shares}.")
    return found
