import pytest
import torch
from composer.algorithms.label_smoothing import smooth_labels
from composer.core import Event
from torch import nn

from algorithms.config import LabelSmoothingConfig
from algorithms.label_smoothing import build
from algorithms.targets import soft_targets


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_the_loss_is_torchs_and_the_targets_are_composers(state, logger, smoothing):
    algorithm = build(LabelSmoothingConfig(smoothing=smoothing))
    run = state(nn.Conv2d(3, 1, 1))
    labels = torch.tensor([0, 3, 1])
    run.batch, run.outputs = (torch.zeros(3, 3, 4, 4), labels), torch.randn(3, 4)
    assert algorithm.match(Event.BEFORE_LOSS, run)
    algorithm.apply(Event.BEFORE_LOSS, run, logger)
    expected = nn.functional.cross_entropy(run.outputs, labels, label_smoothing=smoothing)
    torch.testing.assert_close(run.model.loss(run.outputs, run.batch), expected)
    torch.testing.assert_close(run.batch[1], smooth_labels(run.outputs, labels, smoothing))


def test_without_smoothing_targets_are_one_hot():
    labels = torch.tensor([2, 0, 2])
    assert torch.equal(soft_targets(labels, 3), nn.functional.one_hot(labels, 3).float())
