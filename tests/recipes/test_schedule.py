from itertools import groupby

import pytest
import torch
from composer.optim.scheduler import CosineAnnealingWithWarmupScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from recipes.config import OneCycleConfig, RunConfig
from recipes.errors import InputError
from recipes.schedule import cosine, epoch_plan, one_cycle, peak_lr, step_at

ONE_CYCLE = OneCycleConfig().model_dump(exclude={"name"})


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0.3, 10), (0.3, 1000), (0.25, 37), (0.5, 90), (0.05, 200), (0.9, 11), (0.3, 1)]
)
def test_one_cycle_is_torchs(anneal, warmup, total):
    options = ONE_CYCLE | {"warmup": warmup, "anneal": anneal}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = {name: value for name, value in options.items() if name not in ("warmup", "anneal")}
    original = OneCycleLR(optimizer, 1.7, total, pct_start=warmup, anneal_strategy=anneal, **theirs)
    for step in range(total):
        rate = one_cycle(step, total, lr=1.7, **options)
        assert rate.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-12)
        assert rate.momentum == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-12, abs=1e-12)
        optimizer.step()
        if step < total - 1:
            original.step()


@given(st.floats(0, 1), st.integers(2, 500), st.floats(0.01, 0.99))
def test_one_cycle_stays_within_its_bounds(fraction, total, warmup):
    rate = one_cycle(fraction * (total - 1), total, lr=1.0, **(ONE_CYCLE | {"warmup": warmup}))
    assert 1.0 / 25 / 1e4 * (1 - 1e-9) <= rate.lr <= 1.0 + 1e-12
    assert 0.85 - 1e-12 <= rate.momentum <= 0.95 + 1e-12


@pytest.mark.parametrize("warmup", [0.1, 0.25])
def test_one_cycle_without_a_step_to_rise_in_falls_evenly_from_the_top(warmup):
    # torch divides by zero where the rise ends at step 0 (warmup * total = 1)
    options = ONE_CYCLE | {"warmup": warmup, "anneal": "linear", "final_div_factor": 1e12}
    rates = [one_cycle(step, 4, lr=3.0, **options) for step in range(4)]
    assert [rate.lr for rate in rates] == pytest.approx([3.0, 2.0, 1.0, 0.0], abs=1e-9)
    assert [rate.momentum for rate in rates] == pytest.approx([0.85, 0.85 + 0.1 / 3, 0.85 + 0.2 / 3, 0.95])


@pytest.mark.parametrize("total", [1, 2, 10])
def test_past_the_last_step_a_rate_stays_where_it_ended(total):
    for anneal in ("cos", "linear"):
        options = ONE_CYCLE | {"anneal": anneal}
        assert one_cycle(total, total, lr=1.0, **options) == one_cycle(total - 1, total, lr=1.0, **options)
    end = cosine(total, total, lr=1.0, warmup=0.1, final_lr_ratio=0.01)
    assert end.lr == pytest.approx(0.01)
    assert cosine(total + 0.5, total, lr=1.0, warmup=0.1, final_lr_ratio=0.01) == end


@pytest.mark.parametrize(("warmup", "final"), [(0.1, 0.0), (0.25, 0.1), (0.0, 0.0)])
def test_cosine_is_composers(warmup, final):
    from composer.core import Time, Timestamp

    class Clock:
        """What Composer's schedulers read of its State."""

        max_duration = Time.from_timestring("40ep")
        timestamp = Timestamp()
        dataloader_len = Time.from_timestring("5ba")

        def __init__(self, batch):
            self.timestamp = Timestamp(epoch=batch // 5, batch=batch, batch_in_epoch=batch % 5)

        def get_elapsed_duration(self):
            return Time.from_timestring(f"{self.timestamp.batch.value / 200}dur")

    original = CosineAnnealingWithWarmupScheduler(t_warmup=f"{warmup}dur", alpha_f=final)
    for batch in range(0, 200):
        ours = cosine(batch, 200, lr=2.0, warmup=warmup, final_lr_ratio=final).lr
        assert ours == pytest.approx(2.0 * original(Clock(batch), 1.0), abs=1e-9)


@given(st.integers(1, 100), st.integers(1, 5000))
def test_with_one_batch_size_a_step_is_a_batch(epochs, batches):
    total = epochs * batches
    for epoch, batch in ((0, 0), (0, batches), (epochs - 1, batches - 1), (epochs - 1, batches)):
        assert step_at(epoch, batch, batches, epochs, total) == epoch * batches + batch


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_a_change_of_batch_size_never_makes_the_rate_jump(batches):
    total, epochs = sum(batches), len(batches)
    steps = [
        step_at(epoch, batch, batches[epoch], epochs, total)
        for epoch in range(epochs)
        for batch in range(batches[epoch])
    ]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] < total
    for epoch in range(1, epochs):
        # The end of an epoch and the start of the next are the same point of the schedule.
        end = step_at(epoch - 1, batches[epoch - 1], batches[epoch - 1], epochs, total)
        assert end == pytest.approx(step_at(epoch, 0, batches[epoch], epochs, total), rel=1e-12)


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
    with pytest.raises(InputError, match="global_batch_size: 1024 images at 128 px are not divisible by 3 processes"):
        epoch_plan(config, 3)


def test_the_rate_scales_with_the_batch_size_that_most_epochs_use():
    config = of(optimizer={"lr": 2.0, "lr_batch_size": 1024})
    assert peak_lr(config, epoch_plan(config, 8)) == 2.0 * 3072 / 1024
    fixed = of(optimizer={"lr": 2.0})
    assert peak_lr(fixed, epoch_plan(fixed, 8)) == 2.0
