"""Labels as soft targets, without a question that the device has to answer; for label smoothing and mixing."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels as probabilities, a share `smoothing` of which is spread over all classes (Szegedy et al. 2016).

    Neither torch's `one_hot` nor Composer's, both of which ask the device whether the labels are in range.

    Args:
        labels: int64 (N,), each in [0, num_classes).
        num_classes: Number of classes C.
        smoothing: In [0, 1].

    Returns:
        float32 (N, C); each row sums to 1.
    """
    rest = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), rest, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + rest)
