import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from recipes.load import load_config, load_table
from recipes.plan import PRICES, PricesConfig, Throughput, by_area, measured, published
from tests.support import ROOT


def p3(*overrides):
    return load_config(ROOT / "yamls" / "p3.yaml", overrides)


def test_published_throughput_with_the_techniques_factors():
    plain = published(p3("algorithms.blurpool=off"), "V100-16GB", 8)
    assert (plain.images_per_second_by_size, plain.factors) == ({224: 8322}, [])
    blurred = published(p3(), "V100-16GB", 8).images_per_second_by_size
    assert blurred == {224: pytest.approx(8322 * 911.91 / 1218.01, rel=1e-3)}
    nchw = published(p3("algorithms.channels_last=off"), "V100-16GB", 8)
    assert nchw.images_per_second_by_size[224] == pytest.approx(8322 * 698.61 / 1218.01, rel=2e-3)
    assert [factor["name"] for factor in nchw.factors] == ["no channels_last", "blurpool"]
    assert published(p3("precision=fp32"), "V100-16GB", 8).images_per_second_by_size == {224: 2855}
    assert published(p3(), "A10G", 4) is None
    assert published(p3(), "V100-16GB", 4) is None
    assert published(p3("model.name=resnet101"), "V100-16GB", 8) is None


def test_a_measurement_of_the_whole_recipe_includes_its_techniques():
    one = published(p3(), "H100", 1)
    assert (one.images_per_second_by_size, one.factors) == ({128: 7384, 224: 3187, 288: 1820}, [])
    eight = published(p3(), "H100", 8)
    assert eight.images_per_second_by_size[224] == pytest.approx(3187 * 16621 / 2470, rel=1e-4)
    assert [factor["name"] for factor in eight.factors] == ["8 devices instead of 1"]
    assert published(p3("algorithms.blurpool=off"), "H100", 1).images_per_second_by_size[224] == pytest.approx(
        3187 / 0.749
    )
    assert published(p3("precision=auto"), "H100", 1) == one
    assert published(p3(), "H100", 4) is None


@given(st.integers(32, 512), st.integers(32, 512), st.floats(1, 1e5), st.floats(0.3, 3))
def test_more_pixels_never_go_faster(one, other, rate, cost):
    small, large = sorted((one, other))
    known = Throughput({224: rate}, "given")
    assert known.rate(large, cost, by_area) <= known.rate(small, cost, by_area)


def line(samples, size, rate, **more):
    figures = {"train/image_size": size, "train/images_per_second": rate}
    return {"batch": samples, "epoch": 0.0, "samples": samples, **figures, **more}


def test_measured_rates_are_images_over_seconds(tmp_path):
    # 100 images in 1 s and 300 in 6 s at 128 px; 100 in 4 s at 224 px. The first figures of a size do not count.
    entries = [
        line(10, 128, 5.0),
        line(110, 128, 100.0),
        {"batch": 110, "epoch": 0.1, "eval/224/top1": 0.5},
        line(410, 128, 50.0),
    ]
    entries += [line(500, 224, 1.0), line(600, 224, 25.0), line(600, 224, 25.0)]
    found = measured(write_run(tmp_path / "run", entries))
    assert found.images_per_second_by_size == {128: pytest.approx(400 / 7), 224: pytest.approx(25)}
    assert (found.evaluation_seconds, found.checkpoint_seconds) == (None, None)


def write_run(folder, entries):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.mark.parametrize("entries", [[], [line(10, 32, 3.0)], [{"batch": 1, "epoch": 1.0, "eval/32/top1": 0.1}]])
def test_a_run_without_figures_is_refused_in_one_line(entries, tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: too few values of train/images_per_second; allowed: "):
        measured(write_run(tmp_path / "run", entries))
    with pytest.raises(InputError, match=r"nothing/metrics\.jsonl: cannot be read: no such file; allowed: the folder"):
        measured(tmp_path / "nothing")


def test_every_price_and_throughput_names_its_source():
    prices = load_table(PRICES, PricesConfig)
    assert prices.machines["p3.16xlarge"].on_demand.usd_per_hour == 24.48
    assert prices.machines["g5.12xlarge"].on_demand.usd_per_hour == 5.672
    found = [price for machine in prices.machines.values() for price in (machine.on_demand, machine.spot) if price]
    assert all(price.source and price.date for price in found)
