import contextlib
import gzip
import hashlib
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from torchvision.datasets import ImageNet, imagenet

from data.errors import DataError, run_main
from data.imagefolder import list_images
from data.origins import Files, images_in_keys, open_origin, unpack_tars
from data.parts import Settings, Task, make_part
from data.prepare import main
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


TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar", "devkit": "ILSVRC2012_devkit_t12.tar.gz"}
TRUTH = b"1\n2\n2\n"


def devkit(truth):
    """Two classes whose ILSVRC ids are not in the order of their names, and one of those above them."""
    rows = [(1, CLASSES[1], 0), (2, CLASSES[0], 0), (1001, "n00001740", 2)]
    fields = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    synsets = np.array([[(number, name, f"a {name}, b", "-", children)] for number, name, children in rows], fields)
    savemat(meta := io.BytesIO(), {"synsets": synsets})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    return stream.getvalue()


@pytest.fixture
def put(tmp_path, monkeypatch):
    """A function that writes one of the tar files, whose MD5 counts as that of the original."""

    def write(kind, content):
        (tmp_path / TARS[kind]).write_bytes(content)
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, (TARS[kind], hashlib.md5(content).hexdigest()))

    return write


@pytest.fixture
def ilsvrc(tmp_path, put, jpegs):
    """The three files of image-net.org, with four training and three validation images."""
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpegs[2 * label + i] for i in range(2)})
        for label, wnid in reversed(list(enumerate(CLASSES)))
    }
    put("train", tar_of(inner))
    put("val", tar_of({f"ILSVRC2012_val_{i + 1:08}.JPEG": jpegs[4 + i] for i in (2, 0, 1)}))
    put("devkit", devkit(TRUTH))
    return tmp_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


UNPACKED = sorted([*TARS.values(), "meta.bin", "train", "val"])


def require_unpacked(folder, jpegs):
    train, val = open_origin(str(folder)).values()
    assert train.classes == val.classes == CLASSES
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1, 1], [0, 0, 1])
    pictures = [train.read(i) for i in range(4)] + [val.read(i) for i in range(3)]
    assert pictures == [*jpegs[:4], *jpegs[5:7], jpegs[4]]
    assert names_in(folder) == UNPACKED


def test_ilsvrc_tars_become_the_folders_that_torchvision_makes(ilsvrc, jpegs):
    lines = []
    unpack_tars(ilsvrc, lines.append)
    (line,) = lines
    assert line == f"unpacking the tar files into {ilsvrc}: val and train, 0.000 GB"
    require_unpacked(ilsvrc, jpegs)
    assert ImageNet(ilsvrc, "val").targets == open_origin(str(ilsvrc))["val"].labels.tolist()
    for file in TARS.values():
        (ilsvrc / file).write_bytes(b"not read again")
    unpack_tars(ilsvrc, lines.append)
    assert lines == [line]


def test_only_what_is_not_there_is_unpacked(ilsvrc, jpegs):
    unpack_tars(ilsvrc, print)
    (ilsvrc / TARS["train"]).unlink()
    shutil.rmtree(ilsvrc / "val")
    unpack_tars(ilsvrc, print)
    (ilsvrc / TARS["train"]).touch()
    require_unpacked(ilsvrc, jpegs)


def test_a_folder_without_tars_is_left_as_it_is(tmp_path):
    unpack_tars(tmp_path, print)
    unpack_tars(tmp_path / "absent", print)
    assert names_in(tmp_path) == []


def test_prepare_unpacks_first(ilsvrc, jpegs, tmp_path_factory, capsys):
    """But nothing before it knows that it can write the target."""
    target = tmp_path_factory.mktemp("target")
    (target / "mine.txt").touch()
    assert run_main(lambda: main([str(ilsvrc), str(target)])) == 2
    assert names_in(ilsvrc) == sorted(TARS.values())
    assert "holds something else" in capsys.readouterr().err
    assert main([str(ilsvrc), str(target / "set"), "--train-sizes", "16", "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["unpacking", "expected:"]
    assert "train: 4 images, 0 left out" in lines
    require_unpacked(ilsvrc, jpegs)


def killed_while_unpacking(folder, archives):
    """Unpack so many archives, and end like a process that is killed."""
    unpack, count = imagenet.extract_archive, iter(range(archives))

    def extract_archive(*arguments, **options):
        if next(count, None) is None:
            os._exit(9)
        unpack(*arguments, **options)

    imagenet.extract_archive = extract_archive
    unpack_tars(folder, print)


def test_what_is_not_unpacked_completely_does_not_count(ilsvrc, jpegs):
    for archives, complete in ((0, []), (1, []), (2, ["val"]), (1, ["val"]), (2, ["val"])):  # in train, one is a class
        process = multiprocessing.get_context("fork").Process(target=killed_while_unpacking, args=(ilsvrc, archives))
        process.start()
        process.join()
        assert process.exitcode == 9
        assert [name for name in names_in(ilsvrc) if name in ("train", "val")] == complete
    with pytest.raises(DataError, match="train: no such folder"):
        open_origin(str(ilsvrc))
    (ilsvrc / ".train.unpacking/n00000000").mkdir()
    unpack_tars(ilsvrc, print)
    require_unpacked(ilsvrc, jpegs)


def test_a_disk_without_the_space_is_refused_before_anything_is_written(ilsvrc, monkeypatch):
    size = sum((ilsvrc / file).stat().st_size for file in TARS.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, size))
    with pytest.raises(DataError, match=r"takes 0.000 GB there, but 0.000 GB are free"):
        unpack_tars(ilsvrc, print)
    assert names_in(ilsvrc) == sorted(TARS.values())


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
    "UTF-16": (lambda text: text.encode("utf-16"), "cannot be read as a table in UTF-8"),
    "semicolons": (lambda text: text.replace(",", ";").encode(), "expected the columns .*, separated by commas"),
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


@pytest.mark.parametrize("kind", TARS)
def test_an_archive_that_is_not_the_original_is_named_and_not_unpacked(ilsvrc, jpegs, kind):
    path = ilsvrc / TARS[kind]
    whole = path.read_bytes()
    outside = ilsvrc.with_name("out.JPEG")
    way_out = tar_of({str(outside): jpegs[0], f"../../../{outside.name}": jpegs[0]})
    for content in (b"", whole[:200], whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:], way_out):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=f"{path.name} is not present in the root directory or is corrupted"
        ) as caught:
            unpack_tars(ilsvrc, print)
        assert str(caught.value).isprintable()
        assert set(names_in(ilsvrc)) <= {*UNPACKED} - {"train" if kind == "train" else "val"}
        assert not outside.exists()
    for place in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        shutil.rmtree(ilsvrc / "val", ignore_errors=True)
        path.rmdir() if path.is_dir() else path.unlink()
        place(path)
        with pytest.raises(DataError, match=f"{path.name}: missing"):
            unpack_tars(ilsvrc, print)


DAMAGED_TARS = {  # with the original's MD5
    "a train.tar that ends in a class": ("train", lambda whole: whole[:6000], "unexpected end of data"),
    "a devkit without its files": ("devkit", lambda whole: gzip.compress(tar_of({})), "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGED_TARS)
def test_damage_in_an_archive_is_one_line_and_leaves_nothing(ilsvrc, jpegs, put, capsys, damage):
    kind, spoil, message = DAMAGED_TARS[damage]
    whole = (ilsvrc / TARS[kind]).read_bytes()
    put(kind, spoil(whole))
    split = "train" if kind == "train" else "val"
    with pytest.raises(DataError, match=rf"{ilsvrc}/{split}: cannot be unpacked: .*{message}") as caught:
        unpack_tars(ilsvrc, print)
    assert str(caught.value).isprintable()
    assert set(names_in(ilsvrc)) <= {*UNPACKED} - {split}
    put(kind, whole)
    unpack_tars(ilsvrc, print)
    require_unpacked(ilsvrc, jpegs)


def test_a_class_that_is_in_val_only_is_named(ilsvrc, jpegs, put):
    put("train", tar_of({f"{wnid}.tar": tar_of({"a.JPEG": jpegs[0]}) for wnid in (CLASSES[0], "n99999999")}))
    unpack_tars(ilsvrc, print)
    with pytest.raises(DataError, match=f"val: class folders that {ilsvrc}/train lacks: {CLASSES[1]}"):
        open_origin(str(ilsvrc))


def test_a_name_that_leads_out_is_not_written(tmp_path, jpegs):
    """Whatever the origin: names from a bucket's listing come this way, too."""
    source = Files(str(tmp_path), ["../../out.jpg"], ["ant"], ["ant"])
    task = Task("train", source, str(tmp_path / "target"), Settings("folder", ("24",), ("24",), 90))
    with pytest.raises(DataError, match=r"ant/../../out.jpg: not a name that a file can have"):
        make_part(task, 0)
