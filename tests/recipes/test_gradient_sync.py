"""When gradients are added up; that a resume adds them in the same order is tests/test_two_nodes.py's to show."""

import pytest
from composer.algorithms import EMA, LayerFreezing

from algorithms.fixres import FixResConfig
from recipes.trainer import FixedBuckets, sync_strategy


@pytest.mark.parametrize(
    ("techniques", "strategy"),
    [
        ([], "single_auto_sync"),
        ([EMA("4ba")], "single_auto_sync"),
        ([LayerFreezing()], "multi_auto_sync"),
        ([EMA("4ba"), FixResConfig(start=0.5, train="classifier").build(4)], "multi_auto_sync"),
    ],
)
def test_gradients_are_added_up_once_a_step_unless_a_technique_leaves_some_out(techniques, strategy):
    assert sync_strategy(techniques) == strategy
    assert sync_strategy([*techniques, FixedBuckets()]) == strategy
