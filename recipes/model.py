"""The classifier that is trained: its network, the surgery of the techniques, its loss and metrics."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from composer import Event, Logger, State
from composer.algorithms.ghost_batchnorm.ghost_batchnorm import _GhostBatchNorm
from composer.models import ComposerModel
from composer.utils import dist as composer_dist
from composer.utils import get_device
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models.resnet import Bottleneck

from algorithms.build import build_algorithms
from algorithms.config import AlgorithmsConfig
from algorithms.fixres import classifier
from data.errors import InputError
from data.loader import IGNORED_LABEL
from data.text import did_you_mean
from recipes.config import LossConfig, RunConfig

Batch = tuple[Tensor, Tensor]


def build_network(name: str, num_classes: int) -> nn.Module:
    """A randomly initialised classifier of torchvision, or of timm with the name `timm/NAME`; else InputError."""
    prefix, short = ("timm/", name.removeprefix("timm/")) if name.startswith("timm/") else ("", name)
    if prefix:
        import timm

        known, build = timm.list_models(), timm.create_model
    else:
        import torchvision.models

        known, build = torchvision.models.list_models(module=torchvision.models), torchvision.models.get_model
    if short not in known:
        hint = did_you_mean(short, {other: prefix + other for other in known})
        raise InputError(f"model.name: {name!r} is not a classifier of torchvision, nor of timm with `timm/`{hint}")
    network: nn.Module = build(short, num_classes=num_classes)
    return network


def residual_blocks(network: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network built like torchvision's or timm's ResNet, in order; none in other networks."""
    return [block for block in network.modules() if hasattr(block, "downsample") and hasattr(block, "bn2")]


def last_norms(network: nn.Module) -> list[nn.Module]:
    """The last BatchNorm of each residual block: `bn3` of a bottleneck, `bn2` of a basic block."""
    blocks = residual_blocks(network)
    return [block.get_submodule("bn3" if getattr(block, "bn3", None) is not None else "bn2") for block in blocks]


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics, and leaves its running ones unchanged."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    saved = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        # Copies receive the updates: autograd must see the same operations as in the first pass.
        norm._buffers.update({name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, saved, strict=True):
            norm._buffers.update(buffers)


def checkpoint_activations(network: nn.Module) -> int:
    """Make each residual block drop its activations and compute them again in the backward pass; returns their number.

    The second pass leaves BatchNorm's running statistics unchanged, so gradients and buffers are those of the plain
    model.
    """
    blocks = residual_blocks(network)
    for block in blocks:
        block.forward = functools.partial(_recompute, block, block.forward)
    return len(blocks)


def _recompute(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block))
    )


def binary_cross_entropy(logits: Tensor, target: Tensor, mean: bool = False, threshold: float | None = None) -> Tensor:
    """Binary cross-entropy, summed over the classes and averaged over the images, as in MosaicML's ResNet recipes.

    Logits (N, num_classes); targets are labels, int64 (N,), or soft, float (N, num_classes) in [0, 1]. With `mean`, it
    is averaged over the classes too, as timm's `BinaryCrossEntropy`; a target above a `threshold` is 1, any other 0.
    """
    if target.ndim == 1:
        target = F.one_hot(target, logits.shape[1])
    if threshold is not None:
        target = target > threshold
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="mean" if mean else "sum")
    return loss if mean else loss / len(logits)


AUXILIARY_WEIGHTS = {"GoogLeNet": 0.3, "Inception3": 0.4}
"""Weight of the loss of each auxiliary classifier, by torchvision's class: as in its references
(pytorch/vision, references/classification) and Szegedy et al. 2014, section 5."""


def heads(output: Any) -> tuple[Tensor, list[Tensor]]:
    """A network's output in training, as its logits and those of its auxiliary classifiers."""
    if isinstance(output, Tensor):
        return output, []
    logits, *auxiliary = output
    return logits, [one for one in auxiliary if one is not None]


class _OfLastStep(list[Tensor]):
    """Tensors of a graph. A copy of the model gets none, because torch cannot copy them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfLastStep:
        return _OfLastStep()


class Classifier(ComposerModel):
    """An image classifier with its loss and its evaluation metrics.

    `network` maps float images (N, 3, H, W) to logits (N, num_classes); the loss takes labels (N,) or soft targets
    (N, num_classes).
    """

    def __init__(self, network: nn.Module, num_classes: int, loss: LossConfig) -> None:
        super().__init__()
        self.module = network
        self.num_classes = num_classes
        self._auxiliary = _OfLastStep()
        binary = functools.partial(binary_cross_entropy, mean=loss.mean_over_classes, threshold=loss.target_threshold)
        self._loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy if loss.name == "cross_entropy" else binary

    def forward(self, batch: Batch) -> Tensor:
        """Logits (N, num_classes) of a batch of images (N, 3, H, W) and labels."""
        logits, auxiliary = heads(self.module(batch[0]))
        self._auxiliary = _OfLastStep(auxiliary)
        # Algorithms expect one tensor, and DDP must find in it all parameters that the step uses.
        return logits + 0 * sum(one.sum() for one in self._auxiliary) if self._auxiliary else logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The training loss, a scalar; it includes that of the auxiliary classifiers if the network has any."""
        loss = self._loss(outputs, batch[1])
        for logits in self._auxiliary:
            loss = loss + AUXILIARY_WEIGHTS[type(self.module).__name__] * self._loss(logits, batch[1])
        return loss

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Top-1, top-5 and cross-entropy for evaluation.

        None for training: with MixUp and CutMix, accuracy against unmixed labels says little, and costs time.
        """
        if is_train:
            return {}
        top5 = min(5, self.num_classes)
        return {
            "top1": MulticlassAccuracy(self.num_classes, top_k=1, average="micro"),
            "top5": MulticlassAccuracy(self.num_classes, top_k=top5, average="micro"),
            "loss": MeanMetric(nan_strategy="disable"),
        }

    def update_metric(self, batch: Batch, outputs: Tensor, metric: Metric) -> dict[str, Any]:
        """Count a batch in one metric, without the images whose label is IGNORED_LABEL."""
        kept = batch[1] != IGNORED_LABEL
        logits, labels = outputs[kept].float(), batch[1][kept]
        if not len(labels):
            return {}
        if isinstance(metric, MeanMetric):
            metric.update(F.cross_entropy(logits, labels, reduction="none"))
        else:
            metric.update(logits, labels)
        return {}


def build_classifier(config: RunConfig, num_classes: int, device_type: str) -> Classifier:
    """The model that the Trainer gets; `device_type` is torch's name, such as `cuda`; InputError: no such classifier.

    With a sum of binary cross-entropies the classifier's bias starts at -log(num_classes), so that each class starts at
    probability 1 / num_classes (mosaicml/benchmarks, blogs/resnet/model.py).
    """
    network = build_network(config.model.name, num_classes)
    for norm in last_norms(network):  # at zero each block starts as the identity (Goyal et al. 2017, section 5.1)
        nn.init.constant_(norm.get_parameter("weight"), 0.0 if config.model.zero_init_residual else 1.0)
    if config.loss.name == "binary_cross_entropy" and not config.loss.mean_over_classes:
        nn.init.constant_(classifier(network).bias, -math.log(num_classes))
    if config.model.sync_batchnorm and composer_dist.get_world_size() > 1:
        network = sync_batchnorm(network, device_type)
    return Classifier(network, num_classes, config.loss)


def operated_network(name: str, num_classes: int, algorithms: AlgorithmsConfig) -> nn.Module:
    """A classifier after the surgery of a run's techniques, so that the run's weights fit; in evaluation mode.

    The techniques themselves do the surgery, on the events that the Trainer would send. Memory formats and wrappers are
    left out: they change no result. Stochastic depth has its full drop rate, which a run reaches after `drop_warmup`.
    """
    model = Classifier(build_network(name, num_classes), num_classes, LossConfig())
    kept = ("blurpool", "squeeze_excite", "stochastic_depth", "composer")
    others = {field: None for field in type(algorithms).model_fields if field not in kept}
    state = State(model, rank_zero_seed=0, run_name="", device=get_device("cpu"))
    logger = Logger(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a technique without effect was reported when the run was trained
        for algorithm in build_algorithms(algorithms.model_copy(update=others), total_batches=1, epochs=3):
            for event in (Event.INIT, Event.BEFORE_LOAD):  # what the Trainer sends before it loads a checkpoint
                if algorithm.match(event, state):
                    algorithm.apply(event, state, logger)
    return state.model.get_submodule("module").eval()


def planned_network(config: RunConfig, num_classes: int) -> nn.Module:
    """The network after surgery, on torch's meta device: shapes without values.

    Stochastic depth and Composer's other algorithms, some of which need values, are left out.
    """
    algorithms = config.algorithms.model_copy(update={"stochastic_depth": None, "composer": {}})
    with torch.device("meta"):
        return operated_network(config.model.name, num_classes, algorithms)


def for_inference(network: nn.Module) -> None:
    """Replace, in place, the layers that differ from plain ones only in training.

    In evaluation, stochastic depth multiplies each residual branch by the share of training steps in which it was used
    (composer/algorithms/stochastic_depth/stochastic_layers.py). The branch ends in a BatchNorm, and the same factor on
    its weight and bias is the same function. Ghost BatchNorm normalises with the running statistics of the BatchNorm
    inside it, but refuses small batches (composer/algorithms/ghost_batchnorm/ghost_batchnorm.py).
    """
    for block in network.modules():
        if isinstance(block, Bottleneck) and hasattr(block, "drop_rate"):
            keep = 1.0 - float(block.drop_rate)
            block.bn3.weight.data.mul_(keep)
            block.bn3.bias.data.mul_(keep)
            del block.drop_rate
            block.__dict__.pop("forward", None)
    for name, norm in list(network.named_modules()):
        if isinstance(norm, _GhostBatchNorm):
            network.set_submodule(name, norm.batchnorm)


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with training statistics over all processes; torch's SyncBatchNorm refuses CPU tensors.

    Input and output (N, C, H, W). N may differ between processes. Without a process group it is BatchNorm2d.
    """

    # The graphs of two processes whose N differ would add up different tensors.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training with the statistics over all processes."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        shape = (1, -1, 1, 1)
        count: Tensor = all_reduce(input.new_tensor(input.numel() / input.shape[1]))
        mean: Tensor = all_reduce(input.sum((0, 2, 3))) / count
        centred = input - mean.view(shape)
        variance: Tensor = all_reduce(centred.square().sum((0, 2, 3))) / count
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():  # without `track_running_stats` there are none of the three
                self.num_batches_tracked += 1
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        return output * self.weight.view(shape) + self.bias.view(shape) if self.affine else output


def sync_batchnorm(network: nn.Module, device_type: str) -> nn.Module:
    """The network with synchronised BatchNorm; `device_type` is torch's, such as `cuda`."""
    if device_type == "cpu":
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = CPUSyncBatchNorm2d
        return network
    # timm's function handles its own BatchNormAct2d, and everything else as torch's does.
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(network)
    return converted
