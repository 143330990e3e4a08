"""Where the time of a step goes, added up from the marks of Composer's profiler, and told on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LEAVES = {
    "event/dataloader": "waiting for the loader",
    "event/forward": "forward pass",
    "event/loss": "loss",
    "event/backward": "backward pass",
}
"""Marks that hold no other; so do the algorithms', `algorithm/CLASS/event/EVENT`."""
INPUT, OPTIMIZER, REST = (
    "to the device, normalisation, gradients to zero",
    "optimizer, loss to the host",
    "figures, checkpoints, the rest",
)
ORDER = ("waiting for the loader", INPUT, "forward pass", "loss", "backward pass", OPTIMIZER, "algorithm ", REST)


class Span(NamedTuple):
    """One mark, in seconds."""

    name: str
    begin: float
    end: float


class StageProfile(NamedTuple):
    """What was measured at one image size."""

    size: int
    """In pixels, of what the loader makes."""
    images: int
    """Of a step on one device."""
    batch: int
    """Batches of the run that were done at the end."""
    steps: int
    seconds: float
    """Of all these steps."""
    plain_step_seconds: float | None
    """A step before them, without the profiler (median); None: there were none."""
    device: str
    shares: Mapping[str, float]
    """Seconds by part of the step; they add up to `seconds`."""
    operators: Sequence[Sequence[Any]]
    """(name, share of all operators' time, calls)."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> StageProfile:
        """From a file's JSON.

        Raises:
            TypeError: It lacks an entry.
        """
        return cls(**data)


def shares(spans: Sequence[Span], begin: float, end: float) -> dict[str, float]:
    """Split the time from `begin` to `end` into the parts of a step.

    An instant counts for the innermost mark around it. What is in no leaf is, inside `event/train_batch`, the way of
    the images to the network; else inside `event/batch` the optimizer's; else the rest.

    Args:
        spans: Marks inside that time, nested or apart, as Composer makes them: `event/batch` around
            `event/train_batch` around the leaves.
        begin: In seconds.
        end: In seconds.

    Returns:
        Seconds by part, at least 0, which add up to `end - begin`.
    """
    outer, inner = _named(spans, "event/batch"), _named(spans, "event/train_batch")
    found: dict[str, float] = dict.fromkeys((*LEAVES.values(), INPUT, OPTIMIZER), 0.0)
    leaves: list[Span] = []
    for span in spans:
        part = LEAVES.get(span.name)
        if span.name.startswith("algorithm/"):
            part = f"algorithm {span.name.split('/')[1]}"
        if part is not None:
            found[part] = found.get(part, 0.0) + span.end - span.begin
            leaves.append(span)
    in_train = sum(span.end - span.begin for span in leaves if _inside(span, inner))
    in_batch = sum(span.end - span.begin for span in leaves if _inside(span, outer) and not _inside(span, inner))
    training, batches = _length(inner), _length(outer)
    found[INPUT] = max(training - in_train, 0.0)
    found[OPTIMIZER] = max(batches - training - in_batch, 0.0)
    found[REST] = max(end - begin - sum(found.values()), 0.0)
    return found


def _named(spans: Sequence[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def _inside(span: Span, outer: Sequence[Span]) -> bool:
    return any(one.begin <= span.begin and span.end <= one.end for one in outer)


def _length(spans: Sequence[Span]) -> float:
    return sum(span.end - span.begin for span in spans)


def summary(stages: Sequence[StageProfile]) -> str:
    """The page, as Markdown.

    Args:
        stages: One per image size.
    """
    names = {name for stage in stages for name in stage.shares}
    rank = {name: next(index for index, start in enumerate(ORDER) if name.startswith(start)) for name in names}
    rows = sorted(names, key=lambda name: (rank[name], name))
    lines = ["# Where a step goes", ""]
    lines += [_stage_line(stage) for stage in stages]
    lines += ["", "| ms of a step | " + " | ".join(f"{stage.size} px | share" for stage in stages) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(stages))
    for name in rows:
        cells = [_cells(stage.shares.get(name, 0.0), stage) for stage in stages]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| all | " + " | ".join(_cells(stage.seconds, stage) for stage in stages) + " |")
    lines += ["", *NOTES, "", "## Operators with most time of their own", ""]
    for stage in stages:
        kernel = "GPU" if stage.device == "gpu" else "CPU"
        lines += [f"{stage.size} px, share of all operators' {kernel} time:", ""]
        lines += ["| operator | share | calls |", "| --- | ---: | ---: |"]
        lines += [f"| `{name}` | {share:.1%} | {calls} |" for name, share, calls in stage.operators]
        lines.append("")
    return "\n".join(lines)


NOTES = (
    "Rank 0 only. The profiler slows a step down, and on a GPU each part waits for the device, so that its time is its",
    "own: compare the shares, not the milliseconds. The run's whole waiting for the loader stands in metrics.jsonl.",
    "",
    "The traces beside this file, `SIZEpx.pt.trace.json.gz`, open in Perfetto (ui.perfetto.dev) as they are, and in",
    "TensorBoard with its plugin (`pip install torch-tb-profiler`; `tensorboard --logdir` with this folder).",
)


def _stage_line(stage: StageProfile) -> str:
    plain = stage.plain_step_seconds
    before = "" if plain is None else f", {1000 * plain:.1f} ms without the profiler"
    return (
        f"- {stage.size} px: {stage.steps} steps of {stage.images} images a device up to batch {stage.batch}, "
        f"{1000 * stage.seconds / stage.steps:.1f} ms each{before}"
    )


def _cells(seconds: float, stage: StageProfile) -> str:
    return f"{1000 * seconds / stage.steps:.2f} | {seconds / stage.seconds:.1%}"
