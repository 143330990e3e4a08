"""When, and in which order, gradients are added up over the processes."""

from __future__ import annotations

from collections.abc import Sequence

from composer import Algorithm, Event, Logger, State


class FixedBuckets(Algorithm):
    """Makes DDP keep its first gradient buckets, by asking for its `find_unused_parameters`.

    Without it, DDP orders its buckets anew after a process's first step (`Reducer::should_rebuild_buckets` in torch's
    reducer.cpp). The first step after a resume would then add the gradients of more than two processes in another order
    than the same step of a run that went on, and the two would end with other weights. An algorithm, because Composer's
    Trainer has no argument for it and asks only these (composer/trainer/trainer.py:1583).
    """

    find_unused_parameters = True

    def __init__(self) -> None:  # Composer's has no types
        pass

    def match(self, event: Event, state: State) -> bool:
        """Never: only the attribute counts."""
        del event, state
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Nothing."""


def sync_strategy(algorithms: Sequence[Algorithm]) -> str:
    """Composer's name for when gradients are added up: once a step, or after each of its portions.

    Once is enough, and costs less, unless a technique really leaves parameters unused, which may differ from portion to
    portion; Composer's own choice cannot tell `FixedBuckets` from such a technique (composer/trainer/trainer.py:494).
    """
    uneven = any(item.find_unused_parameters for item in algorithms if not isinstance(item, FixedBuckets))
    return "multi_auto_sync" if uneven else "single_auto_sync"
