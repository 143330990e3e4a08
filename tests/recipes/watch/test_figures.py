import time

import pytest
import torch
from composer import Callback

from tests.recipes.watch.tiny import BATCH, SAMPLES, Images, Tiny

TRAINING = [
    *(f"train/{name}" for name in ("loss", "lr", "momentum", "image_size", "batch_size", "images_per_second")),
    "train/loader_wait_fraction",
    *(f"time/{name}_seconds" for name in ("train", "loader_wait", "evaluation", "checkpointing")),
]


class Stall(Callback):
    """Makes evaluations and checkpoints long."""

    seconds = 0.25

    def _stall(self, state, logger):
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass

    eval_start = epoch_checkpoint = _stall


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
    steps, losses = range(1, 13), bare_losses((8, 8, 12, 16))
    assert finished.of("train/loss") == pytest.approx({step: losses[step - 1] for step in steps}, rel=1e-4)
    assert finished.of("train/lr") == pytest.approx({step: 0.1 / step for step in steps})
    assert set(finished.of("train/momentum").values()) == {0.9}
    assert list(finished.of("train/image_size").values()) == [8] * 6 + [12] * 3 + [16] * 3
    assert list(finished.of("train/batch_size").values()) == [8, 8, 4] * 4
    done = [epoch + images / SAMPLES for epoch in range(4) for images in (8, 16, 20)]
    training = [line for line in finished.lines() if "train/loss" in line]
    assert [line["epoch"] for line in training] == pytest.approx(done)
    assert all(list(line)[4:] == TRAINING for line in training)
    assert sorted(finished.of("eval/16/top1")) == [6, 12]
    for size in (8, 16):
        metrics = finished.trainer.state.eval_metrics[f"eval_{size}"]
        expected = {name: float(metrics[name].compute()) for name in ("top1", "top5", "loss")}
        assert finished.watchers.callbacks[0].evaluations[str(size)] == pytest.approx(expected, abs=1e-6)


def test_interval_first_batch_and_epoch_ends(run):
    assert list(run(interval=5).of("train/loss")) == [1, 3, 5, 6, 9, 10, 12]


def test_stalls_are_not_training(run):
    last = Stall()  # where a callback that saves stands
    result = run(interval=1, prepare=lambda r: r.trainer.state.callbacks.append(last))
    summary = result.summary()
    seconds = summary["seconds"]
    assert 4 * Stall.seconds <= seconds["evaluation"] < 4 * Stall.seconds + 1
    assert 3 * Stall.seconds <= seconds["checkpointing"] < 3 * Stall.seconds + 1
    assert seconds["train"] + seconds["loader_wait"] < 1.0, "on a machine that is not stalled itself"
    assert summary["wall_seconds"] == pytest.approx(sum(seconds.values()), abs=0.01)
    # Also the window that spans an evaluation and a save has the rate of its training; seconds are rounded to 0.001.
    train, wait, rates = (
        result.of(name) for name in ("time/train_seconds", "time/loader_wait_seconds", "train/images_per_second")
    )
    for step in range(2, 13):
        working = train[step] + wait[step] - train[step - 1] - wait[step - 1]
        expected = pytest.approx(result.of("train/batch_size")[step], abs=0.1 + 0.003 * rates[step])
        assert rates[step] * working == expected
        assert 0 <= result.of("train/loader_wait_fraction")[step] <= 1
