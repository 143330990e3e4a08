"""SAM: sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from composer.algorithms.sam import SAMOptimizer
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.optim import Optimizer

from algorithms.config import SAMConfig


def _attribute_of_base(name: str) -> Any:
    """A property that forwards to the same attribute of the base optimizer."""
    return property(
        lambda wrapper: getattr(wrapper.base_optimizer, name),
        lambda wrapper, value: setattr(wrapper.base_optimizer, name, value),
    )


class ResumableSAMOptimizer(SAMOptimizer):
    """Composer's `SAMOptimizer`, with the state and parameter groups of the optimizer that it wraps.

    So a checkpoint holds the momentum, and the number of steps as an entry of the groups. Weights are restored from a
    copy, whereas Composer subtracts what it added: each process climbs along its own gradient, so subtraction rounds
    differently in each process and their weights drift apart, while a resume gives all of them the weights of the
    first. Composer also does not restore a parameter that has no gradient in the second pass (in a block that
    stochastic depth skips).
    """

    base_optimizer: Optimizer
    param_groups = _attribute_of_base("param_groups")
    state = _attribute_of_base("state")

    @property
    def global_step(self) -> int:
        """Steps so far."""
        return int(self.param_groups[0]["sam_steps"])

    @global_step.setter
    def global_step(self, steps: int) -> None:
        for group in self.param_groups:
            group["sam_steps"] = steps

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's."""
        self.base_optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb from w to w + rho * grad / |grad|, and keep a copy of w."""
        norm = self._grad_norm()  # type: ignore[no-untyped-call]  # Composer's
        for group in self.param_groups:
            scale = group["rho"] / (norm + group["epsilon"])
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["before_climb"] = param.clone()
                    param.add_(param.grad * scale.to(param))

    @torch.no_grad()
    def sub_e_w(self) -> None:
        """Go back to w; Composer calls this if the second pass overflowed."""
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state and "before_climb" in self.state[param]:
                    param.copy_(self.state[param].pop("before_climb"))

    @torch.no_grad()
    def second_step(self) -> None:
        """Go back to w and make the optimizer's step with the gradient found above."""
        self.sub_e_w()
        self.base_optimizer.step()

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """One step; without a closure the base optimizer's, by which torch initialises a state before it loads one."""
        if closure is None:
            return self.base_optimizer.step()
        return super().step(closure)  # type: ignore[no-untyped-call]  # Composer's


class SAM(Algorithm):
    """Wraps the optimizers at INIT, after surgery and before a checkpoint is loaded.

    Composer's own SAM wraps at AFTER_LOAD, so the optimizer's class differs between saving and loading, and its state
    is dropped with a warning. At INIT Composer has not chosen its gradient scaler yet, and then chooses the one for
    closures.
    """

    def __init__(self, config: SAMConfig) -> None:
        self.config = config

    def match(self, event: Event, state: State) -> bool:
        """At INIT."""
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap each optimizer."""
        state.optimizers = [wrapped(optimizer, self.config) for optimizer in state.optimizers]


def wrapped(optimizer: Optimizer, config: SAMConfig) -> ResumableSAMOptimizer:
    """An optimizer that makes a SAM step every `interval` batches."""
    return ResumableSAMOptimizer(optimizer, rho=config.rho, epsilon=config.epsilon, interval=config.interval)


def build(config: SAMConfig) -> SAM:
    """The algorithm with these fields."""
    return SAM(config)
