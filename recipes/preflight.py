"""Checks that need the machine and the data, made before anything is trained."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from composer.utils import dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from algorithms.fixres import classifier, freeze, hold_statistics, last_batchnorm
from data.config import EpochPlan
from data.errors import InputError
from data.sampler import EvalSampler, PositionSampler
from data.source import Source
from data.text import first_line
from recipes.checkpoints.store import Places
from recipes.config import RunConfig, at_size
from recipes.model import AUXILIARY_WEIGHTS, heads, planned_network, residual_blocks
from recipes.schedule import epoch_plan
from recipes.trainer import device_name
from recipes.watch.sinks import logger_problems


class Ready(NamedTuple):
    """What a run starts from."""

    config: RunConfig  # with values for this device in place of `auto`
    train: Source
    val: Source
    plan: tuple[EpochPlan, ...]


def require_ready(config: RunConfig, world_size: int, open_data: Callable[[], tuple[Source, Source]]) -> Ready:
    """Refuse a run that cannot work on this machine with `world_size` processes over all machines.

    Returns the images that `open_data` opened too, so that a million files are listed only once. InputError: everything
    that is wrong, one line each, named by its key or path.
    """
    config = with_precision(config)
    lines = list(device_problems(config))
    plan, data, network = tuple[EpochPlan, ...](), None, None
    with _added_to(lines):
        plan = epoch_plan(config, world_size)
    lines += [*_portions(config, world_size, plan), *logger_problems(config.loggers), *_folders(config)]
    with _added_to(lines):
        data = open_data()
    if plan and data is not None:
        lines += _samples(config, world_size, plan, *data)
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


def _portions(config: RunConfig, world_size: int, plan: Sequence[EpochPlan]) -> Iterator[str]:
    """Yields an error unless the device's batch in each stage is a multiple of its microbatches."""
    for entry in {entry.size: entry for entry in plan}.values():
        images, portion = entry.global_batch_size // world_size, pass_images(config, entry, world_size)
        if images % portion:
            yield (
                f"device_microbatch_size: {portion} does not divide the device's batch of {images} images of "
                f"{entry.size} px; allowed: a divisor of {images}"
            )


def _folders(config: RunConfig) -> Iterator[str]:
    """Yields an error for each folder that the run could not write."""
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    folders = {"runs_folder": places.run_folder} | ({} if places.remote else {"checkpoints.folder": places.local})
    for key, folder in folders.items():
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
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
        config = with_portions(config, network, world_size, plan, min(known, default=None))
    return config, [] if memory is None else check_memory(network, config, world_size, plan, memory)


def _last_layers(config: RunConfig, network: nn.Module) -> Iterator[str]:
    """Yields an error if the network lacks the layers that a loss or FixRes needs."""
    needs: list[tuple[str, Callable[[nn.Module], object]]] = []
    if config.loss.name == "binary_cross_entropy":
        needs.append(("loss.name: binary_cross_entropy", classifier))
    if (fixres := config.algorithms.fixres) is not None and fixres.train == "classifier":
        needs += [("algorithms.fixres.train: classifier", layer) for layer in (classifier, last_batchnorm)]
    for key, layer in needs:
        try:
            layer(network)
        except ValueError as error:
            yield f"{key}: {error}"


# Memory: the network runs on torch's meta device, which computes shapes without values, and every tensor that autograd
# keeps for the backward pass is counted. In mixed precision the network is cast to half for the count: for
# convolutions, BatchNorm and ReLU, autocast keeps the same tensors in the same types, and its half-precision copies of
# the weights are added. Networks with LayerNorm or softmax keep some tensors in FP32, and need more than is computed.

CONTEXT_BYTES = 0.7e9  # CUDA's context and the handles of cuDNN and cuBLAS
NCCL_BYTES = 0.4e9  # NCCL's buffers, where several processes train; an assumption, not a measurement
OVERHEAD = 1.06
"""Bytes allocated per byte of activations: gradients in the backward pass, cuDNN's workspace, fragmentation.

With CONTEXT_BYTES it predicts which batches fit an RTX 3090 (23.70 GiB) in timm's AMP training benchmark, which tries
512, 384, 256, 192, ... (pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv): resnet50,
which fits at 512, shows that it is at most 1.075; resnetaa50, which does not, that it is above 1.05. It agrees with
NVIDIA's ResNet-50 v1.5 on a V100-16GB (DeepLearningExamples). VGG, whose first layers are its largest, needs 5 % more.
"""


class Memory(NamedTuple):
    """Peak bytes that one device needs: `fixed + per_image * images`."""

    fixed: float
    per_image: float


def device_bytes(config: RunConfig) -> float | None:
    """Memory of one device, from the config or from the GPU; None if neither gives it."""
    if config.device_memory_gb is not None:
        return config.device_memory_gb * 1e9
    if device_name(config.device) != "gpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory


def check_memory(
    network: nn.Module, config: RunConfig, world_size: int, plan: Sequence[EpochPlan], available: float
) -> list[str]:
    """Errors for the stages that do not fit: `network` is of `planned_network`, `available` the bytes of one device."""
    keys = ("device_microbatch_size", "global_batch_size", "device_batch_size")
    key = next(key for key in keys if getattr(config, key) is not None)
    lines: list[str] = []
    for entry in dict.fromkeys(plan):
        images = pass_images(config, entry, world_size)
        fixed, per_image = step_memory(network, config, world_size, entry.size, entry.crop == "center")
        needed = fixed + per_image * images
        if needed > available:
            lines.append(
                f"{key}: {images} images of {entry.size} px need about {needed / 1e9:.1f} GB, the device has "
                f"{available / 1e9:.1f} GB; at most {max(0, int((available - fixed) / per_image))} fit"
            )
    return lines


FILLED = 0.9
"""Share of a device's memory that `device_microbatch_size: auto` fills by the plan.

On one H100, the plan was 0 to 8 % above what was reserved (16.3, 16.6 and 26.4 GB against 15.7, 15.3 to 16.0 and
26.3), so the rest is for the driver, and for networks that need more than the plan says.
"""


def with_portions(
    config: RunConfig, network: nn.Module, world_size: int, plan: Sequence[EpochPlan], available: float | None
) -> RunConfig:
    """The config with the largest microbatches that fit, by image size, in place of `device_microbatch_size: auto`.

    A microbatch is a divisor of the device's batch that fills at most `FILLED` of `available`, the bytes of one device,
    or one image if none does. Nothing but the arguments counts, in particular not what else is in the memory now, so a
    resume takes the same. `available` None: whole batches. `network`: of `planned_network`.
    """
    if available is None:
        return config.model_copy(update={"device_microbatch_size": None})
    portions: dict[int, int] = {}
    for entry in dict.fromkeys(plan):
        images = entry.global_batch_size // world_size
        fixed, per_image = step_memory(network, config, world_size, entry.size, entry.crop == "center")
        divisors = (count for count in range(images, 1, -1) if images % count == 0)
        most = next((count for count in divisors if fixed + per_image * count <= FILLED * available), 1)
        portions[entry.size] = min(most, portions.get(entry.size, most))
    return config.model_copy(update={"device_microbatch_size": portions})


def pass_images(config: RunConfig, entry: EpochPlan, world_size: int) -> int:
    """Images in one forward and backward pass of a device; of the whole batch where the config says `auto`."""
    images, portions = entry.global_batch_size // world_size, config.device_microbatch_size
    return images if portions is None or isinstance(portions, str) else min(images, at_size(portions, entry.size))


def step_memory(network: nn.Module, config: RunConfig, world_size: int, size: int, fixres: bool = False) -> Memory:
    """Memory that one device needs for a training step; `network`: of `planned_network`; `fixres`: in its stage."""
    frozen = fixres and config.algorithms.fixres is not None and config.algorithms.fixres.train == "classifier"
    half = config.precision != "fp32"
    saving = config.model.activation_checkpointing
    kept = activation_memory(network, size, half=half, frozen=frozen, checkpointing=saving)
    copies = sum(getattr(config.algorithms, name) is not None for name in ("ema", "swa", "sam"))
    together = world_size > 1
    # Weight, gradient, momentum, copies; DDP's buckets are a second gradient, autocast's copies half a weight.
    times = 3 + copies + together + (0.5 if half else 0)
    weights = 4 * times * sum(parameter.numel() for parameter in network.parameters())
    fixed = weights + CONTEXT_BYTES + (NCCL_BYTES if together else 0)
    # The images in FP32, and the uint8 they came in.
    return Memory(fixed + kept.fixed * OVERHEAD, kept.per_image * OVERHEAD + 3 * size**2 * 5)


def activation_memory(network: nn.Module, size: int, *, half: bool, frozen: bool, checkpointing: bool) -> Memory:
    """What autograd keeps for the backward pass; in a frozen stage, also the peak of the forward pass.

    The network is on the meta device. `half`: mixed precision; `frozen`: only the classifier and the last BatchNorm are
    trained; `checkpointing`: residual blocks keep their inputs only.
    """
    network = copy.deepcopy(network).train()
    if frozen:
        freeze(network)
        hold_statistics(network)
    if half:
        network = network.half()
    (two, _), (four, largest) = (_kept_bytes(network, images, size, checkpointing) for images in (2, 4))
    per_image = (four - two) / 2
    # A forward pass that keeps nothing holds a block's input, and a layer's input and output.
    return Memory(two - 2 * per_image, per_image + (3 * largest / 4 if frozen else 0))


def _kept_bytes(network: nn.Module, images: int, size: int, checkpointing: bool) -> tuple[int, int]:
    """What a step keeps of so many images, and the largest output of a layer."""
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    blocks = residual_blocks(network) if checkpointing else []
    kept: dict[nn.Module | None, dict[int, Tensor]] = {None: {}, **{block: {} for block in blocks}}
    current: list[nn.Module | None] = [None]
    outputs: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own and storage not in kept[None]:
            kept[current[-1]][storage] = tensor  # kept alive, so that no other storage gets its address
        return tensor

    def enter(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[None].update({tensor.untyped_storage()._cdata: tensor for tensor in inputs})
        current.append(block)

    def leave(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        current.pop()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.untyped_storage().nbytes())

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    handles += [layer.register_forward_hook(note) for layer in network.modules() if not list(layer.children())]
    batch = torch.empty(images, 3, size, size, device="meta", dtype=next(network.parameters()).dtype)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, auxiliary = heads(network(batch))
        for one in (logits, *auxiliary):
            nn.functional.cross_entropy(one.float(), torch.empty_like(one, dtype=torch.float32))
    for handle in handles:
        handle.remove()
    # A block that recomputes its activations holds them all at once, one block at a time.
    again = max((_bytes(tensors) for block, tensors in kept.items() if block is not None), default=0)
    return _bytes(kept[None]) + again, max(outputs, default=0)


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
