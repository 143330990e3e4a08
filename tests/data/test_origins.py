import contextlib
import gzip
import io
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
from data.imagefolder import list_images
from data.origins import Files, images_in_keys, open_origin
from data.parts import Settings, Task, make_part
from tests.data.conftest import encode, make_photo

CLASSES = ["n01440764", "n01443537"]


@pytest.fixture
def jpegs():
    return [encode(make_photo(20, 24, seed)) for seed in range(8)]


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
    train, val = open_origin(str(ilsvrc)).values()
    assert train.classes == val.classes == CLASSES
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1, 1], [1, 0, 0])
    assert [train.read(i) for i in range(4)] + [val.read(i) for i in range(3)] == jpegs[:7]
    assert train.name(3).endswith("ILSVRC2012_img_train.tar/n01443537/n01443537_1.JPEG")


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


KEYS = ["0.jpg", "a/0.jpg", "a/.h.jpg", "a/n.txt", ".c/0.jpg", "a-b/1.PNG", "a/x/2.jpg", "a/x-y/3.jpg", "a/x/z/4.webp"]
PART = st.sampled_from(["a", "b", "a-b", ".c", "x", "x-y", "z", "é"])  # on a disk, a folder x.jpg is a bad image
FILE = st.sampled_from(["0.jpg", "1.PNG", "._0.jpg", "n.txt", "a.jpg", "x", "ü.jpeg"])
TREE = st.lists(
    st.builds(lambda folders, file: "/".join([*folders, file]), st.lists(PART, max_size=3), FILE), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(tree=TREE)
@example(tree=KEYS)
@example(tree=["a.jpg/0.jpg", "a.jpg/a.jpg"])
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
        classes, counts, files = list_images(Path(name, "train"))
        folders = np.repeat(classes, counts).tolist()
        on_disk = [f"{folder}/{file.decode()}" for folder, file in zip(folders, files, strict=True)]
    assert images_in_keys(set(keys)) == (on_disk, 0)


def test_what_no_disk_holds_is_skipped_and_counted():
    others = ["a/0.jpg", "b/1.jpg", "b/c.jpg/2.jpg"]
    odd = ["a/", "a//0.jpg", "/a/0.jpg", "a/../0.jpg", "../a/0.jpg", "a/./0.jpg", "a/0\0.jpg", f"a/{'x' * 252}.jpg"]
    odd += ["a/\ufffd.jpg", "\udce9/0.jpg", "b", "b/c.jpg", f"{'é' * 128}/0.jpg"]
    for key in odd:
        assert images_in_keys([*others, key]) == (others, 1)


TABLES = {
    "as it is": str.encode,
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "quotes and other line ends": lambda text: '"{}"'.format(text.replace(",", '","').replace("\n", '"\r\n"')).encode(),
    "empty rows": lambda text: (text.replace("\n", "\n\n") + "\n\n").encode(),
    "columns in another order": lambda text: "\n".join(
        ",".join(reversed(line.split(","))) for line in text.splitlines()
    ).encode(),
    "columns behind": lambda text: text.replace("\n", ",,\n").encode(),
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 with tabs": lambda text: b"\xfe\xff" + text.replace(",", "\t").encode("utf-16-be"),
    "Excel's own first line": lambda text: ("sep=;\r\n" + text.replace(",", ";")).encode(),
}


@pytest.mark.parametrize("how", TABLES)
def test_kaggles_tree_has_its_validation_labels_in_a_table(kaggle, jpegs, how):
    table = kaggle / "LOC_val_solution.csv"
    table.write_bytes(TABLES[how](table.read_text()))
    train, val = open_origin(str(kaggle)).values()
    assert train.classes == val.classes == CLASSES
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1, 1], [1, 0])
    assert [val.read(i) for i in range(2)] == jpegs[4:6]


DAMAGED = {
    "an image without a class": (lambda text: f"{text}\nx,".encode(), "csv:4: x has no PredictionString"),
    "a short row": (lambda text: f"{text}\nx".encode(), "csv:4: x has no PredictionString"),
    "a class without an image": (lambda text: f"{text}\n,n01440764 1 2".encode(), "csv:4: a row has no ImageId"),
    "an image twice": (lambda text: f"{text}\n{text.splitlines()[1]}".encode(), "occurs twice"),
    "a way out": (lambda text: f"{text}\n../../x,n01440764 1".encode(), r"csv:4: ../../x: not a name"),
    "an absolute path": (lambda text: f"{text}\n/etc/x,n01440764 1".encode(), r"csv:4: /etc/x: not a name"),
    "zero bytes": (lambda text: f"{text}\nx\0,n01440764 1".encode(), "not a name|cannot be read as a table"),
    "half of UTF-16": (lambda text: text.encode("utf-16")[:-1], "cannot be read as a table"),
    "Latin-1": (lambda text: f"{text}\n\xe9,n01440764".encode("latin-1"), "cannot be read as a table"),
    "other columns": (lambda text: b"a,b\nc,d", "expected the columns ImageId and PredictionString"),
    "nothing": (lambda text: b"", "expected the columns ImageId and PredictionString"),
    "an unknown class": (lambda text: f"{text}\nx,n99999999 1 2 3 4".encode(), "csv: x has class n99999999"),
    "a header alone": (lambda text: text.splitlines()[0].encode(), "lists no image"),
    "a cell without end": (lambda text: f'{text}\n"{200_000 * "x"}'.encode(), "cannot be read as a table"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_table_is_one_line_that_names_it(kaggle, how):
    change, message = DAMAGED[how]
    table = kaggle / "LOC_val_solution.csv"
    table.write_bytes(change(table.read_text()))
    with pytest.raises(DataError, match=message) as caught:
        open_origin(str(kaggle))
    assert str(caught.value).startswith(str(table))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("file", ["img_train.tar", "img_val.tar", "devkit_t12.tar.gz"])
def test_an_archive_that_was_cut_off_or_is_none_is_named(ilsvrc, file):
    path = ilsvrc / f"ILSVRC2012_{file}"
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))  # a tar ends with empty blocks, which may be missing
    for share in (0, 0.01, 0.3, 0.6, 0.9, 0.999):
        path.write_bytes(whole[: int(share * used)])
        with pytest.raises(DataError, match=f"ILSVRC2012_{file}: ") as caught:
            open_origin(str(ilsvrc))
        assert str(caught.value).isprintable()
    for kind in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        path.unlink()
        kind(path)
        with pytest.raises(DataError, match=f"ILSVRC2012_{file}: missing"):
            open_origin(str(ilsvrc))


@pytest.mark.parametrize("name", ["../x.JPEG", "/etc/x.JPEG", "a/b.JPEG", "..", "x" * 256 + ".JPEG"])
def test_a_name_in_a_tar_that_is_not_one_component_is_refused(ilsvrc, jpegs, name):
    train = tar_of({f"{CLASSES[0]}.tar": tar_of({name: jpegs[0]})})
    for file, content in (("val", tar_of({name: jpegs[0]})), ("train", train), ("train", tar_of({name: train}))):
        path = ilsvrc / f"ILSVRC2012_img_{file}.tar"
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a name that a file can have") as caught:
            open_origin(str(ilsvrc))
        assert name in str(caught.value)
        path.write_bytes(whole)


def test_names_as_other_tars_write_them(ilsvrc, jpegs):
    """./ in front, what macOS adds, and bytes that are not UTF-8."""
    inner = tar_of({"./._a.JPEG": b"x", "./a.JPEG": jpegs[0], os.fsdecode(b"\xe9\n.JPEG"): jpegs[1]})
    classes = {f"./{CLASSES[0]}.tar": inner, f"{CLASSES[1]}.tar": tar_of({"c.JPEG": jpegs[2]})}
    (ilsvrc / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    train = open_origin(str(ilsvrc))["train"]
    assert train.classes == CLASSES
    assert [train.read(i) for i in range(3)] == jpegs[:3]
    assert train.name(1).endswith(f"{CLASSES[0]}/\\xe9\\n.JPEG")


def changed_header(content, at, size):
    """A tar whose member, whose header begins at `at`, has another size and the right checksum."""
    content[at + 124 : at + 136] = size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


def test_a_member_whose_size_is_wrong_is_damage_and_not_endless(ilsvrc, jpegs):
    content = bytearray(tar_of({"a.JPEG": jpegs[0], "b.JPEG": jpegs[1]}))
    content = changed_header(content, content.rindex(b"b.JPEG"), b"77777777777\0")
    (ilsvrc / "ILSVRC2012_img_val.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"img_val.tar: is truncated in b.JPEG"):
        open_origin(str(ilsvrc))
    head = bytearray(tarfile.TarInfo("n01.tar").tobuf(tarfile.USTAR_FORMAT))
    head = changed_header(head, 0, b"\xff" * 8 + (2**32 - 512).to_bytes(4, "big"))  # -512: back to this very member
    (ilsvrc / "ILSVRC2012_img_train.tar").write_bytes(head + bytes(2048))
    with pytest.raises(DataError, match=r"img_train.tar: the tar file is damaged at n01.tar"):
        open_origin(str(ilsvrc))


def test_a_devkit_that_unpacks_to_gigabytes_is_refused(ilsvrc, monkeypatch):
    monkeypatch.setattr("data.origins._LARGEST_TABLE", 100_000)
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(DataError, match=r"devkit_t12.tar.gz: .*more than 100000 bytes unpacked"):
        open_origin(str(ilsvrc))


def test_a_name_that_leads_out_is_not_written(tmp_path, jpegs):
    """Whatever the origin: names from a bucket's listing come this way, too."""
    source = Files(str(tmp_path), ["../../out.jpg"], ["ant"], ["ant"])
    task = Task("train", source, str(tmp_path / "target"), Settings("folder", ("24",), ("24",), 90))
    with pytest.raises(DataError, match=r"ant/../../out.jpg: not a name that a file can have"):
        make_part(task, 0)
