import pickle
import subprocess
import tracemalloc

import numpy as np
import pytest
import torchvision

from data.errors import DataError
from data.imagefolder import ImageFolder, open_split_pair
from data.source import subset


def test_order_and_labels_are_torchvisions(tmp_path, encode, photo):
    jpeg = encode(photo(8, 8))
    for name in ("b/2.JPEG", "b/10.jpg", "b/a/1.png", "b/Z.webp", "a/x.tiff", "é/ü.bmp", "B/1.ppm", "a/sub/deep/3.PGM"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    ours, theirs = ImageFolder(tmp_path, None), torchvision.datasets.ImageFolder(str(tmp_path))
    assert ours.classes == theirs.classes
    assert [ours.name(index) for index in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
    assert ours.labels.dtype == np.int64
    assert all(ours.read(index) == jpeg for index in range(len(ours)))


def test_labels_follow_the_classes_given(small_folder):
    folder = ImageFolder(small_folder, ["cat", "dog", "bee", "ant"])
    assert np.bincount(folder.labels).tolist() == [15, 0, 20, 25]
    for index in (0, 30, 59):
        assert f"/{folder.classes[folder.labels[index]]}/" in folder.name(index)


def test_hidden_files_and_folders_are_passed_over(small_folder, tmp_path):
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    (tmp_path / "ant").symlink_to(small_folder / "ant")
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "._1.jpg").write_bytes(b"AppleDouble")
    folder = ImageFolder(tmp_path, None)
    assert folder.classes == ["ant", "bee"]
    assert len(folder) == 25


def test_an_image_costs_tens_of_bytes_of_memory(tmp_path):
    (tmp_path / "class").mkdir()
    for index in range(3000):
        (tmp_path / "class" / f"ILSVRC2012_{index:08}.JPEG").touch()
    ImageFolder(tmp_path, None)
    tracemalloc.start()
    folder = ImageFolder(tmp_path, None)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(folder) < 60
    assert len(pickle.dumps(folder)) / len(folder) < 60


def test_pair_opens_with_one_numbering(tmp_path, write_folder):
    write_folder(tmp_path / "train", {"ant": 3, "bee": 2, "cat": 2})
    write_folder(tmp_path / "val", {"ant": 1, "cat": 2})
    train, val = open_split_pair(tmp_path)
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert val.labels.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (None, None, "no such folder; expected a folder with train/"),
        (None, {"ant": 1}, r"train: no such folder"),
        ({"ant": 1, "bee": 1}, None, r"val: no such folder"),
        ({}, {"ant": 1}, "train: no class folders"),
        ({"ant": 1}, {"ant": 1}, r"one class folder \(ant\)"),
        ({"ant": 1, "bee": 0}, {"ant": 1}, "class folder bee holds no images"),
        ({"ant": 0, "bee": 0}, {"ant": 1}, "train: the class folders hold no images"),
        ({"ant": 1, "bee": 1}, {"ant": 1, "cow": 1, "dog": 0}, r"val: class folder cow, dog is not in .*train"),
        ({"ant": 1, "bee": 1}, {"ant": 0}, "val: the class folders hold no images"),
        ({"ant": 1, "bee": 1}, {}, "val: no class folders"),
    ],
)
def test_a_broken_layout_is_named(tmp_path, write_folder, train, val, message):
    path = tmp_path / "set"
    for split, classes in (("train", train), ("val", val)):
        if classes is not None:
            (path / split).mkdir(parents=True)
            write_folder(path / split, classes)
    with pytest.raises(DataError, match=message) as caught:
        open_split_pair(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("there", "hint"),
    [
        (["train", "test"], "if {0}/test is meant: ln -s test {0}/val"),
        (["Training", "val"], "if {0}/Training is meant: ln -s Training {0}/train"),
        (["mini/train", "mini/val"], "did you mean {0}/mini?"),
        (["train", "ship"], "expected {0}/val/CLASS/IMAGE"),
    ],
)
def test_a_split_that_is_called_otherwise_is_pointed_out(tmp_path, write_folder, there, hint):
    for split in there:
        (tmp_path / split).mkdir(parents=True)
        write_folder(tmp_path / split, {"ant": 1, "bee": 1})
    with pytest.raises(DataError) as caught:
        open_split_pair(tmp_path)
    assert str(caught.value).endswith(hint.format(tmp_path))


def test_the_command_that_is_pointed_out_works(tmp_path, write_folder):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_folder(tmp_path / split, {"ant": 1, "bee": 2})
    with pytest.raises(DataError, match="ln -s") as caught:
        open_split_pair(tmp_path)
    subprocess.run(str(caught.value).partition("is meant: ")[2].split(), check=True)
    assert len(open_split_pair(tmp_path)[1]) == 3


def test_a_subset_is_even_fixed_and_nested(small_folder):
    whole = ImageFolder(small_folder, None)
    small, large = (subset(whole, samples, seed=3) for samples in (10, 50))
    assert sorted(np.bincount(small.labels).tolist()) == [3, 3, 4]
    assert np.bincount(large.labels).tolist() == [18, 17, 15] or np.bincount(large.labels).tolist() == [17, 18, 15]
    names = [small.name(index) for index in range(10)]
    assert names == [subset(whole, 10, seed=3).name(index) for index in range(10)]
    assert names != [subset(whole, 10, seed=4).name(index) for index in range(10)]
    assert set(names) < {large.name(index) for index in range(50)}
    assert all(f"/{small.classes[small.labels[index]]}/" in small.name(index) for index in range(10))
    assert small.read(4) == whole.read([whole.name(index) for index in range(60)].index(names[4]))
    assert subset(whole, 60, seed=3) is whole


@pytest.mark.parametrize("samples", [0, 61])
def test_a_subset_of_more_than_there_is_is_refused(small_folder, samples):
    with pytest.raises(DataError, match=f"{samples} images was asked for; the training set allows 1 to 60"):
        subset(ImageFolder(small_folder, None), samples, seed=3)
