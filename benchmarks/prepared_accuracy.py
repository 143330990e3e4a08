"""Whether training on prepared images costs accuracy: digits at 64 px against the same prepared at 37 px, quality 90.

    python -m benchmarks.prepared_accuracy [--epochs 6] [--seeds 0 1 2] [--images DIR]

A resnet10t (timm) is trained from scratch at 32 px, for which the loader reads 37 px (32 / 0.875), and evaluated on the
unchanged validation images. Without --images the digits of data.demo are used. One thread; the seed determines
everything else: initial weights, order, crops.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

from data.augment import Normalise
from data.config import AugmentConfig, EpochPlan
from data.demo import write_digits
from data.loader import eval_loader, train_loader
from data.prepare import Settings, prepare
from data.sampler import PositionSampler
from data.source import open_split_pair

SIZE, BATCH, RATE = 32, 32, 0.02
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
AUGMENT = AugmentConfig(area=(0.7, 1.0), aspect_ratio=(0.9, 1.1), flip=0.0)
NEAR = {"workers": 0, "prefetch_factor": 2, "pin_memory": False}
TRAINING = {"augment": AUGMENT, "mean": MEAN, "std": STD, "image_transforms": (), "eval_crop_ratio": 1.0, **NEAR}


def accuracy(path: Path, epochs: int, seed: int) -> tuple[float, float]:
    """Train on a dataset; (top-1 in percent, cross-entropy) on its validation images."""
    train, val = open_split_pair(str(path), "")
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=len(train.classes))
    sampler = PositionSampler(len(train), [EpochPlan(SIZE, "random", BATCH)], seed, 0, 1)
    loader = train_loader(train, sampler, seed=seed, **TRAINING)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5 * RATE, total_steps=epochs * len(loader))
    normalise = Normalise(MEAN, STD)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            images, labels = normalise(batch)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        evaluation = eval_loader(val, size=SIZE, crop_ratio=1.0, device_batch_size=100, rank=0, world_size=1, **NEAR)
        for batch in evaluation:
            images, labels = normalise(batch)
            output = model(images)
            right += int((output.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(output, labels, reduction="sum"))
    return 100 * right / len(val), loss / len(val)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=Path, help="an ImageFolder instead of the digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        original = options.images or write_digits(Path(scratch) / "digits", 64)
        prepared = Path(scratch) / "prepared"
        if not prepare(str(original), str(prepared), Settings("mds", ("37",), ("original",), 90), 1, lambda _: None):
            raise SystemExit("the prepared images do not read back correctly")
        found: dict[str, list[tuple[float, float]]] = {"original": [], "prepared": []}
        for seed in options.seeds:
            for name, path in (("original", original), ("prepared", prepared)):
                found[name].append(accuracy(path, options.epochs, seed))
                top1, loss = found[name][-1]
                print(
                    json.dumps({"seed": seed, "images": name, "top1": round(top1, 2), "loss": round(loss, 4)}),
                    flush=True,
                )
    for name, values in found.items() if len(options.seeds) > 1 else ():
        top1, loss = np.array(values).T
        spread = f"loss {loss.mean():.4f} +- {loss.std(ddof=1):.4f}"
        print(f"{name}: top-1 {top1.mean():.2f} +- {top1.std(ddof=1):.2f} %, {spread}")


if __name__ == "__main__":
    main()
