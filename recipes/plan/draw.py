"""The picture of a schedule: image size, batch size, learning rate and momentum over the epochs."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from recipes.config import RunConfig
from recipes.page.chart import COLORS
from recipes.plan.compute import Stage, batches_per_epoch, schedule_of
from recipes.schedule import epoch_plan

POINTS = 2_000
"""Points of a curve, at most."""


def draw(figure: Figure, config: RunConfig, stages: list[Stage], samples: int, devices: int) -> None:
    """Draw it into a figure.

    Args:
        figure: Empty.
        config: The run.
        stages: Its stages.
        samples: Training images.
        devices: Processes of the run.
    """
    plan = epoch_plan(config, devices)
    batches, rate_at = batches_per_epoch(plan, samples), schedule_of(config, plan, samples)
    stride = max(1, sum(batches) // POINTS)
    places = [
        (epoch, batch) for epoch, steps in enumerate(batches) for batch in sorted({*range(0, steps, stride), steps - 1})
    ]
    epochs = [epoch + batch / batches[epoch] for epoch, batch in places]
    rates = [rate_at(epoch, batch) for epoch, batch in places]
    momenta = [config.optimizer.momentum if rate.momentum is None else rate.momentum for rate in rates]
    edges = [*(stage.first_epoch for stage in stages), config.epochs]
    top, second, third, fourth = figure.subplots(4, 1, sharex=True)
    thick: dict[str, Any] = {"baseline": None, "linewidth": 1.8, "zorder": 3}
    top.stairs([stage.size for stage in stages], edges, **thick, color=COLORS[0], label="network")
    if any(stage.size != stage.loader_size for stage in stages):
        loader = [stage.loader_size for stage in stages]
        top.stairs(loader, edges, **thick, color=COLORS[1], linestyle="--", label="loader")
        top.legend(loc="lower right")
    top.set(title=f"{config.run_name}: schedule", ylabel="image size (px)")
    batch = [stage.global_batch_size for stage in stages]
    second.stairs(batch, edges, **thick, color=COLORS[0])
    second.set(ylabel="batch (images)", ylim=(0, 1.15 * max(batch)))
    third.plot(epochs, [rate.lr for rate in rates], color=COLORS[0])
    third.set(ylabel="learning rate", ylim=(0, None))
    fourth.plot(epochs, momenta, color=COLORS[0])
    fourth.set(ylabel="momentum", xlabel="epoch", xlim=(0, config.epochs))
    figure.align_ylabels()
