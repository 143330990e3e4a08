"""SGD, and the callback that hands it each step's learning rate and momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from composer import Callback, Logger, State
from composer.optim import DecoupledSGDW
from torch.nn import Parameter

from recipes.schedule import Rate, step_at


def build_optimizer(
    params: Iterable[Parameter], *, name: str, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD over all parameters in one group.

    Args:
        params: The model's parameters.
        name: `sgd` (torch's: the decay is part of the gradient) or `decoupled_sgdw` (Composer's: weights shrink by
            weight_decay * lr / `lr` a step; Loshchilov & Hutter 2019).
        lr: The schedule's highest rate, which scales the decay of `decoupled_sgdw`.
        momentum: In [0, 1).
        nesterov: Nesterov's momentum; without momentum it is plain SGD.
        weight_decay: At least 0.
    """
    build = torch.optim.SGD if name == "sgd" else DecoupledSGDW
    return build(params, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay)


def exempt_norms_and_biases(optimizer: torch.optim.Optimizer) -> None:
    """Move parameters of at most one dimension (BatchNorm's and biases) to a group of their own without weight decay.

    The rule by dimension is timm's (optim/_param_groups.py) and torchvision's references'.
    """
    (group,) = optimizer.param_groups
    exempt = [param for param in group["params"] if param.ndim <= 1]
    group["params"] = [param for param in group["params"] if param.ndim > 1]
    others = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
    optimizer.add_param_group({"params": exempt, "weight_decay": 0.0, **others})


class ExemptNormsAndBiases(Callback):
    """Splits the optimizer's group after model surgery, which can add parameters to one group only."""

    def before_load(self, state: State, logger: Logger) -> None:
        """The surgery (Event.INIT) is done, and no checkpoint is loaded yet."""
        del logger
        exempt_norms_and_biases(state.optimizers[0])


class Schedule(Callback):
    """Sets the learning rate and the momentum of each step from the run's position alone.

    A Composer scheduler would see the first position twice, could not set the momentum, and would convert epochs to
    batches by the current stage's batch size (see docs on decisions); this has no state to save either.

    Args:
        rate: The schedule: (step, total steps) -> Rate.
        batches: Batches of each epoch of the run.
    """

    def __init__(self, rate: Callable[[float, float], Rate], batches: Sequence[int]) -> None:
        self.rate = rate
        self.batches = batches
        self.total_steps = sum(batches)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Runs before every step."""
        del logger
        epoch = int(state.timestamp.epoch)
        step = step_at(
            epoch, int(state.timestamp.batch_in_epoch), self.batches[epoch], len(self.batches), self.total_steps
        )
        rate = self.rate(step, self.total_steps)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate.lr
            if rate.momentum is not None:
                group["momentum"] = rate.momentum
