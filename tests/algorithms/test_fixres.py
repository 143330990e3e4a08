import pytest
import timm
import torch
import torchvision
from composer.algorithms.blurpool import apply_blurpool
from composer.core import Event
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import Recorder
from torch import nn

from algorithms import fixres
from algorithms.config import FixResConfig
from algorithms.fixres import classifier, last_batchnorm


@given(start=st.floats(0, 1), epochs=st.integers(1, 1000))
def test_the_stage_begins_at_the_nearest_epoch_that_leaves_both_parts_one(start, epochs):
    first = FixResConfig(start=start).start_epoch(epochs)
    assert 0 <= first <= epochs
    if start > 0:
        assert first >= 1
    if start < 1 and epochs > 1:
        assert first <= epochs - 1
    if 1 < first < epochs - 1:
        assert abs(first - start * epochs) <= 0.5


def test_the_recipes_stage_is_the_last_five_of_ninety_epochs():
    assert FixResConfig().start_epoch(90) == 85
    assert FixResConfig().start_epoch(16) == 15
    assert [FixResConfig(start=at).start_epoch(epochs) for at, epochs in ((0, 5), (1, 5), (0.5, 1))] == [0, 5, 1]


def resnet_blurred():
    network = torchvision.models.resnet50(num_classes=4)
    apply_blurpool(network)
    return network


def regnet():
    with torch.device("cpu"):  # it computes its widths with tensors
        return torchvision.models.regnet_y_400mf()


@pytest.mark.parametrize(
    ("build", "norm", "linear"),
    [
        (lambda: torchvision.models.resnet50(num_classes=4), "layer4.2.bn3", "fc"),
        (resnet_blurred, "layer4.2.bn3", "fc"),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18()), "layer4.1.bn2", "fc"),
        (regnet, "trunk_output.block4.block4-5.f.c.1", "fc"),
        (lambda: timm.create_model("resnet10t"), "layer4.0.bn2", "fc"),  # its last block has a shortcut
        (lambda: timm.create_model("efficientnet_b0"), "bn2", "classifier"),
        (lambda: timm.create_model("regnety_002"), "s4.b7.conv3.bn", "head.fc"),
    ],
)
def test_the_classifier_and_the_last_batchnorm_are_found(build, norm, linear):
    with torch.device("meta"):  # the structure is enough
        network = build()
    for model in (network, nn.DataParallel(network)):  # wrapped, as by DDP
        assert last_batchnorm(model) is network.get_submodule(norm)
        assert classifier(model) is network.get_submodule(linear)
    if hasattr(network, "get_classifier"):
        assert classifier(network) is network.get_classifier()


@pytest.mark.parametrize("network", [nn.Sequential(nn.Conv2d(3, 4, 1)), torchvision.models.squeezenet1_1()])
def test_a_network_without_them_is_refused_before_the_stage_begins(network, state, logger):
    for start in (0.0, 0.5):
        with pytest.raises(ValueError, match="the model has no"):
            fixres.build(FixResConfig(start=start, train="classifier"), 10).apply(Event.INIT, state(network), logger)


@pytest.mark.parametrize("microbatch", [8, 4])
def test_in_a_real_run_only_two_layers_change_in_the_stage(run, microbatch):
    """With evaluations and training metrics, both of which put the model back into training mode."""
    watch = Recorder("epoch_start")
    stage = {"fixres": {"start": 0.34, "train": "classifier"}}  # from epoch 1 of 3 on
    final = run(stage, callbacks=(watch,), evaluate=True, microbatch=microbatch).fit()
    changed = {name for name in final if not torch.equal(final[name], watch.values[1][name])}
    assert {name.rpartition(".")[0] for name in changed} == {"module.5", "module.10"}
    assert {name for name in changed if "running" in name} == {"module.5.running_mean", "module.5.running_var"}
