"""FixRes: finish at the test resolution and crop, on all parameters or the classifier's only."""

from __future__ import annotations

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from algorithms.config import FixResConfig


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer defined, which is the classifier in torchvision's and timm's networks; or ValueError."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the model has no linear layer that could be its classifier")
    return layers[-1]


def last_batchnorm(model: nn.Module) -> _BatchNorm:
    """The last BatchNorm defined, except those on shortcuts, which blocks define last; ValueError if none."""
    named = reversed([*model.named_modules()])
    layers = (module for name, module in named if not {"downsample", "shortcut"} & set(name.split(".")))
    for module in layers:
        if isinstance(module, _BatchNorm):
            return module
    raise ValueError("the model has no BatchNorm")


def freeze(model: nn.Module) -> None:
    """Leave only the parameters of the classifier and the last BatchNorm trainable.

    A frozen parameter gets no gradient, and torch's and Composer's optimizers skip parameters without one: neither
    momentum nor weight decay moves it.
    """
    model.requires_grad_(False)
    classifier(model).requires_grad_(True)
    last_batchnorm(model).requires_grad_(True)


def hold_statistics(model: nn.Module) -> None:
    """Put every BatchNorm but the last in evaluation mode, so that it uses its running statistics and keeps them."""
    last = last_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module is not last:
            module.eval()


class FixRes(Algorithm):
    """Trains only the classifier and the last BatchNorm from epoch `first` on (section 4 of the paper).

    The sampler sets the size and crop of the images. Checkpoints do not record what is frozen.
    """

    def __init__(self, first: int) -> None:
        self.first = first

    @property
    def find_unused_parameters(self) -> bool:
        """Whether some parameters will have no gradients later, which DDP must know.

        The alternative, computing gradients only to drop them, would cost a full backward pass in the whole stage.
        """
        return self.first > 0

    def match(self, event: Event, state: State) -> bool:
        """At INIT, and in the stage at its start and before each forward pass.

        EPOCH_START does not fire when a run resumes inside an epoch, so FIT_START freezes as well. Composer puts the
        whole model in training mode when fit starts and after an evaluation, so the statistics are frozen before each
        forward pass.
        """
        events = (Event.FIT_START, Event.EPOCH_START, Event.BEFORE_FORWARD)
        return event == Event.INIT or (event in events and state.timestamp.epoch >= self.first)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Freeze parameters or statistics."""
        if event == Event.BEFORE_FORWARD:
            hold_statistics(state.model)
        elif state.timestamp.epoch >= self.first:
            freeze(state.model)
        else:  # fail now, not when the stage begins, if the model has no such layers
            classifier(state.model)
            last_batchnorm(state.model)


def build(config: FixResConfig, epochs: int) -> FixRes | None:
    """The algorithm that trains the classifier only; None with `train: all`."""
    return None if config.train == "all" else FixRes(config.start_epoch(epochs))
