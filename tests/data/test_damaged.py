"""Prepared data that is damaged, or made to do damage: refused before training, replaced image by image in it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError, run_main
from data.open import open_evaluation, open_split_pair
from data.verify import main
from tests.data.conftest import SHARD
from tests.data.test_loader import PLAN, run, training
from tests.support import end, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared):
    return shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "set")


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "set")


def changed(edit):
    """Edit a JSON file in place."""

    def change(path):
        edit(content := json.loads(path.read_text()))
        path.write_text(json.dumps(content))

    return change


def array(edit):
    return lambda path: np.save(path, edit(np.load(path)))


def cell(position, value):
    def edit(values):
        values[position] = value
        return values

    return array(edit)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def one_byte_less(path):
    path.write_bytes(path.read_bytes()[:-1])


def shard(**fields):
    return changed(lambda i: i["shards"][0]["raw_data"].update(fields))


MANIFEST, INDEX = "dataset.json", "train/28/index.json"
DAMAGE = {  # the file that is damaged, how, and what the message names if it is another
    "no classes": (MANIFEST, changed(lambda m: m.pop("classes"))),
    "a class is a path": (MANIFEST, changed(lambda m: m.update(classes=["ant", "../bee"]))),
    "a class occurs twice": (MANIFEST, changed(lambda m: m.update(classes=["ant", "ant"]))),
    "a class is half a character": (MANIFEST, changed(lambda m: m.update(classes=["ant", "\ud800"]))),
    "a split is a path": (MANIFEST, changed(lambda m: m["splits"].update({"../out": m["splits"]["val"]}))),
    "no resolutions": (MANIFEST, changed(lambda m: m["splits"]["train"].update(resolutions={}))),
    "images are negative": (MANIFEST, changed(lambda m: m["splits"]["val"].update(images=-1))),
    "images are beyond count": (MANIFEST, changed(lambda m: m["splits"]["val"].update(images=10**30))),
    "a resolution is a path": (MANIFEST, changed(lambda m: m["splits"]["train"]["resolutions"].update({"/etc": {}}))),
    "other images": (MANIFEST, changed(lambda m: m["splits"]["val"].update(images=11)), "val/labels.npy"),
    "a deep value": (MANIFEST, lambda p: p.write_text(p.read_text()[:-1] + f', "x": {"[" * 90_000}{"]" * 90_000}}}')),
    "dataset.json is cut": (MANIFEST, one_byte_less),
    "dataset.json is no UTF-8": (MANIFEST, lambda p: p.write_bytes(b"\xff\xfe\xfa" + p.read_bytes())),
    "a number of 5,000 digits": (MANIFEST, lambda p: p.write_text('{"format": ' + "1" * 5000 + "}")),
    "a shard lies elsewhere": (INDEX, shard(basename="../../../x.mds")),
    "a shard's name has NUL": (INDEX, shard(basename="a\0.mds")),
    "shards are a number": (INDEX, changed(lambda i: i.update(shards=3))),
    "a shard is the index": (INDEX, shard(basename="index.json")),
    "a shard occurs twice": (INDEX, changed(lambda i: i["shards"].append(i["shards"][0]))),
    "a shard has no digest": (INDEX, shard(hashes={})),
    "a shard's size is another": (INDEX, shard(bytes=5)),
    "samples are true": (INDEX, changed(lambda i: i["shards"][0].update(samples=True))),
    "index.json is absent": (INDEX, lambda p: p.unlink()),
    "index.json is a FIFO": (INDEX, fifo),
    "another number of samples": (INDEX, changed(lambda i: i["shards"][0].update(samples=11)), "train/28"),
    "a label of -1": ("val/labels.npy", cell(3, -1)),
    "a label one too high": ("val/labels.npy", cell(9, 2)),
    "labels are floats": ("train/labels.npy", array(lambda a: a.astype(np.float64))),
    "a label is missing": ("train/labels.npy", array(lambda a: a[:-1])),
    "labels.npy is cut": ("train/labels.npy", one_byte_less),
    "labels.npy is a FIFO": ("train/labels.npy", fifo),
    "labels.npy is a folder": ("train/labels.npy", folder_in_its_place),
    "images.npy is absent": ("val/original/images.npy", lambda p: p.unlink()),
    "an image is missing": ("val/original/images.npy", array(lambda a: a[:-1]), "val/original"),
    "an image before its shard": ("val/original/images.npy", cell((0, 0), 7)),
    "an image behind its shard": ("val/original/images.npy", cell((2, 1), 2**32 - 1)),
    "a shard is missing": (SHARD, lambda p: p.unlink()),
    "a shard is short": (SHARD, one_byte_less),
    "a shard is a FIFO": (SHARD, fifo),
    "a shard is a folder": (SHARD, folder_in_its_place),
    "a shard is a dangling link": (SHARD, lambda p: (p.unlink(), p.symlink_to("nowhere"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_that_names_the_file_and_the_command(copy, damage, capsys):
    file, spoil, *other = DAMAGE[damage]
    name = (other or [file])[0]
    spoil(copy / file)
    messages = []
    for opened in (lambda: open_split_pair(str(copy), ""), lambda: open_evaluation(str(copy), "", [])):
        with pytest.raises(DataError) as caught:
            opened()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{copy}/{name}: ")
    assert messages[0].endswith(f": python -m data.verify {copy}") or "prepare the dataset again" in messages[0]
    assert "\n" not in messages[0]
    assert messages[0].isprintable()
    assert len(messages[0]) < 500
    assert run_main(lambda: main([str(copy), "--workers", "1"])) == 2
    assert capsys.readouterr().err.startswith(f"{copy}/{name}: ")


def test_verify_names_all_that_is_damaged(copy, capsys):
    with (copy / SHARD).open("r+b") as shard:
        shard.seek(-1, os.SEEK_END)  # of the last image's name: every image is as it was
        shard.write(b"~")
    assert main([str(copy), "--workers", "1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == []
    assert report["broken_shards"] == [f"{copy}/{SHARD}: SHA-256 differs from index.json"]
    (copy / SHARD).unlink()
    one_byte_less(copy / "train/28/00000/shard.00000.mds")
    one_byte_less(copy / "val/labels.npy")
    with pytest.raises(DataError, match=r"train/28/00000/shard.00000.mds: has \d+ bytes, .*, and 2 more; to list all"):
        open_split_pair(str(copy), "")
    assert run_main(lambda: main([str(copy), "--workers", "1"])) == 2
    lines = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    damaged = ["train/28/00000/shard.00000.mds", SHARD, "val/labels.npy"]
    assert lines[-3:] == [f"{copy}/{name}" for name in damaged]


def replaced(loader):
    """How many images an epoch had, and the bad ones by name."""
    count = sum(len(labels) for _, labels in run(loader, [0]))
    return count, {one.name: one.reason for one in loader.dataset.bad.new()}


def test_a_shard_that_is_lost_in_training_costs_its_images_only(copy):
    train, _ = open_split_pair(str(copy), "")
    shard = copy / SHARD
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
        assert all(str(copy) in name for name in bad)


def test_one_record_that_cannot_be_decoded_is_one_bad_image(copy):
    train, _ = open_split_pair(str(copy), "")
    place, offset, length = train.resolutions["28"].where(7)
    with (copy / "train/28" / place).open("r+b") as shard:
        shard.seek(offset)
        shard.write(bytes(length))
    count, bad = replaced(training(train, plan=[PLAN[0]._replace(size=24)]))
    assert (count, list(bad)) == (45, [train.name(7)])


def test_what_ends_a_worker_is_one_line_of_its_own(copy):
    train, _ = open_split_pair(str(copy), "")
    for shard in copy.glob("train/28/*/*.mds"):
        shard.unlink()
    with pytest.raises(DataError) as caught:
        run(training(train, 1, plan=[PLAN[0]._replace(size=24)]), [0])
    assert str(caught.value).endswith("images drawn as replacements cannot be decoded")
    assert str(caught.value).isprintable()


def test_folders_and_shards_behind_links_are_read(copy, tmp_path):
    for name in ("val", SHARD):
        shutil.move(copy / name, elsewhere := tmp_path / Path(name).name)
        (copy / name).symlink_to(elsewhere)
    train, val = open_split_pair(str(copy), "")
    assert train.resolutions["36"].read(44)
    assert val.read(0)


def test_training_ends_with_status_2_and_a_line(copy):
    (copy / SHARD).unlink()
    status, output = end(start(["entrypoint.py", "yamls/demo.yaml", f"data.path={copy}", f"runs_folder={copy}-runs"]))
    assert status == 2, output
    assert f"{copy}/{SHARD}: not found" in output
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
@given(data=st.data(), name=st.sampled_from(["dataset.json", "train/28/index.json", "val/original/index.json"]))
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
    assert message == "" or message.startswith(f"{whole}")


def opened(folder):
    """The splits and no message, or no splits and the message; no other exception passes."""
    try:
        return open_split_pair(str(folder), ""), ""
    except DataError as error:
        return (), str(error)


@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data(), name=st.sampled_from(["train/labels.npy", "val/original/images.npy"]))
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
