"""The curve, and the suggestions against independent statements of what fastai and torch-lr-finder publish."""

import bisect
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recipes.find_lr import CHOSEN, FEWEST, METHODS, Ramp, curve_of, end_of, minimum, smooth, suggestions

RAMP = Ramp(start_lr=1e-4, end_lr=10.0, steps=101, smoothing=0.9, divergence=4.0)
ANY = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


@given(ANY, st.floats(0, 0.99))
def test_the_average_is_the_weighted_mean_of_what_was_seen(losses, smoothing):
    for index, value in enumerate(smooth(losses, smoothing)):
        weights = [smoothing ** (index - k) for k in range(index + 1)]
        mean = math.fsum(w * x for w, x in zip(weights, losses, strict=False)) / math.fsum(weights)
        assert value == pytest.approx(mean, rel=1e-9)


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


def test_the_test_stops_at_the_first_step_whose_average_is_so_many_times_the_lowest():
    curve = measured(quadratic([30.0, 1.0, 0.1]), RAMP)
    assert curve.end == "diverged"
    assert curve.smoothed[-1] > 4 * curve.smoothed.min()
    assert all(curve.smoothed[:-1] <= 4 * np.minimum.accumulate(curve.smoothed)[:-1])
    assert len(curve.lrs) == len(curve.losses) == len(curve.smoothed) < RAMP.steps


LOSSES = st.lists(st.integers(1, 400).map(lambda n: n / 64), min_size=20, max_size=80).map(np.array)


def rates(losses):
    return np.geomspace(1e-5, 10, len(losses))


# fastai's definitions (fastai/callback/schedule.py), stated independently.


def fastai_valley(lrs, losses):
    """Longest strictly falling subsequences by patience sorting: piles of negated losses."""
    piles, lengths = [], []
    for loss in losses:
        place = bisect.bisect_left(piles, -loss)
        piles[place : place + 1] = [-loss]
        lengths.append(place + 1)
    end = lengths.index(max(lengths))
    start = end - max(lengths)
    third = (end - start) / 3
    return start + int(third) + int(third / 2)


def fastai_slide(lrs, losses, threshold):
    """Step left from the end while slopes 15 points apart differ; the last left point at which they did."""
    slopes = np.gradient(losses)
    right, answer = len(losses) - 1, len(losses) - 16
    while right - 15 >= 0 and abs(slopes[right] - slopes[right - 15]) > threshold:
        answer, right = right - 15, right - 1
    return answer, right - 15 >= 0


@given(LOSSES)
def test_valley_is_fastais(losses):
    lrs = rates(losses)
    falls = any(later < earlier for index, earlier in enumerate(losses) for later in losses[index:])
    expected = fastai_valley(lrs, losses)
    assert METHODS["valley"](lrs, losses) == (lrs[max(expected, 0)] if falls else None)


@given(LOSSES, st.floats(0.01, 100))
def test_the_window_is_fastais_slide_with_its_threshold_as_a_share_of_the_height(losses, height):
    assume(losses.argmin() > 0)
    lrs, losses = rates(losses), losses / np.ptp(losses) * height
    index, found = fastai_slide(lrs, losses / height, 0.005)
    slopes = np.gradient(losses / height)
    # A difference that is the threshold up to rounding may go either way.
    assume(not np.any(np.isclose(np.abs(slopes[15:] - slopes[:-15]), 0.005, rtol=1e-6)))
    assert METHODS["sliding window"](lrs, losses) == (lrs[index] if found else None)


@given(LOSSES)
def test_minimum_is_a_tenth_of_the_rate_with_the_lowest_loss(losses):
    lrs = rates(losses)
    index = min(range(len(losses)), key=lambda index: losses[index])
    assert minimum(lrs, losses) == (lrs[index] if index else None)
    assert METHODS["minimum/10"](lrs, losses) == (lrs[index] / 10 if index else None)


@given(LOSSES)
def test_steepest_is_torch_lr_finders(losses):
    lrs = rates(losses)
    # lr_finder.py: the index at which numpy's gradient of the losses is lowest, which is the slope in log lr but for a
    # factor where the ratios are equal.
    slopes = np.gradient(losses)
    assume(np.sum(np.isclose(slopes, slopes.min())) == 1)
    assert METHODS["steepest"](lrs, losses) == (lrs[slopes.argmin()] if slopes.min() < 0 else None)


# What must hold whatever the curve.


@given(LOSSES, st.integers(-12, 12).map(lambda n: 2.0**n), st.floats(1e-3, 1e3))
def test_the_unit_of_the_loss_does_not_matter_and_other_rates_scale_the_suggestion(losses, unit, factor):
    lrs = rates(losses)
    slopes = np.gradient(losses)
    assume(np.sum(np.isclose(slopes, slopes.min())) == 1)  # equal slopes may swap by rounding
    for method in METHODS.values():
        found = method(lrs, losses)
        assert method(lrs, losses * unit) == found
        assert method(lrs * factor, losses) == (None if found is None else pytest.approx(found * factor))


def falling(steps):
    """A descent with its steepest point in the middle, and a take-off at the end."""
    x = np.linspace(-6, 6, steps)
    return 2.3 - 1.5 / (1 + np.exp(-x)) + np.where(x > 4.5, (x - 4.5) ** 2, 0)


def curve(losses, seed=0):
    ramp = RAMP._replace(smoothing=0.0, steps=len(losses))
    return curve_of(losses, ramp, seed, "complete")


def test_too_few_points_or_a_loss_that_only_rises_suggest_nothing():
    for kept in (0, 3, FEWEST - 1):
        short = curve_of(falling(100)[: 10 + kept + 5], RAMP._replace(steps=100), 0, "diverged")
        assert suggestions([short], 100) == {}
    assert suggestions([curve(np.linspace(2, 3, 100))], 100) == {}


@pytest.mark.parametrize("curvature", [0.7, 8.0, 150.0])
def test_on_a_quadratic_the_published_suggestions_are_rates_that_converge(curvature):
    ramp = RAMP._replace(start_lr=1e-4 / curvature, end_lr=100 / curvature)
    found = suggestions([measured(quadratic([curvature, 0.3 * curvature, 0.1 * curvature]), ramp)], ramp.steps)
    assert list(found) == list(METHODS)
    assert all(1e-2 / curvature < found[name].geometric_mean < 2 / curvature for name in METHODS if name != CHOSEN)


def noisy_quadratic(curvature, seed):
    """SGD on 60 quadratics of up to that curvature, whose minima lie elsewhere for each batch."""
    rng = np.random.default_rng(seed)
    curvatures = curvature * np.repeat([1.0, 0.3, 0.1], 20)
    weights = np.ones(60)

    def loss_of_step(lr):
        nonlocal weights
        away = weights - 0.3 * rng.standard_normal(60)
        weights = weights - lr * curvatures * away
        return float((curvatures * away**2).mean() / 2)

    return loss_of_step


@pytest.mark.parametrize(("steps", "curvature"), [(60, 0.7), (100, 150.0), (400, 0.7)])
def test_with_noisy_gradients_the_proposed_rate_is_near_the_border_of_divergence(curvature, steps):
    """Above 2 / curvature nothing converges, and it is the same on a longer ramp."""
    ramp = RAMP._replace(start_lr=1e-4 / curvature, end_lr=100 / curvature, steps=steps, smoothing=1 - 5 / steps)
    curves = [measured(noisy_quadratic(curvature, seed), ramp) for seed in range(5)]
    proposed = suggestions(curves, steps)[CHOSEN]
    assert 1.2 / curvature < proposed.geometric_mean < 2.2 / curvature
    assert proposed.spread < 1.3
