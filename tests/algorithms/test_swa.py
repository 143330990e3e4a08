import pytest
import torch
from composer import Callback
from composer.algorithms import SWA
from tiny_run import assert_equal

from algorithms import swa
from algorithms.config import SWAConfig

LATE = {"swa": {"start": 0.3, "end": 0.7}}  # of 4 epochs: averages after epochs 1, 2 and 3, and replaces then


class Weights(Callback):
    def __init__(self):
        self.at_end, self.at_start = [], []

    def epoch_end(self, state, logger):
        self.at_end.append(state.model.state_dict()["module.0.weight"].clone())

    def epoch_start(self, state, logger):
        self.at_start.append(state.model.state_dict()["module.0.weight"].clone())


def test_the_mean_of_the_epochs_replaces_the_weights(run):
    """Izmailov et al. 2018, algorithm 1. Algorithms run before callbacks, so the last entry is the mean already."""
    watch, plain = Weights(), Weights()
    run(LATE, epochs=4, callbacks=(watch,)).fit()
    run({}, epochs=4, callbacks=(plain,)).fit()
    assert torch.equal(watch.at_end[1], plain.at_end[1])
    torch.testing.assert_close(watch.at_end[2], torch.stack(plain.at_end[:3]).mean(0))
    assert torch.equal(watch.at_start[3], watch.at_end[2])


def test_a_run_equals_composers(run):
    ours = run([swa.build(SWAConfig(start=0.3, end=0.7), epochs=4)], epochs=4).fit()
    assert_equal(ours, run([SWA(swa_start="1ep", swa_end="3ep")], epochs=4).fit())


@pytest.mark.parametrize(("epochs", "start", "end"), [(90, 63, 87), (16, 11, 15), (10, 7, 9), (4, 2, 3), (3, 1, 2)])
def test_an_epoch_is_always_left_for_batchnorm(epochs, start, end):
    algorithm = swa.build(SWAConfig(), epochs)
    assert (algorithm.swa_start.value, algorithm.swa_end.value) == (start, end)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_too_short_is_refused(epochs):
    with pytest.raises(ValueError, match="at least 3 epochs"):
        swa.build(SWAConfig(), epochs)
