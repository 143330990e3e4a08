"""The sections of the report, from runs that were read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from data.errors import DataError
from recipes.page.html import Section, figure, paragraph, table
from recipes.report import about
from recipes.report.confusion import (
    confused_pairs,
    confusion_matrix,
    hardest,
    judged,
    most_confused,
    surest_errors,
)
from recipes.report.curves import PHASES, color, curves, line_style, same_stages, throughput, time_spent
from recipes.report.pictures import error_picture, evaluated_images, grid
from recipes.report.read import Predictions, Run
from recipes.report.timeline import resumes, stages
from recipes.watch.clock import duration

MATRIX, PAIRS, HARDEST = 12, 15, 10
"""Classes in the table of confusions, and rows in the lists below it."""
GRIDS, ERRORS = 8, 24
"""Pictures of one run at most; of several runs, half as many each."""


def sections(runs: Sequence[Run]) -> list[Section]:
    """The report of one run, or of several side by side."""
    several = len(runs) > 1
    parts = [Section("Result", about.results(runs) + _problems(runs))]
    if several:
        parts.append(Section("What differs", about.differences(runs)))
    parts += [
        Section("What was trained", _each(runs, lambda run: about.techniques(run) + about.settings(run))),
        Section("Versions and hardware", about.versions(runs)),
        Section("Curves", _curves(runs)),
        Section("Accuracy at each size", _accuracy(runs)),
        Section("Throughput", _throughput(runs)),
        Section("Where the time went", _time(runs)),
        Section("What the network saw", _each(runs, lambda run: _grids(run, GRIDS // (1 + several)))),
        Section("Confused classes", _each(runs, _confusions)),
        Section("Surest errors", _each(runs, lambda run: _errors(run, ERRORS // (1 + several)))),
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
    if same_stages(runs) and len(stages(drawn[0].training)) > 1:
        words += " Dashed lines: a stage begins."
    if any(run.summary.get("resumed_from") for run in runs):
        words += " Red triangles: the run went on there from a checkpoint."
    lines = max(len(run.training["epoch"]) for run in drawn)
    if lines > 600:
        words += f" A point is the mean of {-(-lines // 600)} logged figures or fewer."
    lost = [_not_finite(run) for run in runs]
    notes = Markup("").join(paragraph(line, note=True) for line in lost if line)
    return _legend(runs) + figure(curves(runs), words) + notes + _each(runs, _resumes)


def _not_finite(run: Run) -> str:
    loss = run.training["train/loss"]
    missing = np.flatnonzero(np.isnan(loss))
    if not len(missing):
        return ""
    batch = run.training["batch"][missing[0]]
    return f"{run.name}: {len(missing)} of {len(loss)} logged losses are not finite, the first at batch {batch:.0f}."


def _resumes(run: Run) -> Markup:
    sources = run.summary.get("resumed_from")
    found = resumes(sources if isinstance(sources, list) else [], run.training)
    if not found:
        return Markup("") if sources in ([], None) else paragraph("Resumes: at places that the figures do not tell.")
    rows = [[about.number(one.epoch, ".2f"), one.batch, one.source] for one in found]
    return table(["went on at epoch", "after batch", "from"], rows, numbers=(0, 1))


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
    for run in runs:
        if run.predictions is not None:
            kept = judged(run.predictions.label, run.predictions.predicted)
            right = float(np.mean(run.predictions.label[kept] == run.predictions.predicted[kept])) if len(kept) else 0.0
            error = 100 * (right * (1 - right) / max(1, len(kept))) ** 0.5
            words = (
                f"{run.name}: {len(kept):,} evaluation images, so the standard error of its top-1 is {error:.2f} points"
            )
            body += paragraph(f"{words}.", note=True)
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


def _time(runs: Sequence[Run]) -> Markup:
    found = []
    for run in runs:
        seconds = run.summary.get("seconds")
        if isinstance(seconds, dict):
            spent = {phase: seconds.get(phase) for phase in PHASES}
            found.append(
                (
                    run.name,
                    {key: max(0.0, value) for key, value in spent.items() if about.number(value, "") != about.ABSENT},
                )
            )
    found = [(name, spent) for name, spent in found if 0 < sum(spent.values()) < float("inf")]
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


def _grids(run: Run, limit: int) -> Markup:
    if not run.pictures:
        return paragraph("The run left no pictures of its batches.")
    chosen = [run.pictures[at] for at in np.unique(np.linspace(0, len(run.pictures) - 1, limit).astype(int))]
    shown = []
    for path in chosen:
        epoch, _, size = path.stem.removeprefix("ep").partition("-")
        caption = f"{size.removesuffix('px')} px, from epoch {int(epoch) if epoch.isdecimal() else epoch} on"
        try:
            shown.append(figure(grid(path, f"Training images at {size}"), caption))
        except OSError as error:
            shown.append(paragraph(f"{path.name} cannot be shown: {error}"))
    words = "The first batch of each stage after augmentation, resizing and mixing: what the network was trained on."
    if len(chosen) < len(run.pictures):
        words += f" {len(chosen)} of {len(run.pictures)} stages are shown; the others are in {run.pictures[0].parent}."
    return paragraph(words, note=True) + Markup("").join(shown)


def _without(run: Run) -> Markup:
    """Why there are no predictions."""
    if any("predictions.npz" in line for line in run.problems):
        return paragraph("The predictions cannot be read; see the notes at the top.")
    if run.summary.get("finished") is True:
        return paragraph("The run left no predictions.npz; it was made by an earlier version, or the file was removed.")
    return paragraph("Known when the run is finished: its last evaluation writes them down, image by image.")


def _confusions(run: Run) -> Markup:
    if run.predictions is None:
        return _without(run)
    answers = run.predictions
    pairs = confused_pairs(answers.label, answers.predicted)
    total = len(judged(answers.label, answers.predicted))
    wrong = sum(pair.count for pair in pairs)
    words = f"{wrong:,} of {total:,} images at {answers.size} px were taken for another class."
    if not pairs:
        return paragraph(words)
    listed = [
        [
            answers.name(pair.label),
            answers.name(pair.predicted),
            pair.count,
            pair.total,
            f"{100 * pair.count / pair.total:.1f}",
        ]
        for pair in pairs[:PAIRS]
    ]
    lowest = [
        [answers.name(label), f"{100 * right / images:.1f}", images]
        for label, right, images in hardest(answers.label, answers.predicted, HARDEST)
    ]
    return (
        paragraph(words)
        + _matrix(answers, most_confused(pairs, MATRIX))
        + table(["images of", "taken for", "times", "of", "share (%)"], listed, numbers=(2, 3, 4))
        + table(["hardest classes", "top-1 (%)", "images"], lowest, numbers=(1, 2))
    )


def _matrix(answers: Predictions, classes: Sequence[int]) -> Markup:
    """Rows: the images' classes; columns: the predictions, by the rows' numbers."""
    counts = confusion_matrix(answers.label, answers.predicted, classes)
    wrong = counts.copy()
    wrong[np.arange(len(classes)), np.arange(len(classes))] = 0
    strongest = max(1, int(wrong[:, :-1].max(initial=0)))

    def cell(row: int, column: int) -> Markup:
        count = int(counts[row, column])
        if row == column or column == len(classes):
            return Markup('<span class="right">{}</span>').format(count)
        share = 0.75 * count / strongest
        return Markup('<span class="cell" style="background: rgba(213, 94, 0, {:.2f})">{}</span>').format(
            share, count or ""
        )

    rows = [
        [f"{row + 1}  {answers.name(one)}", *(cell(row, column) for column in range(len(classes) + 1))]
        for row, one in enumerate(classes)
    ]
    headers = ["images of \\ taken for", *(str(place + 1) for place in range(len(classes))), "others"]
    return table(headers, rows, numbers=range(1, len(classes) + 2))


def _errors(run: Run, limit: int) -> Markup:
    if run.predictions is None:
        return _without(run)
    answers = run.predictions
    chosen = surest_errors(answers.label, answers.predicted, answers.probability, limit)
    if not len(chosen):
        return paragraph("No image was taken for another class.")
    path, cache = run.setting("data.path"), run.setting("data.cache_folder")
    try:
        if not isinstance(path, str):
            raise DataError("the config does not say where the images are")
        source = evaluated_images(path, cache if isinstance(cache, str) else "cache", answers)
    except (DataError, OSError, ValueError) as error:
        source, missing = None, paragraph(f"The images cannot be shown: {error}.", note=True)
    shown = []
    for index in chosen.tolist():
        words = (
            f"{answers.name(int(answers.label[index]))}, taken for {answers.name(int(answers.predicted[index]))} "
            f"({100 * answers.probability[index]:.0f} % against {100 * answers.label_probability[index]:.0f} %)"
        )
        image = Markup("") if source is None else error_picture(source, index, words)
        shown.append(figure(image, words))
    head = "Wrong predictions with the highest probability: class, prediction, and the probabilities of both."
    return (
        paragraph(head, note=True)
        + (missing if source is None else Markup(""))
        + Markup('<div class="grid">{}</div>').format(Markup("").join(shown))
    )
