"""Techniques under DDP: one launch of two processes, looked at from several sides."""

import os
import sys
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.algorithms import EMA
from tiny_run import assert_equal
from two_processes import AVERAGED, SWAPPED

from tests.support import ROOT, end, free_port, start

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes as Composer's launcher would start them, without the seconds that it takes itself."""
    out, port = tmp_path_factory.mktemp("two"), str(free_port())
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    together |= {"MASTER_PORT": port, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    command = [sys.executable, str(HERE / "two_processes.py"), str(out)]
    processes = [start(command, **together, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    outcomes = [end(process) for process in processes]
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    return out


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.out", weights_only=True) for rank in (0, 1)]


def trained(weights):
    """Without BatchNorm's statistics, which each process has of its own."""
    return {name: value for name, value in weights.items() if "running" not in name}


@pytest.mark.parametrize("name", ["averaged", "swapped", "skipped"])
def test_processes_agree_and_a_resume_is_exact(ranks, name):
    assert_equal(ranks[0][name]["through"], ranks[0][name]["resumed"])
    assert_equal(trained(ranks[0][name]["through"]), trained(ranks[1][name]["through"]))


def test_freezing_after_ddp_wrapped_the_model_moves_two_layers_only(ranks):
    start, end = ranks[0]["stage"], ranks[0]["averaged"]["through"]
    changed = {name.rpartition(".")[0] for name in end if not torch.equal(start[name], end[name])}
    assert changed == {"module.5", "module.10"}


def test_all_ranks_mix_alike(ranks):
    assert ranks[0]["choices"] == ranks[1]["choices"]
    assert set(ranks[0]["choices"]) == {"MixUp", "CutMix"}


class Evaluated(Callback):
    def eval_batch_start(self, state, logger):
        self.weights = {name: value.clone() for name, value in state.model.named_parameters()}


def test_one_process_resumes_with_the_averages_of_two(run, folder):
    """Composer ignores weights whose names DDP changed, and would evaluate what was never averaged."""
    watch = Evaluated()
    item = run(AVERAGED, load=folder / "averaged.pt", evaluate=True, callbacks=(watch,))
    (average,) = (algorithm for algorithm in item.trainer.state.algorithms if isinstance(algorithm, EMA))
    saved = {name: value.clone() for name, value in average.ema_model.named_parameters_dict.items()}
    trained = item.weights()
    item.trainer.eval()
    assert_equal(watch.weights, saved)
    assert_equal(item.weights(), trained)
    item.fit()


def test_one_process_resumes_with_the_swa_of_two(run, folder):
    item = run(SWAPPED, load=folder / "swapped.pt", epochs=4)
    item.fit()
    assert item.trainer.state.algorithms[0].swa_completed
