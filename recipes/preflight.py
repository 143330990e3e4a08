"""What the config's own rules cannot tell, checked on the machine before anything is trained."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from composer.algorithms.blurpool import apply_blurpool
from composer.algorithms.squeeze_excite import apply_squeeze_excite
from torch import nn

from algorithms.fixres.fixres import classifier, last_batchnorm
from data.epoch_plan import EpochPlan
from data.errors import DataError
from data.sampler import EvalSampler, PositionSampler
from data.source import Source
from recipes.config import RunConfig, at_size
from recipes.errors import InputError
from recipes.memory import Load, Setting, check_memory
from recipes.model import AUXILIARY_WEIGHTS, build_network, heads
from recipes.schedule import epoch_plan, image_size
from recipes.trainer import device_name

Data = tuple[Source, Source]
Made = TypeVar("Made")


def require_ready(config: RunConfig, world_size: int, open_data: Callable[[], Data]) -> Data:
    """Refuse a run that cannot work here.

    Args:
        config: The run.
        world_size: Its processes, on all machines.
        open_data: Opens the training and the evaluation images.

    Returns:
        What `open_data` returned, so that a million files are listed once.

    Raises:
        InputError: Everything that is wrong, one line each, named by its key or path.
    """
    lines = [*device_problems(config), *_batches(config, world_size), *_packages(config), *_folders(config)]
    data = _collect(lines, open_data)
    if not any(line.startswith("global_batch_size") for line in lines):
        plan = epoch_plan(config, world_size)
        if data is not None:
            lines += _samples(config, world_size, plan, *data)
        classes = config.model.num_classes or (len(data[0].classes) if data is not None else 1000)
        network = _collect(lines, lambda: planned_network(config, classes))
        if network is not None:
            lines += _network(config, network, world_size, plan)
    if lines or data is None:
        raise InputError(*lines)
    return data


def _collect(lines: list[str], make: Callable[[], Made]) -> Made | None:
    """What is made, or None and the errors among the lines."""
    try:
        return make()
    except InputError as error:
        lines += error.lines
    except DataError as error:
        lines += str(error).splitlines()
    return None


def device_problems(config: RunConfig) -> Iterator[str]:
    """The device is there, for each process, and can compute in this precision."""
    there = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = device_name(config.device)
    if not there[device]:
        yield f"device: {device} is not there; allowed here: auto, {', '.join(name for name in there if there[name])}"
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = {"cpu": processes, "gpu": torch.cuda.device_count(), "mps": 1}[device]
    if processes > devices:
        yield f"device: {processes} processes on a machine with {devices} {device.upper()}; allowed: -n {devices}"
    if config.precision != "fp32" and device != "gpu":
        # Composer refuses it on a CPU and leaves it out without a word on MPS (core/precision.py).
        yield f"precision: {config.precision} needs a GPU, and this run is on the {device}; allowed: fp32"
    if (
        config.precision == "amp_bf16"
        and device == "gpu"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        yield f"precision: amp_bf16 is not supported by {torch.cuda.get_device_name()}; allowed: fp32, amp_fp16"


def _batches(config: RunConfig, world_size: int) -> Iterator[str]:
    """At the size of every stage, the batch divides by the processes and by its portions."""
    for size in dict.fromkeys(image_size(config, epoch) for epoch in range(config.epochs)):
        if config.device_batch_size is not None:
            batch = at_size(config.device_batch_size, size)
        else:
            assert config.global_batch_size is not None  # a config has one of the two
            batch, rest = divmod(at_size(config.global_batch_size, size), world_size)
            if rest:
                yield (
                    f"global_batch_size: {batch * world_size + rest} images of {size} px do not divide by "
                    f"{world_size} processes; allowed: a multiple of {world_size}"
                )
                continue
        portion = None if config.device_microbatch_size is None else at_size(config.device_microbatch_size, size)
        if portion is not None and portion < batch and batch % portion:
            yield (
                f"device_microbatch_size: {portion} does not divide the device's batch of {batch} images of {size} px; "
                f"allowed: a divisor of {batch}"
            )


def _packages(config: RunConfig) -> Iterator[str]:
    """The optional loggers are installed."""
    for name in ("wandb", "mlflow"):
        if getattr(config.loggers, name) is not None and importlib.util.find_spec(name) is None:
            yield f"loggers.{name}: the package is not installed; pip install {name}, or set loggers.{name}=off"


def _folders(config: RunConfig) -> Iterator[str]:
    """The run can write where it wants to."""
    names = {"runs_folder": config.runs_folder, "run_name": config.run_name}
    for key, folder in (
        ("runs_folder", Path(config.runs_folder) / config.run_name),
        ("checkpoints.folder", Path(config.checkpoints.folder.format(**names))),
    ):
        nearest = next(parent for parent in (folder, *folder.parents, Path()) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            yield f"{key}: {folder} cannot be written: {nearest.resolve()}: {error.strerror or error}"


def _samples(config: RunConfig, world_size: int, plan: tuple[EpochPlan, ...], train: Source, val: Source) -> list[str]:
    """There are outputs for all classes, and images for all processes."""
    lines = []
    if config.model.num_classes is not None and len(train.classes) > config.model.num_classes:
        lines.append(
            f"model.num_classes: {config.model.num_classes}, but {config.data.path} has {len(train.classes)} classes; "
            f"allowed: at least {len(train.classes)}, or null"
        )
    _collect(lines, lambda: PositionSampler(len(train), plan, config.seed, 0, world_size))
    size = config.eval.sizes[0]
    batch = at_size(config.eval.device_batch_size, size)
    _collect(lines, lambda: EvalSampler(len(val), size, batch, 0, world_size))
    return lines


def planned_network(config: RunConfig, num_classes: int) -> nn.Module:
    """The network after surgery, on the meta device: shapes without numbers.

    Raises:
        InputError: No classifier has that name.
    """
    algorithms = config.algorithms
    with torch.device("meta"):
        network = build_network(config.model.name, num_classes)
        if algorithms.blurpool is not None:
            apply_blurpool(network, **algorithms.blurpool.model_dump())
        if algorithms.squeeze_excite is not None:
            apply_squeeze_excite(network, **algorithms.squeeze_excite.model_dump())
    return network


def _network(config: RunConfig, network: nn.Module, world_size: int, plan: tuple[EpochPlan, ...]) -> list[str]:
    """The network takes images of every size, and the device has the memory for a step at each."""
    lines = []
    trained = dict.fromkeys((entry.size, True) for entry in plan)
    for size, training in (*trained, *((size, False) for size in config.eval.sizes if (size, True) not in trained)):
        try:
            _, auxiliary = heads(network.train(training)(torch.empty(2, 3, size, size, device="meta")))
            if auxiliary and type(network).__name__ not in AUXILIARY_WEIGHTS:
                return [f"model.name: {config.model.name} has several outputs in training, which is not supported"]
        except NotImplementedError:
            return []  # a layer that knows no meta device: nothing can be told
        except Exception as error:
            if "meta" in str(error):
                return []
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            lines.append(f"model.name: {config.model.name} takes no images of {size} px: {reason}")
    lines += _last_layers(config, network)
    memory = device_bytes(config)
    if lines or memory is None:
        return lines
    key = "device_batch_size" if config.global_batch_size is None else "global_batch_size"
    if config.device_microbatch_size is not None:
        key = "device_microbatch_size"
    return check_memory(network, loads(config, world_size, plan), memory, setting_of(config, world_size), key)


def _last_layers(config: RunConfig, network: nn.Module) -> Iterator[str]:
    """The layers that single keys name without naming them."""
    last = config.algorithms.fixres is not None and config.algorithms.fixres.train == "classifier"
    needs: dict[str, list[Callable[[nn.Module], object]]] = {
        "loss.name: binary_cross_entropy": [classifier] if config.loss.name == "binary_cross_entropy" else [],
        "algorithms.fixres.train: classifier": [classifier, last_batchnorm] if last else [],
    }
    for key, layers in needs.items():
        for layer in layers:
            try:
                layer(network)
            except ValueError as error:
                yield f"{key}: {error}"


def device_bytes(config: RunConfig) -> float | None:
    """Memory of one device, from the config or from the GPU; None where neither says."""
    if config.device_memory_gb is not None:
        return config.device_memory_gb * 1e9
    if device_name(config.device) != "gpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory


def setting_of(config: RunConfig, world_size: int) -> Setting:
    """What needs memory besides the images."""
    return Setting(
        half=config.precision != "fp32",
        copies=sum(getattr(config.algorithms, name) is not None for name in ("ema", "swa", "sam")),
        processes=world_size,
        checkpointing=config.model.activation_checkpointing,
    )


def loads(config: RunConfig, world_size: int, plan: tuple[EpochPlan, ...]) -> list[Load]:
    """What one device works on at a time, in each stage."""
    fixres, portions = config.algorithms.fixres, config.device_microbatch_size
    only_classifier = fixres is not None and fixres.train == "classifier"
    found = []
    for entry in dict.fromkeys(plan):
        images = entry.global_batch_size // world_size
        if portions is not None:
            images = min(images, at_size(portions, entry.size))
        found.append(Load(entry.size, images, only_classifier and entry.crop == "center"))
    return found
