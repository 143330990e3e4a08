"""`compile: true`: one graph for each shape, in training and evaluation, with the techniques of the medium recipe.

The graphs run by torch's own operators here (backend `eager`), which needs no compiler and rounds as the plain network.
"""

import functools
import json
import re
import sys

import pytest
import torch

from recipes import evaluate
from tests.support import ROOT, run_two, summary_of

MEDIUM = str(ROOT / "yamls" / "medium.yaml")
SETTINGS = """\
model.name=timm/test_resnet device=cpu data.train_size=32 algorithms.fixres.size=40 eval.sizes=[32,40] max_duration=4ep
algorithms.progressive_resizing.size_increment=4 data.train_samples=21 device_batch_size=4 data.workers=0
loggers.tensorboard=false loggers.progress_bar=false checkpoints.interval=5ba checkpoints.keep=99
"""


@pytest.fixture
def one_graph(monkeypatch):
    """What would break a graph in two raises."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))


def test_a_run_ends_with_the_weights_of_a_plain_one_also_resumed(
    train, one_graph, tmp_path, images, monkeypatch, capsys
):
    _, plain = train(MEDIUM, *SETTINGS.split(), "run_name=plain")
    status, compiled = train(MEDIUM, *SETTINGS.split(), "run_name=compiled", "compile=true")
    assert status == 0
    assert compiled["weights_sha256"] == plain["weights_sha256"]
    assert compiled["eval_by_size"] == plain["eval_by_size"]
    folder = tmp_path / "compiled"
    log = (folder / "log.txt").read_text()
    # Batches of 21 images at most 4 at a time have 3 or 4; the 9 of the evaluation are one batch.
    told = re.findall(r"compiling the network to (\w+) on (\d) images of (\d+) px", log)
    kinds = [("evaluate", "9"), ("train", "3"), ("train", "4")]
    assert sorted(told) == [(*kind, size) for kind in kinds for size in ("32", "40")]
    assert log.count("compiled; that step took") == len(told)

    # As a kill in the middle of an epoch leaves it; what remains is also all that `evaluate` needs.
    for file in (folder / "checkpoints").glob("*-ba*"):
        if int(file.name.partition("-ba")[2][:6]) > 15:
            file.unlink()
    (folder / "summary.json").unlink()
    status, resumed = train(MEDIUM, *SETTINGS.split(), "run_name=compiled", "compile=true")
    assert resumed["resumed_from"][0].endswith("-ba000015.safetensors")
    assert resumed["weights_sha256"] == plain["weights_sha256"]
    words = [f"runs_folder={tmp_path}", f"data.path={images}", "run_name=compiled", "compile=true"]
    monkeypatch.setattr(sys, "argv", ["evaluate", MEDIUM, *SETTINGS.split(), *words, "--json"])
    capsys.readouterr()
    assert evaluate.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights_sha256"] == plain["weights_sha256"]
    assert found["results"][1]["loss"] == pytest.approx(plain["eval_by_size"]["40"]["loss"], rel=1e-5)


TWICE = """
import functools, sys, torch
from recipes.cli import run_command
from recipes.load import load_config
from recipes.run import run

torch.compile = functools.partial(torch.compile, backend="eager")

def main():
    yaml, *words = sys.argv[1:]
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        assert run(load_config(yaml, [*words, f"run_name={name}", f"compile={compiled}"])) == 0
    return 0

sys.exit(run_command(main))
"""


def test_two_processes_with_synchronised_statistics(tmp_path, images):
    # The processes' shares of a batch differ by one image.
    settings = """
    model.name=timm/test_resnet model.sync_batchnorm=true device=cpu device_batch_size=3 max_duration=1ep
    eval.sizes=[32] data.train_size=32 data.train_samples=22 data.workers=0 algorithms.progressive_resizing=off
    algorithms.fixres=off loggers.tensorboard=false loggers.progress_bar=false
    """
    words = [MEDIUM, *settings.split(), f"runs_folder={tmp_path}", f"data.path={images}"]
    run_two(["-c", TWICE, *words])
    assert summary_of(tmp_path, "compiled")["weights_sha256"] == summary_of(tmp_path, "plain")["weights_sha256"]
