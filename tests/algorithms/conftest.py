"""Fixtures around `tiny_run.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Precision, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.models import ComposerClassifier
from tiny_run import BATCH, CLASSES, Run, assert_equal
from torch import nn


@pytest.fixture
def run() -> Any:
    made = []

    def make(techniques: list | dict[str, Any], **options: Any) -> Run:
        made.append(Run(techniques, **options))
        return made[-1]

    yield make
    for item in made:
        item.trainer.close()


@pytest.fixture
def resumed(run: Any, tmp_path: Path) -> Callable:
    """Save after some batches and let the run finish, then resume from each: (through, [resumed, ...]), all finished.

    The final weights must be the same bits.
    """

    def check(techniques: dict[str, Any], batches: list[int], **options: Any) -> tuple[Run, list[Run]]:
        paths = {batch: tmp_path / f"{batch}.pt" for batch in batches}
        through = run(techniques, save=paths, **options)
        final = through.fit()
        others = [run(techniques, load=path, **options) for path in paths.values()]
        for batch, other in zip(batches, others, strict=True):
            assert other.trainer.state.timestamp.batch == batch
            assert_equal(final, other.fit())
        return through, others

    return check


@pytest.fixture
def state() -> Callable:
    """A Composer State around a network, at an epoch of ten."""

    def make(network: nn.Module, epoch: int = 0, batch: int = 0) -> State:
        model = ComposerClassifier(network, num_classes=CLASSES)
        made = State(
            model=model,
            rank_zero_seed=17,
            device=DeviceCPU(),
            run_name="test",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2),
            precision=Precision.FP32,
            max_duration="10ep",
            device_train_microbatch_size=BATCH,
        )
        made.timestamp = made.timestamp.copy(epoch=epoch, batch=batch)
        return made

    return make


@pytest.fixture
def logger() -> Logger:
    return Logger(State.__new__(State), [])
