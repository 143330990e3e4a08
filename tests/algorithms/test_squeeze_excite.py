import pytest
import torch
import torchvision
from composer.algorithms import SqueezeExcite2d, SqueezeExciteConv2d
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Event

from algorithms.config import SqueezeExciteConfig
from algorithms.squeeze_excite import build


def test_wide_convolutions_get_a_block(state, logger):
    network = torchvision.models.resnet50()
    convolutions = {name: item for name, item in network.named_modules() if isinstance(item, torch.nn.Conv2d)}
    wide = [name for name, item in convolutions.items() if min(item.in_channels, item.out_channels) >= 512]
    build(SqueezeExciteConfig(min_channels=512)).apply(Event.INIT, state(network), logger)
    assert [name for name, item in network.named_modules() if isinstance(item, SqueezeExciteConv2d)] == wide != []


def test_a_block_scales_each_channel_as_in_the_paper():
    """Hu et al. 2018, equations 2 to 4: squeeze by the mean, excite by two layers, scale by a sigmoid."""
    block, pictures = SqueezeExcite2d(8, 0.5), torch.randn(2, 8, 5, 5)
    first, second = (layer.weight for layer in block.pool_and_mlp if isinstance(layer, torch.nn.Linear))
    assert first.shape == (4, 8)
    scales = torch.sigmoid(torch.relu(pictures.mean((2, 3)) @ first.T) @ second.T)
    torch.testing.assert_close(block(pictures), pictures * scales[:, :, None, None])


def test_no_effect_is_reported(run):
    with pytest.warns(NoEffectWarning, match="no convolution has 128 channels"):
        run({"squeeze_excite": {}})
