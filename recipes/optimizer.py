"""The optimizer: SGD, or any of timm's or torch's by name, with arguments that are checked against its signature."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, get_type_hints

import torch
from composer.optim import DecoupledSGDW as ComposersDecoupledSGDW
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from data.errors import InputError
from data.text import did_you_mean, first_line
from recipes.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, params: Iterable[Parameter], lr: float) -> Optimizer:
    """The optimizer of all parameters in one group; `lr` is the highest rate of the schedule.

    `sgd` is torch's, where the decay is part of the gradient; with `decoupled_sgdw`, Composer's, weights shrink by
    weight_decay * rate / `lr` a step (Loshchilov & Hutter 2019). On a GPU both have a few kernels for all parameters
    (torch's `foreach`); neither is `fused`, which rounds differently. InputError: no such optimizer, or an argument
    that it does not accept.
    """
    kind = _constructor(config.name)
    known = inspect.signature(kind).parameters
    values: dict[str, Any] = {"momentum": config.momentum} if "momentum" in known else {}
    if "nesterov" in known and not config.name.startswith("timm/"):  # whose names say it: sgd, momentum, nlars
        values["nesterov"] = config.nesterov and config.momentum > 0  # without momentum it is plain SGD
    values |= {"lr": lr, "weight_decay": config.weight_decay}
    hints, lines = get_type_hints(getattr(kind, "func", kind).__init__), list[str]()
    free = known.keys() - {"params", *OptimizerConfig.model_fields}
    for key, value in config.arguments.items():
        if key not in free:
            hint = did_you_mean(key, [*free, *OptimizerConfig.model_fields])
            lines.append(
                f"optimizer.{key}: {config.name} has no such argument; allowed: {', '.join(sorted(free))}{hint}"
            )
            continue
        try:
            accepted = TypeAdapter(hints.get(key, Any), config=ConfigDict(arbitrary_types_allowed=True))
            # As JSON, because only there does pydantic's strict mode accept lists for tuples.
            values[key] = accepted.validate_json(json.dumps(value), strict=True)
        except ValidationError:
            lines.append(f"optimizer.{key}: got {json.dumps(value)}; allowed: {_words(hints[key])}")
    if lines:
        raise InputError(*lines)
    try:
        return kind(params, **values)
    except Exception as error:  # each optimizer checks its values in its own way
        raise InputError(f"optimizer: {config.name}: {first_line(error)}") from None


def _words(annotation: Any) -> str:
    """A type, as Python writes it."""
    return inspect.formatannotation(annotation).replace("typing.", "")


def _constructor(name: str) -> Callable[..., Optimizer]:
    """A class of optimizers, with the arguments that timm's name stands for bound; InputError: there is none."""
    if name in ("sgd", "decoupled_sgdw"):
        return torch.optim.SGD if name == "sgd" else DecoupledSGDW
    library, _, short = name.partition("/")
    known = _of_timm() if library == "timm" else _of_torch()
    if short not in known:
        hint = did_you_mean(short, {other: f"{library}/{other}" for other in known})
        raise InputError(f"optimizer.name: {name!r} is not an optimizer of {library} that can be used here{hint}")
    return known[short]


def _of_torch() -> dict[str, Callable[..., Optimizer]]:
    """By class name in lower case. Without weight decay are those for sparse gradients, closures and whole datasets."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    return {kind.__name__.lower(): kind for kind in kinds if "weight_decay" in inspect.signature(kind).parameters}


def _of_timm() -> dict[str, Callable[..., Optimizer]]:
    """By timm's name, without those that need second derivatives or another library, or that cannot be saved.

    kron draws from a generator of its own, which a checkpoint does not hold; a setting of adafactorbv is a dtype.
    """
    timm: Any = import_module("timm.optim")
    infos = {name: timm.get_optimizer_info(name) for name in timm.list_optimizers("", ["kron*", "*adafactorbv*"])}
    usable = [name for name, info in infos.items() if not isinstance(info.opt_class, str) and not info.second_order]
    return {name: timm.get_optimizer_class(name) for name in usable}


class DecoupledSGDW(ComposersDecoupledSGDW):
    """Composer's optimizer with a few kernels for all parameters, as torch's SGD has, instead of five for each."""

    @staticmethod
    def sgdw(
        params: list[Tensor],
        gradients: list[Tensor],
        momenta: list[Tensor | None],
        *,
        weight_decay: float,
        momentum: float,
        lr: float,
        initial_lr: float,
        dampening: float,
        nesterov: bool,
    ) -> None:
        """Update parameters and `momenta` in place, as Composer's; None: the parameter had no gradient before."""
        if not params:
            return
        steps: Any = gradients
        if momentum:
            old = [index for index, buffer in enumerate(momenta) if buffer is not None]
            if old:
                buffers: Any = [momenta[index] for index in old]
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, [gradients[index] for index in old], alpha=1 - dampening)
            momenta[:] = buffers = [
                new.clone() if buffer is None else buffer for buffer, new in zip(momenta, gradients, strict=True)
            ]
            steps = torch._foreach_add(gradients, buffers, alpha=momentum) if nesterov else buffers
        if weight_decay:
            torch._foreach_mul_(params, 1 - (lr / initial_lr if initial_lr else 1.0) * weight_decay)
        torch._foreach_add_(params, steps, alpha=-lr)


def exempt_norms_and_biases(optimizer: Optimizer) -> None:
    """Move parameters of at most one dimension (BatchNorm's and biases) to a group of their own without weight decay.

    The rule by dimension is timm's (optim/_param_groups.py) and torchvision's references'.
    """
    (group,) = optimizer.param_groups
    exempt = [param for param in group["params"] if param.ndim <= 1]
    group["params"] = [param for param in group["params"] if param.ndim > 1]
    others = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
    optimizer.add_param_group({"params": exempt, "weight_decay": 0.0, **others})


def momentum_of(group: dict[str, Any]) -> float:
    """The momentum of a group of parameters, or else the first of its betas; NaN if it has neither."""
    return float(group["momentum"] if "momentum" in group else group.get("betas", [float("nan")])[0])


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Set what `momentum_of` reads, as torch's OneCycleLR does; nothing if the group has neither."""
    if "momentum" in group:
        group["momentum"] = momentum
    elif "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])


def state_copies(config: OptimizerConfig) -> int:
    """How many copies of the weights the optimizer keeps: one is SGD's momentum, two are Adam's moments."""
    weight = Parameter(torch.zeros(8, 8))
    weight.grad = torch.zeros(8, 8)
    optimizer = build_optimizer(config, [weight], config.lr)
    optimizer.step()
    kept = [value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return max(1, sum(kept) // weight.numel())  # numbers of steps and factors are small
