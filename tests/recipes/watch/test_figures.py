import json
import time

import pytest
import torch
from composer import Callback

from tests.recipes.watch.tiny import BATCH, SAMPLES, Images, Recorder, Tiny

TRAINING = [
    *(f"train/{name}" for name in ("loss", "lr", "momentum", "image_size", "batch_size", "images_per_second")),
    *("train/loader_wait_fraction", "train/epoch"),
    *(f"time/{name}_seconds" for name in ("train", "loader_wait", "evaluation", "checkpointing")),
]


class Stall(Callback):
    """Makes evaluations and checkpoints long."""

    seconds = 0.25

    def _stall(self, state, logger):
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass

    eval_start = _stall
    epoch_checkpoint = _stall


def bare_losses(sizes):
    """The losses of the same run in a plain PyTorch loop."""
    torch.manual_seed(0)
    model, data, losses = Tiny(), Images(16), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for size in sizes:
        for first in range(0, SAMPLES, BATCH):
            images, labels = zip(*(data[index] for index in range(first, min(first + BATCH, SAMPLES))), strict=True)
            batch = (-torch.nn.functional.interpolate(torch.stack(images), size), torch.tensor(labels))
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + len(losses))
            optimizer.zero_grad()
            loss = model.loss(model(batch), batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_values_are_those_of_the_step(finished):
    recorder, steps = finished.recorder, range(1, 13)
    losses = bare_losses((8, 8, 12, 16))
    assert recorder.of("train/loss") == pytest.approx({step: losses[step - 1] for step in steps}, rel=1e-4)
    assert recorder.of("train/lr") == pytest.approx({step: 0.1 / step for step in steps})
    assert set(recorder.of("train/momentum").values()) == {0.9}
    assert list(recorder.of("train/image_size").values()) == [8] * 6 + [12] * 3 + [16] * 3
    assert list(recorder.of("train/batch_size").values()) == [8, 8, 4] * 4
    assert recorder.of("train/epoch") == pytest.approx(
        {
            step: epoch + done / SAMPLES
            for epoch in range(4)
            for step, done in zip(range(3 * epoch + 1, 3 * epoch + 4), (8, 16, 20), strict=True)
        }
    )
    assert {tuple(figures) for _, figures in recorder.logged if "train/loss" in figures} == {tuple(TRAINING)}
    assert sorted(recorder.of("eval/16/top1")) == [6, 12]
    for size in (8, 16):
        final = finished.watchers.callbacks[0].evaluations[str(size)]
        metrics = finished.trainer.state.eval_metrics[f"eval_{size}"]
        assert final == pytest.approx(
            {name: float(metrics[name].compute()) for name in ("top1", "top5", "loss")}, abs=1e-6
        )


def test_interval_first_batch_and_epoch_ends(run):
    recorder = Recorder()
    run(interval=5, callbacks=[recorder])
    assert sorted(recorder.of("train/loss")) == [1, 3, 5, 6, 9, 10, 12]


def test_stalls_are_not_training(run):
    recorder = Recorder()
    last = Stall()  # where a callback that saves stands
    result = run(interval=1, callbacks=[recorder], prepare=lambda r: r.trainer.state.callbacks.append(last))
    summary = json.loads((result.folder / "summary.json").read_text())
    seconds = summary["seconds"]
    assert seconds["evaluation"] >= 4 * Stall.seconds
    assert seconds["evaluation"] < 4 * Stall.seconds + 1
    assert 3 * Stall.seconds <= seconds["checkpointing"] < 3 * Stall.seconds + 1
    assert seconds["train"] + seconds["loader_wait"] < 1.0, "on a machine that is not stalled itself"
    assert summary["wall_seconds"] == pytest.approx(sum(seconds.values()), abs=0.01)
    # Also the window that spans an evaluation and a save has the rate of its training; seconds are rounded to 0.001.
    train, wait = recorder.of("time/train_seconds"), recorder.of("time/loader_wait_seconds")
    rates = recorder.of("train/images_per_second")
    for step in range(2, 13):
        working = train[step] + wait[step] - train[step - 1] - wait[step - 1]
        samples = rates[step] * working
        assert samples == pytest.approx(recorder.of("train/batch_size")[step], abs=0.1 + 0.003 * rates[step])
        assert 0 <= recorder.of("train/loader_wait_fraction")[step] <= 1
