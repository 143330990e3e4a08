"""What counts as a checkpoint; publishing and removing, with a death at any step. The reasons are what a user reads."""

import copy
import hashlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.checkpoints.manifest import (
    DamagedError,
    is_stem,
    load_manifest,
    parse_manifest,
    position_in_words,
    prune,
    stem_of,
    survey,
)
from recipes.checkpoints.store import LocalStore
from tests.recipes.checkpoints.mutants import mutate
from tests.recipes.checkpoints.tiny import Dying, look, save

STEM = "ep001-ba000006"
STORED = {
    "manifest": {
        "format_version": 2,
        "run_name": "tiny",
        "config_digest": "digest",
        "config": {"optimizer": {"lr": 0.1}, "data": {"mean": [0.5, 0.5, 0.5]}},
        "classes": ["cat", "dög"],
        "epoch": 1,
        "batch_in_epoch": 1,
        "batch": 6,
        "samples": 48,
        "world_size": 2,
        "train_images": 40,
        "top1": 0.75,
        "finished": False,
        "created_at": "2026-01-01T00:00:00+00:00",
        "files": [{"name": f"{STEM}.safetensors", "size": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}],
    },
    "sha256": "cc97865cbeba4de5adecc5bcdd9e0192f9b35519eaecf045511c74b9813182a8",
}
"""As version 2 stores it; a later version has to read it."""


def changed(**keys):
    """The stored text with other values, and with the checksum that belongs to them."""
    stored = copy.deepcopy(STORED)
    stored["manifest"] |= keys
    text = json.dumps(stored["manifest"], sort_keys=True, separators=(",", ":"))
    stored["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(stored).encode()


def reason(text, stem=STEM):
    with pytest.raises(DamagedError) as damaged:
        parse_manifest(text, stem)
    return str(damaged.value)


def test_a_stored_manifest_is_read_and_written_as_it_was():
    manifest = parse_manifest(json.dumps(STORED).encode(), STEM)
    assert (manifest.stem, manifest.classes) == (STEM, ("cat", "dög"))
    assert json.loads(manifest.to_json()) == STORED
    assert manifest.describe() == "ep001-ba000006 (after 1 epoch and 1 batch, 48 images)"


FILE = STORED["manifest"]["files"][0]
OTHERS = FILE | {"name": "ep001-ba000004.safetensors"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "its manifest is unreadable") for text in (b"{", b"{}", b"[]")),
        (
            json.dumps(STORED | {"sha256": "0" * 64}).encode(),
            "its manifest's SHA-256 differs from the one stored in it",
        ),
        (changed(epoch=-1), "its manifest is unreadable: epoch: Input should be greater than or equal to 0"),
        (
            changed(files=[FILE | {"size": 0}]),
            "its manifest is unreadable: files.0.size: Input should be greater than or equal to 1",
        ),
        (changed(files=[FILE | {"size": 10**400}]), "its manifest is unreadable"),
        (changed(samples=10**41), "its manifest is unreadable"),
        (changed(batch=4), "its manifest is that of ep001-ba000004"),
        (changed(batch=4, files=[OTHERS]), "its manifest is that of ep001-ba000004"),
        (changed(files=[OTHERS]), "its manifest names the file ep001-ba000004.safetensors"),
    ],
)
def test_what_is_no_manifest_of_this_checkpoint_is_said(text, message):
    assert reason(text) == message


def test_a_stem_is_told_from_other_names_and_a_position_said_in_words(tmp_path):
    assert is_stem(stem_of(0, 0))
    assert is_stem(stem_of(12_345, 12_345_678))
    assert not any(is_stem(text) for text in ("", "ep1-ba000001", "ep001-ba1", f"{STEM}.json", f"x{STEM}", f"{STEM}\n"))
    words = [position_in_words(*at) for at in ((0, 0), (0, 1), (0, 30), (1, 0), (6, 0), (1, 30))]
    assert words == ["0 epochs", "1 batch", "30 batches", "1 epoch", "6 epochs", "1 epoch and 30 batches"]
    store = LocalStore(tmp_path)
    for stem in ("ep002-ba1000000", "ep010-ba000100", "ep009-ba000100"):
        for ending in ("safetensors", "json"):
            store.put(f"{stem}.{ending}", b"x")
    store.put("notes.txt", b"mine")
    store.put("ep1.safetensors", b"not ours")
    assert survey(store) == (("ep009-ba000100", "ep010-ba000100", "ep002-ba1000000"), (), ())


def test_no_change_of_a_manifest_makes_it_another_one(tmp_path):
    store, drawn = LocalStore(tmp_path), random.Random(1)
    stem = save(store, 1)
    original, manifest = (tmp_path / f"{stem}.json").read_bytes(), load_manifest(store, stem)
    changes = [mutate(original, drawn) for _ in range(1000)]
    for at in range(8 * len(original)):
        changed = bytearray(original)
        changed[at // 8] ^= 1 << at % 8
        changes.append(bytes(changed))
    refused = 0
    for changed in changes:
        try:
            assert parse_manifest(changed, stem) == manifest  # white space does not count
        except DamagedError:
            refused += 1
    assert refused > 0.9 * len(changes)


def test_a_death_at_any_step_of_publishing_and_pruning_loses_nothing_that_was_complete(tmp_path):
    for steps in range(30):
        folder = tmp_path / str(steps)
        store, dying = LocalStore(folder), Dying(folder, steps)
        save(store, 1)
        save(store, 2)
        survived = True
        try:
            save(dying, 3)
            prune(dying, 1)
        except KeyboardInterrupt:
            survived = False
        found = look(store)
        assert found.manifest.batch in (2, 3)
        assert found.manifest.batch == 3 or not survived
        save(store, 4)
        prune(store, 1)
        assert list(store.entries()) == ["ep000-ba000004.json", "ep000-ba000004.safetensors"]
        if survived:
            break
    assert survived
    assert steps > 8


def test_a_death_during_the_first_save_starts_from_zero(tmp_path):
    for steps in range(4):
        with pytest.raises(KeyboardInterrupt):
            save(Dying(tmp_path / str(steps), steps), 1)
        assert look(LocalStore(tmp_path / str(steps))) is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 1)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.sets(st.integers(0, 6), max_size=2),
)
def test_pruning_keeps_the_newest_the_best_and_the_protected(tmp_path_factory, checkpoints, keep, protected):
    store = LocalStore(tmp_path_factory.mktemp("prune"))
    store.put("notes.txt", b"mine")
    stems = [save(store, batch, top1=top1) for batch, (_, top1) in enumerate(checkpoints)]
    known = [top1 for _, top1 in checkpoints if top1 is not None]
    protect = {stems[index] for index in protected if index < len(stems)}
    prune(store, keep, protect=protect)
    left = set(survey(store).complete)
    assert set(stems[-keep:]) | protect <= left
    if known:
        best = max(index for index, (_, top1) in enumerate(checkpoints) if top1 == max(known))
        assert stems[best] in left
    assert len(left) <= keep + len(protect) + 1
    assert store.read("notes.txt") == b"mine"
    store.put("ep000-ba999998.json.tmp", b"{}")  # incomplete, before the newest and after it
    store.put("ep000-ba1000000.json.tmp", b"{}")
    newest = save(store, 999_999)
    assert "ep000-ba999998" in prune(store, 1)
    assert (survey(store).complete[-1], survey(store).incomplete) == (newest, ("ep000-ba1000000",))
