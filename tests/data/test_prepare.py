import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data import prepare as module
from data import verify
from data.errors import DataError, WorkerKilledError, run_main
from data.open import open_split_pair
from data.parts import Settings, Task, check_part
from data.prepare import main, prepare
from data.shards import resolution_for
from tests.data.conftest import encode, make_photo, write_folder
from tests.support import ROOT, decode

SIZES = ("24", "36", "original")


def settings(**fields):
    return Settings(**{"layout": "mds", "train_sizes": SIZES, "val_sizes": ("original",), "quality": 90} | fields)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """36 training and 8 validation images; one of them is bad, one a PNG."""
    path = tmp_path_factory.mktemp("dataset")
    write_folder(path / "train", {"ant": 20, "bee": 16}, side=50)
    write_folder(path / "val", {"ant": 4, "bee": 4}, side=50)
    (path / "train/ant/0003.jpg").write_bytes(b"not an image")
    (path / "train/bee/0000.png").write_bytes(encode(make_photo(60, 44), "PNG"))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, dataset):
    target, lines = tmp_path_factory.mktemp("prepared") / "out", []
    assert prepare(str(dataset), str(target), settings(part_images=10), 2, lines.append)
    return target, "\n".join(lines)


def test_images_labels_and_names_carry_over(dataset, prepared):
    origin, _ = open_split_pair(str(dataset), "")
    train, val = open_split_pair(str(prepared[0]), "")
    good = [index for index in range(37) if index != 3]
    assert train.classes == val.classes == ["ant", "bee"]
    assert train.labels.tolist() == origin.labels[good].tolist()
    assert len(val) == 8
    for index, before in enumerate(good):
        assert train.read(index) == origin.read(before)
        assert train.name(index) == origin.name(before).replace(f"{dataset}/train/", f"{prepared[0]}/train: ")
    for line in (
        "left out: ant/0003.jpg: not an image",
        "train at 24: 0.000 GB in 4 shards",
        "train: 36 images, 1 left",
    ):
        assert line in prepared[1]


def test_each_resolution_has_its_short_side_and_the_pictures(dataset, prepared):
    train, _ = open_split_pair(str(prepared[0]), "")
    for size, side in ((21, 24), (31, 36)):
        read = train.reader(size, range(36))
        for index in range(36):
            whole, small = Image.fromarray(decode(train.read(index))), decode(read(index))
            assert min(small.shape[:2]) == side
            assert abs(small.shape[0] / small.shape[1] - whole.height / whole.width) < 0.05
            reference = np.asarray(whole.resize(small.shape[1::-1], Image.Resampling.BICUBIC)).astype(float)
            assert np.abs(small - reference).mean() < 8


def test_streaming_reads_the_shards(prepared):
    from streaming.base.format.mds.reader import MDSReader

    train, _ = open_split_pair(str(prepared[0]), "")
    index = json.loads((prepared[0] / "train/36/index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [9, 10, 10, 7]
    read, number = train.reader(30, range(36)), 0
    for shard in index["shards"]:
        reader = MDSReader.from_json(str(prepared[0] / "train"), "36", shard)
        for sample in range(shard["samples"]):
            assert reader[sample]["image"] == read(number)
            assert reader[sample]["label"] == train.labels[number]
            number += 1


def test_a_folder_per_resolution(tmp_path, dataset):
    one = settings(layout="folder", train_sizes=("24",), val_sizes=("24",))
    assert prepare(str(dataset), str(tmp_path), one, 1, print)
    train, val = open_split_pair(str(tmp_path / "24"), "")
    assert (len(train), len(val)) == (36, 8)
    assert (tmp_path / "24/train/bee/0000.png.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert all(min(decode(train.read(index)).shape[:2]) == 24 for index in range(36))


def test_a_killed_preparation_continues(tmp_path, dataset, prepared):
    command = [sys.executable, "-c", "import sys; from tests.data.test_prepare import go; go(*sys.argv[1:])"]
    target = tmp_path / "out"
    process = subprocess.Popen([*command, str(dataset), str(target)], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(target.glob(".parts/train/*.npz")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in target.glob(".parts/train/*.npz")}
    assert done
    assert not (target / "dataset.json").exists()
    with pytest.raises(DataError, match="was started from another source or with other settings"):
        prepare(str(dataset), str(target), settings(part_images=10, quality=80), 1, print)
    go(dataset, target)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    for file in prepared[0].rglob("*"):
        if file.suffix in (".mds", ".npy") or file.name in ("index.json", "dataset.json"):
            assert (target / file.relative_to(prepared[0])).read_bytes() == file.read_bytes(), file


def go(source, target):
    assert prepare(str(source), str(target), settings(part_images=10), 1, print)


def test_what_does_not_read_back_is_named_and_written_again(tmp_path, dataset, prepared):
    target = shutil.copytree(prepared[0], tmp_path / "set")
    shard = target / "train/24/00001/shard.00000.mds"
    task = Task("train", open_split_pair(str(dataset), "")[0], str(target), settings(part_images=10))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:500] + b"\0" + whole[501:])
    assert "SHA-256" in check_part(task, 1)[0]
    go(dataset, target)
    assert shard.read_bytes() == whole
    assert check_part(task, 1) == []


def test_a_place_that_holds_something_else_is_refused_first(tmp_path, dataset, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    for words, message in (
        ([dataset, tmp_path], f"{tmp_path}: holds something else"),
        ([tmp_path / "absent", tmp_path / "new"], f"{tmp_path}/absent: no such folder"),
    ):
        assert run_main(lambda words=words: main([str(word) for word in words])) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(message)
        assert (captured.err.count("\n"), captured.out) == (1, "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_smallest_resolution_that_suffices():
    names = ["original", "384", "160", "256"]
    chosen = {size: resolution_for(names, size) for size in (96, 128, 140, 141, 176, 224, 225, 288, 336, 337)}
    assert list(chosen.values()) == ["160", "160", "160", "256", "256", "256", "384", "384", "384", "original"]
    assert resolution_for(["160"], 224) == "160"


def kill(held, part):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_commands_say_so_in_one_line(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 2, "bee": 2})
    words = [str(tmp_path / "set"), str(tmp_path / "out"), "--train-sizes", "24", "--workers", "2"]
    monkeypatch.setattr(verify, "_faults", kill)
    monkeypatch.setattr(module, "write_and_check", kill)
    for command in (lambda: verify.main([words[0], "--workers", "2"]), lambda: main(words)):
        assert run_main(command) == 1
        said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "img" not in line and line]
        assert said == [str(WorkerKilledError())]
    monkeypatch.undo()
    assert main(words) == 0  # the same command continues
