import pytest
import torch
from composer.algorithms import SAM as ComposersSAM
from composer.trainer._scaler import ClosureGradScaler
from torch import nn

from algorithms.config import SAMConfig
from algorithms.sam import wrapped


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return nn.Linear(5, 3), torch.randn(16, 5), torch.randn(16, 3)


def test_a_step_is_the_papers(problem):
    """Foret et al. 2021, equations 2 and 3: w' = w - lr * grad L(w + rho * grad L(w) / |grad L(w)|)."""
    network, pictures, targets = problem
    weights = [param.detach().clone().requires_grad_() for param in network.parameters()]

    def gradient(at):
        loss = nn.functional.mse_loss(nn.functional.linear(pictures, *at), targets)
        return torch.autograd.grad(loss, at)

    first = gradient(weights)
    norm = torch.sqrt(sum((part**2).sum() for part in first))
    pairs = zip(weights, first, strict=True)
    climbed = [(weight + 0.3 * part / norm).detach().requires_grad_() for weight, part in pairs]
    expected = [weight - 0.1 * part for weight, part in zip(weights, gradient(climbed), strict=True)]

    optimizer = wrapped(torch.optim.SGD(network.parameters(), lr=0.1), SAMConfig(rho=0.3))
    passes = []

    def closure(**kwargs):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(pictures), targets)
        loss.backward()
        passes.append([param.detach().clone() for param in network.parameters()])
        return loss.item()

    optimizer.step(closure)
    torch.testing.assert_close(passes[1], [part.detach() for part in climbed])
    torch.testing.assert_close(list(network.parameters()), expected)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_run_equals_composers_up_to_rounding(run, interval):
    ours = run({"sam": {"rho": 0.5, "interval": interval}}).fit()
    theirs = run([ComposersSAM(rho=0.5, epsilon=1e-12, interval=interval)]).fit()
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], rtol=1e-4, atol=1e-6)


def test_a_parameter_without_gradient_in_the_second_pass_is_put_back():
    """A block that stochastic depth skips in the second pass only."""
    network, skipped = nn.Linear(2, 1), nn.Linear(2, 1)
    before = skipped.weight.detach().clone()
    base = torch.optim.SGD([*network.parameters(), *skipped.parameters()], lr=0.1)
    optimizer = wrapped(base, SAMConfig(rho=10.0))
    passes = iter([True, False])

    def run(**kwargs):
        optimizer.zero_grad()
        output = network(torch.ones(1, 2)) + (skipped(torch.ones(1, 2)) if next(passes) else 0.0)
        loss = (output**2).sum() + 1
        loss.backward()
        return loss.item()

    optimizer.step(run)
    assert torch.equal(skipped.weight, before)


@pytest.mark.parametrize("overflows", [(), (0,), (1,)])
def test_with_a_gradient_scaler_an_overflow_in_either_pass_changes_nothing(problem, overflows):
    """The order of calls in Composer's trainer under AMP FP16: scale, backward, unscale, step, update."""
    network, pictures, targets = problem
    before = [param.detach().clone() for param in network.parameters()]
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    optimizer = wrapped(base, SAMConfig(rho=0.3))
    assert optimizer._step_supports_amp_closure
    scaler, calls = ClosureGradScaler(device="cpu", init_scale=8.0), []

    def run(**kwargs):
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(network(pictures), targets)
        scaler.scale(loss).backward()
        if len(calls) in overflows:
            network.weight.grad[0, 0] = torch.inf
        calls.append(loss.item())
        scaler.unscale_(optimizer)
        return loss.item()

    scaler.step(optimizer, closure=run)
    scaler.update()
    assert len(calls) == (1 if 0 in overflows else 2)
    assert scaler.get_scale() == (4.0 if overflows else 8.0)
    moved = [(param - start).abs().max().item() for param, start in zip(network.parameters(), before, strict=True)]
    if overflows:
        assert max(moved) == 0
        assert not any("momentum_buffer" in state for state in base.state.values())
    else:
        assert min(moved) > 1e-4
