"""In a step, nothing that has to be computed on the device first is read by the host, unless a line is logged.

On a GPU each such read makes the host wait, and then the GPU idle. A CPU does not wait, but the reads are the same
operations, so that they can be counted.
"""

import collections
import itertools

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.trainer import position_seed
from tests.support import ROOT

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "masked_select", "unique")


class CountReads(TorchDispatchMode):
    """Counts the operations by which the host reads from a tensor, or makes a shape depend on its values."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexes_by_mask = name == "index" and any(str(getattr(one, "dtype", "")) == "torch.bool" for one in args[1])
        if name in READS or indexes_by_mask:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


STEPS = 4  # in an epoch
SETTINGS = f"""
model.name=timm/test_resnet device=cpu max_duration=3ep data.train_size=32 algorithms.fixres.size=40 eval.sizes=[32]
algorithms.progressive_resizing.size_increment=4 data.train_samples={4 * STEPS} device_batch_size=4 data.workers=1
eval.interval=3 checkpoints.interval=3ep loggers.tensorboard=false loggers.progress_bar=false
"""


@pytest.fixture
def reads(train, monkeypatch):
    """What each step of a run of the medium recipe reads, before it reads the last epoch's weights."""

    def reads(*overrides):
        steps = []

        def begin(*position):  # the first thing that a step asks for
            steps.append(mode.found.copy())
            return position_seed(*position)

        monkeypatch.setattr("recipes.trainer.position_seed", begin)
        with CountReads() as mode:
            status, _ = train(ROOT / "yamls" / "medium.yaml", *SETTINGS.split(), "run_name=reads", *overrides)
        assert status == 0
        return [after - before for before, after in itertools.pairwise(steps)]

    return reads


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=decoupled_sgdw"],
        ["algorithms.mixup=off", "algorithms.cutmix=off", "algorithms.gradient_clipping={threshold: 1.0}"],
        ["device_microbatch_size=2", "algorithms.label_smoothing=off"]
        + [f"algorithms.{name}.interpolate_loss=true" for name in ("mixup", "cutmix")],
    ],
    ids=["all techniques", "smoothing alone, clipping", "microbatches, two losses"],
)
def test_steps_between_two_lines_read_nothing(reads, overrides):
    found = reads("loggers.interval=1000", *overrides)
    # A step ends where the next begins, and an epoch also asks once more, for the batch that does not come.
    each = STEPS + 1
    assert len(found) == 3 * each - 1
    within = [step for number, step in enumerate(found) if number % each in range(1, STEPS - 1)]
    assert within == [collections.Counter()] * (3 * (STEPS - 2))


def test_a_line_reads_the_loss(reads):
    found = reads("loggers.interval=1")
    assert found[1] == {"_local_scalar_dense": 1}
