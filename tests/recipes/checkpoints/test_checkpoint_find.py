"""Which checkpoint a run goes on from, with real files of a real run that were spoilt in every way."""

import contextlib
import dataclasses
import json
import shutil

import pytest

from recipes.checkpoints.find import Identity, load_manifest, newest, survey
from recipes.checkpoints.manifest import DamagedError
from recipes.checkpoints.store import LocalStore
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Tiny, damage, identity, same

STEMS = ["ep001-ba000006", "ep001-ba000008", "ep002-ba000010"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints of a run that was interrupted at batch 10."""
    tiny = Tiny(tmp_path_factory.mktemp("saved"))
    tiny.go(tiny.interrupt_at(11, "before_forward"))
    return tiny.places.local


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil; the run is interrupted after its second epoch."""
    shutil.copytree(saved, tmp_path / "run" / "checkpoints")
    for extra in (tmp_path / "run" / "checkpoints").glob("*ba000012*"):
        extra.unlink()
    return tmp_path / "run" / "checkpoints"


def look(folder, restart=False, who=None, remote=None, check=lambda path: None):
    return newest(LocalStore(folder), remote, who or identity(), restart=restart, check=check)


def test_the_newest_is_taken(folder):
    search = look(folder)
    assert search.found.manifest.stem == max(survey(LocalStore(folder)).complete)
    assert search.found.path.stat().st_size == search.found.manifest.files[0].size
    assert search.skipped == {}


def test_no_folder_and_an_empty_one_mean_from_zero(tmp_path):
    assert look(tmp_path / "none").found is None
    (tmp_path / "empty").mkdir()
    assert look(tmp_path / "empty").found is None


@pytest.mark.parametrize("kind", ["bit", "empty", "longer", "0.1", "0.5", "0.99"])
def test_a_damaged_one_is_named_and_the_next_older_taken(folder, kind, caplog):
    *_, older, newer = survey(LocalStore(folder)).complete
    damage(folder / f"{newer}.pt", kind)
    search = look(folder)
    assert search.found.manifest.stem == older
    assert list(search.skipped) == [newer]
    assert newer in caplog.text
    assert older in caplog.text


@pytest.mark.parametrize("kind", ["bit", "empty", "0.3", "0.98"])
def test_a_damaged_manifest_counts_as_damage(folder, kind, caplog):
    *_, older, newer = survey(LocalStore(folder)).complete
    damage(folder / f"{newer}.json", kind)
    search = look(folder)
    assert search.found.manifest.stem == older
    assert newer in caplog.text


@pytest.mark.parametrize("lost", ["json", "pt"])
def test_half_a_checkpoint_is_named_and_passed_over(folder, lost, caplog):
    *_, older, newer = survey(LocalStore(folder)).complete
    (folder / f"{newer}.{lost}").unlink()
    search = look(folder)
    assert search.found.manifest.stem == older
    assert newer in caplog.text


def test_two_damaged_ones_in_a_row(folder):
    oldest, *rest = survey(LocalStore(folder)).complete
    for stem in rest:
        damage(folder / f"{stem}.pt", "bit")
    assert look(folder).found.manifest.stem == oldest


def test_where_none_can_be_used_starting_from_zero_is_refused_unless_told_to(folder):
    stems = survey(LocalStore(folder)).complete
    for stem in stems:
        damage(folder / f"{stem}.pt", "0.5")
    with pytest.raises(InputError) as refused:
        look(folder)
    assert all(stem in str(refused.value) for stem in stems)
    assert "checkpoints.restart=true" in str(refused.value)
    assert look(folder, restart=True).found is None


def test_a_lost_manifest_is_no_reason_to_start_from_zero(folder):
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(InputError, match="none can be used"):
        look(folder)


def test_a_first_checkpoint_that_was_never_completed_is(tmp_path, caplog):
    (tmp_path / "ep000-ba000002.json.tmp").write_text("{}")
    (tmp_path / "ep000-ba000002.pt").write_bytes(b"half")
    search = look(tmp_path)
    assert search.found is None
    assert "ep000-ba000002 was begun and never completed" in caplog.text


def test_another_run_is_refused(folder):
    with pytest.raises(InputError, match="run 'tiny', not of 'other'"):
        look(folder, who=identity("other"))


def test_another_recipe_is_refused_with_the_keys_that_differ(folder):
    with pytest.raises(InputError) as refused:
        look(folder, who=identity(lr=0.2))
    assert any("optimizer.lr: now 0.2, in the checkpoint 0.1" in line for line in refused.value.lines)


def test_the_last_look_can_refuse(folder):
    *_, older, newer = survey(LocalStore(folder)).complete

    def check(path):
        if path.stem == newer:
            raise DamagedError("carries code")

    search = look(folder, check=check)
    assert search.found.manifest.stem == older
    assert search.skipped == {newer: f"{folder}: carries code"}


def test_a_manifest_cannot_point_elsewhere(folder):
    newer = survey(LocalStore(folder)).complete[-1]
    manifest = load_manifest(LocalStore(folder), newer)
    elsewhere = manifest.files[0].model_copy(update={"name": f"../checkpoints/{newer}.pt"})
    (folder / f"{newer}.json").write_bytes(manifest.model_copy(update={"files": (elsewhere,)}).to_json())
    search = look(folder)
    assert newer in search.skipped


def test_names_are_taken_in_the_order_of_positions(tmp_path, folder):
    store = LocalStore(tmp_path / "order")
    for stem in ("ep002-ba1000000", "ep010-ba000100", "ep009-ba000100"):
        for ending in ("pt", "json"):
            store.put(f"{stem}.{ending}", b"x")
    store.put("notes.txt", b"mine")
    store.put("ep1.pt", b"not ours")
    assert survey(store).complete == ("ep009-ba000100", "ep010-ba000100", "ep002-ba1000000")
    assert survey(store).torn == ()


def test_a_run_goes_on_past_a_damaged_checkpoint_to_the_same_weights(folder, untouched):
    tiny = Tiny(folder.parent)
    newer = survey(LocalStore(folder)).complete[-1]
    damage(folder / f"{newer}.pt", "bit")
    weights = tiny.go()
    assert newer in tiny.resume.damaged
    assert same(weights, untouched)
    assert look(folder).found.manifest.finished


def test_restart_trains_from_zero_and_its_checkpoints_are_then_the_newest(folder, untouched):
    for stem in survey(LocalStore(folder)).complete:
        damage(folder / f"{stem}.pt", "0.5")
    tiny = Tiny(folder.parent, epochs=3)
    stop = tiny.go(tiny.interrupt_at(3), restart=True)
    assert stop.saved
    assert look(folder).found.manifest.batch == 3
    assert same(tiny.go(), untouched)


def test_identity_of_a_real_config_leaves_out_what_may_hold_keys_to_a_service():
    from recipes.config import RunConfig

    config = RunConfig(
        run_name="r", data={"path": "x"}, device_batch_size=8, loggers={"wandb": {"api_key": "very-secret"}}
    )
    who = Identity.of(config, 1)
    assert "very-secret" not in json.dumps(dataclasses.asdict(who))
    assert who.config["optimizer"]["lr"] == config.optimizer.lr


def test_every_bit_of_a_manifest_counts(folder):
    store = LocalStore(folder)
    stem = survey(store).complete[-1]
    original = (folder / f"{stem}.json").read_bytes()
    manifest = load_manifest(store, stem)
    for at in range(0, 8 * len(original), 5):
        changed = bytearray(original)
        changed[at // 8] ^= 1 << at % 8
        (folder / f"{stem}.json").write_bytes(bytes(changed))
        with contextlib.suppress(DamagedError):  # white space does not count
            assert load_manifest(store, stem) == manifest
