from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.schedule import epoch_plan, peak_lr

MEDIUM = {
    "run_name": "t",
    "data": {"path": "d"},
    "device_batch_size": {128: 768, 224: 384, 288: 256},
    "algorithms": {
        "progressive_resizing": {
            "where": "loader",
            "initial_scale": 128 / 224,
            "delay_fraction": 10 / 90,
            "finetune_fraction": 80 / 90,
            "size_increment": 32,
        },
        "fixres": {"start": 85 / 90, "size": 288},
    },
}


def of(**changes):
    return RunConfig.model_validate(MEDIUM | changes)


def stages(plan):
    """(epochs, size, crop, global batch size) of each stretch of equal epochs."""
    return [(len(list(members)), *entry) for entry, members in groupby(plan)]


def test_the_stages_of_the_medium_recipe():
    assert stages(epoch_plan(of(max_duration="90ep"), world_size=8)) == [
        (10, 128, "random", 6144),
        (75, 224, "random", 3072),
        (5, 288, "center", 2048),
    ]


@given(st.integers(3, 600))
def test_every_length_has_the_same_stages_in_the_same_proportion(epochs):
    found = stages(epoch_plan(of(max_duration=f"{epochs}ep"), world_size=1))
    lengths = {size: length for length, size, *_ in found}
    assert sum(lengths.values()) == epochs
    assert lengths[288] == pytest.approx(max(1, epochs * 5 / 90), abs=1)
    assert lengths.get(128, 0) == pytest.approx(epochs * 10 / 90, abs=1)
    assert [size for _, size, *_ in found] == sorted(lengths)


def test_without_techniques_an_epoch_is_an_epoch():
    plain = of(algorithms={}, max_duration="4ep")
    assert [tuple(entry) for entry in epoch_plan(plain, 2)] == [(224, "random", 768)] * 4


def test_resizing_in_the_batch_leaves_the_loader_at_full_size():
    resizing = MEDIUM["algorithms"]["progressive_resizing"] | {"where": "batch", "finetune_fraction": 0.5}
    plan = epoch_plan(of(algorithms={"progressive_resizing": resizing}, max_duration="9ep"), 1)
    assert {entry.size for entry in plan} == {224}


def test_a_global_batch_size_is_the_same_on_any_number_of_devices():
    config = of(device_batch_size=None, global_batch_size={128: 1024, 224: 512})
    assert epoch_plan(config, 1) == epoch_plan(config, 8)
    with pytest.raises(InputError, match="global_batch_size: 1024 images at 128 px do not divide by 3 processes"):
        epoch_plan(config, 3)


def test_the_rate_scales_with_the_batch_size_that_most_epochs_use():
    config = of(optimizer={"lr": 2.0, "lr_batch_size": 1024})
    assert peak_lr(config, epoch_plan(config, 8)) == 2.0 * 3072 / 1024
    fixed = of(optimizer={"lr": 2.0})
    assert peak_lr(fixed, epoch_plan(fixed, 8)) == 2.0
