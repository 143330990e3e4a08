"""FixRes: finish at the test resolution and crop, on all parameters or the classifier's only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from algorithms import Fraction, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm


def start_epoch(start: float, epochs: int) -> int:
    """The first epoch of the FixRes stage, counted from 0; `epochs` if there is none.

    It is the nearest epoch to `start * epochs` such that the stage has at least one epoch if `start` is below 1, and
    does not start the run if `start` is above 0. A run of one epoch cannot satisfy both, and then has no stage.
    """
    first = round(start * epochs)
    if start < 1:
        first = min(first, epochs - 1)
    return max(first, 1) if start > 0 else first


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer defined, which is the classifier in torchvision's and timm's networks; or ValueError."""
    from torch import nn

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the model has no linear layer that could be its classifier")
    return layers[-1]


def last_batchnorm(model: nn.Module) -> _BatchNorm:
    """The last BatchNorm defined, except those on shortcuts, which blocks define last; ValueError if none."""
    from torch.nn.modules.batchnorm import _BatchNorm

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
    from torch.nn.modules.batchnorm import _BatchNorm

    last = last_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module is not last:
            module.eval()


class FixResConfig(Technique):
    """Finish at `size` px with test-time crops (Touvron et al. 2019), on all parameters or the classifier's only."""

    start: Fraction = 85 / 90
    """Share of the run before the stage; it begins at the nearest epoch, and lasts at least one."""
    size: Annotated[int, Field(ge=8, le=4096)] = 288
    """Side of the images in the stage, in pixels."""
    train: Literal["all", "classifier"] = "all"
    """What is trained in the stage: everything, or only the last Linear and the last BatchNorm."""

    def build(self, epochs: int) -> Algorithm | None:
        """The algorithm that trains the classifier only (section 4 of the paper); None with `train: all`.

        The sampler sets the size and crop of the images. Checkpoints do not record what is frozen.
        """
        if self.train == "all":
            return None
        from composer.core import Algorithm, Event

        first = start_epoch(self.start, epochs)

        class FixRes(Algorithm):
            # DDP must know that some parameters will have no gradients later. The alternative, computing gradients only
            # to drop them, would cost a full backward pass during the whole stage.
            find_unused_parameters = first > 0

            def match(self, event: Event, state: State) -> bool:
                # EPOCH_START does not fire when a run resumes inside an epoch, so FIT_START freezes as well.
                # Composer puts the whole model in training mode when fit starts and after an evaluation, so the
                # statistics are frozen before each forward pass.
                in_stage = state.timestamp.epoch >= first
                events = (Event.FIT_START, Event.EPOCH_START, Event.BEFORE_FORWARD)
                return event == Event.INIT or (in_stage and event in events)

            def apply(self, event: Event, state: State, logger: Logger) -> None:
                if event == Event.BEFORE_FORWARD:
                    hold_statistics(state.model)
                elif state.timestamp.epoch >= first:
                    freeze(state.model)
                else:  # fail now, not when the stage begins, if the model has no such layers
                    classifier(state.model)
                    last_batchnorm(state.model)

        return FixRes()  # type: ignore[no-untyped-call]  # Composer's
