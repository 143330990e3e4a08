import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.report import moving_mean, read_run, thin, throughput_curve


@pytest.fixture
def training(run_folder):
    return read_run(run_folder).training


def test_a_slow_stretch_shows(training):
    slow = training["time/train_seconds"].copy()
    slow[25:] += 10
    middles, rates, waits = throughput_curve(training | {"time/train_seconds": slow})
    assert middles[np.argmin(rates)] == pytest.approx(2.55)
    assert rates[np.argmin(rates)] == pytest.approx(32 / 10.5)
    assert waits[np.argmin(rates)] == pytest.approx(0.05 / 10.5)


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
