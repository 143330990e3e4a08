import io
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from data.errors import DataError
from data.origins import open_origin

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
