"""Saving: a death at any moment, a full disk, pruning."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.checkpoints.find import newest, survey
from recipes.checkpoints.publish import prune
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.checkpoints.write import Writer
from tests.recipes.checkpoints.tiny import At, Dying, algorithms, at_most, identity, same, save, snapshot


def look(store):
    return newest(store, None, identity(), restart=False, algorithms=algorithms()).found


def test_a_death_at_any_step_of_publishing_and_pruning_loses_nothing_that_was_complete(tmp_path):
    for steps in range(30):
        folder = tmp_path / str(steps)
        store, dying = LocalStore(folder), Dying(folder, steps)
        save(store, 1)
        save(store, 2)
        survived = True
        try:
            save(dying, 3)
            prune(dying, 1, protect=(), ignore=())
        except KeyboardInterrupt:
            survived = False
        found = look(store)
        assert found.manifest.batch in (2, 3)
        assert found.manifest.batch == 3 or not survived
        save(store, 4)
        prune(store, 1, protect=(), ignore=())
        assert [entry.name for entry in store.entries()] == ["ep000-ba000004.json", "ep000-ba000004.safetensors"]
        if survived:
            break
    assert survived
    assert steps > 8


@pytest.mark.parametrize("steps", range(4))
def test_a_death_during_the_first_save_starts_from_zero(tmp_path, steps):
    with pytest.raises(KeyboardInterrupt):
        save(Dying(tmp_path, steps), 1)
    assert look(LocalStore(tmp_path)) is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 1)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sets(st.integers(0, 6), max_size=2),
)
def test_pruning_keeps_the_newest_the_best_and_the_protected(tmp_path_factory, checkpoints, keep, protected):
    store = LocalStore(tmp_path_factory.mktemp("prune"))
    stems = [save(store, batch, top1=top1) for batch, (_, top1) in enumerate(checkpoints)]
    known = [top1 for _, top1 in checkpoints if top1 is not None]
    protect = {stems[index] for index in protected if index < len(stems)}
    prune(store, keep, protect=protect, ignore=())
    left = set(survey(store).complete)
    assert set(stems[-keep:]) | protect <= left
    if known:
        best = max(index for index, (_, top1) in enumerate(checkpoints) if top1 == max(known))
        assert stems[best] in left
    assert len(left) <= keep + len(protect) + 1


def test_pruning_leaves_other_files_alone(tmp_path):
    store = LocalStore(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for batch in range(4):
        save(store, batch)
    prune(store, 1, protect=(), ignore=())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_pruning_removes_what_was_begun_before_the_newest_and_nothing_after_it(tmp_path):
    store = LocalStore(tmp_path)
    for batch in (999_998, 1_000_000):
        store.put(f"ep000-ba{batch:06d}.json.tmp", b"{}")
    save(store, 999_999)
    assert prune(store, 1, protect=(), ignore=()) == ["ep000-ba999998"]
    assert survey(store).begun == ("ep000-ba1000000",)


def writer_of(store, keep=3, verified=None, damaged=()):
    return Writer(store, identity(), keep, verified=verified, damaged=damaged, uploader=None)


def test_the_writer_writes_beside_the_training_and_keeps_the_newest(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_of(store, keep=2)
    for batch in range(5):
        writer.put(snapshot(batch), patience=10)
    assert writer.wait(10)
    assert survey(store).complete == ("ep000-ba000003", "ep000-ba000004")
    assert writer.deliver("ep000-ba000004", 0) == 0


def test_what_a_dead_writer_left_is_swept_away(tmp_path):
    (tmp_path / ".ep000-ba000001.safetensors.part").write_bytes(b"half")
    writer_of(LocalStore(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_one_checkpoint_and_no_older_one(tmp_path, caplog):
    store = LocalStore(tmp_path)
    writer = writer_of(store)
    writer.put(snapshot(1), patience=10)
    writer.wait(10)
    with at_most(2000):
        writer.put(snapshot(2), patience=10)
        writer.wait(10)
    assert "ep000-ba000002 could not be saved" in caplog.text
    assert look(store).manifest.batch == 1
    assert writer.deliver("ep000-ba000002", 0) == 1
    assert not list(tmp_path.glob(".*"))
    writer.put(snapshot(3), patience=10)
    writer.wait(10)
    assert look(store).manifest.batch == 3


def test_a_disk_that_fills_up_makes_room_by_giving_up_older_checkpoints(tmp_path):
    class Small(LocalStore):
        """Holds two checkpoints."""

        def put(self, name, source):
            if (
                sum(entry.size for entry in self.entries())
                + len(b"".join([source] if isinstance(source, bytes) else source))
                > 9000
            ):
                raise StoreError(f"{name}: No space left on device")
            super().put(name, source)

    store = Small(tmp_path)
    writer = writer_of(store, keep=3)
    for batch in range(1, 5):
        writer.put(snapshot(batch), patience=10)
        assert writer.wait(10)
        assert look(store).manifest.batch == batch


def test_a_full_disk_never_stops_the_training(tiny, untouched, caplog):
    limit = []

    def fill(state):
        limit.append(at_most(2000))
        limit[0].__enter__()

    def free(state):
        limit[0].__exit__(None, None, None)

    weights = tiny.go(At("batch_start", 3, fill), At("batch_start", 9, free))
    assert same(weights, untouched)
    assert "could not be saved" in caplog.text
    assert tiny.kept
    assert look(LocalStore(tiny.places.local)).manifest.finished


def test_a_last_state_that_cannot_be_saved_is_said(tiny, caplog):
    limit = []

    def fill(state):
        limit.append(at_most(2000))
        limit[0].__enter__()

    try:
        tiny.go(At("batch_start", 11, fill))
    finally:
        limit[0].__exit__(None, None, None)
    assert tiny.kept is False
    assert "not where it belongs" in caplog.text


def test_a_checkpoint_in_use_is_not_pruned(tmp_path):
    store = LocalStore(tmp_path)
    stems = [save(store, batch) for batch in range(3)]
    for name in ("ep000-ba000001", "ep000-ba000002"):
        Path(tmp_path / f"{name}.safetensors").write_bytes(b"spoilt")
    found = look(store)
    assert found.manifest.stem == stems[0]
    writer = writer_of(store, keep=1, verified=found.manifest, damaged=stems[1:])
    with at_most(2000):
        writer.put(snapshot(5), patience=10)
        writer.wait(10)
    assert look(store).manifest.stem == stems[0]


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        LocalStore(tmp_path / "file" / "checkpoints").put("a", b"x")
