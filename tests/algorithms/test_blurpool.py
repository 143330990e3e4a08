import pytest
import torch
import torchvision
from composer.algorithms.blurpool import BlurConv2d, BlurMaxPool2d
from composer.algorithms.warnings import NoEffectWarning
from torch import nn


def count(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize(
    ("fields", "convolutions", "pools"),
    [({}, 6, 1), ({"replace_convs": False}, 0, 1), ({"replace_maxpools": False}, 6, 0), ({"min_channels": 3}, 7, 1)],
)
def test_resnet50s_strided_layers_are_replaced(run, fields, convolutions, pools):
    trainer = run({"blurpool": fields}, network=torchvision.models.resnet50).trainer
    assert count(trainer.state.model, BlurConv2d) == convolutions
    assert count(trainer.state.model, BlurMaxPool2d) == pools


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


def test_it_changes_the_run_and_resumes(run, assert_resumes):
    with_it, plain = run({"blurpool": {}}).fit(), run({}).fit()
    assert not torch.equal(with_it["module.0.weight"], plain["module.0.weight"])
    assert_resumes({"blurpool": {}}, batch=7)
