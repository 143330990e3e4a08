"""When a run saves, what a checkpoint holds, and that a run in pieces is the run in one."""

import time

import pytest
import torch

from data.errors import StoreError
from recipes.checkpoints.interrupt import EXIT_INTERRUPTED
from recipes.checkpoints.manifest import load_manifest, prune, survey
from recipes.checkpoints.resume import Resume
from recipes.checkpoints.save import Writer
from recipes.checkpoints.store import RECORD, LocalStore
from tests.recipes.checkpoints.tiny import BATCHES, At, Tiny, at_most, content_of, look, same, save, snapshot

TOTAL = 3 * BATCHES


def test_it_saves_when_due_and_at_the_end_which_changes_nothing_in_the_run(tmp_path, untouched):
    for interval, expected in (
        ("1ep", ["ep001-ba000005", "ep002-ba000010", "ep003-ba000015"]),
        ("2ep", ["ep002-ba000010", "ep003-ba000015"]),
        ("4ba", ["ep000-ba000004", "ep001-ba000008", "ep002-ba000012", "ep003-ba000015"]),
        ("1h", ["ep003-ba000015"]),
    ):
        tiny = Tiny(tmp_path / interval, interval=interval, keep=10)
        assert same(tiny.go(), untouched)
        assert tiny.stems() == expected


def test_it_saves_by_time(tmp_path, monkeypatch):
    tiny = Tiny(tmp_path, interval="1s", keep=10)
    now = time.monotonic
    tiny.go(At("batch_start", 6, lambda state: monkeypatch.setattr(time, "monotonic", lambda: now() + 1.0)))
    assert "ep001-ba000007" in tiny.stems()


def test_what_a_finished_run_leaves(tiny):
    tiny.go()
    store = LocalStore(tiny.places.local)
    last = load_manifest(store, "ep003-ba000015")
    assert (last.epoch, last.batch_in_epoch, last.batch, last.samples) == (3, 0, TOTAL, 8 * TOTAL)
    assert last.finished
    assert last.top1 == tiny.state.eval_metrics["eval"]["MulticlassAccuracy"].compute().item()
    middle = load_manifest(store, "ep002-ba000014")
    assert (middle.epoch, middle.batch_in_epoch, middle.top1, middle.finished) == (2, 4, None, False)
    state = content_of(tiny.places.local, "ep003-ba000015")["state"]
    averages = dict(state["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"]
    assert same(state["model"], tiny.state.model.state_dict())  # the trained weights, and the averages beside them
    assert averages.keys() <= dict(tiny.state.model.named_parameters()).keys()
    assert not torch.equal(averages["module.4.weight"], state["model"]["module.4.weight"])
    assert tiny.find().finished


def test_interrupted_after_any_step_it_resumes_to_the_same_weights(tmp_path, untouched):
    tiny = Tiny(tmp_path, interval="1ep")
    for batch in (1, 4, 5, 6, 9, 14, 15):
        stop = tiny.go(tiny.interrupt_at(batch))
        assert stop.status == EXIT_INTERRUPTED
        assert "a test" in str(stop)
        assert tiny.find().manifest.batch == batch
    assert same(tiny.go(), untouched)
    assert tiny.resume.manifest.batch == 15


def test_interrupted_in_an_evaluation_the_evaluation_is_repeated(tiny, untouched):
    for batch in (5, 15):
        for event in ("eval_batch_start", "eval_end"):
            stop = tiny.go(tiny.interrupt_at(batch, event))
            if event == "eval_end" and batch == 15:
                # The evaluation was over: there was nothing left to interrupt.
                assert same(stop, untouched)
                break
            assert stop.saved
            if event == "eval_batch_start":
                manifest = tiny.find().manifest
                assert (manifest.epoch, manifest.batch) == (batch // BATCHES - 1, batch)
    assert load_manifest(LocalStore(tiny.places.local), "ep003-ba000015").top1 is not None


def test_interrupted_again_in_the_repeated_evaluation_the_state_is_still_the_one_before_it(tiny, untouched):
    def stop(state):
        tiny.interrupt.request("a test", 20.0)
        tiny.checkpoints.gate(True, None)  # as the loader of the real run asks for each batch

    for _ in range(3):
        assert tiny.go(At("eval_batch_start", 15, stop)).saved
        assert tiny.find().manifest.stem == "ep002-ba000015"
    assert same(tiny.go(), untouched)
    assert load_manifest(LocalStore(tiny.places.local), "ep003-ba000015").top1 is not None


def test_an_evaluation_that_fails_does_not_cost_the_epoch_before_it(tmp_path, untouched):
    tiny = Tiny(tmp_path, interval="1h")

    def fail(state):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.go(At("eval_batch_start", 10, fail))
    assert tiny.find().manifest.stem == "ep001-ba000010"
    assert same(tiny.go(), untouched)


class Full:
    """The disk takes no file of more than 2,000 bytes between two events of a run."""

    def __init__(self):
        self.limit = at_most(2000)

    def begin(self, state):
        self.limit.__enter__()

    def end(self, state=None):
        self.limit.__exit__(None, None, None)


def test_a_full_disk_never_stops_the_training(tiny, untouched, caplog):
    full = Full()
    assert same(tiny.go(At("batch_start", 3, full.begin), At("batch_start", 9, full.end)), untouched)
    assert "could not be saved" in caplog.text
    assert tiny.status == 0
    assert look(LocalStore(tiny.places.local)).manifest.finished


def test_a_last_state_that_cannot_be_saved_has_status_1(tiny, caplog):
    full = Full()
    try:
        stop = tiny.go(At("batch_end", 3, full.begin), tiny.interrupt_at(3))
        assert not stop.saved
        assert stop.status == 1
        assert "could NOT be saved" in str(stop)
        full.end()
        full = Full()
        tiny.go(At("batch_start", 11, full.begin))
    finally:
        full.end()
    assert tiny.status == 1
    assert "is NOT saved" in caplog.text


def writer_of(store, keep=3, **resume):
    return Writer(store, keep, Resume(**resume))


def write(writer, batch):
    writer.write(snapshot(batch))
    assert writer.wait()


def test_what_a_dead_process_left_is_swept_away(tiny):
    tiny.places.local.mkdir(parents=True)
    (tiny.places.local / ".ep000-ba000001.safetensors.new").write_bytes(b"half")
    assert tiny.find().manifest is None
    assert [path.name for path in tiny.places.local.iterdir()] == [RECORD]


def test_a_full_disk_or_a_forgetful_one_costs_one_checkpoint_and_no_older_one(tmp_path, caplog):
    class Forgetful(LocalStore):
        def put(self, name, source):
            super().put(name, source if isinstance(source, bytes) else [*source[:-1], bytes(len(source[-1]))])

    store = LocalStore(tmp_path)
    writer = writer_of(store, keep=2)
    write(writer, 0)
    write(writer, 1)
    with at_most(2000):
        write(writer, 2)
    assert "ep000-ba000002 could not be saved" in caplog.text
    assert look(store).manifest.batch == 1
    assert (writer.exit_status("ep000-ba000002", 0), writer.exit_status("ep000-ba000001", 0)) == (1, 0)
    assert not list(tmp_path.glob(".*"))
    for batch in (3, 4):
        write(writer, batch)
    assert survey(store).complete == ("ep000-ba000003", "ep000-ba000004")
    caplog.clear()
    forgetful = writer_of(Forgetful(tmp_path / "forgetful"))
    write(forgetful, 1)
    assert "could not be saved" in caplog.text
    assert forgetful.exit_status("ep000-ba000001", 0) == 1


def test_a_disk_that_fills_up_makes_room_by_giving_up_older_checkpoints(tmp_path):
    class Small(LocalStore):
        """Holds two checkpoints."""

        def put(self, name, source):
            size = len(b"".join([source] if isinstance(source, bytes) else source))
            if sum(self.entries().values()) + size > 9000:
                raise StoreError(f"{name}: No space left on device")
            super().put(name, source)

    store = Small(tmp_path)
    writer = writer_of(store, keep=3)
    for batch in range(1, 5):
        write(writer, batch)
        assert look(store).manifest.batch == batch


def test_the_checkpoint_in_use_is_not_pruned(tmp_path):
    store = LocalStore(tmp_path)
    stems = [save(store, batch) for batch in range(3)]
    for stem in stems[1:]:
        (tmp_path / f"{stem}.safetensors").write_bytes(b"spoilt")
    found = look(store)
    assert found.manifest.stem == stems[0]
    writer = writer_of(store, keep=1, manifest=found.manifest, damaged=tuple(stems[1:]))
    with at_most(2000):
        write(writer, 5)
    assert look(store).manifest.stem == stems[0]
    assert prune(store, 1, protect=[stems[0]], ignore=stems[1:]) == []
