"""Checks that need the machine and the data, made before anything is trained."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from composer.utils import dist
from torch import nn

from algorithms.fixres import classifier, last_batchnorm
from data.config import EpochPlan
from data.errors import InputError
from data.sampler import EvalSampler, PositionSampler
from data.source import Source
from data.text import first_line
from recipes.checkpoints.store import Places
from recipes.config import RunConfig
from recipes.memory import check_memory, device_bytes, microbatch_images, with_microbatches
from recipes.model import AUXILIARY_WEIGHTS, heads, planned_network
from recipes.optimizer import state_copies
from recipes.schedule import epoch_plan
from recipes.trainer import device_name
from recipes.watch.trackers import logger_problems


class Ready(NamedTuple):
    """What a run starts from."""

    config: RunConfig  # with values for this device in place of `auto`
    train: Source
    val: Source
    plan: tuple[EpochPlan, ...]


def prepare_run(config: RunConfig, world_size: int, open_data: Callable[[], tuple[Source, Source]]) -> Ready:
    """The config with values for this machine, its data and its plan, if `world_size` processes in all can train it.

    Returns the images that `open_data` opened too, so that a million files are listed only once. InputError: everything
    that is wrong, one line each, named by its key or path.
    """
    config = with_precision(config)
    lines = list(device_problems(config))
    plan, data, network = tuple[EpochPlan, ...](), None, None
    with _added_to(lines):
        plan = epoch_plan(config, world_size)
    lines += [*_microbatches(config, world_size, plan), *logger_problems(config.loggers), *_folders(config)]
    lines += _compiler(config)
    with _added_to(lines):
        data = open_data()
    if plan and data is not None:
        lines += _samples(config, world_size, plan, *data)
    with _added_to(lines):
        state_copies(config.optimizer)
    with _added_to(lines):
        network = planned_network(config, config.model.num_classes or (len(data[0].classes) if data else 1000))
    if plan and network is not None:
        config, found = _fitted(config, network, world_size, plan)
        lines += found
    if lines or data is None:
        raise InputError(*lines)
    return Ready(config, *data, plan)


@contextmanager
def _added_to(lines: list[str]) -> Iterator[None]:
    """Instead of raising an InputError, add its lines to these."""
    try:
        yield
    except InputError as error:
        lines += error.lines


def with_precision(config: RunConfig) -> RunConfig:
    """The config with a value for this device in place of `precision: auto`."""
    device = device_name(config.device)
    if config.precision != "auto" or (device == "gpu" and not torch.cuda.is_available()):
        return config
    bf16 = device == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    # All processes compute alike, on the least of their devices.
    chosen = chosen_precision(device, all(dist.all_gather_object(bf16)))
    return config.model_copy(update={"precision": chosen})


def chosen_precision(device: str, bf16: bool) -> Literal["fp32", "amp_fp16", "amp_bf16"]:
    """What `precision: auto` is on a device, by Composer's name, that computes in bfloat16 or does not."""
    return "fp32" if device != "gpu" else "amp_bf16" if bf16 else "amp_fp16"


def device_problems(config: RunConfig) -> Iterator[str]:
    """Yields an error unless each process has a device that can compute in this precision."""
    available = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = device_name(config.device)
    if not available[device]:
        names = ", ".join(name for name in available if available[name])
        yield f"device: {device} is not available here; available: auto, {names}"
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = {"cpu": processes, "gpu": torch.cuda.device_count(), "mps": 1}[device]
    if processes > devices:
        yield f"device: {processes} processes on a machine with {devices} {device.upper()}; allowed: -n {devices}"
    elif device == "gpu" and (line := _card_problem()):
        yield line
        return
    if config.precision not in ("fp32", "auto") and device != "gpu":
        # Composer refuses half precision on a CPU and silently ignores it on MPS (core/precision.py).
        yield f"precision: {config.precision} needs a GPU, and this run is on the {device}; allowed: fp32"
    bf16 = device == "gpu" and config.precision == "amp_bf16"
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield f"precision: amp_bf16 is not supported by {torch.cuda.get_device_name()}; allowed: fp32, amp_fp16"


DEFAULT_KERNELS = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
"""What `torch.cuda.get_arch_list()` says of the torch in requirements.lock, 2.7.0, on x86-64."""
NEW_KERNELS = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
"""The same of the torch in requirements-new.lock, 2.15.0."""


def kernel_problem(card: str, capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """An error if a torch with kernels for `architectures` cannot compute on this card, else None.

    `capability` and `architectures` are those of `torch.cuda.get_device_capability` and `get_arch_list`. Without any
    NVIDIA architecture, as in a build for AMD, nothing can be said.
    """
    if not any(name.startswith("sm_") for name in architectures) or _has_kernels(capability, architectures):
        return None
    if _has_kernels(capability, DEFAULT_KERNELS.split()):
        advice = "install the other: make install"
    elif _has_kernels(capability, NEW_KERNELS.split()):
        advice = "install the other: make install TORCH=new"
    else:
        advice = "nor has the other of `make install`; allowed: device=cpu"
    version = f"sm_{capability[0]}{capability[1]}"
    return f"device: the installed torch {torch.__version__} has no kernels for {card} ({version}); {advice}"


def _has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """CUDA's rule: a binary runs on cards of its major version from its minor on, PTX on every later card.

    sm_90a is for that one card only (CUDA C++ Programming Guide, "Binary Compatibility", "Feature-Set").
    """
    for kind, major, minor, only in re.findall(r"\b(sm|compute)_(\d+)(\d)(a?)", " ".join(architectures)):
        built = int(major), int(minor)
        later = capability >= built and (kind == "compute" or capability[0] == built[0])
        if capability == built or (later and not only):
            return True
    return False


def _card_problem() -> str | None:
    """An error if the installed torch has no kernels for this process's GPU."""
    index = int(os.environ.get("LOCAL_RANK", "0"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says it too, in ten lines
        capability = torch.cuda.get_device_capability(index)
    return kernel_problem(torch.cuda.get_device_name(index), capability, torch.cuda.get_arch_list())


def _microbatches(config: RunConfig, world_size: int, plan: Sequence[EpochPlan]) -> Iterator[str]:
    """Yields an error unless the device's batch in each stage is a multiple of its microbatches."""
    for entry in {entry.size: entry for entry in plan}.values():
        images, microbatch = entry.global_batch_size // world_size, microbatch_images(config, entry, world_size)
        if images % microbatch:
            yield (
                f"device_microbatch_size: {microbatch} does not divide the device's batch of {images} images of "
                f"{entry.size} px; allowed: a divisor of {images}"
            )


def _compiler(config: RunConfig) -> Iterator[str]:
    """Yields an error if torch.compile lacks the C compiler that Triton uses on a GPU, or the C++ compiler on a CPU."""
    variable, names = ("CC", ("gcc", "clang")) if device_name(config.device) == "gpu" else ("CXX", ("g++", "clang++"))
    if config.compile and variable not in os.environ and not any(map(shutil.which, names)):
        yield f"compile: needs {' or '.join(names)}; install one, set {variable} to another, or set compile to false"


def _folders(config: RunConfig) -> Iterator[str]:
    """Yields an error for each folder that the run could not write."""
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    folders = {"runs_folder": places.run_folder} | ({} if places.remote else {"checkpoints.folder": places.local})
    for key, folder in folders.items():
        nearest = folder
        try:
            while not nearest.exists():  # raises for a name that is too long
                nearest = nearest.parent
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            yield f"{key}: {folder} cannot be written: {nearest.resolve()}: {error.strerror or error}"


def _samples(config: RunConfig, world_size: int, plan: Sequence[EpochPlan], train: Source, val: Source) -> list[str]:
    """Errors if there are fewer outputs than classes, or too few images for the processes."""
    lines: list[str] = []
    if config.model.num_classes is not None and len(train.classes) > config.model.num_classes:
        lines.append(
            f"model.num_classes: {config.model.num_classes}, but {config.data.path} has {len(train.classes)} classes; "
            f"allowed: at least {len(train.classes)}, or null"
        )
    with _added_to(lines):
        PositionSampler(len(train), plan, config.seed, 0, world_size)
    with _added_to(lines):
        EvalSampler(len(val), config.eval.sizes[0], 1, 0, world_size)
    return lines


def _fitted(
    config: RunConfig, network: nn.Module, world_size: int, plan: Sequence[EpochPlan]
) -> tuple[RunConfig, list[str]]:
    """The config with microbatches for this device in place of `auto`, and what is wrong.

    The latter if the network does not accept images of every size, or the device lacks the memory for a step.
    """
    lines: list[str] = []
    trained = dict.fromkeys((entry.size, True) for entry in plan)
    for size, training in (*trained, *((size, False) for size in config.eval.sizes if (size, True) not in trained)):
        try:
            _, auxiliary = heads(network.train(training)(torch.empty(2, 3, size, size, device="meta")))
            if auxiliary and type(network).__name__ not in AUXILIARY_WEIGHTS:
                name = config.model.name
                return config, [f"model.name: {name} has several outputs in training, which is not supported"]
        except Exception as error:
            if isinstance(error, NotImplementedError) or "meta" in str(error):
                # A layer that cannot run on the meta device: nothing can be checked.
                unknown = f"device_microbatch_size: auto: the memory of {config.model.name} is not known"
                return config, [f"{unknown}; set a number or null"] * (config.device_microbatch_size == "auto")
            lines.append(f"model.name: {config.model.name} does not accept images of {size} px: {first_line(error)}")
    lines += _last_layers(config, network)
    if lines:
        return config, lines
    memory = device_bytes(config)
    if config.device_microbatch_size == "auto":
        known = [bytes_ for bytes_ in dist.all_gather_object(memory) if bytes_ is not None]
        config = with_microbatches(config, network, world_size, plan, min(known, default=None))
    return config, [] if memory is None else check_memory(network, config, world_size, plan, memory)


def _last_layers(config: RunConfig, network: nn.Module) -> Iterator[str]:
    """Yields an error if the network lacks the layers that a loss or FixRes needs."""
    needs: list[tuple[str, Callable[[nn.Module], object]]] = []
    if config.loss.name == "binary_cross_entropy" and not config.loss.mean_over_classes:
        needs.append(("loss.name: binary_cross_entropy", classifier))
    if (fixres := config.algorithms.fixres) is not None and fixres.train == "classifier":
        needs += [("algorithms.fixres.train: classifier", layer) for layer in (classifier, last_batchnorm)]
    for key, layer in needs:
        try:
            layer(network)
        except ValueError as error:
            yield f"{key}: {error}"
