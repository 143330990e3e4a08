"""A plan on the terminal: at most 80 columns, and no colour that a dark ground swallows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import RenderableType
from rich.table import Table

from recipes.plan.plan import Plan, StageCost
from recipes.plan.throughput import Throughput

SHOWN = 8
"""Stages that are listed one by one; of a finer ramp, neighbours become one row."""


class Row(NamedTuple):
    """One or several neighbouring stages."""

    parts: tuple[StageCost, ...]

    @property
    def epochs(self) -> str:
        """First and last, counted from 1."""
        first, last = self.parts[0].stage, self.parts[-1].stage
        end = last.first_epoch + last.epochs
        return f"{first.first_epoch + 1}" if end == first.first_epoch + 1 else f"{first.first_epoch + 1}-{end}"

    @property
    def sizes(self) -> str:
        """Of what the network sees, in pixels."""
        return _range([part.stage.size for part in self.parts])

    @property
    def loader_sizes(self) -> str:
        """Of what the loader makes, in pixels."""
        return _range([part.stage.loader_size for part in self.parts])

    @property
    def rate(self) -> float | None:
        """Images per second over the row's hours."""
        hours = self.hours
        if not hours:
            return None
        return sum((part.images_per_second or 0.0) * (part.hours or 0.0) for part in self.parts) / hours

    @property
    def hours(self) -> float | None:
        """Training time."""
        known = [part.hours for part in self.parts if part.hours is not None]
        return sum(known) if len(known) == len(self.parts) else None


def _range(values: Sequence[int]) -> str:
    return f"{values[0]}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def rows(stages: Sequence[StageCost]) -> list[Row]:
    """The stages as rows; where there are many, neighbours that differ in size alone and last briefly are one."""
    found: list[Row] = []
    total = sum(part.stage.epochs for part in stages)
    ramp = [len(stages) > SHOWN and 8 * part.stage.epochs < total for part in stages]
    for index, part in enumerate(stages):
        before = stages[index - 1].stage if index else None
        same = before is not None and (before.global_batch_size, before.crop) == (
            part.stage.global_batch_size,
            part.stage.crop,
        )
        if same and ramp[index] and ramp[index - 1]:
            found[-1] = Row((*found[-1].parts, part))
        else:
            found.append(Row((part,)))
    return found


def number(value: float) -> str:
    """A learning rate in three digits."""
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def percent(share: float) -> str:
    """`3.9 % less` or `2.0 % more`."""
    return f"{abs(share):.1%}".replace("%", " %") + (" less" if share >= 0 else " more")


def duration(hours: float) -> str:
    """`5 h 03 min`, `12 min` or `30 s`."""
    seconds = round(hours * 3600)
    if seconds < 120:
        return f"{hours * 3600:.3g} s"
    minutes = round(hours * 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def heading(plan: Plan) -> list[str]:
    """What is planned, on what."""
    hardware = "any hardware" if plan.hardware == "any" else plan.hardware
    lines = [
        f"{plan.run_name}: {plan.epochs} epochs of {plan.images.train:,} images ({plan.images.source})",
        f"on {hardware}, {plan.devices} process{'es' if plan.devices > 1 else ''}",
    ]
    if plan.machine is not None and plan.machine.note:
        lines.append(f"note: {plan.machine.note}")
    return lines


def compute(plan: Plan) -> list[str]:
    """The compute and what it saves, in words."""
    lines = [
        f"highest learning rate: {number(plan.peak_lr)}, in epoch {plan.peak_epoch + 1}, "
        f"at momentum {plan.peak_momentum:.3g}",
        f"compute: {plan.equivalents:.4g} epochs at 224 px (scaled by {plan.work}), {percent(plan.saving)} than "
        f"{plan.epochs} plain epochs at 224 px",
    ]
    if plan.train_size != 224:
        lines[1] += f", {percent(plan.saving_at_train_size)} than at {plan.train_size} px"
    if plan.saving != plan.saving_by_size:
        lines[1] += f"; by the sizes alone {percent(plan.saving_by_size)} than at 224 px"
    sizes = " and ".join(map(str, plan.evaluation.sizes))
    lines.append(
        f"evaluation, counted by itself: {plan.evaluation.times} times at {sizes} px, "
        f"{plan.evaluation_equivalents:.3g} epochs at 224 px"
    )
    return lines


def sources(plan: Plan) -> list[str]:
    """Where the rates come from; or what to do where there are none."""
    throughput = plan.throughput
    if throughput is None:
        return [
            "no throughput: nothing is published for this model, hardware and precision, and no run was measured.",
            "--measured RUN takes that of a run, --images-per-second N what you know.",
        ]
    known = ", ".join(str(size) for size in throughput.at)
    lines = [f"images/s {throughput.source} (at {known} px; other sizes scaled by {plan.work})"]
    lines += [f"x {factor:.3g} for {name}: {source}" for name, factor, source in throughput.factors]
    return [*lines, left_out(throughput)]


def left_out(throughput: Throughput) -> str:
    """What the hours and the dollars do not hold."""
    parts = ["start-up", "interruptions"]
    if throughput.checkpoint_seconds is None:
        parts.append("waiting for checkpoints")
    if not throughput.whole_step:
        parts.append("waiting for a loader that is slower than the devices")
    return f"left out: {', '.join(parts)}; of the dollars, storage and transfer too"


def stage_table(plan: Plan) -> Table:
    """What is trained when."""
    table = _table("epochs", "px", "batch", "steps", "learning rate", "momentum", "224-epochs")
    for row in rows(plan.stages):
        first, last = row.parts[0].stage.first, row.parts[-1].stage.last
        own = plan.momentum if first.momentum is None else first.momentum
        end = plan.momentum if last.momentum is None else last.momentum
        table.add_row(
            row.epochs,
            row.sizes,
            f"{row.parts[0].stage.global_batch_size:,}",
            f"{sum(part.stage.steps for part in row.parts):,}",
            _from_to(number(first.lr), number(last.lr)),
            _from_to(f"{own:.3g}", f"{end:.3g}"),
            f"{sum(part.equivalents for part in row.parts):.4g}",
        )
    return table


def time_table(plan: Plan) -> Table:
    """How long it takes, and what the loader must give."""
    vcpus = plan.machine.vcpus if plan.machine else None
    table = _table("epochs", "px", "loader px", "images/s needed", "per device", "per vCPU", "time")
    for row in rows(plan.stages):
        if row.rate is None or row.hours is None:
            continue
        table.add_row(
            row.epochs,
            row.sizes,
            row.loader_sizes,
            f"{row.rate:,.0f}",
            f"{row.rate / plan.devices:,.0f}",
            f"{row.rate / vcpus:,.0f}" if vcpus else "-",
            duration(row.hours),
        )
    table.add_section()
    if plan.evaluation_hours is not None:
        table.add_row("evaluation", "", "", "", "", "", duration(plan.evaluation_hours))
    if plan.checkpoint_hours is not None:
        table.add_row("checkpoints", "", "", "", "", "", duration(plan.checkpoint_hours))
    if plan.hours is not None:
        table.add_row("all", "", "", "", "", "", duration(plan.hours))
    return table


def memory_table(plan: Plan) -> Table:
    """What one device needs; stages of one row show the largest."""
    table = _table("epochs", "px", "GB per device", "GB it has")
    has = "-" if plan.device_memory_gb is None else f"{plan.device_memory_gb:.1f}"
    for row in rows(plan.stages):
        needed = max(part.memory_gb or 0.0 for part in row.parts)
        table.add_row(row.epochs, row.sizes, f"{needed:.1f}", has)
    return table


def price_lines(plan: Plan) -> list[str]:
    """The dollars, each price with its date and source."""
    if plan.machine is None:
        known = ", ".join(plan.machines)
        return [f"no price: no machine of the price list is named; --machine NAME takes one: {known}"]
    lines = []
    for bill in plan.bills:
        price = bill.price
        varies = "; varies by the hour" if bill.kind == "spot" else ""
        lines.append(
            f"{bill.kind}: {bill.dollars:,.2f} dollars at {price.usd_per_hour:g} $/h "
            f"({price.region}, {price.date}{varies}; {price.source})"
        )
    for kind, listed in (("on demand", plan.machine.on_demand), ("spot", plan.machine.spot)):
        if listed is None:
            lines.append(f"{kind}: no price")
        elif plan.hours is None:
            lines.append(f"{kind}: {listed.usd_per_hour:g} $/h ({listed.region}, {listed.date}; {listed.source})")
    return lines


def render(plan: Plan) -> Iterator[RenderableType]:
    """All of it, from top to bottom."""
    yield from heading(plan)
    yield ""
    yield stage_table(plan)
    yield from compute(plan)
    yield ""
    if plan.throughput is not None:
        yield time_table(plan)
    yield from sources(plan)
    yield ""
    yield from price_lines(plan)
    yield ""
    if any(part.memory_gb is not None for part in plan.stages):
        yield memory_table(plan)
    else:
        yield "memory per device: --memory tells, and counts FLOPs for compute (loads torch, some 10 s)"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table
