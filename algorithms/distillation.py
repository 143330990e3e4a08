"""Knowledge distillation: learn from a trained network's outputs as well."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from algorithms.config import DistillationConfig


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || network) of the softmax at temperature T, mean over the images (Hinton et al. 2015, section 2).

    T^2 keeps the size of the gradients, which a temperature divides by T^2.

    Args:
        logits: (N, C), of any float dtype; the loss is computed in float32.
        teacher_logits: (N, C).
        temperature: Above 0; the higher, the more the small probabilities count.

    Returns:
        float32, a scalar, at least 0.
    """
    ours, theirs = (log_softmax(one.float() / temperature, dim=1) for one in (logits, teacher_logits))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


class Teacher(nn.Module):
    """A trained network in evaluation mode, which takes images normalised as the run's.

    `mean` and `std`, of images in [0, 1], are the run's; `own_mean` and `own_std` those that the network expects.
    `sha256` identifies its weights.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        own_mean: tuple[float, ...],
        own_std: tuple[float, ...],
        sha256: str,
    ) -> None:
        super().__init__()
        self.sha256 = sha256
        self.network = network.eval().requires_grad_(False)
        ours, theirs = (torch.tensor(pair).view(2, 1, 3, 1, 1) for pair in ((mean, std), (own_mean, own_std)))
        self.register_buffer("scale", ours[1] / theirs[1])
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1])

    def forward(self, images: Tensor) -> Tensor:
        """Float images (N, 3, H, W) to logits (N, C)."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return logits


class Distillation(Algorithm):
    """Adds the teacher's part to each microbatch's loss; the teacher sees what the network saw."""

    def __init__(self, teacher: Teacher, alpha: float, temperature: float) -> None:
        self.teacher = teacher
        self.alpha, self.temperature = alpha, temperature

    def match(self, event: Event, state: State) -> bool:
        """When the device is known, and after the loss."""
        return event in (Event.FIT_START, Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Move the teacher to the device, or blend its loss into the network's."""
        if event == Event.FIT_START:
            state.device.module_to_device(self.teacher)
            # torch's stubs leave this overload out.
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return
        with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
            teacher_logits = self.teacher(state.batch[0])
        assert isinstance(state.outputs, Tensor)
        assert isinstance(state.loss, Tensor)
        loss = distillation_loss(state.outputs, teacher_logits, self.temperature)
        state.loss = (1 - self.alpha) * state.loss + self.alpha * loss

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it was."""
        return super().state_dict() | {"teacher_sha256": self.teacher.sha256}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """ValueError: the checkpoint's run had another teacher."""
        here, there = self.teacher.sha256, str(state["teacher_sha256"])
        if here != there:
            raise ValueError(
                f"algorithms.distillation.teacher: its weights have SHA-256 {here[:12]}, the checkpoint's "
                f"teacher {there[:12]}; to resume, use the same teacher"
            )


def build(config: DistillationConfig, teacher: Teacher) -> Distillation:
    """The algorithm with these fields."""
    return Distillation(teacher, config.alpha, config.temperature)
