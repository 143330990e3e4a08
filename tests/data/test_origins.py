import contextlib
import io
import itertools
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from data.errors import DataError
from data.listing import list_images
from data.origins import images_in_keys, open_origin

CLASSES = ["n01440764", "n01443537"]


@pytest.fixture
def jpegs(encode, photo):
    return [encode(photo(20, 24, seed)) for seed in range(8)]


def add(tar, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return stream.getvalue()


@pytest.fixture
def ilsvrc(tmp_path, jpegs):
    """The three files of image-net.org, with two classes whose ILSVRC ids are not in the order of their names."""
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpegs[2 * label + i] for i in range(2)})
        for label, wnid in reversed(list(enumerate(CLASSES)))
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    val = {f"ILSVRC2012_val_{i + 1:08}.JPEG": jpegs[4 + i] for i in (2, 0, 1)}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    savemat(meta := io.BytesIO(), {"synsets": synsets([(1, CLASSES[1]), (2, CLASSES[0]), (1001, "n00001740")])})
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n2\n")
    return tmp_path


def synsets(rows):
    return np.array([[row] for row in rows], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])


def test_ilsvrc_tars_are_read_where_they_lie(ilsvrc, jpegs):
    splits = open_origin(str(ilsvrc))
    train, val = splits["train"], splits["val"]
    assert train.classes == val.classes == CLASSES
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert [train.read(i) for i in range(4)] == jpegs[:4]
    assert val.labels.tolist() == [1, 0, 0]
    assert [val.read(i) for i in range(3)] == jpegs[4:7]
    assert train.name(3).endswith("ILSVRC2012_img_train.tar/n01443537/n01443537_1.JPEG")


def test_a_missing_or_damaged_tar_is_named(ilsvrc):
    (ilsvrc / "ILSVRC2012_img_val.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match="tar file is damaged"):
        open_origin(str(ilsvrc))
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataError, match=r"ILSVRC2012_devkit_t12.tar.gz: missing"):
        open_origin(str(ilsvrc))


@pytest.fixture
def kaggle(tmp_path, jpegs):
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    for label, wnid in enumerate(CLASSES):
        (root / "train" / wnid).mkdir(parents=True)
        for i in range(2):
            (root / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(jpegs[2 * label + i])
    (root / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for i, wnid in ((1, CLASSES[0]), (0, CLASSES[1])):
        (root / "val" / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(jpegs[4 + i])
        rows.append(f"ILSVRC2012_val_{i:08},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows))
    return tmp_path


def test_kaggles_tree_has_its_validation_labels_in_a_table(kaggle, jpegs):
    splits = open_origin(str(kaggle))
    assert splits["train"].labels.tolist() == [0, 0, 1, 1]
    val = splits["val"]
    assert val.classes == CLASSES
    assert val.labels.tolist() == [1, 0]
    assert [val.read(i) for i in range(2)] == jpegs[4:6]


def test_a_table_with_an_unknown_class_is_named(kaggle):
    (kaggle / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx,n99999999 1 2 3 4\n")
    with pytest.raises(DataError, match=r"LOC_val_solution.csv: x is of class n99999999"):
        open_origin(str(kaggle))


def test_an_archives_own_top_folder_is_entered(tmp_path, write_folder):
    for split in ("train", "val"):
        write_folder(tmp_path / "imagenet-mini" / split, {"ant": 2, "bee": 1})
    splits = open_origin(str(tmp_path))
    assert [len(splits[split]) for split in ("train", "val")] == [3, 3]


def test_nothing_known_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_origin(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="train: no such folder"):
        open_origin(str(tmp_path))


KEYS = ["0.jpg", "a/0.jpg", "a/.h.jpg", "a/n.txt", ".c/0.jpg", "a-b/1.PNG", "a/x/2.jpg", "a/x-y/3.jpg", "a/x/z/4.webp"]
PART = st.sampled_from(["a", "b", "a-b", "a.jpg", ".c", "x", "x-y", "z", "é"])
FILE = st.sampled_from(["0.jpg", "1.PNG", "._0.jpg", "n.txt", "a.jpg", "x", "ü.jpeg"])
TREE = st.lists(
    st.builds(lambda folders, file: "/".join([*folders, file]), st.lists(PART, max_size=3), FILE), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(tree=TREE)
@example(tree=KEYS)
@example(tree=["a.jpg/0.jpg", "a.jpg/a.jpg", "b/a.jpg/0.jpg"])
def test_a_tree_in_a_bucket_is_the_same_dataset_as_on_a_disk(tree):
    with tempfile.TemporaryDirectory() as name:
        keys = []
        for key in tree:
            file = Path(name, "train", key)
            with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"x")
                keys.append(key)
        Path(name, "train").mkdir(exist_ok=True)
        listing = list_images(Path(name, "train"))
        ends = [0, *listing.ends.tolist()]
        files = [listing.names[a:b].tobytes().decode() for a, b in itertools.pairwise(ends)]
        classes = np.repeat(listing.classes, listing.counts).tolist()
        on_disk = [f"{folder}/{file}" for folder, file in zip(classes, files, strict=True)]
    assert images_in_keys(set(keys)) == (on_disk, 0)


@pytest.mark.parametrize(
    "key",
    [
        *("a/", "a//0.jpg", "/a/0.jpg", "a/../0.jpg", "../a/0.jpg", "a/./0.jpg", "a/0\0.jpg", f"a/{'x' * 252}.jpg"),
        *("a/\ufffd.jpg", "\udce9/0.jpg", "b", "b/c.jpg", f"{'é' * 128}/0.jpg"),
    ],
)
def test_what_no_disk_holds_is_skipped_and_counted(key):
    others = ["a/0.jpg", "b/1.jpg", "b/c.jpg/2.jpg"]
    assert images_in_keys([*others, key]) == (others, 1)


@given(st.lists(st.text(st.sampled_from("ab./\0é\ufffd\ud800"), max_size=8).map(lambda key: f"{key}.jpg")))
def test_an_image_in_a_bucket_has_a_place_on_a_disk(keys):
    found, skipped = images_in_keys(keys)
    assert skipped <= len(keys)
    for key in found:
        assert os.path.normpath(f"/folder/{key}") == f"/folder/{key}"
        assert key in keys
