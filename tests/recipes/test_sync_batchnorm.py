import copy
import multiprocessing
import socket
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recipes.model import CPUSyncBatchNorm2d, build_network, sync_batchnorm
from recipes.trainer import SameStatistics


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def one_rank(rank, world_size, port, network, images, shares, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    # What multiprocessing hands over lies in shared memory: each rank updates statistics of its own.
    network = copy.deepcopy(network)
    low, high = shares[rank]
    # The sum over the ranks of these losses is the loss of one process with all images.
    network(images[low:high]).square().sum().div(len(images)).backward()
    gradients = {}
    for name, param in network.named_parameters():
        dist.all_reduce(param.grad)
        gradients[name] = param.grad
    if rank == 0:
        torch.save((gradients, dict(network.named_buffers())), results)
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [[(0, 5), (5, 10)], [(0, 7), (7, 10)]])
def test_two_processes_compute_what_one_does(shares, tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    ).double()
    synchronised = sync_batchnorm(copy.deepcopy(plain), "cpu")
    images = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    plain(images).square().sum().div(10).backward()
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [
        context.Process(target=one_rank, args=(rank, 2, port, synchronised, images, shares, tmp_path / "result"))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    gradients, buffers = torch.load(tmp_path / "result")
    for name, param in plain.named_parameters():
        assert torch.allclose(gradients[name], param.grad, atol=1e-12), name
    for name, buffer in plain.named_buffers():
        assert torch.allclose(buffers[name], buffer, atol=1e-12), name


def test_alone_and_in_evaluation_it_is_batchnorm():
    plain = build_network("resnet18", 10)
    synchronised = sync_batchnorm(copy.deepcopy(plain), "cpu")
    assert sum(type(module) is CPUSyncBatchNorm2d for module in synchronised.modules()) == 20
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(images), synchronised.train(mode)(images))


def test_on_a_gpu_it_is_torchs():
    network = sync_batchnorm(build_network("resnet18", 10), "cuda")
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) == 20


def evaluate_with_own_statistics(rank, port, results):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(rank + 1.0)
    norm.num_batches_tracked.fill_(rank + 5)
    SameStatistics().eval_start(types.SimpleNamespace(model=norm), None)
    results.put((norm.running_mean.tolist(), int(norm.num_batches_tracked)))
    dist.destroy_process_group()


def test_every_process_evaluates_with_the_first_ones_statistics():
    context, port = multiprocessing.get_context("fork"), free_port()
    results = context.Queue()
    ranks = [context.Process(target=evaluate_with_own_statistics, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
    assert found == [([1.0, 1.0], 5)] * 2
