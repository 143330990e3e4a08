"""Techniques under DDP: `python test_two_processes.py FOLDER` trains in two processes, once for all tests."""

import sys
from pathlib import Path

import pytest
import torch
from composer.algorithms import EMA
from composer.utils import dist
from tiny_run import Recorder, Run, assert_equal, bottlenecks, convnet

from algorithms import bare_name
from tests.support import run_two

AVERAGED = {
    "fixres": {"start": 0.34, "train": "classifier"},
    "mixup": {"alpha": 0.4},
    "cutmix": {},
    "ema": {"half_life": "4ba"},
    "sam": {"interval": 2},
}
SWAPPED = {"swa": {"start": 0.3, "end": 0.7}}
SKIPPED = {"stochastic_depth": {"drop_rate": 0.6}}


class Mixes(Recorder):
    """Which of MixUp and CutMix acts on each batch."""

    def __init__(self):
        super().__init__("before_loss", self.choice)

    def batch_start(self, state, logger):
        self.images = state.batch[0].clone()

    def choice(self, state):
        # CutMix takes every value from some image as it is; MixUp blends.
        return "CutMix" if torch.isin(state.batch[0], self.images).all() else "MixUp"


def through_and_resumed(out, name, techniques, epochs, batch, *, network=convnet, callbacks=()):
    """The final weights of an uninterrupted run and of one resumed from its checkpoint."""
    path = out / f"{name}.pt"
    through = Run(techniques, epochs=epochs, network=network, save={batch: path}, callbacks=callbacks)
    through.trainer.fit()
    resumed = Run(techniques, epochs=epochs, network=network, load=path)
    resumed.trainer.fit()
    weights = [item.trainer.state.model.module.state_dict() for item in (through, resumed)]
    return {"through": weights[0], "resumed": weights[1]}


def main(out):
    dist.initialize_dist("cpu", timeout=120)
    starts, mixes = Recorder("epoch_start"), Mixes()
    found = {
        "averaged": through_and_resumed(out, "averaged", AVERAGED, 3, 8, callbacks=(starts, mixes)),
        "swapped": through_and_resumed(out, "swapped", SWAPPED, 4, 12),
        "skipped": through_and_resumed(out, "skipped", SKIPPED, 3, 2, network=bottlenecks),
        "stage": starts.values[1],
        "choices": mixes.values,
    }
    torch.save(found, out / f"rank{dist.get_global_rank()}.out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    run_two([__file__, str(out)])
    return out


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.out", weights_only=True) for rank in (0, 1)]


def trained(weights):
    """Without BatchNorm's statistics, which each process has of its own."""
    return {name: value for name, value in weights.items() if "running" not in name and "tracked" not in name}


@pytest.mark.parametrize("name", ["averaged", "swapped", "skipped"])
def test_processes_agree_and_resume_exactly(ranks, name):
    assert_equal(ranks[0][name]["through"], ranks[0][name]["resumed"])
    assert_equal(trained(ranks[0][name]["through"]), trained(ranks[1][name]["through"]))


def test_freezing_after_ddp_wrapped_the_model_changes_only_two_layers(ranks):
    stage, end = (
        {bare_name(name): tensor for name, tensor in weights.items()}
        for weights in (ranks[0]["stage"], ranks[0]["averaged"]["through"])
    )
    changed = {name.rpartition(".")[0] for name in end if not torch.equal(stage[name], end[name])}
    assert changed == {"5", "10"}


def test_all_processes_mix_alike(ranks):
    assert ranks[0]["choices"] == ranks[1]["choices"]
    assert set(ranks[0]["choices"]) == {"MixUp", "CutMix"}


def test_one_process_resumes_with_the_averages_of_two(run, folder):
    """Composer ignores weights whose names DDP changed, and would evaluate what was never averaged."""
    evaluated = Recorder("eval_batch_start")
    item = run(AVERAGED, load=folder / "averaged.pt", evaluate=True, callbacks=(evaluated,))
    (average,) = (algorithm for algorithm in item.trainer.state.algorithms if isinstance(algorithm, EMA))
    saved = {name: value.clone() for name, value in average.ema_model.named_parameters_dict.items()}
    trained = item.weights()
    item.trainer.eval()
    assert_equal({name: evaluated.values[-1][name] for name in saved}, saved)
    assert_equal(item.weights(), trained)
    item.fit()


def test_one_process_resumes_with_the_swa_of_two(run, folder):
    item = run(SWAPPED, load=folder / "swapped.pt", epochs=4)
    item.fit()
    assert item.trainer.state.algorithms[0].swa_completed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
