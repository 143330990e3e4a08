import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.find_lr.curve import Ramp, curve_of, end_of, smooth

RAMP = Ramp(start_lr=1e-4, end_lr=10.0, steps=101, smoothing=0.9, divergence=4.0)
LOSSES = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


def test_the_ramp_has_equal_ratios_and_both_ends():
    lrs = RAMP.lrs()
    assert len(lrs) == 101
    assert (lrs[0], lrs[-1]) == (pytest.approx(1e-4), pytest.approx(10.0))
    np.testing.assert_allclose(lrs[1:] / lrs[:-1], 10 ** (5 / 100))


@settings(deadline=None)
@given(LOSSES, st.floats(0, 0.99))
def test_the_average_is_the_weighted_mean_of_what_was_seen(losses, smoothing):
    for index, value in enumerate(smooth(losses, smoothing)):
        weights = [smoothing ** (index - k) for k in range(index + 1)]
        mean = math.fsum(w * x for w, x in zip(weights, losses, strict=False)) / math.fsum(weights)
        assert value == pytest.approx(mean, rel=1e-9)


@settings(deadline=None)
@given(st.floats(0.01, 100), st.integers(1, 50), st.floats(0, 0.99))
def test_a_constant_loss_is_its_own_average_from_the_first_step_on(loss, count, smoothing):
    np.testing.assert_allclose(smooth([loss] * count, smoothing), loss, rtol=1e-9)


def test_without_smoothing_the_average_is_the_loss():
    np.testing.assert_array_equal(smooth([3.0, 1.0, 2.0], 0.0), [3.0, 1.0, 2.0])


def measured(loss_of_step, ramp):
    """The test of a toy whose `loss_of_step(lr)` gives the loss and then makes the step."""
    losses, end = [], None
    for lr in ramp.lrs():
        losses.append(loss_of_step(lr))
        end = end_of(losses, ramp)
        if end is not None:
            break
    return curve_of(losses, ramp, 0, end)


def quadratic(curvatures):
    """Gradient descent on sum(c * w**2) / 2, which falls along every axis below the rate 2 / max(c)."""
    curvatures = np.asarray(curvatures, dtype=float)
    weights = np.ones_like(curvatures)

    def loss_of_step(lr):
        nonlocal weights
        loss = float((curvatures * weights**2).sum() / 2)
        weights = weights - lr * curvatures * weights
        return loss

    return loss_of_step


@pytest.mark.parametrize("curvature", [0.7, 8.0, 150.0])
def test_on_a_quadratic_the_raw_loss_is_lowest_where_the_rate_passes_2_over_the_curvature(curvature):
    curve = measured(quadratic([curvature]), RAMP._replace(smoothing=0.0, start_lr=1e-4))
    first_above = int(np.argmax(RAMP.lrs() > 2 / curvature))
    assert curve.losses.argmin() == first_above
    assert curve.end == "diverged"
    assert len(curve.lrs) < first_above + 12


def test_the_test_stops_at_the_first_step_whose_average_is_so_many_times_the_lowest():
    curve = measured(quadratic([30.0, 1.0, 0.1]), RAMP)
    assert curve.end == "diverged"
    assert curve.smoothed[-1] > 4 * curve.smoothed.min()
    assert all(curve.smoothed[:-1] <= 4 * np.minimum.accumulate(curve.smoothed)[:-1])
    assert len(curve.lrs) == len(curve.losses) == len(curve.smoothed) < RAMP.steps


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_no_number_ends_the_test(bad):
    assert end_of([2.0, 1.0, bad], RAMP) == "not finite"


def test_a_calm_loss_reaches_the_end():
    curve = measured(lambda lr: 1.0, RAMP)
    assert (curve.end, len(curve.lrs)) == ("complete", RAMP.steps)


@settings(deadline=None)
@given(LOSSES, st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(losses, unit):
    assert end_of(losses, RAMP) == end_of([unit * loss for loss in losses], RAMP)
