import pytest
import torch
from composer.core import Event
from torch import nn

from algorithms.label_smoothing import LabelSmoothingConfig


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_the_loss_is_torchs_with_label_smoothing(state, logger, smoothing):
    algorithm = LabelSmoothingConfig(smoothing=smoothing).build()
    run = state(nn.Conv2d(3, 1, 1))
    labels = torch.tensor([0, 3, 1])
    run.batch, run.outputs = (torch.zeros(3, 3, 4, 4), labels), torch.randn(3, 4)
    algorithm.apply(Event.BEFORE_LOSS, run, logger)
    expected = nn.functional.cross_entropy(run.outputs, labels, label_smoothing=smoothing)
    torch.testing.assert_close(run.model.loss(run.outputs, run.batch), expected)
    algorithm.apply(Event.AFTER_LOSS, run, logger)
    assert torch.equal(run.batch[1], labels)
