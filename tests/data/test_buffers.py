"""Buffers that are used again: never while somebody holds a batch, always afterwards."""

import contextlib
import gc
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch

from data.config import EpochPlan
from data.errors import StalledError
from data.imagefolder import ImageFolder
from tests.data.test_loader import training

LONG = [EpochPlan(24, "random", 4)]
PER_WORKER = 2 + 2
"""The tests' prefetch factor, and those beyond it."""


@pytest.fixture
def source(small_folder):
    return ImageFolder(small_folder, None)


def mapped():
    """Shared memory of torch's that this process maps."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/torch_" in line]


def addresses(loader, epochs=range(3)):
    """Where the batches lie that are let go at once."""
    found = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        found += [images.data_ptr() for images, _ in loader]
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_buffers_are_used_again(source, workers):
    found = addresses(training(source, workers, plan=LONG))
    assert len(found) == 45
    assert len(set(found)) <= workers * PER_WORKER


@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_that_is_held_in_whole_or_in_part_stays_as_it_was(source, workers):
    held, parts = [], itertools.cycle([lambda x: x, lambda x: x[1:2], lambda x: x.numpy()[0, 1:]])
    for images, _ in training(source, workers, plan=LONG):
        part = next(parts)(images)
        held.append((part, torch.as_tensor(part).clone()))
        del images
    assert len(held) == 15
    assert all(torch.equal(torch.as_tensor(part), copy) for part, copy in held)


def test_abandoned_epochs_give_their_buffers_back_and_the_memory_goes_with_the_loader(source):
    before, loader = len(mapped()), training(source, workers=2, plan=LONG)
    for epoch in range(12):
        loader.batch_sampler.set_epoch(epoch)
        list(itertools.islice(loader, 2))
    assert len(set(addresses(loader))) <= 2 * PER_WORKER
    assert before < len(mapped()) <= before + 2 * PER_WORKER + 2
    images, _ = next(iter(loader))
    copy = images.clone()
    del loader
    assert len(mapped()) <= before + 2  # its own, and nothing else's
    assert torch.equal(images, copy)
    del images
    assert len(mapped()) <= before + 1


def test_a_fork_that_lets_a_batch_go_does_not_free_it(source):
    loader = training(source, workers=1, plan=LONG)
    iterator = iter(loader)
    images, _ = next(iterator)
    copy = images.clone()
    child = os.fork()
    if not child:
        del images
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in iterator:  # more batches than there are buffers
        pass
    assert torch.equal(images, copy)


def test_a_killed_worker_is_an_error_and_leaves_held_batches_whole(source):
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            loader = training(source, workers=2, plan=LONG)
            iterator = iter(loader)
            images, _ = next(iterator)
            copy = images.clone()
            try:
                os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
                list(iterator)
            except (StalledError, RuntimeError, OSError, EOFError):  # the last two where memory was on its way
                status = 0 if torch.equal(images, copy) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
