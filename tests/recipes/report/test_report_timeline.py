import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.report import POINTS, moving_mean, read_run, resumes, stages, thin, throughput_curve


@pytest.fixture
def training(run_folder):
    return read_run(run_folder).training


def test_stages_with_their_throughput(training):
    first, second = stages(training)
    assert (first.first, first.last, first.size, first.batch_size) == (0.0, 2.0, 24, 32)
    assert (second.first, second.last, second.size) == (2.0, 4.0, 32)
    for stage in (first, second):
        assert stage.images_per_second == pytest.approx(64)
        assert stage.wait_fraction == pytest.approx(0.1)


def test_a_stage_begins_with_its_epoch_and_not_with_its_first_figure(training):
    sparse = {name: column[[0, 4, 19, 24, 39]] for name, column in training.items()}
    assert [(stage.first, stage.last) for stage in stages(sparse)] == [(0.0, 2.0), (2.0, 4.0)]
    within = training | {"train/image_size": np.where(training["batch"] <= 15, 24.0, 32.0)}
    assert [(stage.first, stage.last) for stage in stages(within)] == [(0.0, 1.5), (1.5, 4.0)]


def test_a_slow_stretch_shows(training):
    slow = training["time/train_seconds"].copy()
    slow[25:] += 10
    middles, rates, waits = throughput_curve(training | {"time/train_seconds": slow})
    assert middles[np.argmin(rates)] == pytest.approx(2.55)
    assert rates[np.argmin(rates)] == pytest.approx(32 / 10.5)
    assert waits[np.argmin(rates)] == pytest.approx(0.05 / 10.5)


def test_resumes_by_the_names_of_checkpoints(training):
    names = ["runs/ep900-ba900000/ep001-ba000015.pt", "elsewhere", "s3://b/p/ep002-ba000020.pt", "ep009-ba000090.pt"]
    first, second, unknown = resumes(names, training)
    assert (first.batch, first.epoch, first.source) == (15, 1.5, names[0])
    assert (second.batch, second.epoch) == (20, 2.0)
    assert unknown.batch == 90
    assert np.isnan(unknown.epoch)


def test_nothing_yet():
    nothing = {name: np.empty(0) for name in ("batch", "epoch", "train/image_size", "samples")}
    assert stages(nothing) == []
    assert [len(column) for column in throughput_curve(nothing)] == [0, 0, 0]
    assert np.isnan(resumes(["ep001-ba000015"], nothing)[0].epoch)
    assert len(moving_mean(np.empty(0))) == 0


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300), st.integers(1, 50))
def test_thinning_keeps_the_mean_and_the_range(values, points):
    y = np.array(values)
    x, means = thin(np.arange(len(y), dtype=float), y, points)
    assert len(x) == len(means) <= max(points, 1)
    assert (np.diff(x) > 0).all()
    finite = y[np.isfinite(y)]
    assert np.isfinite(means).any() == bool(len(finite))
    for curve in (means, moving_mean(y)):
        assert len(finite) == 0 or np.nanmin(curve) >= finite.min() - 1e-6
        assert len(finite) == 0 or np.nanmax(curve) <= finite.max() + 1e-6


def test_half_a_million_figures_become_as_many_points_as_a_screen_shows():
    x = np.linspace(0, 90, 450_000)
    thin_x, thin_y = thin(x, 3 * x)
    assert len(thin_x) <= POINTS
    np.testing.assert_allclose(thin_y, 3 * thin_x)


@pytest.mark.parametrize("points", [0, 1, 49, 50, 300])
def test_short_curves_are_their_own_moving_mean(points):
    y = np.random.default_rng(points).normal(size=points)
    assert (points < 50) == np.array_equal(moving_mean(y), y)
