"""FixRes on the classifier: everything else is frozen for the rest of the run."""

from __future__ import annotations

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_SHORTCUTS = {"downsample", "shortcut"}


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer in the order of definition, which is the classifier in torchvision's and timm's networks.

    Raises:
        ValueError: The model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the model has no linear layer to take for its classifier")
    return layers[-1]


def last_batchnorm(model: nn.Module) -> _BatchNorm:
    """The last BatchNorm in the order of definition, not counting those on shortcuts, which blocks define last.

    Raises:
        ValueError: The model has none.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not _SHORTCUTS & set(name.split("."))
    ]
    if not norms:
        raise ValueError("the model has no BatchNorm")
    return norms[-1]


def freeze(model: nn.Module) -> None:
    """Leave only the classifier's and the last BatchNorm's parameters trainable.

    A frozen parameter gets no gradient, and torch's and Composer's optimizers pass over parameters without one: neither
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
    """Trains only the classifier and the last BatchNorm from an epoch on (Touvron et al. 2019, section 4).

    The sampler's plan changes the images' size and crop. Freezing is repeated at FIT_START, because EPOCH_START does
    not fire where a run goes on inside an epoch; it is no part of the checkpoint. The statistics are held before each
    forward pass, because Composer puts the whole model in training mode at the start of a fit and after evaluations.

    Args:
        start_epoch: The first epoch of the stage, counted from 0; at 0 the model is frozen from the outset.
    """

    def __init__(self, start_epoch: int) -> None:
        self.start_epoch = start_epoch

    def __repr__(self) -> str:
        return f"FixRes(start_epoch={self.start_epoch})"

    @property
    def find_unused_parameters(self) -> bool:
        """Tell DDP that parameters will stop having gradients after it has counted them.

        The alternative, computing gradients only to drop them, would cost the backward pass of the whole stage.
        """
        return self.start_epoch > 0

    def match(self, event: Event, state: State) -> bool:
        """At INIT; and in the stage at its epochs' starts, at a fit's start, and before each forward pass."""
        in_stage = state.timestamp.epoch >= self.start_epoch
        return event == Event.INIT or (in_stage and event in (Event.FIT_START, Event.EPOCH_START, Event.BEFORE_FORWARD))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Freeze the parameters, or hold the statistics; before the stage, only look whether that will be possible.

        Raises:
            ValueError: The model has no linear layer or no BatchNorm.
        """
        del logger
        if event == Event.BEFORE_FORWARD:
            hold_statistics(state.model)
        elif state.timestamp.epoch >= self.start_epoch:
            freeze(state.model)
        else:
            classifier(state.model)
            last_batchnorm(state.model)
