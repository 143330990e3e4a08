"""The network as a run trains it: its architecture after the techniques that change it."""

from __future__ import annotations

import warnings

from composer import Event, Logger, State
from composer.algorithms.ghost_batchnorm.ghost_batchnorm import _GhostBatchNorm
from composer.utils import get_device
from torch import nn
from torchvision.models.resnet import Bottleneck

from algorithms.config import AlgorithmsConfig
from recipes.model import Classifier, build_network

_SURGEONS = ("blurpool", "squeeze_excite", "stochastic_depth")
_WHEN = (Event.INIT, Event.BEFORE_LOAD)
"""The Trainer's events before it loads a checkpoint."""


def operated_network(name: str, num_classes: int, algorithms: AlgorithmsConfig) -> nn.Module:
    """A classifier with the layers that a run's techniques put into it, which its weights fit; in evaluation mode.

    The techniques themselves do it, through the events that the Trainer would give them. Memory formats and wrappers
    are left out: they change no result. Stochastic depth has its full drop rate, which a run reaches after
    `drop_warmup`.

    Args:
        name: As in `build_network`.
        num_classes: Outputs of the last layer.
        algorithms: The run's.

    Raises:
        InputError: No classifier has that name.
    """
    classifier = Classifier(build_network(name, num_classes), num_classes, "cross_entropy")
    others = {field: None for field in type(algorithms).model_fields if field not in (*_SURGEONS, "composer")}
    state = State(classifier, rank_zero_seed=0, run_name="", device=get_device("cpu"))
    logger = Logger(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what had no effect was said when the run was trained
        for algorithm in algorithms.model_copy(update=others).build(total_batches=1, epochs=3):
            for event in _WHEN:
                if algorithm.match(event, state):
                    algorithm.apply(event, state, logger)
    return state.model.get_submodule("module").eval()


def for_inference(network: nn.Module) -> None:
    """Take out what only training needs and what is a plain layer's work at the test, in place.

    Stochastic depth multiplies each residual branch by its share of training steps at the test
    (composer/algorithms/stochastic_depth/stochastic_layers.py); the branch ends in a BatchNorm, and that factor on its
    weight and bias is the same function. Ghost BatchNorm normalises with the running statistics of the BatchNorm within
    it, but refuses small batches (composer/algorithms/ghost_batchnorm/ghost_batchnorm.py).

    Args:
        network: Of `operated_network`, with its weights.
    """
    for block in network.modules():
        if isinstance(block, Bottleneck) and hasattr(block, "drop_rate"):
            keep = 1.0 - float(block.drop_rate)
            block.bn3.weight.data.mul_(keep)
            block.bn3.bias.data.mul_(keep)
            del block.drop_rate
            block.__dict__.pop("forward", None)
    for name, norm in [(name, one) for name, one in network.named_modules() if isinstance(one, _GhostBatchNorm)]:
        network.set_submodule(name, norm.batchnorm)
