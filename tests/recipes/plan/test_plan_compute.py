import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models import resnet50

from data.sampler import PositionSampler
from recipes.load import load_config
from recipes.plan import Images, by_area, by_flops, flops, make_plan, network_size, schedule_of
from recipes.schedule import epoch_plan, peak_lr, rate_function
from recipes.trainer import Schedule
from tests.support import ROOT

IMAGENET = 1_281_167
P3, MOSAIC = (ROOT / "yamls" / f"{name}.yaml" for name in ("p3", "mosaic-medium"))


def plan_of(path, devices, *overrides, train=IMAGENET):
    config = load_config(path, overrides)
    return config, make_plan(config, Images(train, 50_000, "test"), devices)


def test_mosaics_schedule_saves_two_thirds_by_size_and_gives_some_back_for_sam():
    config, plan = plan_of(MOSAIC, 8)
    sizes = [network_size(config, epoch, 176) for epoch in range(90)]
    # Progress counts whole epochs: half scale until epoch 36 of 90 and while it still rounds to 88, all of it from 72.
    assert sizes[:37] == [88] * 37
    assert sizes[37] == 92
    assert sizes[72:] == [176] * 18
    by_size = 1 - sum((size / 224) ** 2 for size in sizes) / 90
    assert plan["saving_by_size_alone"] == pytest.approx(by_size)
    assert 0.66 < by_size < 0.68
    # Two passes in every tenth step.
    assert plan["saving_against_224px"] == pytest.approx(1 - 1.1 * (1 - by_size))
    assert plan["saving_against_train_size"] == pytest.approx(1 - 1.1 * sum((size / 176) ** 2 for size in sizes) / 90)


@pytest.mark.parametrize(("path", "devices"), [(P3, 8), (MOSAIC, 4), (ROOT / "yamls" / "demo.yaml", 1)])
def test_rates_are_those_the_trainer_sets(path, devices):
    config, samples = load_config(path), 20_011
    plan = epoch_plan(config, devices)
    sampler = PositionSampler(samples, plan, 0, 0, devices)
    batches = [sampler.batches(epoch) for epoch in range(config.epochs)]
    callback = Schedule(rate_function(config.scheduler, peak_lr(config, plan)), batches)
    steps, rate_at = schedule_of(config, plan, samples)
    assert steps == batches
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0, momentum=0.123)

    class State:
        optimizers = (optimizer,)

    for stage in plan_of(path, devices, train=samples)[1]["stages"]:
        first = stage["first_epoch"]
        end = first + stage["epochs"] - 1
        for epoch, batch, rate in ((first, 0, stage["first"]), (end, batches[end] - 1, stage["last"])):
            State.timestamp = type("Stamp", (), {"epoch": epoch, "batch_in_epoch": batch})
            callback.batch_start(State, None)
            (group,) = optimizer.param_groups
            assert group["lr"] == rate["lr"] == rate_at(epoch, batch).lr
            assert rate["momentum"] in (None, group["momentum"])


@given(
    st.integers(1, 60),
    st.sampled_from([96, 128, 160]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.sampled_from(["loader", "batch"]),
)
def test_stages_cover_the_run_and_sum_to_its_compute(epochs, size, delay, finetune, where):
    keys = {"where": where, "initial_scale": 0.5, "delay_fraction": delay, "finetune_fraction": finetune}
    words = [f"algorithms.progressive_resizing.{key}={value}" for key, value in keys.items()]
    words += [f"max_duration={epochs}ep", f"data.train_size={size}", "algorithms.fixres=off"]
    config, plan = plan_of(P3, 8, *words)
    stages, epochs_of = plan["stages"], epoch_plan(config, 8)
    lengths = [stage["epochs"] for stage in stages]
    assert [stage["first_epoch"] for stage in stages] == [sum(lengths[:index]) for index in range(len(stages))]
    assert sum(lengths) == epochs
    steps = sum(-(-IMAGENET // entry.global_batch_size) for entry in epochs_of)
    assert sum(stage["steps"] for stage in stages) == steps
    each = [by_area(network_size(config, epoch, entry.size)) for epoch, entry in enumerate(epochs_of)]
    assert plan["epochs_at_224px"] == pytest.approx(sum(each))
    assert plan["saving_against_train_size"] >= -1e-12, "small images cost no more than large ones"


def test_flops_count_what_area_does_not():
    with torch.device("meta"):
        network = resnet50()
    # 4.09 G multiply-adds (torchvision, models/resnet.py, ResNet50_Weights: _ops 4.089).
    assert flops(network, 224) / 2 == pytest.approx(4.089e9, rel=0.01)
    work = by_flops(network)
    assert work(448) == pytest.approx(4, rel=0.01)
    assert work(88) > 1.08 * (88 / 224) ** 2, "11 px of 5.5, 3 px of 2.75"
