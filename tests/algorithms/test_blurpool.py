import copy
from importlib.util import find_spec

import pytest
import timm
import torch
import torchvision
from composer.algorithms.blurpool import BlurConv2d, BlurMaxPool2d, apply_blurpool
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Event
from tiny_run import bottlenecks, convnet
from torch import nn

from algorithms import blurpool
from algorithms.config import BlurPoolConfig

ZERO = {"timm": "constant", "antialiased_cnns": "zero"}
"""What the original layers call zero padding."""
ORIGINALS = ["timm", *(["antialiased_cnns"] if find_spec("antialiased_cnns") else [])]
"""timm's layer, and the paper's own package where it is installed: its licence keeps it out of our requirements."""


def original(name, channels, stride, padding=ZERO):
    """The 3x3 blur of another implementation."""
    if name == "timm":
        return timm.layers.BlurPool2d(channels, filt_size=3, stride=stride, pad_mode=padding[name])
    import antialiased_cnns

    return antialiased_cnns.BlurPool(channels, pad_type=padding[name], filt_size=3, stride=stride)


def blurred_by_hand(network, name, *, blur_first):
    """The network with another implementation's blur put in by hand; a pooling layer's channels are the last ones."""
    channels = 3
    for key, layer in network.named_children():
        strided = isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and layer.in_channels >= 16
        if strided and blur_first:
            setattr(network, key, nn.Sequential(original(name, layer.in_channels, 1), layer))
        elif strided:
            stride, layer.stride = layer.stride[0], (1, 1)
            setattr(network, key, nn.Sequential(layer, original(name, layer.out_channels, stride)))
        elif isinstance(layer, nn.MaxPool2d):
            pool = nn.MaxPool2d(layer.kernel_size, 1, layer.padding)
            setattr(network, key, nn.Sequential(pool, original(name, channels, layer.stride)))
        else:
            blurred_by_hand(layer, name, blur_first=blur_first)
        channels = getattr(layer, "out_channels", channels)
    return network


def count(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize(
    ("fields", "convolutions", "pools"),
    [({}, 6, 1), ({"replace_convs": False}, 0, 1), ({"replace_maxpools": False}, 6, 0), ({"min_channels": 3}, 7, 1)],
)
def test_resnet50s_strided_layers_are_replaced(state, logger, fields, convolutions, pools):
    made = state(torchvision.models.resnet50())
    blurpool.build(BlurPoolConfig(**fields)).apply(Event.INIT, made, logger)
    assert count(made.model, BlurConv2d) == convolutions
    assert count(made.model, BlurMaxPool2d) == pools


def test_the_blur_is_the_papers_binomial_filter():
    """Zhang 2019, section 4: the 3x3 filter is the outer product of (1, 2, 1), normalised."""
    layer = BlurConv2d.from_conv2d(nn.Conv2d(1, 1, 1, stride=2, bias=False), blur_first=True)
    layer.conv.weight.data.fill_(1.0)
    impulse = torch.zeros(1, 1, 7, 7)
    impulse[0, 0, 2, 2] = 1.0
    assert layer(impulse)[0, 0, 1, 1].item() == pytest.approx(4 / 16)
    impulse = impulse.roll(1, dims=3)
    assert layer(impulse)[0, 0, 1, 1].item() == pytest.approx(2 / 16)


def test_no_effect_is_said(run):
    with pytest.warns(NoEffectWarning, match="did not change any layers"):
        run({"blurpool": {}}, network=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)))


@pytest.mark.parametrize("blur_first", [True, False])
@pytest.mark.parametrize("network", [convnet, bottlenecks])
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_network_computes_what_it_does_with_the_original_layers(run, name, network, blur_first):
    torch.manual_seed(3)
    plain = network()
    by_hand = blurred_by_hand(copy.deepcopy(plain), name, blur_first=blur_first).eval()
    ours = run({"blurpool": {"blur_first": blur_first}}, network=lambda: plain).trainer.state.model.module.eval()
    images = torch.randn(4, 3, 17, 22)
    torch.testing.assert_close(ours(images), by_hand(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("blur_first", [True, False])
def test_a_network_computes_what_it_does_with_composers_layers(blur_first):
    torch.manual_seed(3)
    composers = torchvision.models.resnet50(num_classes=4)
    apply_blurpool(composers, blur_first=blur_first)
    ours = copy.deepcopy(composers)
    blurpool.replace_forward(ours)
    assert ours.state_dict().keys() == composers.state_dict().keys()
    images = torch.randn(2, 3, 65, 48)
    assert torch.equal(ours(images), composers(images))


def test_it_compiles_to_one_graph_and_exports():
    network = torchvision.models.resnet18(num_classes=4)
    apply_blurpool(network)
    blurpool.replace_forward(network)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)  # a break in the graph raises
    torch.testing.assert_close(compiled(images), network(images))
    program = torch.export.export(network.eval(), (images,))
    torch.testing.assert_close(program.module()(images), network(images))
