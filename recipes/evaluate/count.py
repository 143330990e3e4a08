"""Counting: how many images of each class a network puts first, or among the first five."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from composer.core import Precision, get_precision_context
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.buffers import Batch
from data.errors import DataError
from data.imagefolder import class_names
from data.loader import IGNORED_LABEL, BatchDataset, eval_loader
from data.normalise import Normalise
from data.source import Source
from recipes.checkpoints.manifest import Manifest
from recipes.errors import InputError
from recipes.trained import Trained, to_device


class Counts(NamedTuple):
    """What was counted at one setting, over all processes."""

    images: Tensor
    """Images of each class, int64 (num_classes,)."""
    top1: Tensor
    """Those whose class came first, int64 (num_classes,)."""
    top5: Tensor
    """Those whose class was among the first five, int64 (num_classes,)."""
    loss: float
    """Mean cross-entropy over all images."""


class Result(NamedTuple):
    """The figures at one setting."""

    size: int
    crop_ratio: float
    counts: Counts

    @property
    def images(self) -> int:
        """Images that count."""
        return int(self.counts.images.sum())

    @property
    def top1(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return int(self.counts.top1.sum()) / self.images

    @property
    def top5(self) -> float:
        """Top-5 accuracy in [0, 1]."""
        return int(self.counts.top5.sum()) / self.images


class Evaluation(NamedTuple):
    """All figures, and what they are of."""

    manifest: Manifest | None
    """None: another project's weights."""
    location: str
    """The checkpoint's address."""
    weights: str
    """`ema` or `raw`."""
    weights_sha256: str
    data: str
    """The folder, as the user named it."""
    flip: bool
    precision: str
    classes: list[str]
    """Class folder names in label order."""
    names: list[str]
    """Their English names."""
    results: list[Result]
    bad_images: list[str]
    """Images that cannot be decoded, which do not count; one line each with the reason."""


def both_ways(network: nn.Module, images: Tensor) -> Tensor:
    """The mean of the logits of images and of their mirror images.

    Of the logits, as in libffcv/ffcv-imagenet's evaluation, so that figures can be compared with FFCV's.

    Args:
        network: Maps images to logits.
        images: Float (N, 3, H, W).

    Returns:
        Logits (N, num_classes).
    """
    logits: Tensor = (network(images) + network(images.flip(3))) / 2
    return logits


@torch.no_grad()
def count(
    logits_of: Callable[[Tensor], Tensor],
    loader: DataLoader[Batch],
    normalise: Normalise,
    num_classes: int,
    device: torch.device,
    precision: AbstractContextManager[Any],
    bar: tqdm[Any],
) -> Counts:
    """Count one pass over a loader, summed over all processes.

    Args:
        logits_of: Maps float images (N, 3, H, W) to logits (N, num_classes).
        loader: Gives (images uint8, labels int64); images whose label is IGNORED_LABEL do not count.
        normalise: Makes float images of uint8.
        num_classes: Number of logits.
        device: Where to compute.
        precision: What to compute in.
        bar: Moves on by this process's images.
    """
    labels_of, hits_of, losses = [], [], []
    with precision:
        for images, labels in loader:
            batch, target = normalise((images.to(device, non_blocking=True), labels.to(device, non_blocking=True)))
            logits = logits_of(batch).float()
            hits = logits.topk(min(5, num_classes)).indices == target[:, None]
            # Kept where they are until the end: fetching them would make the device wait after each batch.
            labels_of.append(labels)
            hits_of.append(torch.stack([hits[:, 0], hits.any(1)]))
            losses.append(F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED_LABEL))
            bar.update(len(images))
    labels, hits, loss = torch.cat(labels_of), torch.cat(hits_of, 1).cpu(), torch.cat(losses).cpu().double().sum()
    kept = [labels != IGNORED_LABEL, *hits]
    counts = torch.stack([torch.bincount(labels[mask], minlength=num_classes) for mask in kept])
    if dist.get_world_size() > 1:
        counts, loss = counts.to(device), loss.to(device)
        dist.all_reduce(counts)
        dist.all_reduce(loss)
        counts = counts.cpu()
    total = int(counts[0].sum())
    return Counts(counts[0], counts[1], counts[2], float(loss) / total if total else float("nan"))


def require_sizes(network: nn.Module, name: str, sizes: Sequence[int], device: torch.device) -> None:
    """Find out before the long part whether the network takes images of these sizes.

    Raises:
        InputError: It does not.
    """
    for size in dict.fromkeys(sizes):
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"--sizes: {name} takes no images of {size} px: {reason}") from None


def evaluation(
    trained: Trained,
    source: Source,
    *,
    data: str,
    settings: Sequence[tuple[int, float]],
    flip: bool,
    device: str,
    precision: str,
    device_batch_size: Callable[[int], int],
    workers: int,
    prefetch_factor: int,
    limit: float | None,
) -> Evaluation:
    """Evaluate a network at several settings; each process of the run calls it, and all get the same figures.

    Args:
        trained: The network.
        source: The images, whose labels are the network's outputs.
        data: What the images are called.
        settings: (size in pixels, crop ratio) of each pass.
        flip: Take the mean of the logits over each image and its mirror image.
        device: The config's name of the device.
        precision: The config's name of the precision.
        device_batch_size: Images per process and step at an image size; no figure depends on it.
        workers: Loader processes per device.
        prefetch_factor: Batches that each prepares ahead.
        limit: Seconds to wait for a batch; None: for ever.

    Raises:
        InputError: The network does not take images of such a size, or cannot tell the source's classes.
        DataError: There are fewer images than processes, or none can be decoded.
    """
    if len(source.classes) > trained.num_classes or (not trained.classes and len(source.classes) < trained.num_classes):
        raise InputError(
            f"{data}: {len(source.classes)} classes, but {trained.content.location} has {trained.num_classes} outputs "
            "and does not say which is which"
        )
    network, place = to_device(trained.network, device)
    require_sizes(network, trained.config.model.name, [size for size, _ in settings], place)
    normalise = Normalise(trained.config.data.mean, trained.config.data.std)
    results: list[Result] = []
    bad: dict[str, None] = {}
    share = len(source) * len(settings) // dist.get_world_size()
    with tqdm(total=share, unit="img", desc="evaluating", disable=dist.get_global_rank() != 0, leave=False) as bar:
        for size, crop_ratio in settings:
            loader = eval_loader(
                source,
                size=size,
                crop_ratio=crop_ratio,
                device_batch_size=device_batch_size(size),
                rank=dist.get_global_rank(),
                world_size=dist.get_world_size(),
                workers=workers,
                prefetch_factor=prefetch_factor,
                limit=limit,
                pin_memory=place.type == "cuda",
            )
            counts = count(
                partial(both_ways, network) if flip else network,
                loader,
                normalise,
                trained.num_classes,
                place,
                get_precision_context(Precision(precision)),
                bar,
            )
            results.append(Result(size, crop_ratio, counts))
            bad |= dict.fromkeys(_bad_images(loader))
    if not results[0].images:
        raise DataError(f"{data}: none of its {len(source)} images can be decoded")
    classes = [*source.classes, *(f"output {index}" for index in range(len(source.classes), trained.num_classes))]
    content = trained.content
    return Evaluation(
        content.manifest,
        content.location,
        content.weights,
        content.weights_sha256,
        data,
        flip,
        precision,
        classes,
        class_names(classes),
        results,
        list(bad),
    )


def _bad_images(loader: DataLoader[Batch]) -> list[str]:
    """The images that cannot be decoded, of all processes."""
    assert isinstance(loader.dataset, BatchDataset)  # as data/loader.py builds it
    lines = [f"{one.name}: {one.reason}" for one in loader.dataset.bad.new()]
    if dist.get_world_size() == 1:
        return lines
    return sorted(line for part in dist.all_gather_object(lines) for line in part)
