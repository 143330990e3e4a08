import pytest
import torch
from composer.algorithms import SWA
from tiny_run import Recorder, assert_equal

from algorithms import swa
from algorithms.config import SWAConfig


def test_the_mean_of_the_epochs_replaces_the_weights_as_with_composers(run):
    """Izmailov et al. 2018, algorithm 1: averages after epochs 1, 2 and 3 of 4, and replaces then.

    Algorithms run before callbacks, so the last entry is the mean already.
    """
    starts, ends, plain = Recorder("epoch_start"), Recorder("epoch_end"), Recorder("epoch_end")
    ours = run({"swa": {"start": 0.3, "end": 0.7}}, epochs=4, callbacks=(starts, ends)).fit()
    run({}, epochs=4, callbacks=(plain,)).fit()
    assert_equal(ends.values[1], plain.values[1])
    mean = torch.stack([weights["module.0.weight"] for weights in plain.values[:3]]).mean(0)
    torch.testing.assert_close(ends.values[2]["module.0.weight"], mean)
    assert_equal(starts.values[3], ends.values[2])
    assert_equal(ours, run([SWA(swa_start="1ep", swa_end="3ep")], epochs=4).fit())


@pytest.mark.parametrize(("epochs", "start", "end"), [(90, 63, 87), (16, 11, 15), (10, 7, 9), (4, 2, 3), (3, 1, 2)])
def test_an_epoch_is_always_left_for_batchnorm(epochs, start, end):
    algorithm = swa.build(SWAConfig(), epochs)
    assert (algorithm.swa_start.value, algorithm.swa_end.value) == (start, end)


def test_a_run_too_short_is_refused():
    for epochs in (1, 2):
        with pytest.raises(ValueError, match="at least 3 epochs"):
            swa.build(SWAConfig(), epochs)
