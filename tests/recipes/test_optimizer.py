"""Any optimizer of timm or torch: what it computes, what a checkpoint holds of it, and wrong input."""

import json

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from data.errors import InputError
from recipes.checkpoints.format import numbered_state, pack, unpack
from recipes.config import OptimizerConfig
from recipes.load import load_config
from recipes.optimizer import build_optimizer, exempt_norms_and_biases, momentum_of, set_momentum, state_copies
from tests.support import ROOT

DEMO = ROOT / "yamls" / "demo.yaml"


class Network(nn.Sequential):
    """Its third layer is skipped in the first four steps, as by stochastic depth."""

    def forward(self, images, step=0):
        first, norm, middle, last = self
        hidden = norm(first(images)).relu()
        hidden = middle(hidden) if step >= 4 else hidden
        return last(hidden.mean((2, 3)))


def made(config):
    torch.manual_seed(0)
    network = Network(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Linear(16, 33))
    optimizer = build_optimizer(config, network.parameters(), config.lr)
    exempt_norms_and_biases(optimizer)
    return network, optimizer


def train(network, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        optimizer.zero_grad()
        network(torch.randn(4, 3, 9, 9), step).square().sum().backward()
        optimizer.step()


def equal(left, right):
    return all(torch.equal(*pair) for pair in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "adamw", "sgd", "lars"])
def test_it_is_the_one_that_timm_would_create(name):
    config = OptimizerConfig(name=f"timm/{name}", lr=0.01, weight_decay=0.1, momentum=0.8)
    ours, optimizer = made(config)
    theirs, _ = made(config)
    original = create_optimizer_v2(theirs, name, lr=0.01, weight_decay=0.1, momentum=0.8)
    train(ours, optimizer, range(6))
    train(theirs, original, range(6))
    if name == "lamb":  # it adds the norms of all gradients, and timm has the two groups in the other order
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-7)
    else:
        assert equal(ours, theirs)
    assert not equal(ours, made(config)[0])


def test_sgd_is_torchs():
    plain, same = (made(OptimizerConfig(name=name, lr=0.01, weight_decay=0.1)) for name in ("sgd", "torch/sgd"))
    train(*plain, range(6))
    train(*same, range(6))
    assert equal(plain[0], same[0])


SAVED = "sgd timm/lamb timm/lion timm/muon timm/nadamuon timm/novograd timm/madgrad torch/adamw torch/adafactor"


@pytest.mark.parametrize("name", [*SAVED.split(), "torch/adagrad", "torch/nadam", "torch/asgd"])
@pytest.mark.parametrize("at", [1, 3])
def test_its_state_is_saved_and_loaded_bit_for_bit(name, at):
    config = OptimizerConfig(name=name, weight_decay=0.01)
    through, optimizer = made(config)
    train(through, optimizer, range(at))
    content = {"optimizer": get_optimizer_state_dict(through, optimizer), "model": through.state_dict()}
    content = unpack(b"".join(pack(content)))
    resumed, fresh = made(config)
    resumed.load_state_dict(content["model"])
    fresh.load_state_dict(numbered_state(fresh, content["optimizer"], resumed, "optimizer"))
    train(through, optimizer, range(at, 8))
    train(resumed, fresh, range(at, 8))
    assert equal(through, resumed)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["state"]["0.weight"].update(step=3),
        lambda saved: saved["state"]["0.weight"].update(exp_avg=torch.zeros(16, 3)),
        lambda saved: saved["state"]["0.weight"].update(exp_avg=None),
        lambda saved: saved["state"]["0.weight"].pop("exp_avg_sq"),
        lambda saved: saved["state"].update({"0.weight": 3}),
        lambda saved: saved["param_groups"][0].update(betas=0.9),
        lambda saved: saved["param_groups"][0].update(betas=(0.9, "x")),
    ],
)
def test_a_state_of_another_form_is_refused(change):
    config = OptimizerConfig(name="torch/adamw")
    network, optimizer = made(config)
    train(network, optimizer, range(1))
    saved = get_optimizer_state_dict(network, optimizer)
    fresh, other = made(config)
    numbered_state(other, saved, fresh, "optimizer")
    change(saved)
    with pytest.raises(InputError, match="optimizer/"):
        numbered_state(other, saved, fresh, "optimizer")


TINY = ("model.name=timm/test_resnet", "max_duration=2ep", "data.workers=0", "loggers.tensorboard=off")
SAVES = ("checkpoints.interval=1ba", "checkpoints.keep=100", "device_batch_size=8", "loggers.interval=1")


@pytest.mark.parametrize("name", ["timm/lion", "torch/adamw"])
def test_a_run_resumes_bit_for_bit_and_its_schedule_sets_the_first_beta(name, train, tmp_path):
    words = (*TINY, *SAVES, f"optimizer.name={name}", "optimizer.lr=0.003", "optimizer.betas=[0.8, 0.99]", "run_name=x")
    status, whole = train(DEMO, *words)
    lines = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    momenta = [line["train/momentum"] for line in lines if "train/momentum" in line]
    assert (momenta[0], min(momenta)) == (pytest.approx(0.95), pytest.approx(0.85, abs=0.01))
    for path in (tmp_path / "x" / "checkpoints").iterdir():
        if not path.name.startswith(("ep000-ba000002", "ep001-ba000004")):
            path.unlink()
    again, resumed = train(DEMO, *words)
    assert (status, again, len(resumed["resumed_from"])) == (0, 0, 1)
    assert "ep001-ba000004" in resumed["resumed_from"][0]
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_momentum_is_the_first_beta_where_there_is_no_other():
    sgd, adam, neither = {"momentum": 0.9}, {"betas": (0.9, 0.99, 0.5)}, {"lr": 1.0}
    for group in (sgd, adam, neither):
        set_momentum(group, 0.7)
    assert (sgd, adam, neither) == ({"momentum": 0.7}, {"betas": (0.7, 0.99, 0.5)}, {"lr": 1.0})
    assert momentum_of(sgd) == momentum_of(adam) == 0.7
    assert momentum_of(neither) != momentum_of(neither)


@pytest.mark.parametrize(("name", "copies"), [("sgd", 1), ("timm/lion", 1), ("timm/lamb", 2), ("torch/adamw", 2)])
def test_the_memory_plan_counts_what_it_keeps(name, copies):
    assert state_copies(OptimizerConfig(name=name)) == copies


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "optimizer.name=timm/lam",
            "not an optimizer of timm that can be used here; did you mean 'timm/lamb'",
        ),
        ("optimizer.name=torch/lbfgs", "'torch/lbfgs' is not an optimizer of torch that can be used here"),
        (
            "optimizer.name=timm/lamb optimizer.bets=[0.9,0.9]",
            "optimizer.bets: timm/lamb has no such argument; allowed",
        ),
        ("optimizer.name=torch/adamw optimizer.amsgrad=7", "optimizer.amsgrad: got 7; allowed: bool"),
        ("optimizer.name=torch/adamw optimizer.betas=[0.9,1.5]", "torch/adamw: Invalid beta parameter at index 1: 1.5"),
        ("optimizer.name=timm/lamb optimizer.params=3", "optimizer.params: timm/lamb has no such argument"),
    ],
)
def test_wrong_words_are_one_line_before_anything_is_trained(words, line, train):
    with pytest.raises(InputError) as refused:
        train(DEMO, *TINY, *words.split())
    assert len(refused.value.lines) == 1
    assert line in refused.value.lines[0]


def test_an_unknown_key_of_sgd_is_one_line_with_the_known_ones():
    with pytest.raises(InputError) as refused:
        load_config(DEMO, ["optimizer.momentm=0.9"])
    (line,) = refused.value.lines
    assert "optimizer.momentm: unknown key; allowed: name, lr," in line
    assert line.endswith("did you mean 'momentum'?")
