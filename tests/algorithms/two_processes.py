"""What `test_two_processes.py` starts in two processes; writes what it finds to the folder that is its argument."""

import sys
from pathlib import Path

import torch
from composer import Callback
from composer.utils import dist
from conftest import Run

OUT = Path(sys.argv[1])
AVERAGED = {
    "fixres": {"start": 0.34, "train": "classifier"},
    "mixup": {"alpha": 0.4},
    "cutmix": {},
    "ema": {"half_life": "4ba"},
    "sam": {"interval": 2},
}
SWAPPED = {"swa": {"start": 0.3, "end": 0.7}}
SKIPPED = {"stochastic_depth": {"drop_rate": 0.6}}


class Stage(Callback):
    """Notes the weights when the FixRes stage begins, and which of MixUp and CutMix acts on each batch."""

    def __init__(self) -> None:
        self.start, self.choices = {}, []

    def epoch_start(self, state, logger):
        if state.timestamp.epoch == 1:
            self.start = {name: value.clone() for name, value in state.model.module.state_dict().items()}

    def before_loss(self, state, logger):
        mix = state.algorithms[1]
        self.choices.append(type(mix._chosen(state)).__name__)


def through_and_resumed(name, techniques, epochs, batch, **options):
    """The final weights of an uninterrupted run and of one resumed from its checkpoint."""
    path = OUT / f"{name}.pt"
    through = Run(techniques, epochs=epochs, save=(batch, path), **options)
    through.trainer.fit()
    resumed = Run(techniques, epochs=epochs, load=path)
    resumed.trainer.fit()
    weights = [item.trainer.state.model.module.state_dict() for item in (through, resumed)]
    return {"through": weights[0], "resumed": weights[1]}


def main() -> None:
    """Train, resume, save."""
    dist.initialize_dist("cpu", timeout=120)
    stage = Stage()
    found = {
        "averaged": through_and_resumed("averaged", AVERAGED, 3, 8, callbacks=(stage,)),
        "swapped": through_and_resumed("swapped", SWAPPED, 4, 12),
        "skipped": through_and_resumed("skipped", SKIPPED, 3, 2),
        "stage": stage.start,
        "choices": stage.choices,
    }
    torch.save(found, OUT / f"rank{dist.get_global_rank()}.out")


if __name__ == "__main__":
    main()
