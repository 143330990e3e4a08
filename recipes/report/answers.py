"""The sections that show images and what the model made of them."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np
from markupsafe import Markup

from data.errors import DataError
from recipes.page.html import figure, paragraph, table
from recipes.report.confusion import (
    confused_pairs,
    confusion_matrix,
    hardest,
    judged,
    most_confused,
    surest_errors,
)
from recipes.report.pictures import error_picture, evaluated_images, grid
from recipes.report.read import Predictions, Run

MATRIX, PAIRS, HARDEST = 12, 15, 10
"""Classes in the table of confusions, and rows in the lists below it."""


def grids(run: Run, limit: int) -> Markup:
    """The grids of training images that the run saved, at most so many, spread over it."""
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


def confusions(run: Run) -> Markup:
    """The most confused classes against each other, the most frequent confusions, the hardest classes."""
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
    """Rows: the images' classes; columns: the predictions, by the rows' letters."""
    counts = confusion_matrix(answers.label, answers.predicted, classes)
    wrong = counts.copy()
    wrong[np.arange(len(classes)), np.arange(len(classes))] = 0
    strongest = max(1, int(wrong[:, :-1].max(initial=0)))

    def cell(row: int, column: int) -> Markup:
        count = int(counts[row, column])
        if row == column or column == len(classes):
            return Markup('<span class="cell">{}</span>').format(count)
        share = 0.75 * count / strongest
        return Markup('<span class="cell" style="background: rgba(213, 94, 0, {:.2f})">{}</span>').format(
            share, count or ""
        )

    letters = ascii_uppercase[: len(classes)]
    others = bool(counts[:, -1].any())  # where the table has all classes, there are none
    rows = [
        [
            Markup("<b>{}</b> {}").format(letter, answers.name(one)),
            *(cell(row, column) for column in range(len(classes) + others)),
        ]
        for row, (letter, one) in enumerate(zip(letters, classes, strict=True))
    ]
    headers = ["images of \\ taken for", *letters, *["others"] * others]
    return table(headers, rows, numbers=range(1, len(headers)))


def errors(run: Run, limit: int) -> Markup:
    """The wrong predictions with the highest probability, with their images where these are still there."""
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
        words = f"{answers.name(int(answers.label[index]))}, taken for {answers.name(int(answers.predicted[index]))}"
        chances = f"{100 * answers.probability[index]:.0f} % against {100 * answers.label_probability[index]:.0f} %"
        image = Markup("") if source is None else error_picture(source, index, words)
        shown.append(figure(image, Markup("{}<br>{}").format(words, chances)))
    head = "The wrong predictions with the highest probability, which stands against that of the right class."
    return (
        paragraph(head, note=True)
        + (missing if source is None else Markup(""))
        + Markup('<div class="grid">{}</div>').format(Markup("").join(shown))
    )
