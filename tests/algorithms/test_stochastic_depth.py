import pytest
import torch
import torchvision
from composer.core import Event
from composer.loggers import Logger
from tiny_run import bottlenecks
from torchvision.models.resnet import Bottleneck

from algorithms.build import build_algorithms
from algorithms.config import AlgorithmsConfig


def blocks(network):
    return [module for module in network.modules() if isinstance(module, Bottleneck)]


@pytest.mark.parametrize("method", ["block", "sample"])
def test_the_default_layer_name_fits_torchvisions_resnet50(state, method):
    network = torchvision.models.resnet50()
    made = state(network)
    (algorithm,) = build_algorithms(AlgorithmsConfig(stochastic_depth={"stochastic_method": method}), 15, 3)
    algorithm.apply(Event.INIT, made, Logger(made))
    # Huang et al. 2016, section 3: linear in the depth, up to the last of 16 blocks.
    rates = [block.drop_rate.item() for block in blocks(network)]
    torch.testing.assert_close(rates, [0.2 * (index + 1) / 16 for index in range(16)])


def test_a_block_that_is_dropped_is_the_identity(run):
    item = run({"stochastic_depth": {"drop_rate": 1.0, "drop_distribution": "uniform"}}, network=bottlenecks)
    plain, shortcut, _ = (block.train() for block in blocks(item.trainer.state.model))
    pictures = torch.rand(2, 16, 4, 4)
    assert torch.equal(plain(pictures), pictures)
    torch.testing.assert_close(shortcut(pictures), torch.relu(shortcut.downsample(pictures)))


def test_the_warm_up_ends_at_the_full_rate(run):
    item = run({"stochastic_depth": {"drop_rate": 0.6, "drop_warmup": 0.5}}, network=bottlenecks)
    item.fit()
    rates = [block.drop_rate.item() for block in blocks(item.trainer.state.model)]
    assert rates == pytest.approx([0.2, 0.4, 0.6])
