"""Which checkpoint a run goes on from, with real files of a real run that were spoilt in every way."""

import contextlib
import dataclasses
import json
import shutil

import pytest

from recipes.checkpoints.find import Identity, load_manifest, newest, survey
from recipes.checkpoints.manifest import DamagedError
from recipes.checkpoints.store import LocalStore
from recipes.config import RunConfig
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Tiny, algorithms, damage, identity, same, save

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


def look(folder, restart=False, who=None, remote=None):
    return newest(LocalStore(folder), remote, who or identity(), restart=restart, algorithms=algorithms())


def test_the_newest_is_taken(folder):
    search = look(folder)
    assert search.found.manifest.stem == max(survey(LocalStore(folder)).complete)
    assert search.found.path.stat().st_size == search.found.manifest.files[0].size
    assert search.found.location == f"{folder}/{search.found.manifest.stem}.safetensors"
    assert search.skipped == {}


def test_no_folder_and_an_empty_one_mean_from_zero(tmp_path):
    assert look(tmp_path / "none").found is None
    (tmp_path / "empty").mkdir()
    assert look(tmp_path / "empty").found is None


@pytest.mark.parametrize("kind", ["bit", "empty", "longer", "0.1", "0.5", "0.99"])
def test_a_damaged_one_is_named_and_the_next_older_taken(folder, kind, caplog):
    *_, older, newer = survey(LocalStore(folder)).complete
    damage(folder / f"{newer}.safetensors", kind)
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


@pytest.mark.parametrize("lost", ["json", "safetensors"])
def test_half_a_checkpoint_is_named_and_passed_over(folder, lost, caplog):
    *_, older, newer = survey(LocalStore(folder)).complete
    (folder / f"{newer}.{lost}").unlink()
    search = look(folder)
    assert search.found.manifest.stem == older
    reason = "its data or its manifest is missing"
    assert search.skipped == {newer: reason}
    going_on = f"going on from {search.found.manifest.describe()}"
    assert caplog.messages == [f"checkpoint {newer} passed over: {reason}; {going_on}"]


def test_two_damaged_ones_in_a_row(folder):
    oldest, *rest = survey(LocalStore(folder)).complete
    for stem in rest:
        damage(folder / f"{stem}.safetensors", "bit")
    assert look(folder).found.manifest.stem == oldest


def test_where_none_can_be_used_starting_from_zero_is_refused_unless_told_to(folder, caplog):
    stems = survey(LocalStore(folder)).complete
    for stem in stems:
        damage(folder / f"{stem}.safetensors", "0.5")
    with pytest.raises(InputError) as refused:
        look(folder)
    assert all(stem in str(refused.value) for stem in stems)
    assert refused.value.lines[-1] == (
        f"{folder}: checkpoints of tiny are there, but none can be used; mend them, choose another run_name, or start "
        "from zero with checkpoints.restart=true"
    )
    caplog.clear()
    search = look(folder, restart=True)
    assert search.found is None
    reasons = {f"checkpoint {stem} passed over: {search.skipped[stem]}" for stem in stems}
    assert set(caplog.messages) == reasons


def test_a_lost_manifest_is_no_reason_to_start_from_zero(folder):
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(InputError, match="none can be used"):
        look(folder)


def test_a_first_checkpoint_that_was_never_completed_is(tmp_path, caplog):
    (tmp_path / "ep000-ba000002.json.tmp").write_text("{}")
    (tmp_path / "ep000-ba000002.safetensors").write_bytes(b"half")
    search = look(tmp_path)
    assert search.found is None
    assert caplog.messages == ["checkpoint ep000-ba000002 was begun and never completed"]


def refusal(folder, who):
    with pytest.raises(InputError) as refused:
        look(folder, who=who)
    return refused.value.lines


def test_another_run_is_refused(folder):
    assert refusal(folder, identity("other")) == (
        f"{folder}: holds checkpoints of run 'tiny', not of 'other'; choose another checkpoints.folder, or that run's "
        "run_name",
    )


def test_another_recipe_is_refused_with_the_keys_that_differ(folder):
    newest = survey(LocalStore(folder)).complete[-1]
    assert refusal(folder, identity(lr=0.2)) == (
        f"{folder}: {newest} was made by another recipe; to go on from it these keys must be as they were, to "
        "begin anew choose another run_name:",
        "  optimizer.lr: now 0.2, in the checkpoint 0.1",
    )


@pytest.mark.parametrize("batch_size", ["x" * 1000, [1] * 1000, {}, {"a": {"b": None}}, None, True, 10**39])
def test_another_recipe_whose_batch_size_is_anything_is_refused_in_lines(folder, batch_size):
    store, stem = LocalStore(folder), survey(LocalStore(folder)).complete[-1]
    config = {"device_batch_size": batch_size}
    changed = load_manifest(store, stem).model_copy(
        update={"config": config, "config_digest": "x", "world_size": 10**12}
    )
    store.put(f"{stem}.json", changed.to_json())
    assert "made by another recipe" in refusal(folder, identity())[0]


def test_other_data_are_refused_where_both_sides_know_them(tmp_path):
    store, known = LocalStore(tmp_path), dataclasses.replace(identity(), train_images=24, classes=("cat", "dog"))
    save(store, 1, who=known)
    for other in ({}, {"train_images": None}, {"classes": ()}, {"train_images": None, "classes": ()}):
        assert look(tmp_path, who=dataclasses.replace(known, **other)).found
    the_rest = "; to go on from it the data must be as they were, to begin anew choose another run_name"
    assert refusal(tmp_path, dataclasses.replace(known, train_images=23)) == (
        f"data.path: holds 23 training images, ep000-ba000001 at {tmp_path} was trained on 24{the_rest}",
    )
    assert refusal(tmp_path, dataclasses.replace(known, classes=("cat", "cow", "dog"))) == (
        f"data.path: holds 3 classes, and not the 2 that ep000-ba000001 at {tmp_path} was trained on{the_rest}",
    )
    save(store, 2)  # of an older version, which noted neither
    assert look(tmp_path, who=known).found.manifest.batch == 2


def test_a_manifest_cannot_point_elsewhere(folder):
    newer = survey(LocalStore(folder)).complete[-1]
    manifest = load_manifest(LocalStore(folder), newer)
    elsewhere = manifest.files[0].model_copy(update={"name": f"../checkpoints/{newer}.safetensors"})
    (folder / f"{newer}.json").write_bytes(manifest.model_copy(update={"files": (elsewhere,)}).to_json())
    search = look(folder)
    assert newer in search.skipped


def test_names_are_taken_in_the_order_of_positions(tmp_path, folder):
    store = LocalStore(tmp_path / "order")
    for stem in ("ep002-ba1000000", "ep010-ba000100", "ep009-ba000100"):
        for ending in ("safetensors", "json"):
            store.put(f"{stem}.{ending}", b"x")
    store.put("notes.txt", b"mine")
    store.put("ep1.safetensors", b"not ours")
    assert survey(store).complete == ("ep009-ba000100", "ep010-ba000100", "ep002-ba1000000")
    assert survey(store).torn == ()


def test_a_longer_number_is_newer_than_a_shorter_one(tmp_path):
    store = LocalStore(tmp_path)
    for epoch, batch in ((9, 999_999), (9, 1_000_000), (10, 1_000_000), (8, 1_000_001)):
        save(store, batch, epoch=epoch)
    search = look(tmp_path)
    assert search.found.manifest.stem == "ep008-ba1000001"
    damage(tmp_path / "ep008-ba1000001.safetensors", "bit")
    assert look(tmp_path).found.manifest.stem == "ep010-ba1000000"


def test_a_run_goes_on_past_a_damaged_checkpoint_to_the_same_weights(folder, untouched):
    tiny = Tiny(folder.parent)
    newer = survey(LocalStore(folder)).complete[-1]
    damage(folder / f"{newer}.safetensors", "bit")
    weights = tiny.go()
    assert newer in tiny.resume.damaged
    assert same(weights, untouched)
    assert look(folder).found.manifest.finished


def test_restart_trains_from_zero_and_its_checkpoints_are_then_the_newest(folder, untouched):
    for stem in survey(LocalStore(folder)).complete:
        damage(folder / f"{stem}.safetensors", "0.5")
    tiny = Tiny(folder.parent, epochs=3)
    stop = tiny.go(tiny.interrupt_at(3), restart=True)
    assert stop.saved
    assert look(folder).found.manifest.batch == 3
    assert same(tiny.go(), untouched)


def real(**more):
    return RunConfig(**{"run_name": "r", "data": {"path": "x"}, "device_batch_size": 8, **more})


def test_identity_of_a_real_config_leaves_out_what_may_hold_keys_to_a_service():
    config = real(loggers={"wandb": {"api_key": "very-secret"}})
    who = Identity.of(config, 1)
    assert "very-secret" not in json.dumps(dataclasses.asdict(who))
    assert who.config["optimizer"]["lr"] == config.optimizer.lr


def test_a_run_knows_its_own_checkpoint_on_any_number_of_devices_with_the_same_global_batch(tmp_path):
    store = LocalStore(tmp_path)
    save(store, 1, who=Identity.of(real(), 4, 24, ["cat", "dog"]), world_size=4)
    again = Identity.of(real(device_batch_size=16), 2, 24, ["cat", "dog"])
    found = look(tmp_path, who=again).found
    assert again.differences(found.manifest) == []
    assert (found.manifest.run_name, found.manifest.train_images, found.manifest.classes) == ("r", 24, ("cat", "dog"))
    *_, line = refusal(tmp_path, Identity.of(real(), 2))
    assert line == "  global_batch_size: now 16, in the checkpoint 32"


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
