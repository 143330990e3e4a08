import pytest
import torch

from recipes.config import OptimizerConfig
from recipes.model import build_network
from recipes.trainer import build_optimizer, exempt_norms_and_biases


def build(params, name, momentum=0.9):
    return build_optimizer(OptimizerConfig(name=name, momentum=momentum, nesterov=True, weight_decay=1e-2), params, 0.5)


@pytest.mark.parametrize("name", ["sgd", "decoupled_sgdw"])
def test_norms_and_biases_are_exempt_from_decay_and_from_nothing_else(name):
    network = build_network("resnet18", 10)
    optimizer = build(network.parameters(), name)
    exempt_norms_and_biases(optimizer)
    decayed, exempt = optimizer.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1e-2, 0.0)
    names = {id(param): key for key, param in network.named_parameters()}
    assert {names[id(param)] for param in exempt["params"]} == {
        key for key in names.values() if "bn" in key or "downsample.1" in key or key == "fc.bias"
    }
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    same = ("lr", "momentum", "nesterov", "initial_lr") if name == "decoupled_sgdw" else ("lr", "momentum", "nesterov")
    assert all(decayed[key] == exempt[key] for key in same)


def test_without_gradient_only_decay_moves_a_weight():
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build([weight, bias], "decoupled_sgdw")
    exempt_norms_and_biases(optimizer)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 0.99))
    assert torch.equal(bias, torch.ones(2))


def test_no_momentum_means_no_nesterov():
    optimizer = build([torch.nn.Parameter(torch.ones(2))], "sgd", momentum=0.0)
    assert optimizer.defaults["nesterov"] is False
