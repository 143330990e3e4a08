"""A loss that is not finite: the run ends before that state is kept, and nothing that it wrote is no JSON."""

import json
from types import SimpleNamespace

import pytest
import torch
from composer.core import Precision

from recipes.divergence import DivergedError, StopOnNan, is_finite
from tests.support import ROOT

NAN, INF = float("nan"), float("inf")
TINY = ("run_name=diverges", "model.name=timm/test_resnet", "max_duration=2ep", "device_batch_size=6", "data.workers=0")
OVERRIDES = (*TINY, "loggers.tensorboard=false", "scheduler={name: constant}", "optimizer.lr=1e30")
OVERRIDES += ("algorithms.progressive_resizing=off",)


def state(precision=Precision.FP32, spoil=None):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    if spoil is not None:
        name, value = spoil
        model.state_dict()[name].view(-1)[-1] = value
    return SimpleNamespace(
        model=model,
        precision=precision,
        timestamp=SimpleNamespace(batch=7, epoch=2),
        optimizers=[torch.optim.SGD(model.parameters(), lr=0.25)],
    )


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("often", ["loggers.interval=1", "checkpoints.interval=1ba"])
def test_it_ends_with_status_1_and_what_is_kept_is_from_before(train, tmp_path, caplog, often):
    status, summary = train(ROOT / "yamls" / "demo.yaml", *OVERRIDES, "loggers.interval=1000", often)
    assert status == 1
    assert not summary["finished"]
    (line,) = [one.getMessage() for one in caplog.records if "stop_on_nan" in one.getMessage()]
    assert "learning rate 1e+30" in line
    assert "--lr" in line
    log = (tmp_path / "diverges" / "log.txt").read_text()
    assert line in log
    assert "Traceback" not in log
    kept = sorted(path.stem for path in (tmp_path / "diverges" / "checkpoints").glob("*.json"))
    assert kept in ([], ["ep000-ba000001"])  # the first step's loss was that of the initial weights


def test_it_goes_on_where_that_is_wanted_and_writes_json(train, tmp_path):
    status, summary = train(ROOT / "yamls" / "demo.yaml", *OVERRIDES, "stop_on_nan=false", "loggers.interval=1")
    assert (status, summary["finished"]) == (0, True)
    folder = tmp_path / "diverges"
    figures = [strictly(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("train/loss", 0) is None for line in figures)
    for value in strictly((folder / "summary.json").read_text())["eval_by_size"].values():
        assert value["loss"] is None


def test_what_the_gradient_scaler_skips_is_none():
    watch = StopOnNan()
    watch.fit_start(state(Precision.AMP_FP16), None)
    for loss in (1.0, INF, 1.0, NAN, 0.5, INF):
        watch.log_metrics({"train/loss": loss})
    with pytest.raises(DivergedError, match="amp_bf16"):
        watch.log_metrics({"train/loss": NAN})


@pytest.mark.parametrize("spoil", [("0.weight", INF), ("0.bias", NAN), ("1.running_mean", NAN), ("1.running_var", INF)])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.AMP_FP16, Precision.AMP_BF16])
def test_a_state_that_is_not_worth_keeping(spoil, precision):
    assert is_finite(state(precision=precision), 1.0)
    assert not is_finite(state(precision=precision, spoil=spoil), 1.0)
    assert is_finite(state(precision=precision), NAN) == (precision == Precision.AMP_FP16)
