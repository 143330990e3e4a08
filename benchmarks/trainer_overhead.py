"""What Composer's Trainer with our callbacks costs: images/s against a bare PyTorch loop, alternating in one process.

    python -m benchmarks.trainer_overhead [--size 32] [--batch-size 32] [--batches 40] [--rounds 7] [--device cpu]

Both sides train a ResNet-50 with the same initial weights and optimizer on the same uint8 batches in memory, so the
loader costs nothing on either side; ours has the recipe's callbacks, the log, metrics.jsonl and TensorBoard. Prints the
ratio ours / bare of each round, and the median; and the CPU time of a step's events, callbacks included, with our
Engine and with Composer's.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from composer import Callback, DataSpec, Event, Logger, State
from composer.core import Engine

from benchmarks.measure import alternate, commit, machine, options
from data.augment import Normalise
from recipes.config import OneCycleConfig, RunConfig
from recipes.divergence import StopOnNan
from recipes.model import build_classifier
from recipes.optimizer import build_optimizer, exempt_norms_and_biases
from recipes.schedule import rate_function, step_at
from recipes.step import SteadyEngine, SteadyTrainer
from recipes.trainer import ExemptNormsAndBiases, Microbatches, PositionSeed, SameStatistics, Schedule, split
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
        if step % CONFIG.loggers.interval == 0:
            loss.item()  # a loop that shows its loss must read it, as ours does
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def count_events(engine: Engine, steps: list[float]) -> None:
    """Append the CPU seconds of each step's events, from BEFORE_DATALOADER to BATCH_CHECKPOINT."""
    run_event = engine.run_event

    def timed(event: Event) -> object:
        if event == Event.BEFORE_DATALOADER:
            steps.append(0.0)
        began = time.thread_time()
        traces = run_event(event)
        if steps and not (event.is_eval or event.value.startswith(("epoch", "iteration", "fit"))):
            steps[-1] += time.thread_time() - began
        return traces

    engine.run_event = timed  # type: ignore[method-assign,assignment]


def ours(
    batches: Batches, device: torch.device, scratch: str, engine: type[Engine], events: dict[type[Engine], list[float]]
) -> float:
    """Seconds of the same with the Trainer and everything that watches a run; `events` gets a step's median, in µs."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
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
    trainer = SteadyTrainer(
        images_of=lambda _, batch: len(batches[batch][1]),
        model=model,
        train_dataloader=DataSpec(batches, num_samples=samples, microbatch_transforms=NORMALISE, split_batch=split),
        optimizers=optimizer_of(model),
        max_duration="1ep",
        callbacks=[
            *(PositionSeed(17), SameStatistics(), schedule, ExemptNormsAndBiases(), Microbatches(len(batches[0][1]))),
            *(*watchers.callbacks, seconds),
        ],
        loggers=[*watchers.loggers, StopOnNan()],
        device="gpu" if device.type == "cuda" else device.type,
        precision="fp32",
        device_train_microbatch_size=len(batches[0][1]),
        spin_dataloaders=False,
        progress_bar=False,
        auto_log_hparams=False,
    )
    trainer.engine.__class__ = engine
    count_events(trainer.engine, steps := [])
    trainer.fit()
    trainer.close()
    events[engine].append(1e6 * statistics.median(steps[1:-1]))  # the last asks for a batch that does not come
    return seconds.took


def main() -> None:
    """Measure, and print a line of JSON with everything the result depends on."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    given = options(__doc__, size=32, batch_size=32, batches=40, rounds=7, device=default)
    shape = (given.batch_size, 3, given.size, given.size)
    batches = [
        (
            torch.randint(256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
            torch.randint(CLASSES, (given.batch_size,)),
        )
        for _ in range(given.batches)
    ]
    device, images = torch.device(given.device), given.batches * given.batch_size
    events: dict[type[Engine], list[float]] = {SteadyEngine: [], Engine: []}
    with tempfile.TemporaryDirectory() as scratch:
        sides = {"bare": partial(bare, batches, device)}
        for name, engine in (("ours", SteadyEngine), ("Composer's engine", Engine)):
            sides[name] = partial(ours, batches, device, scratch, engine, events)
        took = alternate(sides, given.rounds)
    ratios = [plain / with_trainer for plain, with_trainer in zip(took["bare"], took["ours"], strict=True)]
    for plain, with_trainer, ratio in zip(took["bare"], took["ours"], ratios, strict=True):
        print(f"bare {images / plain:8.1f} images/s   ours {images / with_trainer:8.1f} images/s   {ratio:.3f}")
    name = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figures = {"ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3), "n": len(ratios)}
    for engine, each in events.items():
        middle, rounds = statistics.median(each[1:]), ", ".join(f"{one:.0f}" for one in each[1:])
        print(f"events of a step, {engine.__name__:12} {middle:6.0f} µs of CPU time ({rounds})")
    print(json.dumps(figures | vars(given) | {"device": f"{name}, {machine()}", "commit": commit()}))


if __name__ == "__main__":
    main()
