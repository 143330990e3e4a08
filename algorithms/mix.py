"""MixUp, CutMix, and the switch between them.

What is drawn is a function of (seed, rank, batch, microbatch), on the host; the device gets a permutation to index with
and is never asked anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from algorithms.config import CutMixConfig, MixUpConfig
from algorithms.targets import soft_targets

Bounds = tuple[int, int, int, int]
"""Top, bottom, left and right in pixels; bottom and right are not part of it."""


def mixup(images: Tensor, permutation: Tensor, share: float) -> Tensor:
    """Each image (N, C, H, W) blended with a `share` in [0, 1] of that at its place in the permutation, int64 (N,)."""
    return torch.lerp(images, images[permutation], share)


def cutmix(images: Tensor, permutation: Tensor, box: Bounds) -> Tensor:
    """Images (N, C, H, W), a box of each replaced by that of the one at its place in the permutation, int64 (N,)."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][permutation]
    return mixed


def box_around(y: int, x: int, height: int, width: int, share: float) -> Bounds:
    """The box of a `share` in [0, 1] of an image's area and of its shape, centred at (y, x), clipped to the image.

    As `rand_bbox` of the CutMix authors computes it (github.com/clovaai/CutMix-PyTorch, train.py).
    """
    half_height, half_width = (_half(side, share) for side in (height, width))
    top, bottom = (min(max(at, 0), height) for at in (y - half_height, y + half_height))
    left, right = (min(max(at, 0), width) for at in (x - half_width, x + half_width))
    return top, bottom, left, right


def _half(side: int, share: float) -> int:
    """Half the side of a box that covers a `share` of the area."""
    return int(side * share**0.5) // 2


def is_cutmix(seed: int, batch: int, switch_prob: float) -> bool:
    """Whether a batch gets CutMix rather than MixUp: a function of its position only, the same on all ranks.

    `switch_prob` is the probability of CutMix, as in timm's `Mixup`.
    """
    return bool(np.random.default_rng((seed, batch)).random() < switch_prob)


class Mixing(NamedTuple):
    """How the images of a microbatch are mixed, and its targets."""

    permutation: Tensor
    """The other image of each, int64 (N,), on the host."""
    share: float
    """Of the other image, in [0, 1]."""
    box: Bounds | None
    """CutMix's box; None: MixUp."""


def draw_mixup(config: MixUpConfig, rng: np.random.Generator, shape: torch.Size) -> Mixing:
    """A mixing of images of this shape (N, C, H, W) by MixUp; the share is at most a half, as Composer draws it."""
    kept = rng.beta(config.alpha, config.alpha)
    return Mixing(torch.from_numpy(rng.permutation(shape[0])), float(min(kept, 1 - kept)), None)


def draw_cutmix(config: CutMixConfig, rng: np.random.Generator, shape: torch.Size) -> Mixing:
    """A mixing of images of this shape (N, C, H, W) by CutMix; the share is that of the clipped box."""
    count, _, height, width = shape
    share = 1 - rng.beta(config.alpha, config.alpha)
    # For each pixel to be replaced equally often, the centre may also lie outside of the image.
    beyond = [_half(side, share) if config.uniform_sampling else 0 for side in (height, width)]
    y, x = (int(rng.integers(-b, side + b)) for b, side in zip(beyond, (height, width), strict=True))
    top, bottom, left, right = box_around(y, x, height, width, share)
    area = (bottom - top) * (right - left)
    return Mixing(torch.from_numpy(rng.permutation(count)), area / (height * width), (top, bottom, left, right))


class Mix(Algorithm):
    """Gives each batch to MixUp or to CutMix, and smooths the targets by the share `smoothing`.

    If both are on, the switch gives each batch to exactly one (Wightman et al. 2021; timm's `Mixup`, mode `batch`). The
    draws are made anew in SAM's second pass, and are equal there, as the microbatches are counted from its start.
    """

    def __init__(self, mixup: MixUpConfig | None, cutmix: CutMixConfig | None, smoothing: float) -> None:
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing
        self.interpolate_loss = any(one.interpolate_loss for one in (mixup, cutmix) if one)
        self._microbatch = 0
        self._permutation, self._share = torch.empty(0), 0.0  # of the current microbatch, the first on its device

    def match(self, event: Event, state: State) -> bool:
        """At the start of a pass, before the forward pass, and where the targets or losses are mixed."""
        mixes = Event.BEFORE_BACKWARD if self.interpolate_loss else Event.BEFORE_LOSS
        return event in (Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, mixes)

    def draw(self, state: State, shape: torch.Size) -> Mixing:
        """The mixing of the current microbatch."""
        batch = state.timestamp.batch.value
        rng = np.random.default_rng((state.rank_zero_seed, dist.get_global_rank(), batch, self._microbatch))
        if self.cutmix and (self.mixup is None or is_cutmix(state.rank_zero_seed, batch, self.cutmix.switch_prob)):
            return draw_cutmix(self.cutmix, rng, shape)
        assert self.mixup is not None
        return draw_mixup(self.mixup, rng, shape)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Mix the images of a microbatch, then its targets or losses."""
        if event == Event.BEFORE_TRAIN_BATCH:
            self._microbatch = 0
            return
        images, labels = state.batch
        if event == Event.BEFORE_FORWARD:
            mixing = self.draw(state, images.shape)
            self._microbatch += 1
            self._permutation, self._share = on_device(mixing.permutation, images.device), mixing.share
            if mixing.box is None:
                images = mixup(images, self._permutation, mixing.share)
            else:
                images = cutmix(images, self._permutation, mixing.box)
            state.batch = (images, labels)
        elif event == Event.BEFORE_LOSS:
            assert isinstance(state.outputs, Tensor)
            targets = soft_targets(labels, state.outputs.shape[1], self.smoothing)
            state.batch = (images, torch.lerp(targets, targets[self._permutation], self._share))
        else:
            model: Any = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
            other = model.loss(state.outputs, (images, labels[self._permutation]))
            assert isinstance(state.loss, Tensor)
            state.loss = torch.lerp(state.loss, other, self._share)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device, without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def build(mixup: MixUpConfig | None, cutmix: CutMixConfig | None, smoothing: float) -> Mix | None:
    """The algorithm that mixes and smooths; None if neither is on."""
    return Mix(mixup, cutmix, smoothing) if mixup or cutmix else None
