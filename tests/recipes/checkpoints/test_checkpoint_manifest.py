"""What counts as a checkpoint's manifest and as its file; the reasons are what a user reads in the log."""

import copy
import hashlib
import json

import pytest

from recipes.checkpoints.manifest import DamagedError, FileEntry, is_stem, parse, position_in_words, stem_of, verify

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
        parse(text, stem)
    return str(damaged.value)


def test_a_stored_manifest_is_read_and_written_as_it_was():
    manifest = parse(json.dumps(STORED).encode(), STEM)
    assert (manifest.stem, manifest.order, manifest.classes) == (STEM, (6, 1), ("cat", "dög"))
    assert json.loads(manifest.to_json()) == STORED
    assert manifest.describe() == "ep001-ba000006 (after 1 epoch and 1 batch, 48 images)"


FILE = STORED["manifest"]["files"][0]
OTHERS = FILE | {"name": "ep001-ba000004.safetensors"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "its manifest is unreadable"),
        (b"{}", "its manifest is unreadable"),
        (b"[]", "its manifest is unreadable"),
        (json.dumps(STORED | {"sha256": "0" * 64}).encode(), "its manifest's SHA-256 is not the one in it"),
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


def test_a_file_is_compared_with_its_manifest(tmp_path):
    path, entry = tmp_path / f"{STEM}.safetensors", FileEntry(**FILE)
    path.write_bytes(b"hello")
    verify(path, entry)
    for content, message in (
        (b"hell", "4 bytes instead of 5"),
        (b"hello!", "6 bytes instead of 5"),
        (b"hallo", "its SHA-256 is not the manifest's"),
        (None, "cannot be read: No such file or directory"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DamagedError) as damaged:
            verify(path, entry)
        assert str(damaged.value) == message


def test_a_stem_is_told_from_other_names():
    assert is_stem(stem_of(0, 0))
    assert is_stem(stem_of(12_345, 12_345_678))
    assert not any(is_stem(text) for text in ("", "ep1-ba000001", "ep001-ba1", f"{STEM}.json", f"x{STEM}", f"{STEM}\n"))


@pytest.mark.parametrize(
    ("epochs", "batches", "words"),
    [
        (0, 0, "0 epochs"),
        (0, 1, "1 batch"),
        (0, 30, "30 batches"),
        (1, 0, "1 epoch"),
        (6, 0, "6 epochs"),
        (1, 30, "1 epoch and 30 batches"),
    ],
)
def test_a_position_in_words(epochs, batches, words):
    assert position_in_words(epochs, batches) == words
