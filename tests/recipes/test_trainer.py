"""What the recipe does at each step and epoch, and how several processes share it."""

import copy
import json
import shutil
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from composer.optim import DecoupledSGDW
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from data.errors import InputError
from recipes import trainer
from recipes.config import OptimizerConfig
from recipes.load import load_config
from recipes.memory import step_memory
from recipes.model import CPUSyncBatchNorm2d, build_network, planned_network, sync_batchnorm
from recipes.optimizer import build_optimizer, exempt_norms_and_biases
from recipes.trainer import SameStatistics, split
from tests.support import ROOT, free_port


def optimizer_of(params, name, momentum=0.9):
    return build_optimizer(OptimizerConfig(name=name, momentum=momentum, nesterov=True, weight_decay=1e-2), params, 0.5)


@pytest.mark.parametrize("name", ["sgd", "decoupled_sgdw"])
def test_norms_and_biases_are_exempt_from_decay_and_from_nothing_else(name):
    network = build_network("resnet18", 10)
    optimizer = optimizer_of(network.parameters(), name)
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

    # Without a gradient, decay alone moves a weight.
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of([weight, bias], "decoupled_sgdw")
    exempt_norms_and_biases(optimizer)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 0.99))
    assert torch.equal(bias, torch.ones(2))


@given(
    seed=st.integers(0, 2**31),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    decay=st.sampled_from([0.0, 5e-5]),
    missing=st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=4),
)
def test_decoupled_sgdw_is_composers_bit_for_bit(seed, momentum, nesterov, decay, missing):
    """`missing`: the parameters without a gradient in each step, as a layer that stochastic depth skips has none."""
    torch.manual_seed(seed)
    start = [torch.randn(shape) for shape in ((5, 3), (17,), (1,), (2, 2, 3))]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    config = OptimizerConfig(name="decoupled_sgdw", momentum=momentum, nesterov=nesterov, weight_decay=decay)
    options = {"momentum": momentum, "nesterov": nesterov and momentum > 0, "weight_decay": decay}
    optimizers = build_optimizer(config, ours, 0.5), DecoupledSGDW(theirs, lr=0.5, **options)
    for step, without in enumerate(missing):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(pair[0].shape)
            for parameter in pair:
                parameter.grad = None if index in without else gradient.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert type(optimizers[0]).__qualname__ == "DecoupledSGDW", "checkpoints have it under Composer's name"


# Without BatchNorm, whose statistics are a microbatch's, and without what draws at random for each microbatch.
TINY = ("max_duration=2ep", "data.workers=0", "loggers.tensorboard=off", "loggers.interval=1")
PORTIONS = (
    "model.name=timm/test_nfnet",
    *(f"algorithms.{name}=off" for name in ("mixup", "cutmix", "blurpool", "ema")),
)


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_microbatches_by_size_add_up_to_the_whole_step(train, tmp_path, monkeypatch):
    largest = {}

    def noted(batch, images):
        parts = split(batch, images)
        if torch.is_grad_enabled():  # not in an evaluation
            size = batch[0].shape[-1]
            largest[size] = max(largest.get(size, 0), *(len(part[0]) for part in parts))
        return parts

    monkeypatch.setattr(trainer, "split", noted)
    whole, _ = train(ROOT / "yamls" / "demo.yaml", *TINY, *PORTIONS, "run_name=whole")
    assert set(largest.values()) == {24}
    largest.clear()
    microbatches = "device_microbatch_size={32: 8, 36: 4}"
    parted, _ = train(ROOT / "yamls" / "demo.yaml", *TINY, *PORTIONS, "run_name=parted", microbatches)
    assert largest == {32: 8, 36: 4}
    assert (whole, parted) == (0, 0)
    assert losses(tmp_path / "parted") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_cudnn_times_its_kernels_only_in_a_run_that_asks_for_it(train, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(trainer, "split", lambda *args: (seen.add(torch.backends.cudnn.benchmark), split(*args))[1])
    least = (*TINY, "model.name=timm/test_resnet", "max_duration=1ep")
    for wanted, keys in ((True, ["cudnn_benchmark=true", "run_name=timed"]), (False, ["run_name=default"])):
        seen = set()
        train(ROOT / "yamls" / "demo.yaml", *least, *keys)
        assert seen == {wanted}


def test_automatic_microbatches_are_the_same_after_a_resume_and_another_card_is_refused(train, tmp_path):
    demo = ROOT / "yamls" / "demo.yaml"
    keys = (
        *TINY,
        "model.name=timm/test_resnet",
        "precision=auto",
        "device_microbatch_size=auto",
        "run_name=auto",
        "device_batch_size=24",
    )
    config = load_config(demo, [*keys, "precision=fp32"])
    fixed, per_image = step_memory(planned_network(config, 3), config, 1, 32)
    card = f"device_memory_gb={(fixed + 13 * per_image) / 0.9e9}"  # for 12 of the 24 images of a step
    status, whole = train(demo, *keys, card)
    text = (tmp_path / "auto" / "log.txt").read_text()
    saved = load_config(tmp_path / "auto" / "config.yaml")
    assert (status, saved.precision, saved.device_microbatch_size[32]) == (0, "fp32", 12)
    assert text.count(f"precision fp32, device_microbatch_size {saved.device_microbatch_size}") == 1
    for path in (tmp_path / "auto" / "checkpoints").glob("ep002*"):
        path.unlink()
    with pytest.raises(InputError, match=r"device_microbatch_size.32: now 24, in the checkpoint 12"):
        train(demo, *keys, "device_memory_gb=100")
    status, resumed = train(demo, *keys, card)
    assert (status, resumed["weights_sha256"]) == (0, whole["weights_sha256"])
    assert len(resumed["resumed_from"]) == 1


STAGES = (
    *(*TINY, "run_name=stages", "model.name=timm/test_resnet", "max_duration=6ep"),
    *("checkpoints.interval=1ba", "checkpoints.keep=100", "device_batch_size={24: 12, 32: 4, 36: 6}"),
)
BATCHES = 24 // 12 + 4 * (24 // 4) + 24 // 6
"""One epoch at 24 px, four at 32, one at 36, of 24 images each."""


def test_stages_with_smaller_batches_see_all_images_and_resume_anywhere(train, tmp_path):
    status, whole = train(ROOT / "yamls" / "demo.yaml", *STAGES)
    assert (status, whole["epochs"], whole["batches"], whole["samples"]) == (0, 6, BATCHES, 6 * 24)
    saved = tmp_path / "stages" / "checkpoints"
    every = sorted(saved.glob("ep*.json"))
    for position in (5, BATCHES - 2):  # in the middle of the second epoch, and of the last
        [last] = [path for path in every if path.stem.endswith(f"-ba{position:06d}")]
        later = tmp_path / f"from{position}"
        shutil.copytree(tmp_path / "stages", later / "stages")
        for path in [path for path in every if path.stem > last.stem]:
            for suffix in (".json", ".safetensors"):
                (later / "stages" / "checkpoints" / path.with_suffix(suffix).name).unlink()
        status, _ = train(ROOT / "yamls" / "demo.yaml", *STAGES, f"runs_folder={later}")
        resumed = json.loads((later / "stages" / "summary.json").read_text())
        assert [Path(one).stem for one in resumed["resumed_from"]] == [last.stem]
        compared = ("batches", "samples", "weights_sha256", "top1")
        assert (status, [resumed[name] for name in compared]) == (0, [whole[name] for name in compared])


def one_rank(rank, port, network, images, shares, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    low, high = shares[rank]
    # The sum over the ranks of these losses is the loss of one process with all images.
    network(images[low:high]).square().sum().div(len(images)).backward()
    gradients = {}
    for name, param in network.named_parameters():
        dist.all_reduce(param.grad)
        gradients[name] = param.grad
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 1.0)
    norm.num_batches_tracked.fill_(rank + 5)
    SameStatistics().eval_start(types.SimpleNamespace(model=norm), None)
    torch.save((gradients, dict(network.named_buffers()), norm.state_dict()), results / str(rank))
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    shares = [(0, 7), (7, 10)]
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    ).double()
    synchronised = sync_batchnorm(copy.deepcopy(plain), "cpu")
    images = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    plain(images).square().sum().div(10).backward()
    # Forked, so that they need not import Composer again.
    arguments = (free_port(), synchronised, images, shares, tmp_path)
    torch.multiprocessing.start_processes(one_rank, arguments, nprocs=2, start_method="fork")
    for rank in range(2):
        gradients, buffers, evaluated = torch.load(tmp_path / str(rank))
        for name, param in plain.named_parameters():
            assert torch.allclose(gradients[name], param.grad, atol=1e-12), name
        for name, buffer in plain.named_buffers():
            assert torch.allclose(buffers[name], buffer, atol=1e-12), name
        # Every process evaluates with the first one's statistics.
        assert (evaluated["running_mean"].tolist(), int(evaluated["num_batches_tracked"])) == ([1.0, 1.0], 5)


def test_alone_and_in_evaluation_it_is_batchnorm():
    plain = build_network("resnet18", 10)
    synchronised = sync_batchnorm(copy.deepcopy(plain), "cpu")
    assert sum(type(module) is CPUSyncBatchNorm2d for module in synchronised.modules()) == 20
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(images), synchronised.train(mode)(images))
