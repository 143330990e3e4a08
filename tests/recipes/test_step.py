"""SteadyTrainer does what Composer's Trainer does: the same weights, and the same calls to whatever listens."""

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.loggers import LoggerDestination
from composer.models import ComposerClassifier

from algorithms.config import SAMConfig
from algorithms.sam import SAM
from recipes.step import SteadyTrainer
from recipes.trainer import split

EPOCHS, BATCHES, IMAGES = 2, 3, 4


class Silent(Callback):
    """Has no method for any event."""


class Steps(Callback):
    def __init__(self, heard):
        self.heard = heard

    def batch_start(self, state, logger):
        self.heard.append(f"{type(self).__name__} {int(state.timestamp.batch)}")

    epoch_end = fit_end = batch_end = batch_start


class Sink(LoggerDestination):
    """A logger, which comes after all other callbacks."""

    __init__, batch_end = Steps.__init__, Steps.batch_start


class Everything(Callback):
    def __init__(self, heard):
        self.heard = heard

    def run_event(self, event, state, logger):
        self.heard.append(event.value)


class Late(Callback):
    """Adds a callback while the run goes on."""

    def __init__(self, heard):
        self.epoch_end = lambda state, logger: state.callbacks.append(Steps(heard))


def trained(kind, algorithms, monkeypatch):
    """The weights of a tiny run, what its callbacks heard, and how often Composer's own `run_event` was called."""
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
    model, heard, calls = ComposerClassifier(torch.nn.Sequential(*layers), num_classes=3), [], []
    batches = [(torch.randn(IMAGES, 3, 4, 4), torch.arange(IMAGES) % 3) for _ in range(BATCHES)]
    real = Callback.run_event
    with monkeypatch.context() as patched:
        patched.setattr(Callback, "run_event", lambda *args: (calls.append(type(args[0])), real(*args)))
        trainer = kind(
            model=model,
            train_dataloader=DataSpec(batches, num_samples=BATCHES * IMAGES, split_batch=split),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            max_duration=f"{EPOCHS}ep",
            algorithms=algorithms,
            callbacks=[Silent(), Sink(heard), Steps(heard), Everything(heard), Late(heard)],
            device="cpu",
            device_train_microbatch_size=2,
            progress_bar=False,
            **({"images_of": lambda epoch, batch: IMAGES} if kind is SteadyTrainer else {}),
        )
        heard.clear()  # the events of the constructor
        calls.clear()
        trainer.fit()
    return trainer.state.model.state_dict(), heard, calls


@pytest.mark.parametrize("algorithms", [[], [SAM(SAMConfig(interval=2))]], ids=["plain", "sam"])
def test_the_same_weights_and_calls_as_composers(algorithms, monkeypatch):
    theirs, heard_there, calls_there = trained(Trainer, algorithms, monkeypatch)
    ours, heard, calls = trained(SteadyTrainer, algorithms, monkeypatch)
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    assert heard == heard_there
    assert sum(line.startswith("Steps") for line in heard) == EPOCHS * (2 * BATCHES + 1) + 1 + 2 * BATCHES + 2 + 1
    assert Silent in calls_there
    assert Silent not in calls
    assert len(calls) < len(calls_there) / 10
