"""The sections of the report, from runs that were read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from recipes.page.html import Section, figure, paragraph, table
from recipes.report import about
from recipes.report.answers import confusions, errors, grids
from recipes.report.confusion import judged
from recipes.report.curves import (
    PHASES,
    accuracy_over_time,
    color,
    curves,
    line_style,
    same_stages,
    throughput,
    time_spent,
)
from recipes.report.read import Run
from recipes.report.timeline import averaged, resumes, stages
from recipes.watch.clock import duration

GRIDS, ERRORS = 8, 24
"""Pictures of one run at most; of several runs, half as many each."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """The report of one run, or of several side by side."""
    several = len(runs) > 1
    parts = [Section("Result", about.results(runs) + _problems(runs))]
    if several:
        parts.append(Section("What differs", about.differences(runs)))
    parts += [
        Section("What was trained", _each(runs, lambda run: about.trained(run, folded=several))),
        Section("Versions and hardware", about.versions(runs)),
        Section("Curves", _curves(runs)),
        Section("Accuracy at each size", _accuracy(runs)),
        Section("Throughput", _throughput(runs)),
        Section("Where the time went", _time(runs)),
        Section("What the network saw", _each(runs, lambda run: grids(run, GRIDS // (1 + several)))),
        Section("Confused classes", _each(runs, confusions)),
        Section("Surest errors", _each(runs, lambda run: errors(run, ERRORS // (1 + several)))),
    ]
    return parts


def _each(runs: Sequence[Run], body: Callable[[Run], Markup]) -> Markup:
    """A part per run, under the run's name where there are several."""
    if len(runs) == 1:
        return body(runs[0])
    heads = (Markup("<h3>{}</h3>").format(run.name) for run in runs)
    return Markup("").join(head + body(run) for head, run in zip(heads, runs, strict=True))


def _problems(runs: Sequence[Run]) -> Markup:
    lines = [Markup("<li>{}</li>").format(line) for run in runs for line in run.problems]
    return Markup('<ul class="problems">{}</ul>').format(Markup("").join(lines)) if lines else Markup("")


def _legend(runs: Sequence[Run]) -> Markup:
    """Which line is which run's; long names have room here."""
    if len(runs) == 1:
        return Markup("")
    border = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}
    entries = (
        Markup('<span><i style="border-top: 3px {} {}"></i>{}</span>').format(
            border[line_style(index)], color(index), run.name
        )
        for index, run in enumerate(runs)
    )
    return Markup('<p class="legend">{}</p>').format(Markup("").join(entries))


def _curves(runs: Sequence[Run]) -> Markup:
    drawn = [run for run in runs if len(run.training["epoch"])]
    if not drawn:
        return paragraph("No figures of the training yet: metrics.jsonl has none.")
    words = "The band on top shows the stages: image size, and images of a step over all devices."
    if any(averaged(run.training["train/loss"]) for run in drawn):
        words += " The bold line of the loss is its moving mean."
    if same_stages(runs) and len(stages(drawn[0].training)) > 1:
        words += " Dashed lines: a stage begins."
    if any(run.resumed_from for run in runs):
        words += " Red triangles: the run went on there from a checkpoint."
    lines = max(len(run.training["epoch"]) for run in drawn)
    if lines > 600:
        words += f" A point is the mean of {-(-lines // 600)} logged figures or fewer."
    lost = [_not_finite(run) for run in runs]
    notes = Markup("").join(paragraph(line, note=True) for line in lost if line)
    return _legend(runs) + figure(curves(runs), words) + notes + _resumes(runs)


def _not_finite(run: Run) -> str:
    loss = run.training["train/loss"]
    missing = np.flatnonzero(np.isnan(loss))
    if not len(missing):
        return ""
    batch = run.training["batch"][missing[0]]
    return f"{run.name}: {len(missing)} of {len(loss)} logged losses are not finite, the first at batch {batch:.0f}."


def _resumes(runs: Sequence[Run]) -> Markup:
    found = [(run, one) for run in runs for one in resumes(run.resumed_from, run.training)]
    if not found:
        return Markup("")
    rows = [[run.name, about.number(one.epoch, ".2f"), one.batch, one.source] for run, one in found]
    return table(["run", "went on at epoch", "after batch", "from"], rows, numbers=(1, 2))


def _accuracy(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        by_size = run.summary.get("eval_by_size")
        for size, figures in by_size.items() if isinstance(by_size, dict) else ():
            if isinstance(figures, dict):
                shares = [about.percent(figures.get(name)) for name in ("top1", "top5")]
                rows.append([run.name, size, *shares, about.number(figures.get("loss"), ".4f")])
    if not rows:
        return paragraph("No evaluation yet.")
    body = table(["run", "size (px)", "top-1 (%)", "top-5 (%)", "loss"], rows, numbers=(1, 2, 3, 4))
    if any(run.evaluations for run in runs):
        words = "Time of training, loading, evaluation and checkpoints, without the program's start."
        body += _legend(runs) + figure(accuracy_over_time(runs), words)
    for run in runs:
        if run.predictions is not None:
            answers = run.predictions
            kept = judged(answers.label, answers.predicted)
            right = float(np.mean(answers.label[kept] == answers.predicted[kept])) if len(kept) else 0.0
            error = 100 * (right * (1 - right) / max(1, len(kept))) ** 0.5
            words = f"{run.name}: {len(kept):,} evaluation images, so the standard error of its top-1"
            body += paragraph(f"{words} at {answers.size} px is {error:.2f} points.", note=True)
    return body


def _throughput(runs: Sequence[Run]) -> Markup:
    rows = [
        [
            run.name,
            f"{stage.first:.4g} to {stage.last:.4g}",
            stage.size,
            stage.batch_size or about.ABSENT,
            about.number(stage.images_per_second, ",.1f"),
            about.number(100 * stage.wait_fraction, ".1f"),
        ]
        for run in runs
        for stage in stages(run.training)
    ]
    if not rows:
        return paragraph("No figures of the training yet.")
    headers = ["run", "epochs", "size (px)", "batch size", "images/s", "loader wait (%)"]
    words = "Over all devices, evaluation and checkpoints left out; the wait is the first process's."
    return _legend(runs) + figure(throughput(runs), words) + table(headers, rows, numbers=(2, 3, 4, 5))


def _seconds(run: Run) -> dict[str, float]:
    """Seconds by phase, as far as summary.json holds numbers."""
    seconds = run.summary.get("seconds")
    spent = seconds if isinstance(seconds, dict) else {}
    return {phase: float(spent[phase]) for phase in PHASES if isinstance(spent.get(phase), int | float)}


def _time(runs: Sequence[Run]) -> Markup:
    found = [(run.name, _seconds(run)) for run in runs]
    found = [
        (name, spent)
        for name, spent in found
        if min(spent.values(), default=0) >= 0 < sum(spent.values()) < float("inf")
    ]
    if not found:
        return paragraph("No times yet: summary.json has none.")
    rows = []
    for name, spent in found:
        whole = sum(spent.values())
        shares = (
            f"{duration(spent.get(phase, 0.0))} ({100 * spent.get(phase, 0.0) / whole:.1f} %)" for phase in PHASES
        )
        rows.append([name, *shares, duration(whole)])
    headers = ["run", *(label for label, _ in PHASES.values()), "in all (h:mm:ss)"]
    words = (
        "Over all processes that led to the present state; what a killed one did after its last checkpoint is not in."
    )
    return figure(time_spent(found), words) + table(headers, rows, numbers=range(1, 6))
