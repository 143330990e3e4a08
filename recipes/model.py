"""The classifier that is trained: torchvision's or timm's, in the form that Composer's Trainer takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from algorithms.fixres import classifier
from data.loader import IGNORED_LABEL
from recipes.errors import InputError

LossFunction = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]
Forward = Callable[..., Any]
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def build_network(name: str, num_classes: int) -> nn.Module:
    """A randomly initialised classifier.

    Args:
        name: A classifier of torchvision.models, or `timm/NAME`.
        num_classes: Outputs of the last layer.

    Raises:
        InputError: No classifier has that name; the message holds the nearest ones.
    """
    import difflib

    if name.startswith("timm/"):
        import timm

        known, build = timm.list_models(), functools.partial(timm.create_model, name.removeprefix("timm/"))
    else:
        import torchvision.models

        known = torchvision.models.list_models(module=torchvision.models)
        build = functools.partial(torchvision.models.get_model, name, weights=None)
    if name.removeprefix("timm/") not in known:
        near = difflib.get_close_matches(name.removeprefix("timm/"), known, n=3)
        prefix = "timm/" if name.startswith("timm/") else ""
        hint = f"; did you mean {' or '.join(prefix + other for other in near)}?" if near else ""
        raise InputError(f"model.name: {name!r} is no classifier of torchvision, nor of timm with `timm/`{hint}")
    return build(num_classes=num_classes)


def residual_blocks(network: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network built like torchvision's or timm's ResNet, in order; none in other networks."""
    return [block for block in network.modules() if hasattr(block, "downsample") and hasattr(block, "bn2")]


def last_norms(network: nn.Module) -> list[nn.Module]:
    """The last BatchNorm of each residual block: `bn3` of a bottleneck, `bn2` of a basic block."""
    return [
        block.get_submodule("bn2" if getattr(block, "bn3", None) is None else "bn3")
        for block in residual_blocks(network)
    ]


def set_last_norms(network: nn.Module, scale: float) -> None:
    """Start each residual block with this scale of its last BatchNorm: 0 makes it the identity, 1 is torch's default.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1.
    """
    for norm in last_norms(network):
        nn.init.constant_(norm.get_parameter("weight"), scale)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm computes with the batch's statistics, and leaves its running ones as they are."""
    saved = [
        (part, dict(part._buffers)) for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    for norm, buffers in saved:
        # Copies take the updates: autograd must see the same operations as in the first pass.
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in saved:
            norm._buffers.update(buffers)


def checkpoint_activations(network: nn.Module) -> int:
    """Make each residual block drop its activations and compute them again in the backward pass.

    The second pass must not count in BatchNorm's running statistics, so they are left alone there: gradients and
    buffers are those of the plain model.

    Returns:
        The number of blocks that do so now.
    """
    blocks = residual_blocks(network)
    for block in blocks:
        plain = block.forward

        def contexts(block: nn.Module = block) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), _frozen_statistics(block)

        def forward(*args: Any, plain: Forward = plain, contexts: Contexts = contexts) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args)
            return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts)

        block.forward = forward
    return len(blocks)


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the classes and averaged over the images, as in MosaicML's ResNet recipes.

    Args:
        logits: Shape (N, num_classes).
        target: Labels, int64 (N,), or soft targets, float (N, num_classes) in [0, 1].
    """
    if target.ndim == 1:
        target = F.one_hot(target, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum") / len(logits)


AUXILIARY_WEIGHTS = {"GoogLeNet": 0.3, "Inception3": 0.4}
"""Weight of the loss of each auxiliary classifier, by torchvision's class: as in its references
(pytorch/vision, references/classification) and Szegedy et al. 2014, section 5."""


def heads(output: Any) -> tuple[Tensor, list[Tensor]]:
    """What a network in training gave, as its logits and those of its auxiliary classifiers."""
    if isinstance(output, Tensor):
        return output, []
    logits, *auxiliary = output
    return logits, [one for one in auxiliary if one is not None]


class _OfLastStep(list[Tensor]):
    """Tensors of a graph, which a copy of their model does without: torch copies none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfLastStep:
        return _OfLastStep()


class Classifier(ComposerModel):
    """An image classifier with its loss and its evaluation metrics.

    Args:
        network: Maps float images (N, 3, H, W) to logits (N, num_classes).
        num_classes: Number of logits.
        loss: `cross_entropy` or `binary_cross_entropy`; both take labels (N,) or soft targets (N, num_classes).
    """

    def __init__(self, network: nn.Module, num_classes: int, loss: str) -> None:
        super().__init__()
        self.module = network
        self.num_classes = num_classes
        self._auxiliary = _OfLastStep()
        self._loss: LossFunction = F.cross_entropy if loss == "cross_entropy" else binary_cross_entropy

    def forward(self, batch: Batch) -> Tensor:
        """Logits (N, num_classes) of a batch of images (N, 3, H, W) and labels."""
        logits, auxiliary = heads(self.module(batch[0]))
        self._auxiliary = _OfLastStep(auxiliary)
        # Algorithms want one tensor, and DDP must find in it all parameters that the step uses.
        return logits + 0 * sum(one.sum() for one in self._auxiliary) if self._auxiliary else logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The training loss, a scalar; with that of the auxiliary classifiers, where the network has some."""
        loss = self._loss(outputs, batch[1])
        for logits in self._auxiliary:
            loss = loss + AUXILIARY_WEIGHTS[type(self.module).__name__] * self._loss(logits, batch[1])
        return loss

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Top-1, top-5 and cross-entropy for evaluation.

        None for training: under MixUp and CutMix, accuracy against unmixed labels says little, and costs time.
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


def build_classifier(
    name: str, num_classes: int, *, zero_init_residual: bool, loss: str, sync_batchnorm: bool, device_type: str
) -> Classifier:
    """The model that the Trainer gets.

    Args:
        name: As in `build_network`.
        num_classes: Number of classes.
        zero_init_residual: Start each residual block as the identity.
        loss: `cross_entropy` or `binary_cross_entropy`. With the latter the classifier's bias starts at
            -log(num_classes), so that each class starts at probability 1 / num_classes
            (mosaicml/benchmarks, blogs/resnet/model.py).
        sync_batchnorm: Take BatchNorm's statistics over all processes.
        device_type: torch's name of the device type, such as `cuda`.

    Raises:
        InputError: No classifier has that name.
    """
    network = build_network(name, num_classes)
    set_last_norms(network, 0.0 if zero_init_residual else 1.0)
    if loss == "binary_cross_entropy":
        nn.init.constant_(classifier(network).bias, -math.log(num_classes))
    if sync_batchnorm:
        from recipes.sync_batchnorm import convert

        network = convert(network, device_type)
    return Classifier(network, num_classes, loss)
