import math

import pytest
import torch
from composer.optim.scheduler import CosineAnnealingWithWarmupScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from recipes.config import OneCycleConfig
from recipes.schedule import constant, cosine, one_cycle, step_at

ONE_CYCLE = OneCycleConfig().model_dump(exclude={"name"})


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0.3, 10), (0.3, 1000), (0.25, 37), (0.5, 90), (0.05, 200), (0.9, 11), (0.3, 1)]
)
def test_one_cycle_is_torchs(anneal, warmup, total):
    options = ONE_CYCLE | {"warmup": warmup, "anneal": anneal}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    original = OneCycleLR(
        optimizer,
        max_lr=1.7,
        total_steps=total,
        pct_start=warmup,
        anneal_strategy=anneal,
        div_factor=options["div_factor"],
        final_div_factor=options["final_div_factor"],
        base_momentum=options["base_momentum"],
        max_momentum=options["max_momentum"],
    )
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


def test_one_cycle_of_one_step_is_finite():
    assert math.isfinite(one_cycle(0, 1, lr=1.0, **ONE_CYCLE).lr)


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


def test_constant_is_constant():
    assert {constant(step, 10, lr=0.3).lr for step in range(10)} == {0.3}


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
