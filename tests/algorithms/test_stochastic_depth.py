import pytest
import torch
import torchvision
from torchvision.models.resnet import Bottleneck

from algorithms.config import AlgorithmsConfig

SKIP = {"stochastic_depth": {"drop_rate": 0.5}}


def blocks(network):
    return [module for module in network.modules() if isinstance(module, Bottleneck)]


@pytest.mark.parametrize("method", ["block", "sample"])
def test_the_default_layer_name_fits_torchvisions_resnet50(run, method):
    trainer = run(
        {"stochastic_depth": {"stochastic_method": method}}, network=lambda: torchvision.models.resnet50()
    ).trainer
    rates = [block.drop_rate.item() for block in blocks(trainer.state.model)]
    # Huang et al. 2016, section 3: linear in the depth, up to the last of 16 blocks.
    torch.testing.assert_close(rates, [0.2 * (index + 1) / 16 for index in range(16)])


def test_a_block_that_is_dropped_is_the_identity(run, networks):
    item = run(
        {"stochastic_depth": {"drop_rate": 1.0, "drop_distribution": "uniform"}}, network=networks["bottlenecks"]
    )
    plain, shortcut, _ = (block.train() for block in blocks(item.trainer.state.model))
    pictures = torch.rand(2, 16, 4, 4)
    assert torch.equal(plain(pictures), pictures)
    torch.testing.assert_close(shortcut(pictures), torch.relu(shortcut.downsample(pictures)))


@pytest.mark.parametrize("batch", [1, 4, 7, 10])
@pytest.mark.parametrize("extra", [{}, {"drop_warmup": 0.5}, {"stochastic_method": "sample"}])
def test_a_resume_is_exact(assert_resumes, networks, batch, extra):
    assert_resumes({"stochastic_depth": {"drop_rate": 0.6, **extra}}, batch=batch, network=networks["bottlenecks"])


def test_a_resume_is_exact_where_blocks_were_never_trained(assert_resumes, networks):
    never = {"drop_rate": 1.0, "drop_distribution": "uniform"}
    assert_resumes({"stochastic_depth": never}, batch=2, network=networks["bottlenecks"])


def test_the_warm_up_ends_at_the_full_rate(run, networks):
    item = run({"stochastic_depth": {"drop_rate": 0.6, "drop_warmup": 0.5}}, network=networks["bottlenecks"])
    item.fit()
    rates = [block.drop_rate.item() for block in blocks(item.trainer.state.model)]
    assert rates == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("method", ["block", "sample"])
def test_it_changes_the_run(run, networks, method):
    config = {"stochastic_depth": {"drop_rate": 0.5, "stochastic_method": method}}
    AlgorithmsConfig.model_validate(config)
    with_it = run(config, network=networks["bottlenecks"]).fit()
    plain = run({}, network=networks["bottlenecks"]).fit()
    assert not torch.equal(with_it["module.0.weight"], plain["module.0.weight"])
