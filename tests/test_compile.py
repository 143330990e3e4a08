"""`compile: true`: one graph for each shape, in training and evaluation, with the techniques of the medium recipe.

The graphs run by torch's own operators here (backend `eager`), which needs no compiler and rounds as the plain network.
"""

import functools

import torch

from tests.support import ROOT

SETTINGS = """
model.name=timm/test_resnet device=cpu data.train_size=32 algorithms.fixres.size=40 eval.sizes=[32,40] max_duration=4ep
algorithms.progressive_resizing.size_increment=4 data.train_samples=21 device_batch_size=4 data.workers=0
loggers.tensorboard=false loggers.progress_bar=false
"""


def test_a_run_ends_with_the_weights_of_a_plain_one(train, monkeypatch, caplog):
    recipe = ROOT / "yamls" / "medium.yaml"
    _, plain = train(recipe, *SETTINGS.split(), "run_name=plain")
    # With `fullgraph`, whatever would break a graph in two raises.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    status, compiled = train(recipe, *SETTINGS.split(), "run_name=compiled", "compile=true")
    assert status == 0
    assert compiled["weights_sha256"] == plain["weights_sha256"]
    assert compiled["eval_by_size"] == plain["eval_by_size"]
    lines = [record.getMessage() for record in caplog.records]
    sizes = [int(line.split()[-2]) for line in lines if line.startswith("compiling the network for")]
    assert sizes == [32, 40]
    assert sum(line.startswith("the first step at") for line in lines) == 2
