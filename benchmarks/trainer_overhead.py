"""What Composer's Trainer with our callbacks costs: images/s against a bare PyTorch loop, alternating in one process.

    python -m benchmarks.trainer_overhead [--size 32] [--batch-size 32] [--batches 40] [--rounds 7] [--device cpu]

Both sides train a ResNet-50 with the same initial weights and optimizer on the same uint8 batches in memory, so the
loader costs nothing on either side; ours has the recipe's callbacks, the log, metrics.jsonl and TensorBoard. Prints the
ratio ours / bare of each round, and the median.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from composer import Callback, DataSpec, Logger, State, Trainer

from data.augment import Normalise
from recipes.config import OneCycleConfig, RunConfig
from recipes.model import build_classifier
from recipes.schedule import rate_function, step_at
from recipes.trainer import (
    ExemptNormsAndBiases,
    PositionSeed,
    Schedule,
    build_optimizer,
    exempt_norms_and_biases,
    split,
)
from recipes.watch import build_watchers
from recipes.watch.sinks import TextLog

CLASSES = 10
CONFIG = RunConfig.model_validate({"run_name": "overhead", "device_batch_size": 1, "data": {"path": "unused"}})
"""The defaults: ResNet-50, and SGD with Nesterov momentum."""
NORMALISE = Normalise(CONFIG.data.mean, CONFIG.data.std)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Seconds(Callback):
    """Time from the first step to the end of the last."""

    def __init__(self) -> None:
        self.took = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.took = -time.perf_counter()

    def epoch_end(self, state: State, logger: Logger) -> None:
        if state.device.name == "gpu":
            torch.cuda.synchronize()
        self.took += time.perf_counter()


def network(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_classifier(CONFIG, CLASSES, device.type)
    return model.to(device, memory_format=torch.channels_last)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(CONFIG.optimizer, model.parameters(), 0.05)


def bare(batches: Batches, device: torch.device) -> float:
    """Seconds of a hand-written loop."""
    model = network(device).train()
    optimizer = optimizer_of(model)
    exempt_norms_and_biases(optimizer)
    rate = rate_function(OneCycleConfig(), 0.05)
    began = time.perf_counter()
    for step, batch in enumerate(batches):
        now = rate(step_at(0, step, len(batches), 1, len(batches)), len(batches))
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = now.lr, now.momentum
        images, labels = NORMALISE(tuple(part.to(device, non_blocking=True) for part in batch))
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model.module(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()  # a loop that shows its loss must read it, as ours does
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ours(batches: Batches, device: torch.device, folder: Path) -> float:
    """Seconds of the same with the Trainer and everything that watches a run."""
    model, seconds, samples = network(device), Seconds(), sum(len(labels) for _, labels in batches)
    watchers = build_watchers(
        CONFIG,
        TextLog(folder / "log.txt", io.StringIO(), "overhead"),
        samples=samples,
        sizes=[batches[0][0].shape[-1]],
        classes=[],
        class_names=[],
        resumed_from=None,
    )
    schedule = Schedule(rate_function(OneCycleConfig(), 0.05), [len(batches)])
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(batches, num_samples=samples, microbatch_transforms=NORMALISE, split_batch=split),
        optimizers=optimizer_of(model),
        max_duration="1ep",
        callbacks=[PositionSeed(17), schedule, ExemptNormsAndBiases(), *watchers.callbacks, seconds],
        loggers=watchers.loggers,
        device="gpu" if device.type == "cuda" else device.type,
        precision="fp32",
        device_train_microbatch_size=len(batches[0][1]),
        spin_dataloaders=False,
        progress_bar=False,
        auto_log_hparams=False,
    )
    trainer.fit()
    trainer.close()
    return seconds.took


def rounds(count: int, batches: Batches, device: torch.device) -> Iterator[tuple[float, float]]:
    """(bare, ours) in seconds, alternating which goes first; the first round warms up and is left out."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {"bare": partial(bare, batches, device)}
        for number in range(count + 1):
            sides["ours"] = partial(ours, batches, device, Path(folder) / str(number))
            order = ("bare", "ours") if number % 2 else ("ours", "bare")
            took = {side: sides[side]() for side in order}
            if number:
                yield took["bare"], took["ours"]


def main() -> None:
    """Measure, and print a line of JSON with everything the result depends on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=40, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    shape = (args.batch_size, 3, args.size, args.size)
    batches = [
        (
            torch.randint(256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
            torch.randint(CLASSES, (args.batch_size,)),
        )
        for _ in range(args.batches)
    ]
    images = args.batches * args.batch_size
    ratios = []
    for plain, with_trainer in rounds(args.rounds, batches, torch.device(args.device)):
        ratios.append(plain / with_trainer)
        print(f"bare {images / plain:8.1f} images/s   ours {images / with_trainer:8.1f} images/s   {ratios[-1]:.3f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figures = {"ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3), "n": len(ratios)}
    print(json.dumps(figures | vars(args) | {"device": f"{device}, {platform.machine()}", "commit": commit}))


if __name__ == "__main__":
    main()
