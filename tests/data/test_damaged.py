"""Prepared data that is damaged, or made to do damage: refused before training, replaced image by image in it."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.open import open_evaluation, open_split_pair
from data.prepare import Settings, prepare
from data.verify import main
from tests.data.conftest import write_folder
from tests.data.test_loader import PLAN, run, training
from tests.support import end, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    write_folder(root / "images/train", {"ant": 25, "bee": 20})
    write_folder(root / "images/val", {"ant": 5, "bee": 5})
    assert prepare(str(root / "images"), str(root / "set"), Settings("mds", ("28", "36"), ("28",), 90, 10), 1, print)
    return root / "set"


@pytest.fixture
def prepared(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "set")


def change(path, edit):
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def manifest(edit):
    return "dataset.json", lambda folder: change(folder / "dataset.json", edit)


def index(edit):
    return "train/28/index.json", lambda folder: change(folder / "train/28/index.json", edit)


def file(name, edit):
    return name, lambda folder: edit(folder / name)


def array(name, edit):
    def rewrite(path):
        values = np.load(path)
        np.save(path, edit(values))

    return file(name, rewrite)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def label(position, value):
    def edit(labels):
        labels[position] = value
        return labels

    return edit


def one_byte_less(path):
    path.write_bytes(path.read_bytes()[:-1])


SHARD = "train/36/00002/shard.00000.mds"
DAMAGE = {
    "no classes": manifest(lambda m: m.pop("classes")),
    "a class is a path": manifest(lambda m: m.update(classes=["ant", "../bee"])),
    "a class occurs twice": manifest(lambda m: m.update(classes=["ant", "ant"])),
    "a class is half a character": manifest(lambda m: m.update(classes=["ant", "\ud800"])),
    "a split is a path": manifest(lambda m: m["splits"].update({"../out": m["splits"]["val"]})),
    "a resolution is a path": manifest(lambda m: m["splits"]["train"]["resolutions"].update({"/etc": {}})),
    "no resolutions": manifest(lambda m: m["splits"]["train"].update(resolutions={})),
    "images are negative": manifest(lambda m: m["splits"]["val"].update(images=-1)),
    "images are beyond count": manifest(lambda m: m["splits"]["val"].update(images=10**30)),
    "another number of images": ("val/labels.npy", manifest(lambda m: m["splits"]["val"].update(images=11))[1]),
    "a deep value in dataset.json": file(
        "dataset.json", lambda p: p.write_text(p.read_text()[:-1] + ', "x": ' + "[" * 90_000 + "]" * 90_000 + "}")
    ),
    "dataset.json is cut": file("dataset.json", one_byte_less),
    "dataset.json is no UTF-8": file("dataset.json", lambda p: p.write_bytes(b"\xff\xfe\xfa" + p.read_bytes())),
    "a number of 5,000 digits": file("dataset.json", lambda p: p.write_text('{"format": ' + "1" * 5000 + "}")),
    "shards are a number": index(lambda i: i.update(shards=3)),
    "a shard lies elsewhere": index(lambda i: i["shards"][0]["raw_data"].update(basename="../../../x.mds")),
    "a shard is the index": index(lambda i: i["shards"][0]["raw_data"].update(basename="index.json")),
    "a shard's name has NUL": index(lambda i: i["shards"][0]["raw_data"].update(basename="a\0.mds")),
    "a shard occurs twice": index(lambda i: i["shards"].append(i["shards"][0])),
    "a shard has no digest": index(lambda i: i["shards"][0]["raw_data"].update(hashes={})),
    "a shard's size is another": index(lambda i: i["shards"][0]["raw_data"].update(bytes=5)),
    "samples are true": index(lambda i: i["shards"][0].update(samples=True)),
    "index.json is absent": file("train/36/index.json", lambda p: p.unlink()),
    "index.json is a FIFO": file("train/36/index.json", fifo),
    "another number of samples": ("train/28", index(lambda i: i["shards"][0].update(samples=11))[1]),
    "a label of -1": array("val/labels.npy", label(3, -1)),
    "a label one too high": array("val/labels.npy", label(9, 2)),
    "labels are floats": array("train/labels.npy", lambda a: a.astype(np.float64)),
    "a label is missing": array("train/labels.npy", lambda a: a[:-1]),
    "labels.npy is cut": file("train/labels.npy", one_byte_less),
    "labels.npy is a FIFO": file("train/labels.npy", fifo),
    "labels.npy is a folder": file("train/labels.npy", folder_in_its_place),
    "images.npy is absent": file("val/28/images.npy", lambda p: p.unlink()),
    "an image is missing": ("val/28", array("val/28/images.npy", lambda a: a[:-1])[1]),
    "an image before its shard": array("val/28/images.npy", label((0, 0), 7)),
    "an image behind its shard": array("val/28/images.npy", label((2, 1), 2**32 - 1)),
    "a shard is missing": file(SHARD, lambda p: p.unlink()),
    "a shard is short": file(SHARD, one_byte_less),
    "a shard is a FIFO": file(SHARD, fifo),
    "a shard is a folder": file(SHARD, folder_in_its_place),
    "a shard is a dangling link": file(SHARD, lambda p: (p.unlink(), p.symlink_to("nowhere"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_that_names_the_file_and_the_command(prepared, damage, capsys):
    name, spoil = DAMAGE[damage]
    spoil(prepared)
    messages = []
    for opened in (lambda: open_split_pair(str(prepared), ""), lambda: open_evaluation(str(prepared), "", [])):
        with pytest.raises(DataError) as caught:
            opened()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{prepared}/{name}: ")
    assert messages[0].endswith(f": python -m data.verify {prepared}") or "prepare the dataset again" in messages[0]
    assert "\n" not in messages[0]
    assert messages[0].isprintable()
    assert len(messages[0]) < 500
    assert main([str(prepared), "--workers", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"{prepared}/{name}: ")


def test_verify_names_all_that_is_damaged(prepared, capsys):
    with (prepared / SHARD).open("r+b") as shard:
        shard.seek(-1, os.SEEK_END)  # of the last image's name: every image is as it was
        shard.write(b"~")
    assert main([str(prepared), "--workers", "1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == []
    assert report["broken_shards"] == [f"{prepared}/{SHARD}: SHA-256 differs from index.json"]
    (prepared / SHARD).unlink()
    one_byte_less(prepared / "train/28/00000/shard.00000.mds")
    one_byte_less(prepared / "val/labels.npy")
    with pytest.raises(DataError, match=r"train/28/00000/shard.00000.mds: has \d+ bytes, .*, and 2 more; to list all"):
        open_split_pair(str(prepared), "")
    assert main([str(prepared), "--workers", "1"]) == 2
    lines = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    damaged = ["train/28/00000/shard.00000.mds", SHARD, "val/labels.npy"]
    assert lines[-3:] == [f"{prepared}/{name}" for name in damaged]


def replaced(loader):
    """How many images an epoch had, and the bad ones by name."""
    count = sum(len(labels) for _, labels in run(loader, [0]))
    return count, {one.name: one.reason for one in loader.dataset.bad.new()}


def test_a_shard_that_is_lost_in_training_costs_its_images_only(prepared):
    train, _ = open_split_pair(str(prepared), "")
    shard = prepared / SHARD
    for spoil, reason, workers in (
        (lambda: shard.write_bytes(b"x" * shard.stat().st_size), "not an image", 0),
        (lambda: os.truncate(shard, 0), "the file is empty", 0),
        (lambda: fifo(shard), "the file cannot be read", 0),
        (lambda: folder_in_its_place(shard), "the file cannot be read", 0),
        (lambda: shard.rmdir(), "the file is missing", 2),
    ):
        spoil()
        count, bad = replaced(training(train, workers, plan=[PLAN[0]._replace(size=31)]))
        assert (count, len(bad)) == (45, 10)
        assert all(one.startswith(reason) for one in bad.values())
        assert all(str(prepared) in name for name in bad)


def test_one_record_that_cannot_be_decoded_is_one_bad_image(prepared):
    train, _ = open_split_pair(str(prepared), "")
    place, offset, length = train.resolutions["28"].where(7)
    with (prepared / "train/28" / place).open("r+b") as shard:
        shard.seek(offset)
        shard.write(bytes(length))
    count, bad = replaced(training(train, plan=[PLAN[0]._replace(size=24)]))
    assert (count, list(bad)) == (45, [train.name(7)])


def test_what_ends_a_worker_is_one_line_of_its_own(prepared):
    train, _ = open_split_pair(str(prepared), "")
    for shard in prepared.glob("train/28/*/*.mds"):
        shard.unlink()
    with pytest.raises(DataError) as caught:
        run(training(train, 1, plan=[PLAN[0]._replace(size=24)]), [0])
    assert str(caught.value).endswith("images drawn as replacements cannot be decoded")
    assert str(caught.value).isprintable()


def test_training_ends_with_status_2_and_a_line(prepared):
    (prepared / SHARD).unlink()
    words = ["entrypoint.py", "yamls/demo.yaml", f"data.path={prepared}", f"runs_folder={prepared}-runs"]
    status, output = end(start(words))
    assert status == 2, output
    assert f"{prepared}/{SHARD}: not found" in output
    assert "Traceback" not in output


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["..", "/etc/passwd", "a/../../b.mds", "\ud800", "x" * 300]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data(), name=st.sampled_from(["dataset.json", "train/28/index.json", "val/28/index.json"]))
def test_metadata_with_anything_in_it_is_refused_in_a_line_or_leads_nowhere_else(whole, data, name):
    original = (whole / name).read_text()
    at = content = json.loads(original)
    while True:  # walk down to some value, and put junk in its place, or another key for it
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        if not (isinstance(at[key], dict | list) and at[key] and data.draw(st.integers(0, 3))):
            break
        at = at[key]
    if isinstance(at, dict) and data.draw(st.booleans()):
        at[data.draw(st.text(max_size=5) | st.sampled_from(["..", "/tmp", "a/b"]))] = at.pop(key)
    else:
        at[key] = data.draw(JUNK)
    (whole / name).write_text(json.dumps(content))
    try:
        splits, message = opened(whole)
    finally:
        (whole / name).write_text(original)
    for source in splits:
        for resolution in source.resolutions.values():
            assert all(file.resolve().is_relative_to(whole) for file, _, _ in resolution.files())
        assert len(source.read(len(source) - 1)) > 0
        assert source.name(0)
    assert message.isprintable()


def opened(folder):
    """The splits and no message, or no splits and the message; no other exception passes."""
    try:
        return open_split_pair(str(folder), ""), ""
    except DataError as error:
        return (), str(error)


@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data(), name=st.sampled_from(["train/labels.npy", "val/28/images.npy"]))
def test_an_array_with_any_byte_changed_is_refused_in_a_line_or_read(whole, data, name):
    original = (whole / name).read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, min(len(changed) - 1, 200)))] = data.draw(st.integers(0, 255))
    (whole / name).write_bytes(changed[: data.draw(st.sampled_from([len(changed), len(changed) // 2, 100]))])
    try:
        splits, message = opened(whole)
        assert message.isprintable()
        if splits:
            assert splits[0].labels.max() <= 1
            assert len(splits[1].read(0)) < 10_000
    finally:
        (whole / name).unlink()  # and not written over: it may be mapped
        (whole / name).write_bytes(original)
