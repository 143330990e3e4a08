"""Count a network's right answers on a folder of images, over all processes of the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.buffers import Batch
from data.errors import DataError, InputError
from data.loader import IGNORED_LABEL, BatchDataset, eval_loader
from data.source import Source
from data.text import escape
from recipes.config import RunConfig, at_size
from recipes.trained import Logits, Trained, named
from recipes.trainer import device_name, loading


def measure(
    trained: Trained, source: Source, config: RunConfig, settings: Sequence[tuple[int, float]], *, data: str, flip: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The `results` and `bad_images` of `--json --per-class`; every process calls this, and all get the same.

    The source's labels are the network's outputs; `data` says where the images are, for display. `settings` has (size
    in pixels, crop ratio) of each pass. `flip` averages the logits of each image and its mirror image, as
    libffcv/ffcv-imagenet does.

    Raises:
        InputError: The network does not accept images of such a size, or cannot distinguish the source's classes.
        DataError: There are fewer images than processes, or none can be decoded.
    """
    outputs, rank, processes = trained.num_classes, dist.get_global_rank(), dist.get_world_size()
    if len(source.classes) > outputs or (not trained.classes and len(source.classes) < outputs):
        raise InputError(
            f"{data}: {len(source.classes)} classes, but {trained.location} has {outputs} outputs and does not say "
            "which is which"
        )
    names = named(source.classes, outputs)
    logits_of = Logits(trained, config, (size for size, _ in settings))
    results: list[dict[str, Any]] = []
    bad: dict[str, None] = {}
    share = len(source) * len(settings) // processes
    with tqdm(total=share, unit="img", desc="evaluating", disable=rank != 0, leave=False) as bar:
        for size, crop in settings:
            loader = eval_loader(
                source,
                size=size,
                crop_ratio=crop,
                device_batch_size=at_size(config.eval.device_batch_size, size),
                rank=rank,
                world_size=processes,
                **loading(config.data, device_name(config.device)),
            )
            counts, loss = _count(logits_of, loader, outputs, flip, bar)
            if not sum(counts[0]):
                raise DataError(f"{data}: none of its {len(source)} images can be decoded")
            classes = [name | _shares(*one) for name, *one in zip(names, *counts, strict=True) if one[0]]
            figures = {"size": size, "crop_ratio": crop} | _shares(*map(sum, counts))
            results.append(figures | {"loss": loss, "classes": classes})
            assert isinstance(loader.dataset, BatchDataset)  # as data/loader.py builds it
            parts = dist.all_gather_object([f"{one.name}: {one.reason}" for one in loader.dataset.bad.new()])
            bad |= dict.fromkeys(sorted(chain(*parts)))
    return results, list(map(escape, bad))


def _shares(images: int, top1: int, top5: int) -> dict[str, Any]:
    hits = {"top1_correct": top1, "top5_correct": top5, "top1": top1 / images, "top5": top5 / images}
    return {"images": images} | hits


def _count(
    logits_of: Logits, loader: DataLoader[Batch], outputs: int, flip: bool, bar: tqdm[Any]
) -> tuple[list[list[int]], float]:
    """Images, top-1 and top-5 hits of each class, and the mean cross-entropy, over all processes.

    Images that cannot be decoded have the label IGNORED_LABEL and do not count.
    """
    labels_of, hits_of, losses = [], [], []
    for images, labels in loader:
        target, logits = labels.to(logits_of.device, non_blocking=True), logits_of(images, flip)
        hits = logits.topk(min(5, outputs)).indices == target[:, None]
        # Kept on the device until the end: fetching them would wait for the device after each batch.
        labels_of.append(labels)
        hits_of.append(torch.stack([hits[:, 0], hits.any(1)]))
        losses.append(F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED_LABEL))
        bar.update(len(images))
    labels, hits, loss = torch.cat(labels_of), torch.cat(hits_of, 1).cpu(), torch.cat(losses).cpu().double().sum()
    kept = [labels != IGNORED_LABEL, *hits]
    counts = torch.stack([torch.bincount(labels[mask], minlength=outputs) for mask in kept]).to(logits_of.device)
    loss = loss.to(logits_of.device)
    for figures in (counts, loss):
        dist.all_reduce(figures)
    total = int(counts[0].sum())
    return counts.tolist(), float(loss) / total if total else float("nan")
