"""Progressive resizing: small images first.

With `where: loader` the plan of epochs holds the sizes (`ProgressiveResizingConfig.size_at`), and the loader decodes to
them. With `where: batch` Composer's algorithm scales whole batches.
"""

from __future__ import annotations

from composer.algorithms import ProgressiveResizing

from algorithms.config import TOLERANCE, ProgressiveResizingConfig


def build(config: ProgressiveResizingConfig) -> ProgressiveResizing | None:
    """Composer's algorithm on batches; None with `where: loader`."""
    if config.where == "loader":
        return None
    delay, finetune = config.delay_fraction, config.finetune_fraction
    if delay + finetune > 1 - TOLERANCE:
        # Composer would divide by the ramp's length, zero here, so give it a tiny ramp that ends at `delay`.
        delay, finetune = delay - 2 * TOLERANCE, min(finetune, 1 - delay)
    fields = config.model_dump(exclude={"where"}) | {"delay_fraction": delay, "finetune_fraction": finetune}
    return ProgressiveResizing(**fields)
