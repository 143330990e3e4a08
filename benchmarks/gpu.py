"""What a training step costs on a GPU: our run against a bare loop and torchvision's reference loop, side by side.

    python -m benchmarks.gpu yamls/gpu.yaml data.path=PHOTOS [key=value ...] --output DIR [--sizes 128 224 288]
        [--rounds 5] [--steps 20] [--warmup 10]

PHOTOS has train/CLASS/IMAGE and val/CLASS/IMAGE; its images are repeated as often as necessary. Sides at each size:

- bare: a loop in plain PyTorch on batches in memory: uint8, in pinned memory, channels last, cudnn.benchmark, mixed
  precision, cross-entropy. It has the YAML's network with BlurPool, optimizer, batch size and microbatches, and reads
  nothing from the device.
- memory: our run, everything that `entrypoint.py` builds with all techniques of the YAML, on the same batches. EMA is
  updated as often as in 90 epochs of ImageNet.
- photos: the same with its loader.
- memory-compiled, photos-compiled: both with `compile: true`.
- torchvision: the loop of torchvision's references/classification with ImageFolder and as many workers: no BlurPool, no
  channels last, a batch as large as our microbatch, accuracy and loss read in each step.

The sides alternate in one process, each in a thread that gets batches only while it is measured; its workers are
stopped meanwhile. Before it is measured, a side drops the batches that its loader has ready and takes the steps of the
warm-up, so that a slow loader is not hidden by what it prepared in advance; the device is synchronised only before the
first measured step and after the last. A first round, in which kernels are chosen and compiled, is left out. All six
networks stay in the device's memory, about 3 GB with ResNet-50: on a small card, name less than it has, as
device_memory_gb=8.

Prints and writes to DIR, as results.json and table.md: images/s, peak memory beside the estimate, and the ratios
asked for, medians over the rounds. On a GPU the exit status is 1 if one of them is not reached.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import math
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from composer import DataSpec
from torch import nn
from torch.utils.data import DataLoader, Subset

from benchmarks.measure import alternate, commit, machine
from data import source as sources
from data.augment import Normalise
from data.config import EpochPlan
from data.sampler import PositionSampler
from data.source import Source
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.interrupt import Interrupt
from recipes.checkpoints.manifest import Identity
from recipes.checkpoints.resume import Resume
from recipes.checkpoints.save import CheckpointManager
from recipes.checkpoints.store import Places
from recipes.cli import end_workers, pixels, run_command
from recipes.config import RunConfig
from recipes.divergence import StopOnNan
from recipes.load import load_config
from recipes.memory import microbatch_images, step_memory
from recipes.model import build_network, operated_network, planned_network
from recipes.optimizer import build_optimizer, exempt_norms_and_biases
from recipes.output import ABSENT, Content, Table, markdown, show
from recipes.preflight import prepare_run
from recipes.results import to_json
from recipes.run import open_data
from recipes.trainer import FixedBuckets, build_algorithms, build_trainer, device_name, split
from recipes.watch import build_watchers
from recipes.watch.sinks import TextLog

CLASSES = 1000
IMAGES, EPOCHS = 1_281_167, 90
"""Of ImageNet's training set, and of the recipe."""
ASKED = {
    ("memory", "bare"): 0.97,
    ("memory-compiled", "bare"): 1.15,
    ("photos", "memory"): 0.95,
    ("photos-compiled", "memory-compiled"): 0.95,
}
"""The least ratio of images/s, one side to another."""


class Setting(NamedTuple):
    """What the sides have in common at one size."""

    config: RunConfig  # for this size and device
    device: torch.device
    plan: Sequence[EpochPlan]  # of the only epoch
    train: Source  # as many images as are asked for
    val: Source
    network: nn.Module  # with BlurPool, on the CPU
    images: int  # per step
    portion: int  # images of a forward and backward pass
    batches: list[tuple[torch.Tensor, torch.Tensor]]  # as many, uint8 and int64, most of them the same
    folder: str  # for the runs

    @property
    def half(self) -> torch.dtype | None:
        """The type that autocast computes in; None in FP32."""
        return {"amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}.get(self.config.precision)


class _Ended(BaseException):
    """Leaves a side's loop from within its loader; not an Exception, which a loop might handle."""


class Side:
    """A training loop in a thread of its own, and the loader that delivers its batches, only within `rate`.

    `train` gets this object, gives it a `loader`, and iterates over it. `peak`: bytes that the device reserved for it.
    """

    def __init__(
        self, train: Callable[[Side], None], device: torch.device, images: int, steps: int, warmup: int
    ) -> None:
        self.loader: Any = []
        self.peak = 0
        self._cuda, self._images, self._steps, self._warmup = device.type == "cuda", images, steps, warmup
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._cudnn_benchmark = (
            False  # torch's default; the setting is the process's, and so that of the side that runs
        )
        self._seconds, self._over = math.nan, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()

    def rate(self) -> float:
        """Images/s of the next window; nan if the loop has failed, which the first time is printed."""
        if self._error is not None:
            return math.nan
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_reserved()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            traceback.print_exception(self._error)
            return math.nan
        if self._cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_reserved() - others)
        return self._images * self._steps / self._seconds

    def close(self) -> None:
        """End the loop."""
        self._over = True
        self._go.release()
        self._thread.join()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        found = getattr(getattr(self.loader, "_iterator", None), "_workers", ())
        workers = [psutil.Process(worker.pid) for worker in found]
        ready = len(workers) * self.loader.prefetch_factor if workers else 0
        while True:
            for _ in range(ready):
                next(batches)
            for _ in range(self._warmup):
                yield next(batches)
            began = self._now()
            for _ in range(self._steps):
                yield next(batches)
            self._seconds = self._now() - began
            for worker in workers:
                worker.suspend()
            try:
                self._pause()
            finally:
                for worker in workers:
                    worker.resume()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _pause(self) -> None:
        self._cudnn_benchmark = torch.backends.cudnn.benchmark
        self._done.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._over:
            raise _Ended
        torch.backends.cudnn.benchmark = self._cudnn_benchmark

    def _run(self, train: Callable[[Side], None]) -> None:
        try:
            self._wait()
            train(self)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()


def bare(setting: Setting, side: Side) -> None:
    """The same network and optimizer in a loop that does nothing else."""
    torch.backends.cudnn.benchmark = True
    config, device, half = setting.config, setting.device, setting.half
    network = copy.deepcopy(setting.network).to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(config.optimizer, network.parameters(), 0.01)
    exempt_norms_and_biases(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    normalise = Normalise(config.data.mean, config.data.std)
    side.loader = setting.batches
    for batch in side:
        optimizer.zero_grad(set_to_none=True)
        for portion in split(batch, setting.portion):
            images, labels = normalise([part.to(device, non_blocking=True) for part in portion])
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = F.cross_entropy(network(images), labels)
            scaler.scale(loss * (len(labels) / setting.images)).backward()
        scaler.step(optimizer)
        scaler.update()


def ours(photos: bool, compiled: bool, setting: Setting, side: Side) -> None:
    """What `recipes/run.py` builds."""
    name = f"{'photos' if photos else 'memory'}{'-compiled' * compiled}-{setting.config.data.train_size}"
    update = {"run_name": name, "runs_folder": setting.folder, "compile": compiled}
    config, train = setting.config.model_copy(update=update), setting.train
    text_log = TextLog(Path(setting.folder) / name / "log.txt", io.StringIO(), name)
    watchers = build_watchers(
        config,
        text_log,
        samples=len(train),
        sizes=[entry.size for entry in setting.plan],
        classes=train.classes,
        class_names=train.classes,
        resumed_from=None,
    )
    places = Places.of(config.checkpoints.folder, config.runs_folder, name)
    checkpoints = CheckpointManager(
        config,
        places=places,
        identity=Identity.of(config, 1, len(train), train.classes),
        owner=Owner(places, name),
        resume=Resume(),
        interrupt=Interrupt(),
        top1=lambda state: None,
    )
    trainer = build_trainer(
        config,
        train=train,
        val=setting.val,
        sampler=PositionSampler(len(train), setting.plan, config.seed, 0, 1),
        algorithms=[*build_algorithms(config, [math.ceil(IMAGES / setting.images)] * EPOCHS), FixedBuckets()],
        callbacks=[*watchers.callbacks, checkpoints],
        loggers=[*watchers.loggers, StopOnNan()],
    )
    trainer.state.train_dataloader.gate = checkpoints.gate
    side.loader = trainer.state.train_dataloader if photos else setting.batches
    normalise = Normalise(config.data.mean, config.data.std)
    try:
        trainer.fit(train_dataloader=DataSpec(side, microbatch_transforms=normalise, split_batch=split))
    finally:
        trainer.close()
        text_log.close()


def torchvisions(setting: Setting, side: Side) -> None:
    """The loop of torchvision's references/classification/train.py, with its loader and its defaults."""
    from torchvision import datasets
    from torchvision import transforms as T

    torch.backends.cudnn.benchmark = True
    config, device, half = setting.config, setting.device, setting.half
    parts = [T.RandomResizedCrop(config.data.train_size), T.RandomHorizontalFlip(), T.PILToTensor()]
    parts += [T.ConvertImageDtype(torch.float), T.Normalize(config.data.mean, config.data.std)]
    dataset = datasets.ImageFolder(f"{config.data.path}/train", T.Compose(parts))
    side.loader = DataLoader(
        Subset(dataset, (np.arange(len(setting.train)) % len(dataset)).tolist()),
        batch_size=setting.portion,
        shuffle=True,
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        pin_memory=device.type == "cuda",
    )
    network = build_network(config.model.name, CLASSES).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    for batch in side:
        images, labels = (part.to(device) for part in batch)
        with torch.autocast(device.type, half, enabled=half is not None):
            output = network(images)
            loss = F.cross_entropy(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        hits = output.topk(5).indices == labels[:, None]
        for count in (1, 5):
            hits[:, :count].sum().item()
        loss.item()


SIDES: Mapping[str, Callable[[Setting, Side], None]] = {
    "bare": bare,
    "memory": partial(ours, False, False),
    "photos": partial(ours, True, False),
    "memory-compiled": partial(ours, False, True),
    "photos-compiled": partial(ours, True, True),
    "torchvision": torchvisions,
}


def config_at(yaml: Path, overrides: Sequence[str], size: int) -> RunConfig:
    """The YAML's run as one epoch at one size, without a progress bar."""
    fixed = [f"data.train_size={size}", f"eval.sizes=[{size}]", "max_duration=1ep", "loggers.progress_bar=false"]
    off = [f"algorithms.{name}=off" for name in ("progressive_resizing", "fixres")]
    return load_config(yaml, [f"model.num_classes={CLASSES}", "run_name=gpu", *overrides, *fixed, *off])


def prepare(config: RunConfig, folder: str, steps: int) -> Setting:
    """The images and the network for so many steps; InputError: the config cannot be used on this machine."""
    config, train, val, plan = prepare_run(config, 1, lambda: open_data(config))
    kind = device_name(config.device)
    device, images, size = torch.device("cuda" if kind == "gpu" else kind), plan[0].global_batch_size, plan[0].size
    torch.manual_seed(config.seed)
    batches = []
    for _ in range(2):
        pictures = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
        batch = pictures.contiguous(memory_format=torch.channels_last), torch.randint(CLASSES, (images,))
        batches.append(tuple(part.pin_memory() for part in batch) if device.type == "cuda" else batch)
    return Setting(
        config,
        device,
        plan,
        sources.Subset(train, np.arange(images * steps) % len(train)),
        val,
        operated_network(config.model.name, CLASSES, config.algorithms),
        images,
        microbatch_images(config, plan[0], 1),
        [batches[step % 2] for step in range(steps)],
        folder,
    )


def measure(config: RunConfig, rounds: int, steps: int, warmup: int) -> dict[str, Any]:
    """Each side's images/s in each round, and its peak bytes, at the config's size."""
    window = config.data.workers * config.data.prefetch_factor + warmup + steps
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(config, folder, (rounds + 2) * window)
        images = {name: setting.portion if name == "torchvision" else setting.images for name in SIDES}
        sides = {
            name: Side(partial(train, setting), setting.device, images[name], steps, warmup)
            for name, train in SIDES.items()
        }

        def measured(name: str) -> float:
            rate = sides[name].rate()
            print(f"{config.data.train_size} px  {name}  {rate:,.1f} images/s", flush=True)
            return rate

        try:
            rates = alternate({name: partial(measured, name) for name in sides}, rounds)
        finally:
            for side in sides.values():
                side.close()
            end_workers()
            torch._dynamo.reset()
    config = setting.config
    fixed, per_image = step_memory(planned_network(config, CLASSES), config, 1, config.data.train_size)
    return {
        "images_per_step": setting.images,
        "images_per_microbatch": setting.portion,
        "precision": config.precision,
        "images_per_second": rates,
        "peak_bytes": {name: side.peak for name, side in sides.items()},
        "estimated_bytes": round(fixed + per_image * setting.portion),
    }


def ratio(rates: Mapping[str, Sequence[float]], side: str, other: str) -> float:
    """The median over the rounds of one side's images/s over the other's."""
    return median(one / two for one, two in zip(rates[side], rates[other], strict=True))


def shown(value: float, form: str = ".3f") -> str:
    """A number; `-` for one that is not known."""
    return ABSENT if math.isnan(value) else format(value, form)


def tables(found: Mapping[int, Mapping[str, Any]]) -> Content:
    """The results of `measure` by size in pixels."""
    heads, columns = [f"{size} px" for size in found], range(1, 1 + len(found))
    rates = {size: at["images_per_second"] for size, at in found.items()}
    speed = [
        [side, *(f"{shown(median(at[side]), ',.0f')} ({shown(ratio(at, side, 'bare'))})" for at in rates.values())]
        for side in SIDES
    ]
    asked = [
        [f"{side} / {other}", f"{least:.2f}", *(shown(ratio(at, side, other)) for at in rates.values())]
        for (side, other), least in ASKED.items()
    ]
    peaks = [
        [side, *(shown((at["peak_bytes"][side] or math.nan) / 1e9, ".1f") for at in found.values())] for side in SIDES
    ]
    peaks.append(["memory estimate", *(f"{at['estimated_bytes'] / 1e9:.1f}" for at in found.values())])
    return {
        "Images per second (of the bare loop)": [Table(["side", *heads], speed, columns)],
        "Asked": [Table(["images/s of", "at least", *heads], asked, [1, *(column + 1 for column in columns)])],
        "Peak memory, GB": [Table(["side", *heads], peaks, columns)],
    }


def missed(found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """What is asked for and not reached, one line each; that of a side that failed is nan."""
    return [
        f"{size} px: {side} / {other} is {reached:.3f}, asked: {least:.2f}"
        for size, at in found.items()
        for (side, other), least in ASKED.items()
        if not (reached := ratio(at["images_per_second"], side, other)) >= least
    ]


def count(text: str) -> int:
    """The type of an option that takes a number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: at least 1")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("yaml", type=Path)
    add("overrides", nargs="*", metavar="key=value")
    add("--sizes", type=pixels, nargs="+", default=[128, 224, 288], help="image sizes in pixels (default: 128 224 288)")
    add("--rounds", type=count, default=5, help="measured windows of each side (default: %(default)s)")
    add("--steps", type=count, default=20, help="in a window (default: %(default)s)")
    add("--warmup", type=count, default=10, help="steps before it (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_intermixed_args(arguments)
    found: dict[int, dict[str, Any]] = {}
    configs = {size: config_at(options.yaml, options.overrides, size) for size in options.sizes}
    options.output.mkdir(parents=True, exist_ok=True)
    for size, config in configs.items():
        found[size] = measure(config, options.rounds, options.steps, options.warmup)
        on_gpu = device_name(config.device) == "gpu"
        card = torch.cuda.get_device_name() if on_gpu else f"no GPU, {torch.get_num_threads()} threads"
        about = {"device": f"{card}, {machine()}", "torch": torch.__version__, "commit": commit()}
        about |= {"command": ["benchmarks.gpu", *arguments], "n": options.rounds, "steps": options.steps}
        (options.output / "results.json").write_text(to_json(about | {"sizes": found}, indent=1) + "\n")
        (options.output / "table.md").write_text(markdown(tables(found)))
    show(tables(found), f"{card}, torch {torch.__version__}, n = {options.rounds}")
    failed = any(
        map(math.isnan, (rate for at in found.values() for of in at["images_per_second"].values() for rate in of))
    )
    if not on_gpu:
        print("no GPU: these figures only show that the command works")
        return int(failed)
    print("\n".join(missed(found)) or "all that is asked for is reached")
    return int(failed or bool(missed(found)))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(sys.argv[1:])))
