"""What `test_two_processes.py` starts in two processes; writes what it finds to the folder that is its argument."""

import sys
from pathlib import Path

import torch
from composer import Callback
from composer.utils import dist
from tiny_run import Run, bottlenecks, convnet

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

    def batch_start(self, state, logger):
        self.images = state.batch[0].clone()

    def before_loss(self, state, logger):
        # CutMix takes every value from some image as it is; MixUp blends.
        whole = torch.isin(state.batch[0], self.images).all().item()
        self.choices.append("CutMix" if whole else "MixUp")


def through_and_resumed(out, name, techniques, epochs, batch, *, network=convnet, callbacks=()):
    """The final weights of an uninterrupted run and of one resumed from its checkpoint."""
    path = out / f"{name}.pt"
    through = Run(techniques, epochs=epochs, network=network, save={batch: path}, callbacks=callbacks)
    through.trainer.fit()
    resumed = Run(techniques, epochs=epochs, network=network, load=path)
    resumed.trainer.fit()
    weights = [item.trainer.state.model.module.state_dict() for item in (through, resumed)]
    return {"through": weights[0], "resumed": weights[1]}


def main(out: Path) -> None:
    """Train, resume, save."""
    dist.initialize_dist("cpu", timeout=120)
    stage = Stage()
    found = {
        "averaged": through_and_resumed(out, "averaged", AVERAGED, 3, 8, callbacks=(stage,)),
        "swapped": through_and_resumed(out, "swapped", SWAPPED, 4, 12),
        "skipped": through_and_resumed(out, "skipped", SKIPPED, 3, 2, network=bottlenecks),
        "stage": stage.start,
        "choices": stage.choices,
    }
    torch.save(found, out / f"rank{dist.get_global_rank()}.out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
