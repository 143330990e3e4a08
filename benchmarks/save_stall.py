"""How long training pauses for a checkpoint, against a plain `torch.save` of the same state to the same disk.

`python -m benchmarks.save_stall`: the real state of ResNet-50 with SGD's momentum and EMA (300 MB), taken
from Composer's Trainer after one step; ours and the plain one alternate in one process. Ours is everything that
`CheckpointManager` does between two steps; it writes in the background, which is not timed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from composer import State
from composer.algorithms import EMA
from composer.models import ComposerClassifier
from composer.utils import reproducibility
from torchvision.models import resnet50

from benchmarks.measure import alternate, machine, options, show_ratio
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.interrupt import Interrupt
from recipes.checkpoints.manifest import Identity
from recipes.checkpoints.resume import Resume
from recipes.checkpoints.save import CheckpointManager
from recipes.checkpoints.store import Places
from recipes.config import RunConfig
from recipes.step import SteadyTrainer


def trained_state() -> State:
    """ResNet-50 with EMA after two steps on noise."""
    images = torch.utils.data.TensorDataset(torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.long))
    model = ComposerClassifier(resnet50(), num_classes=1000)
    trainer = SteadyTrainer(
        images_of=lambda *_: 2,
        model=model,
        train_dataloader=torch.utils.data.DataLoader(images, batch_size=2),
        max_duration="1ep",
        algorithms=[EMA(half_life="10ba")],
        optimizers=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        progress_bar=False,
        auto_log_hparams=False,
    )
    trainer.fit()
    return trainer.state


def main() -> None:
    repeats = options(__doc__, repeats=15).repeats
    state = trained_state()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = Places(folder / "ours", None, folder)
        saving = {"interval": "1ba", "keep": 2}
        checkpoints = CheckpointManager(
            RunConfig(run_name="stall", data={"path": "noise"}, device_batch_size=2, checkpoints=saving),
            places=places,
            identity=Identity(run_name="stall", config_digest="digest", config={}, world_size=1),
            owner=Owner(places, "stall"),
            resume=Resume(),
            interrupt=Interrupt(),
            top1=lambda state: None,
        )

        def ours() -> float:
            state.timestamp = state.timestamp.to_next_batch(samples=2)
            began = time.perf_counter()
            checkpoints.batch_checkpoint(state, None)
            took = time.perf_counter() - began
            checkpoints.writer.wait(120)
            return took

        def plain() -> float:
            began = time.perf_counter()
            torch.save({"state": state.state_dict(), "rng": reproducibility.get_rng_state()}, folder / "plain.pt")
            return time.perf_counter() - began

        ratio = show_ratio(alternate({"ours": ours, "torch.save": plain}, repeats), "ours", "torch.save")
        size = (folder / "plain.pt").stat().st_size / 1e6
    print(f"ratio of medians {ratio:.2f} (at most 1.2), {size:.0f} MB, n = {repeats}, {machine()}")


if __name__ == "__main__":
    main()
