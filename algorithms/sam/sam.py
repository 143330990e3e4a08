"""Sharpness-aware minimization that resumes exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from composer.algorithms.sam import SAMOptimizer
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor


class ResumableSAMOptimizer(SAMOptimizer):
    """Composer's `SAMOptimizer`, with nothing of its own to save: state and parameter groups are the base optimizer's.

    So a checkpoint holds the momentum, and the count of steps as an entry of the groups. And the weights are kept and
    put back where upstream subtracts what it added: each process climbs its own gradient, so subtracting rounds
    differently in each, their weights drift apart, and a resume, which gives all of them the first one's, is not exact.
    Upstream also leaves a parameter where it is if it has no gradient in the second pass (one in a block that
    stochastic depth skips).

    Args:
        base_optimizer: The optimizer that makes the steps.
        rho: Radius of the neighbourhood, L2 norm over all weights.
        epsilon: Added to the gradient's norm.
        interval: Steps from one sharpness-aware step to the next.
    """

    def __init__(self, base_optimizer: torch.optim.Optimizer, rho: float, epsilon: float, interval: int) -> None:
        super().__init__(base_optimizer, rho=rho, epsilon=epsilon, interval=interval)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    @property
    def global_step(self) -> int:
        """Steps made so far, which decides what is an `interval`-th."""
        steps: int = self.param_groups[0]["sam_steps"]
        return steps

    @global_step.setter
    def global_step(self, steps: int) -> None:
        for group in self.param_groups:
            group["sam_steps"] = steps

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the base optimizer."""
        self.base_optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb from w to w + rho * grad / |grad|, and keep w."""
        norm = self._grad_norm()  # type: ignore[no-untyped-call]  # Composer's
        for group in self.param_groups:
            scale = group["rho"] / (norm + group["epsilon"])
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["before_climb"] = param.clone()
                    param.add_(param.grad * scale.to(param))

    @torch.no_grad()
    def sub_e_w(self) -> None:
        """Go back to w; upstream calls this where the second pass overflowed."""
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state and "before_climb" in self.state[param]:
                    param.copy_(self.state[param].pop("before_climb"))

    @torch.no_grad()
    def second_step(self) -> None:
        """Go back to w and make the base optimizer's step with the gradient found above."""
        self.sub_e_w()
        self.base_optimizer.step()

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Composer's forward and backward pass; without one, the base optimizer's step, which is how torch
                fills in a fresh optimizer's state before it loads a checkpoint.
        """
        if closure is None:
            return self.base_optimizer.step()
        return super().step(closure)  # type: ignore[no-untyped-call]  # Composer's


class SAM(Algorithm):
    """Wraps the optimizers at INIT, after surgery and before a checkpoint is loaded (Foret et al. 2021).

    Composer's own SAM wraps at AFTER_LOAD, so the optimizer's class differs between saving and loading, and the state
    is dropped with a warning. At INIT Composer has not chosen its gradient scaler yet, and takes the one for closures.

    Args:
        rho: As in `ResumableSAMOptimizer`.
        epsilon: As in `ResumableSAMOptimizer`.
        interval: As in `ResumableSAMOptimizer`.
    """

    def __init__(self, rho: float, epsilon: float, interval: int) -> None:
        self.rho = rho
        self.epsilon = epsilon
        self.interval = interval

    def match(self, event: Event, state: State) -> bool:
        """Once, at INIT."""
        del state
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap."""
        del event, logger
        state.optimizers = [
            ResumableSAMOptimizer(optimizer, self.rho, self.epsilon, self.interval) for optimizer in state.optimizers
        ]
