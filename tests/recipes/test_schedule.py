from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from composer.core import Time, Timestamp
from composer.optim.scheduler import CosineAnnealingWithWarmupScheduler
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from data.errors import InputError
from recipes.config import CosineConfig, OneCycleConfig, StepConfig
from recipes.load import load_config
from recipes.schedule import cosine, epoch_plan, one_cycle, peak_lr, rate_function, step_at
from tests.support import ROOT


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0.3, 10), (0.3, 1000), (0.25, 37), (0.5, 90), (0.05, 200), (0.9, 11), (0.3, 1)]
)
def test_one_cycle_is_torchs(anneal, warmup, total):
    config = OneCycleConfig(warmup=warmup, anneal=anneal)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = config.model_dump(exclude={"name", "warmup", "anneal"})
    original = OneCycleLR(optimizer, 1.7, total, pct_start=warmup, anneal_strategy=anneal, **theirs)
    for step in range(total):
        rate = one_cycle(step, total, 1.7, config)
        assert rate.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-12)
        assert rate.momentum == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-12, abs=1e-12)
        optimizer.step()
        if step < total - 1:
            original.step()
    assert one_cycle(total, total, 1.7, config) == one_cycle(total - 1, total, 1.7, config)


@given(st.floats(0, 1), st.integers(2, 500), st.floats(0.01, 0.99))
def test_one_cycle_stays_within_its_bounds(fraction, total, warmup):
    rate = one_cycle(fraction * (total - 1), total, 1.0, OneCycleConfig(warmup=warmup))
    assert 1.0 / 25 / 1e4 * (1 - 1e-9) <= rate.lr <= 1.0 + 1e-12
    assert 0.85 - 1e-12 <= rate.momentum <= 0.95 + 1e-12


@pytest.mark.parametrize("warmup", [0.1, 0.25])
def test_one_cycle_without_a_step_to_rise_in_falls_evenly_from_the_top(warmup):
    # torch divides by zero where the rise ends at step 0 (warmup * total = 1)
    config = OneCycleConfig(warmup=warmup, anneal="linear", final_div_factor=1e12)
    rates = [one_cycle(step, 4, 3.0, config) for step in range(4)]
    assert [rate.lr for rate in rates] == pytest.approx([3.0, 2.0, 1.0, 0.0], abs=1e-9)
    assert [rate.momentum for rate in rates] == pytest.approx([0.85, 0.85 + 0.1 / 3, 0.85 + 0.2 / 3, 0.95])


@pytest.mark.parametrize(("warmup", "final"), [(0.1, 0.01), (0.25, 0.1), (0.0, 0.0)])
def test_cosine_is_composers(warmup, final):
    original = CosineAnnealingWithWarmupScheduler(t_warmup=f"{warmup}dur", alpha_f=final)
    config = CosineConfig(warmup=warmup, final_lr_ratio=final)
    for batch in range(200):
        state = SimpleNamespace(  # what Composer's schedulers read of its State
            max_duration=Time.from_timestring("40ep"),
            dataloader_len=Time.from_timestring("5ba"),
            timestamp=Timestamp(epoch=batch // 5, batch=batch, batch_in_epoch=batch % 5),
            get_elapsed_duration=lambda batch=batch: Time.from_timestring(f"{batch / 200}dur"),
        )
        assert cosine(batch, 200, 2.0, config).lr == pytest.approx(2.0 * original(state, 1.0), abs=1e-9)
    assert cosine(200, 200, 2.0, config).lr == pytest.approx(2.0 * final)
    assert cosine(200.5, 200, 2.0, config) == cosine(200, 200, 2.0, config)


def test_an_overlapping_cosine_is_timms_at_whole_epochs():
    config = CosineConfig(warmup=0.05, overlap=True, first_lr_ratio=0.0125, final_lr_ratio=1.25e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-3)
    original = CosineLRScheduler(optimizer, t_initial=100, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4)
    for epoch in range(100):
        original.step(epoch)
        assert cosine(epoch * 626, 100 * 626, 8e-3, config).lr == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("batches", [1, 7, 5005])
def test_steps_are_torchs(batches):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    original, rate = StepLR(optimizer, 30), rate_function(StepConfig(), 0.1)
    for epoch in range(90):
        for step in {epoch * batches, (epoch + 1) * batches - 1}:
            assert rate(step, 90 * batches) == (pytest.approx(optimizer.param_groups[0]["lr"]), None)
        optimizer.step()
        original.step()


@given(st.integers(1, 100), st.integers(1, 5000))
def test_with_one_batch_size_a_step_is_a_batch(epochs, batches):
    total = epochs * batches
    for epoch, batch in ((0, 0), (0, batches), (epochs - 1, batches - 1), (epochs - 1, batches)):
        assert step_at(epoch, batch, batches, epochs, total) == epoch * batches + batch


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_a_change_of_batch_size_never_makes_the_rate_jump(batches):
    total, epochs = sum(batches), len(batches)
    places = [(epoch, batch, count) for epoch, count in enumerate(batches) for batch in range(count)]
    steps = [step_at(epoch, batch, count, epochs, total) for epoch, batch, count in places]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] < total
    for epoch in range(1, epochs):
        # The end of an epoch and the start of the next are the same point of the schedule.
        end = step_at(epoch - 1, batches[epoch - 1], batches[epoch - 1], epochs, total)
        assert end == pytest.approx(step_at(epoch, 0, batches[epoch], epochs, total), rel=1e-12)


def of(*overrides):
    batches = "device_batch_size={128: 768, 224: 384, 288: 256}"
    return load_config(ROOT / "yamls" / "medium.yaml", [batches, *overrides])


def stages(plan):
    """(epochs, size, crop, global batch size) of each stretch of equal epochs."""
    return [(len(list(members)), *entry) for entry, members in groupby(plan)]


def test_the_stages_of_the_medium_recipe():
    wanted = [(10, 128, "random", 6144), (75, 224, "random", 3072), (5, 288, "center", 2048)]
    assert stages(epoch_plan(of("max_duration=90ep"), world_size=8)) == wanted


@given(st.integers(3, 600))
def test_every_length_has_the_same_stages_in_the_same_proportion(epochs):
    found = stages(epoch_plan(of(f"max_duration={epochs}ep"), world_size=1))
    lengths = {size: length for length, size, *_ in found}
    assert sum(lengths.values()) == epochs
    assert lengths[288] == pytest.approx(max(1, epochs * 5 / 90), abs=1)
    assert lengths.get(128, 0) == pytest.approx(epochs * 10 / 90, abs=1)
    assert [size for _, size, *_ in found] == sorted(lengths)


@pytest.mark.parametrize("override", ["progressive_resizing=off", "progressive_resizing.where=batch"])
def test_without_resizing_in_the_loader_every_epoch_is_the_same(override):
    plain = of("max_duration=4ep", "algorithms.fixres=off", f"algorithms.{override}")
    assert [tuple(entry) for entry in epoch_plan(plain, 2)] == [(224, "random", 768)] * 4


def test_a_global_batch_size_is_the_same_on_any_number_of_devices():
    config = of("device_batch_size=null", "global_batch_size={128: 1024, 224: 512}")
    assert epoch_plan(config, 1) == epoch_plan(config, 8)
    with pytest.raises(InputError, match="global_batch_size: 1024 images at 128 px are not divisible by 3 processes"):
        epoch_plan(config, 3)


def test_the_rate_scales_with_the_batch_size_that_most_epochs_use():
    for reference, lr in ((1024, 2.0 * 3072 / 1024), ("null", 2.0)):
        config = of("optimizer.lr=2.0", f"optimizer.lr_batch_size={reference}")
        assert peak_lr(config, epoch_plan(config, 8)) == lr
