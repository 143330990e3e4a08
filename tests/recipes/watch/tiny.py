"""A tiny run on Composer's real Trainer: 3 stages of sizes, evaluation at two sizes, checkpoints by a callback."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Callback, DataSpec, Evaluator, Event
from composer.models import ComposerModel
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from data.source import BadSample
from recipes.config import RunConfig
from recipes.step import SteadyTrainer
from recipes.watch import Watchers, build_watchers
from recipes.watch.sinks import TextLog

SAMPLES, BATCH, CLASSES = 20, 8, 10
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Images(torch.utils.data.Dataset):
    """Normalised random images whose content depends on the index alone; reports those in `broken` once read."""

    def __init__(self, size: int, samples: int = SAMPLES) -> None:
        self.size, self.samples, self.bad = size, samples, self
        self.broken: dict[int, str] = {}
        self.met: set[int] = set()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.met.add(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, self.size, self.size, generator=generator), index % CLASSES

    def new(self) -> list[BadSample]:
        found = [index for index in sorted(self.met) if index in self.broken]
        return [BadSample(index, f"n01/{index:02d}.jpeg", self.broken.pop(index)) for index in found]


class FromBatch(DistributedSampler):
    """All indices in order, on each process, from a batch on in the first epoch asked for."""

    def __init__(self, samples: int) -> None:
        super().__init__(range(samples), num_replicas=1, rank=0)
        self.samples, self.first = samples, 0

    def __len__(self) -> int:
        return -(-self.samples // BATCH)

    def __iter__(self):
        first, self.first = self.first, 0
        for batch in range(first, len(self)):
            yield list(range(batch * BATCH, min((batch + 1) * BATCH, self.samples)))


class Sizes(Callback):
    """Resizes to the plan's size, in place of a loader that does, and moves the learning rate."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def after_dataloader(self, state, logger) -> None:
        images, labels = state.batch
        size = self.sizes[int(state.timestamp.epoch)]
        state.batch = (nn.functional.interpolate(images, size), labels)
        for group in state.optimizers[0].param_groups:
            group["lr"] = 0.1 / (1 + int(state.timestamp.batch))


class Invert(Callback):
    """In place of an algorithm that changes the batch before the forward pass; keeps each epoch's first batch."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def before_forward(self, state, logger):
        state.batch = (-state.batch[0], state.batch[1])
        self.seen.setdefault(int(state.timestamp.epoch), state.batch[0])


class Saver(Callback):
    """Saves the state at given positions, and dies at one."""

    def __init__(self, folder: Path, save_at: Sequence[str], die_at: int | None) -> None:
        self.folder, self.save_at, self.die_at = folder, save_at, die_at

    def _save(self, state, name: str) -> None:
        if name in self.save_at:
            torch.save({"state": state.state_dict(), "rng": []}, self.folder / f"{name}.pt")

    def batch_checkpoint(self, state, logger) -> None:
        self._save(state, f"ba{int(state.timestamp.batch)}")
        if int(state.timestamp.batch) == self.die_at:
            raise KeyboardInterrupt

    def epoch_checkpoint(self, state, logger) -> None:
        self._save(state, f"ep{int(state.timestamp.epoch)}")


class Tiny(ComposerModel):
    """A classifier of any image size."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))

    def forward(self, batch):
        return self.module(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train):
        if is_train:
            return {}
        accuracy = {f"top{k}": MulticlassAccuracy(CLASSES, top_k=k, average="micro") for k in (1, 5)}
        return accuracy | {"loss": MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        if isinstance(metric, MeanMetric):
            metric.update(self.loss(outputs, batch))
        else:
            metric.update(outputs, batch[1])


@dataclass
class Run:
    """What a test looks at after a run."""

    folder: Path
    watchers: Watchers
    trainer: SteadyTrainer
    stream: io.StringIO
    train: Images
    val: Images
    error: BaseException | None = None
    finished: str | None = None
    seen: dict[int, torch.Tensor] | None = None

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def of(self, name: str) -> dict[int, Any]:
        """A figure by batch."""
        return {line["batch"]: line[name] for line in self.lines() if name in line}

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


def train_tiny(
    root: Path,
    *,
    sizes: Sequence[int] = (8, 8, 12, 16),
    save_at: Sequence[str] = (),
    die_at: int | None = None,
    load: str | None = None,
    stream: io.StringIO | None = None,
    prepare: Callable[[Run], None] = lambda run: None,
    folder: str = "run",
    callbacks: Sequence[Callback] = (),
    max_bad_fraction: float = 0.1,
    **loggers: Any,
) -> Run:
    """Train 4 epochs of 3 batches in root/run, and return what is left; checkpoints are written to root."""
    torch.manual_seed(0)
    stream = stream or io.StringIO()
    data = {"path": "x", "mean": MEAN, "std": STD, "max_bad_fraction": max_bad_fraction}
    config = RunConfig(
        run_name="tiny", device_batch_size=BATCH, data=data, eval={"sizes": (8, 16)}, loggers={"interval": 2} | loggers
    )
    watchers = build_watchers(
        config,
        TextLog(root / folder / "log.txt", stream, "tiny"),
        samples=SAMPLES,
        sizes=sizes,
        classes=[f"n{label:02d}" for label in range(CLASSES)],
        class_names=[f"class {label}" for label in range(CLASSES)],
        resumed_from=f"{load}.pt" if load else None,
    )
    train, val = Images(16), Images(16)
    sampler = FromBatch(SAMPLES)
    evaluators = [
        Evaluator(
            label=f"eval_{size}",
            dataloader=DataSpec(DataLoader(val, batch_sampler=FromBatch(SAMPLES))),
            eval_interval=lambda state, event: event == Event.EPOCH_END and int(state.timestamp.epoch) % 2 == 0,
            device_eval_microbatch_size=BATCH,
        )
        for size in (8, 16)
    ]
    model = Tiny()
    trainer = SteadyTrainer(
        images_of=lambda _, batch: min(BATCH, SAMPLES - batch * BATCH) * dist.get_world_size(),
        model=model,
        train_dataloader=DataSpec(DataLoader(train, batch_sampler=sampler)),
        eval_dataloader=evaluators,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=f"{len(sizes)}ep",
        callbacks=[Sizes(sizes), *callbacks, *watchers.callbacks, Saver(root, save_at, die_at)],
        loggers=watchers.loggers,
        device="cpu",
        device_train_microbatch_size=BATCH,
        load_path=str(root / f"{load}.pt") if load else None,
        spin_dataloaders=False,
        progress_bar=False,
        auto_log_hparams=False,
        run_name="tiny",
    )
    sampler.first = int(trainer.state.timestamp.batch_in_epoch)
    result = Run(root / folder, watchers, trainer, stream, train, val)
    prepare(result)
    try:
        trainer.fit()
        result.finished = watchers.summary.finish(model.state_dict())
    except (KeyboardInterrupt, Exception) as error:
        result.error = error
    trainer.close()
    return result
