"""Techniques under DDP: one launch of two processes, looked at from several sides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(HERE / "two_processes.py"), str(out)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.out", weights_only=True) for rank in (0, 1)]


def trained(weights):
    """Without BatchNorm's statistics, which each process has of its own."""
    return {name: value for name, value in weights.items() if "running" not in name}


@pytest.mark.parametrize("name", ["averaged", "swapped", "skipped"])
def test_processes_agree_and_a_resume_is_exact(ranks, same_weights, name):
    same_weights(ranks[0][name]["through"], ranks[0][name]["resumed"])
    same_weights(trained(ranks[0][name]["through"]), trained(ranks[1][name]["through"]))


def test_freezing_after_ddp_wrapped_the_model_moves_two_layers_only(ranks):
    start, end = ranks[0]["stage"], ranks[0]["averaged"]["through"]
    changed = {name.rpartition(".")[0] for name in end if not torch.equal(start[name], end[name])}
    assert changed == {"module.5", "module.10"}


def test_all_ranks_mix_alike(ranks):
    assert ranks[0]["choices"] == ranks[1]["choices"]
    assert set(ranks[0]["choices"]) == {"MixUp", "CutMix"}


def test_one_process_goes_on_with_the_averages_of_two(run, folder):
    """Composer passes over weights whose names DDP changed, and would evaluate what was never averaged."""
    from two_processes import AVERAGED, SWAPPED

    item = run(AVERAGED, load=folder / "averaged.pt", evaluate=True)
    average = item.trainer.state.algorithms[2]
    saved = {name: value.clone() for name, value in average.ema_model.named_parameters_dict.items()}
    assert all(name.startswith("module.module.") for name in saved)
    current = item.weights()
    item.trainer.state.algorithms[2].ema_weights_active = False
    item.trainer.eval()
    swapped_back = item.weights()
    assert all(torch.equal(current[name], swapped_back[name]) for name in current)
    assert average.ema_model.named_parameters_dict.keys() == {name.removeprefix("module.") for name in saved}
    item.fit()
    run(SWAPPED, load=folder / "swapped.pt", epochs=4).fit()
