"""The processes of a run: how they join each other, and what the first one decides for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from composer.utils import dist, get_device

from data.errors import InputError, StoreError
from recipes.cli import require_launched
from recipes.config import RunConfig
from recipes.trainer import device_name

T = TypeVar("T")


def start_processes(config: RunConfig) -> None:
    """Join the other processes of the run, and divide the CPU cores among those on this machine."""
    require_launched()
    if dist.get_world_size() == 1:
        return
    device = device_name(config.device)
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_local_world_size()))
    dist.initialize_dist(get_device(device), timeout=300.0)


def on_first(decide: Callable[[], T]) -> T:
    """Return process 0's result on every process; its InputError or StoreError becomes an InputError on each."""
    outcome: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            outcome = [(decide(), None)]
        except InputError as error:
            outcome = [(None, error.lines)]
        except StoreError as error:
            outcome = [(None, (str(error),))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    answer, lines = outcome[0]
    if lines is not None:
        raise InputError(*lines)
    return answer  # type: ignore[no-any-return]
