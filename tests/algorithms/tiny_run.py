"""A run of seconds through Composer's real Trainer: 15 steps of a small network on 40 random images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Evaluator, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import dist
from composer.utils.reproducibility import seed_all
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck

from algorithms.build import build_algorithms
from algorithms.config import AlgorithmsConfig
from recipes.checkpoints.format import restore, to_save
from recipes.trainer import position_seed

CLASSES, IMAGES, BATCH, EPOCHS = 4, 40, 8, 3
BATCHES_PER_EPOCH = IMAGES // BATCH


def convnet() -> nn.Sequential:
    """Two strided convolutions with BatchNorm, a pooling layer, dropout and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, CLASSES),
    )


def bottlenecks() -> nn.Sequential:
    """Three of torchvision's bottleneck blocks between a convolution and a classifier."""
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Bottleneck(16, 4),
        Bottleneck(16, 8, stride=2, downsample=shortcut),
        Bottleneck(32, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class SeedAndSave(Callback):
    """Makes draws a function of rank and batch, as the recipe's trainer does, and saves checkpoints on the way."""

    def __init__(self, paths: dict[int, Path]) -> None:
        self.paths = paths
        self.trainer: Trainer | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        seed_all(position_seed(1000, dist.get_global_rank(), state.timestamp.batch.value))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if path := self.paths.get(state.timestamp.batch.value):
            self.trainer.save_checkpoint(str(path))


class Loaded(Callback):
    """Loads a checkpoint of `SeedAndSave` as the recipe does."""

    def __init__(self, path: Path) -> None:
        self.saved = torch.load(path, weights_only=False, map_location="cpu")

    def before_load(self, state: State, logger: Logger) -> None:
        restore(state, to_save(self.saved["state"]), logger, "the checkpoint")


class Recorder(Callback):
    """Keeps what a function reads from the state at each event of one kind; by default the weights."""

    def __init__(self, event: str, read: Callable[[State], Any] | None = None) -> None:
        self.values: list[Any] = []
        setattr(self, event, lambda state, logger: self.values.append((read or weights_of)(state)))


def weights_of(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def loader() -> DataLoader:
    """Random images in order, shared evenly by the processes."""
    generator, processes = torch.Generator().manual_seed(1), dist.get_world_size()
    pictures = torch.randn(IMAGES, 3, 16, 16, generator=generator)
    data = TensorDataset(pictures, torch.randint(0, CLASSES, (IMAGES,), generator=generator))
    return DataLoader(data, BATCH // processes, sampler=dist.get_sampler(data, shuffle=False))


class Run:
    """A Trainer of Composer's, of techniques by their fields or of built algorithms."""

    def __init__(
        self,
        techniques: list | dict[str, Any],
        *,
        network: Callable[[], nn.Module] = convnet,
        epochs: int = EPOCHS,
        load: Path | None = None,
        save: dict[int, Path] | None = None,
        callbacks: tuple[Callback, ...] = (),
        microbatch: int = BATCH,
        evaluate: bool = False,
        momentum: float = 0.9,
    ) -> None:
        if isinstance(techniques, dict):
            config = AlgorithmsConfig.model_validate(techniques)
            techniques = build_algorithms(config, epochs * BATCHES_PER_EPOCH, epochs)
        torch.manual_seed(0)
        model = ComposerClassifier(network(), num_classes=CLASSES)
        saver, loaded = SeedAndSave(save or {}), [Loaded(load)] if load else []
        self.trainer = Trainer(
            model=model,
            train_dataloader=loader(),
            eval_dataloader=Evaluator(label="eval", dataloader=loader()) if evaluate else None,
            max_duration=f"{epochs}ep",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3),
            algorithms=techniques,
            callbacks=[saver, *loaded, *callbacks],
            device_train_microbatch_size=microbatch,
            device="cpu",
            seed=3,
            progress_bar=False,
            python_log_level=None,
        )
        saver.trainer = self.trainer
        for one in loaded:
            self.trainer._rng_state = one.saved["rng"]  # Composer restores it before the first batch

    def fit(self) -> dict[str, torch.Tensor]:
        """Train, and return the final weights."""
        self.trainer.fit()
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        return weights_of(self.trainer.state)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
