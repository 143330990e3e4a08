"""SAM: sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from algorithms import PositiveFloat, PositiveInt, Technique

if TYPE_CHECKING:
    from composer.algorithms.sam import SAMOptimizer
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
    from torch.optim import Optimizer


def _attribute_of_base(name: str) -> Any:
    """A property that forwards to the same attribute of the base optimizer."""
    return property(
        lambda wrapper: getattr(wrapper.base_optimizer, name),
        lambda wrapper, value: setattr(wrapper.base_optimizer, name, value),
    )


class SAMConfig(Technique):
    """Step along the gradient of the worst point nearby (Foret et al. 2021), every `interval` batches."""

    rho: PositiveFloat = 0.05
    """Radius of the neighbourhood, in the L2 norm of all weights."""
    epsilon: PositiveFloat = 1e-12
    """Added to the gradient's norm, against division by zero."""
    interval: PositiveInt = 1
    """Batches from one such step to the next; each costs a second forward and backward pass."""

    def build(self) -> Algorithm:
        """The algorithm that wraps the optimizers at INIT, after surgery and before a checkpoint is loaded.

        Composer's own SAM wraps at AFTER_LOAD, so the optimizer's class differs between saving and loading, and its
        state is dropped with a warning. At INIT Composer has not chosen its gradient scaler yet, and then chooses the
        one for closures.
        """
        from composer.core import Algorithm, Event

        wrapped = self.wrapped

        class SAM(Algorithm):
            def match(self, event: Event, state: State) -> bool:
                return event == Event.INIT

            def apply(self, event: Event, state: State, logger: Logger) -> None:
                state.optimizers = [wrapped(optimizer) for optimizer in state.optimizers]

        return SAM()  # type: ignore[no-untyped-call]  # Composer's

    def wrapped(self, optimizer: Optimizer) -> SAMOptimizer:  # noqa: C901  # the methods of a class
        """Composer's `SAMOptimizer`, with the state and parameter groups of the optimizer that it wraps.

        So a checkpoint holds the momentum, and the number of steps as an entry of the groups. Weights are restored from
        a copy, whereas Composer subtracts what it added: each process climbs along its own gradient, so subtraction
        rounds differently in each process and their weights drift apart, while a resume gives all of them the weights
        of the first. Composer also does not restore a parameter that has no gradient in the second pass (in a block
        that stochastic depth skips).
        """
        import torch
        from composer.algorithms.sam import SAMOptimizer

        class ResumableSAMOptimizer(SAMOptimizer):
            base_optimizer: Optimizer
            param_groups = _attribute_of_base("param_groups")
            state = _attribute_of_base("state")

            @property
            def global_step(self) -> int:
                return int(self.param_groups[0]["sam_steps"])

            @global_step.setter
            def global_step(self, steps: int) -> None:
                for group in self.param_groups:
                    group["sam_steps"] = steps

            def state_dict(self) -> dict[str, Any]:
                return self.base_optimizer.state_dict()

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
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
                # torch steps without a closure to initialise an optimizer's state before it loads a checkpoint.
                if closure is None:
                    return self.base_optimizer.step()
                return super().step(closure)  # type: ignore[no-untyped-call]  # Composer's

        return ResumableSAMOptimizer(optimizer, rho=self.rho, epsilon=self.epsilon, interval=self.interval)
