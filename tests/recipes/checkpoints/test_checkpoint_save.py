"""When a run saves, what a checkpoint holds, and that a run in pieces is the run in one."""

import time
from contextlib import ExitStack

import pytest
import torch

from recipes.checkpoints.find import load_manifest
from recipes.checkpoints.interrupt import EXIT_INTERRUPTED
from recipes.checkpoints.save import Interval
from recipes.checkpoints.store import LocalStore
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import BATCHES, At, Tiny, at_most, content_of, same

TOTAL = 3 * BATCHES


@pytest.mark.parametrize(
    ("text", "interval"),
    [("2ep", (2, "ep")), ("500ba", (500, "ba")), ("30s", (30, "s")), ("10m", (600, "s")), ("2h", (7200, "s"))],
)
def test_intervals(text, interval):
    assert Interval.of(text) == interval


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ("1ep", ["ep001-ba000005", "ep002-ba000010", "ep003-ba000015"]),
        ("2ep", ["ep002-ba000010", "ep003-ba000015"]),
        ("4ba", ["ep000-ba000004", "ep001-ba000008", "ep002-ba000012", "ep003-ba000015"]),
        ("1h", ["ep003-ba000015"]),
    ],
)
def test_it_saves_when_due_and_at_the_end(tmp_path, interval, expected):
    tiny = Tiny(tmp_path, interval=interval, keep=10)
    tiny.go()
    assert tiny.stems() == expected


def test_it_saves_by_time(tmp_path, monkeypatch):
    tiny = Tiny(tmp_path, interval="1s", keep=10)
    now = time.monotonic
    tiny.go(At("batch_start", 6, lambda state: monkeypatch.setattr(time, "monotonic", lambda: now() + 1.0)))
    assert "ep001-ba000007" in tiny.stems()


def test_the_manifest_says_where_and_how_good(tiny):
    tiny.go()
    store = LocalStore(tiny.places.local)
    last = load_manifest(store, "ep003-ba000015")
    assert (last.epoch, last.batch_in_epoch, last.batch, last.samples) == (3, 0, TOTAL, 8 * TOTAL)
    assert last.finished
    assert last.top1 == tiny.state.eval_metrics["eval"]["MulticlassAccuracy"].compute().item()
    middle = load_manifest(store, "ep002-ba000014")
    assert (middle.epoch, middle.batch_in_epoch, middle.top1, middle.finished) == (2, 4, None, False)


@pytest.mark.parametrize("batch", [1, 4, 5, 6, 9, 14, 15])
def test_interrupted_after_any_step_it_goes_on_to_the_same_weights(tiny, untouched, batch):
    stop = tiny.go(tiny.interrupt_at(batch))
    assert stop.saved
    assert stop.status == EXIT_INTERRUPTED
    assert "a test" in str(stop)
    weights = tiny.go()
    assert tiny.resume.manifest.batch == batch
    assert same(weights, untouched)


@pytest.mark.parametrize("batch", [5, 15])
@pytest.mark.parametrize("event", ["eval_batch_start", "eval_end"])
def test_interrupted_in_an_evaluation_the_evaluation_is_repeated(tiny, untouched, batch, event):
    stop = tiny.go(tiny.interrupt_at(batch, event))
    if event == "eval_end" and batch == 15:
        # The evaluation was over: there was nothing left to interrupt.
        assert same(stop, untouched)
        return
    assert stop.saved
    weights = tiny.go()
    assert same(weights, untouched)
    if event == "eval_batch_start":
        assert (tiny.resume.manifest.epoch, tiny.resume.manifest.batch) == (batch // BATCHES - 1, batch)
    assert load_manifest(LocalStore(tiny.places.local), "ep003-ba000015").top1 is not None


def test_many_interruptions(tmp_path, untouched):
    tiny = Tiny(tmp_path, interval="1ep")
    for batch in range(1, TOTAL, 3):
        assert tiny.go(tiny.interrupt_at(batch)).saved
    assert same(tiny.go(), untouched)


def test_a_finished_run_says_so(tiny):
    tiny.go()
    assert tiny.find().finished


def test_training_weights_and_averages_are_both_there(tiny):
    tiny.go()
    state = content_of(tiny.places.local, "ep003-ba000015")["state"]
    averages = dict(state["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"]
    assert same(state["model"], tiny.state.model.state_dict())
    assert averages.keys() <= dict(tiny.state.model.named_parameters()).keys()
    assert not torch.equal(averages["module.4.weight"], state["model"]["module.4.weight"])


def test_saving_changes_nothing_in_the_run(tmp_path, untouched):
    assert same(Tiny(tmp_path, interval="1h").go(), untouched)


def test_an_interruption_whose_state_cannot_be_saved_says_so_and_has_status_1(tiny):
    with ExitStack() as stack:

        def fill(state):
            stack.enter_context(at_most(2000))
            tiny.interrupt.request("a test", 20.0)

        stop = tiny.go(At("batch_end", 3, fill))
    assert not stop.saved
    assert stop.status == 1
    assert "could NOT be saved" in str(stop)


def test_a_file_where_the_folder_should_be_is_the_users_mistake(tiny):
    tiny.places.local.parent.mkdir(parents=True)
    tiny.places.local.write_text("in the way")
    with pytest.raises(InputError, match="Not a directory"):
        tiny.find()
