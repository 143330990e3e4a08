import pytest
import torch
from composer.algorithms.progressive_resizing import resize_batch
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import PositionSampler
from recipes.load import load_config
from recipes.plan.compute import (
    by_area,
    equivalents,
    evaluation_equivalents,
    evaluation_of,
    network_size,
    plan_stages,
    saving,
    schedule_of,
)
from recipes.schedule import epoch_plan, peak_lr, rate_function
from recipes.trainer import Schedule
from tests.support import ROOT

IMAGENET = 1_281_167
P3, MOSAIC = (ROOT / "yamls" / f"{name}.yaml" for name in ("p3", "mosaic-medium"))


def stages_of(path, devices, *overrides):
    config = load_config(path, overrides)
    return config, plan_stages(config, IMAGENET, devices)


def test_the_recipes_stages_by_hand():
    _, stages = stages_of(P3, 8)
    assert [(s.first_epoch, s.epochs, s.size, s.loader_size, s.global_batch_size, s.cost) for s in stages] == [
        (0, 10, 128, 128, 6144, 1.0),
        (10, 75, 224, 224, 2048, 1.0),
        (85, 5, 288, 288, 2048, 1.0),
    ]
    # ceil(1281167 / 6144) = 209, ceil(1281167 / 2048) = 626
    assert [stage.steps for stage in stages] == [2090, 46950, 3130]
    assert [stage.crop for stage in stages] == ["random", "random", "center"]
    assert stages[0].first == (pytest.approx(2.0 / 25), pytest.approx(0.95))
    assert stages[-1].last.lr == pytest.approx(2.0 / 25 / 1e4, rel=1e-3)


def test_the_recipes_schedule_saves_a_few_percent():
    _, stages = stages_of(P3, 8)
    by_hand = (10 * (128 / 224) ** 2 + 75 + 5 * (288 / 224) ** 2) / 90
    assert saving(stages, by_area) == pytest.approx(1 - by_hand)
    assert saving(stages, by_area) == pytest.approx(0.0386, abs=1e-4)


def test_mosaics_schedule_saves_two_thirds_by_size_and_gives_some_back_for_sam():
    config, stages = stages_of(MOSAIC, 8)
    sizes = [network_size(config, epoch, 176) for epoch in range(90)]
    # Progress counts whole epochs: half scale until epoch 36 of 90 and while it still rounds to 88, all of it from 72.
    assert sizes[:37] == [88] * 37
    assert sizes[37] == 92
    assert sizes[72:] == [176] * 18
    by_size = 1 - sum((size / 224) ** 2 for size in sizes) / 90
    assert saving([stage._replace(cost=1.0) for stage in stages], by_area) == pytest.approx(by_size)
    assert 0.66 < by_size < 0.68
    # Two passes in every tenth step.
    assert saving(stages, by_area) == pytest.approx(1 - 1.1 * (1 - by_size))
    assert saving(stages, by_area, 176) == pytest.approx(1 - 1.1 * sum((size / 176) ** 2 for size in sizes) / 90)


def test_a_plain_run_is_its_epochs_and_sam_doubles_it():
    off = ("algorithms.progressive_resizing=off", "algorithms.fixres=off")
    config, (stage,) = stages_of(P3, 8, *off, "max_duration=30ep")
    assert equivalents(stage, by_area) == pytest.approx(30)
    assert saving([stage], by_area) == pytest.approx(0)
    _, (doubled,) = stages_of(P3, 8, *off, "max_duration=30ep", "algorithms.sam=on")
    assert equivalents(doubled, by_area) == pytest.approx(60)
    _, (again,) = stages_of(P3, 8, *off, "max_duration=30ep", "model.activation_checkpointing=true")
    assert equivalents(again, by_area) == pytest.approx(40)
    assert config.epochs == 30


def test_fixres_on_the_classifier_has_no_backward_pass():
    _, stages = stages_of(P3, 8, "algorithms.fixres.train=classifier")
    assert [stage.cost for stage in stages] == [1.0, 1.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize("mode", ["resize", "crop"])
def test_the_network_sees_what_composers_class_makes(mode):
    config = load_config(MOSAIC, [f"algorithms.progressive_resizing.mode={mode}", "data.train_size=180"])
    images, labels = torch.zeros(2, 3, 180, 180), torch.zeros(2, dtype=torch.int64)
    resizing = config.algorithms.progressive_resizing
    for epoch in range(config.epochs - 18):
        # What ProgressiveResizing.apply does; test_progressive_resizing.py holds size_at equal to its sizes.
        scale = resizing.size_at(epoch / 90, 180) / 180
        scaled, _ = resize_batch(images, labels, scale, mode=mode)
        assert network_size(config, epoch, 180) == scaled.shape[-1]


@pytest.mark.parametrize(("path", "devices"), [(P3, 8), (MOSAIC, 4), (ROOT / "yamls" / "demo.yaml", 1)])
def test_rates_are_those_the_trainer_sets(path, devices):
    config, samples = load_config(path), 20_011
    plan = epoch_plan(config, devices)
    sampler = PositionSampler(samples, plan, 0, 0, devices)
    batches = [sampler.batches(epoch) for epoch in range(config.epochs)]
    callback = Schedule(rate_function(config.scheduler, peak_lr(config, plan)), batches)
    told = schedule_of(config, plan, samples)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0, momentum=0.123)

    class State:
        optimizers = (optimizer,)

    for stage in plan_stages(config, samples, devices):
        end = stage.first_epoch + stage.epochs - 1
        for epoch, batch, rate in ((stage.first_epoch, 0, stage.first), (end, batches[end] - 1, stage.last)):
            State.timestamp = type("Stamp", (), {"epoch": epoch, "batch_in_epoch": batch})
            callback.batch_start(State, None)
            (group,) = optimizer.param_groups
            assert group["lr"] == rate.lr == told(epoch, batch).lr
            assert rate.momentum in (None, group["momentum"])


@given(
    st.integers(1, 60),
    st.sampled_from([96, 128, 160]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.sampled_from(["loader", "batch"]),
)
def test_stages_cover_the_run_and_sum_to_its_compute(epochs, size, delay, finetune, where):
    keys = {"where": where, "initial_scale": 0.5, "delay_fraction": delay, "finetune_fraction": finetune}
    config, stages = stages_of(
        P3,
        8,
        f"max_duration={epochs}ep",
        f"data.train_size={size}",
        "algorithms.fixres=off",
        *(f"algorithms.progressive_resizing.{key}={value}" for key, value in keys.items()),
    )
    assert [stage.first_epoch for stage in stages] == [
        sum(stage.epochs for stage in stages[:index]) for index in range(len(stages))
    ]
    assert sum(stage.epochs for stage in stages) == epochs
    batches = [-(-IMAGENET // entry.global_batch_size) for entry in epoch_plan(config, 8)]
    assert sum(stage.steps for stage in stages) == sum(batches)
    total = sum(equivalents(stage, by_area) for stage in stages)
    each = [by_area(network_size(config, e, entry.size)) for e, entry in enumerate(epoch_plan(config, 8))]
    assert total == pytest.approx(sum(each))
    assert saving(stages, by_area, size) >= -1e-12, "small images cost no more than large ones"


@pytest.mark.parametrize(("epochs", "interval", "times"), [(90, 1, 90), (12, 3, 4), (10, 3, 4), (2, 5, 1)])
def test_evaluations_by_hand(epochs, interval, times):
    config = load_config(P3, [f"max_duration={epochs}ep", f"eval.interval={interval}", "eval.sizes=[224, 448]"])
    evaluation = evaluation_of(config, 50_000)
    assert evaluation == (times, (224, 448), 50_000)
    # A forward pass is a third of a step; 448 px is four times 224 px.
    assert evaluation_equivalents(evaluation, 100_000, by_area) == pytest.approx(times * 0.5 / 3 * (1 + 4))
