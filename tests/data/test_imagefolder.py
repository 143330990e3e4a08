import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torchvision

from data.errors import DataError
from data.imagefolder import ImageFolder, class_folders, class_names, open_folders
from data.open import open_evaluation, open_split_pair
from data.source import subset
from tests.data.conftest import encode, make_photo, write_folder


def test_order_and_labels_are_torchvisions(tmp_path):
    jpeg = encode(make_photo(8, 8))
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


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (None, None, "no such folder; expected a folder with train/"),
        (None, {"ant": 1}, r"train: no such folder"),
        ({"ant": 1, "bee": 1}, None, r"val: no such folder"),
        ({}, {"ant": 1}, "train: no class folders"),
        ({"ant": 1}, {"ant": 1}, r"one class folder \(ant\)"),
        ({"ant": 1, "bee": 0}, {"ant": 1}, "class folders without images: bee"),
        ({"ant": 0, "bee": 0}, {"ant": 1}, "train: the class folders hold no images"),
        ({"ant": 1, "bee": 1}, {"ant": 1, "cow": 1, "dog": 0}, r"val: class folders that .*train lacks: cow, dog"),
        ({"ant": 1, "bee": 1}, {"ant": 0}, "val: the class folders hold no images"),
        ({"ant": 1, "bee": 1}, {}, "val: no class folders"),
    ],
)
def test_a_broken_layout_is_named(tmp_path, train, val, message):
    path = tmp_path / "set"
    for split, classes in {"train": train, "val": val}.items():
        if classes is not None:
            (path / split).mkdir(parents=True)
            write_folder(path / split, classes)
    with pytest.raises(DataError, match=message) as caught:
        open_folders(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_too_long_is_named(tmp_path):
    path = str(tmp_path / ("long" * 100))
    for opened in (partial(open_split_pair, path, "cache"), partial(open_evaluation, path, "cache", ["ant"])):
        with pytest.raises(DataError, match=f"^{path}: .*File name too long"):
            opened()


@pytest.mark.parametrize(
    ("there", "hint"),
    [
        (["train", "test"], "if {0}/test is meant: ln -s test {0}/val"),
        (["mini/train", "mini/val"], "did you mean {0}/mini?"),
        (["train", "ship"], "expected {0}/val/CLASS/IMAGE"),
    ],
)
def test_a_split_that_is_called_otherwise_is_pointed_out(tmp_path, there, hint):
    for split in there:
        write_folder(tmp_path / split, {"ant": 1, "bee": 1})
    with pytest.raises(DataError) as caught:
        open_folders(tmp_path)
    assert str(caught.value).endswith(hint.format(tmp_path))


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
    for samples in (0, 61):
        with pytest.raises(DataError, match=f"got {samples}; allowed: 1 to 60"):
            subset(whole, samples, seed=3)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set" / "train"
    for name in ("ant/1.jpg", "ant/b/2.jpg", "ant/a/3.jpg", "bee/4.JPEG", "bee/notes.txt", "é/ü.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


WHOLE = ["ant/1.jpg", "ant/a/3.jpg", "ant/b/2.jpg", "bee/4.JPEG", "é/ü.png"]


def names(path):
    source = ImageFolder(path, None)
    return [os.path.relpath(source.name(index), path) for index in range(len(source))]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("ant/again", "."),
        ("ant/a/up", "../../.."),  # the dataset
        ("ant/root", "/"),
        ("ant/a/up", "../../ant"),
        ("cow", "."),  # a class that is the split
        ("cow", ".."),
    ],
)
def test_a_link_to_a_parent_folder_is_named_and_not_followed(folder, caplog, link, target):
    for number in range(3):  # each would double the work
        (folder / f"{link}{number or ''}").symlink_to(target)
    assert names(folder) == WHOLE
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    expected = f"{folder}/{link}: not followed: it is a link to {(folder / link).resolve()}, a folder that contains it"
    assert expected in said
    assert class_folders(folder) == ["ant", "bee", "é"]


def test_links_that_lead_to_themselves_or_nowhere_leave_the_rest(folder):
    for where in (folder, folder / "ant", folder / "ant/a"):
        for name, target in (("x", "x"), ("y", "z"), ("z", "y"), ("w", "/nowhere"), ("v", "/dev/null")):
            (where / name).symlink_to(target)
    for place in (".hidden", "ant/.thumbnails", "ant/a/.ipynb_checkpoints"):
        (folder / place).mkdir()
        (folder / place / "1.jpg").touch()
    assert names(folder) == WHOLE


def test_a_folder_counts_once_however_many_links_lead_to_it(folder, tmp_path, caplog):
    (tmp_path / "more/deep").mkdir(parents=True)
    (tmp_path / "more/7.jpg").touch()
    (tmp_path / "more/deep/8.jpg").touch()
    (tmp_path / "more/back").symlink_to(tmp_path / "more")
    (tmp_path / "more/home").symlink_to(folder)
    for link in ("one", "two", "a/three"):
        (folder / "ant" / link).symlink_to(tmp_path / "more")
    (folder / "ant/0_real").symlink_to("b")  # sorts before b, which is listed where it really is
    ant = ["1.jpg", "a/3.jpg", "a/three/7.jpg", "a/three/deep/8.jpg", "b/2.jpg"]
    assert [name for name in names(folder) if name.startswith("ant")] == [f"ant/{name}" for name in ant]
    assert len(caplog.records) == 5


def test_a_ladder_of_links_ends(folder, tmp_path):
    """Two links to the next folder in each: 2^40 paths."""
    for step in range(40):
        (tmp_path / f"ladder/{step}").mkdir(parents=True)
        (tmp_path / f"ladder/{step}/{step}.jpg").touch()
        for side in "lr":
            (tmp_path / f"ladder/{step}/{side}").symlink_to(f"../{step + 1}")
    (folder / "ant/ladder").symlink_to(tmp_path / "ladder/0")
    assert len(names(folder)) == len(WHOLE) + 40


def test_wordnet_ids_get_names_and_nothing_else_does():
    folders = ["n01440764", "n02979186", "7", "cat", "n99999999", "n0144076", "N01440764"]
    assert class_names(folders) == ["tench", "cassette player", *folders[2:]]
    cranes = class_names(["n02012849", "n03126707", "n01440764"])
    assert cranes == ["crane (n02012849)", "crane (n03126707)", "tench"]
    code = "import sys, data.imagefolder as f; f.class_names(['0', 'cat']); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
