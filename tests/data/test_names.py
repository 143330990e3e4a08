"""Names that are not UTF-8, lead elsewhere, or would do something to a terminal: of files, of classes."""

import os
import posixpath
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.errors import DataError
from data.files import plain_name, relative_path
from data.open import open_evaluation, open_split_pair
from data.prepare import main as prepare
from data.verify import main as verify
from tests.data.conftest import encode, make_photo
from tests.support import ROOT

STRICT = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
NASTY = [b"caf\xe9.jpg", b"\xff\xfe.jpg", b"a\nb.jpg", b"\x1b[2J.jpg", "\u202egpj.exe.jpg".encode(), b"c\\xe9.jpg"]
SHOWN = ["caf\\xe9.jpg", "\\xff\\xfe.jpg", "a\\nb.jpg", "\\x1b[2J.jpg", "\\u202egpj.exe.jpg", "c\\xe9.jpg"]
CLASSES = [b"\xe9l\xe9phant", b"line\nbreak", "évian".encode()]
CLASSES_SHOWN = ["line\\nbreak", "évian", "\\xe9l\\xe9phant"]


@pytest.fixture
def dataset(tmp_path):
    for split in (b"train", b"val"):
        for label, name in enumerate(CLASSES):
            folder = os.fsencode(tmp_path) + b"/set/" + split + b"/" + name
            os.makedirs(folder)  # noqa: PTH103 (bytes)
            for number, file in enumerate(NASTY):
                with open(folder + b"/" + file, "wb") as out:  # noqa: PTH123 (bytes)
                    out.write(encode(make_photo(30, 36, 10 * label + number)))
            with open(folder + b"/broken\xe9\n.jpg", "wb") as out:  # noqa: PTH123 (bytes)
                out.write(b"not an image")
    return tmp_path / "set"


def test_images_are_read_and_their_classes_have_one_numbering(dataset):
    train, val = open_split_pair(str(dataset), "")
    assert sorted(train.classes) == sorted(CLASSES_SHOWN)
    assert train.classes == val.classes
    assert np.bincount(train.labels).tolist() == [7, 7, 7]
    for index in range(len(train)):
        with open(train.file(index), "rb") as file:  # noqa: PTH123 (bytes)
            assert train.read(index) == file.read()
        assert train.name(index).isprintable()
    assert open_evaluation(str(dataset), "", train.classes[::-1]).labels.tolist() == [2] * 7 + [1] * 7 + [0] * 7


def test_two_classes_that_look_the_same_are_refused(dataset):
    (dataset / "train" / "line\\nbreak").mkdir()
    with pytest.raises(DataError, match=r"two class folders cannot be told apart by their names: line\\nbreak"):
        open_split_pair(str(dataset), "")


@pytest.mark.parametrize("layout", ["mds", "folder"])
def test_they_can_be_prepared_and_verified(dataset, tmp_path, layout, capsys):
    assert prepare([str(dataset), str(tmp_path / "out"), "--train-sizes", "24", "--format", layout]) == 0
    out = capsys.readouterr().out
    assert out.count("left out: ") == 6
    assert "left out: \\xe9l\\xe9phant/broken\\xe9\\n.jpg: not an image" in out
    where = tmp_path / "out" / ("24" if layout == "folder" else "")
    train, _ = open_split_pair(str(where), "")
    assert sorted(train.classes) == sorted(CLASSES_SHOWN)
    assert np.bincount(train.labels).tolist() == [6, 6, 6]
    assert {train.name(index).rpartition("/")[2] for index in range(len(train))} == set(SHOWN)
    assert verify([str(where)]) == 0
    assert capsys.readouterr().out == "36 images, 0 broken\n"


def test_verify_names_them_and_moves_the_very_files(dataset, tmp_path, capsys):
    assert verify([str(dataset), "--json"]) == 1
    assert "broken\\\\xe9\\\\n.jpg" in capsys.readouterr().out
    command = [sys.executable, "-m", "data.verify", str(dataset), "--quarantine", str(tmp_path / "aside")]
    ended = subprocess.run(command, cwd=ROOT, env=STRICT, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False), ended.stderr
    assert "broken\\xe9\\n.jpg" in ended.stdout
    moved = os.fsencode(tmp_path) + b"/aside/train/" + CLASSES[0]
    assert os.listdir(moved) == [b"broken\xe9\n.jpg"]  # noqa: PTH208 (bytes)
    assert verify([str(dataset)]) == 0


HOSTILE = st.text(st.sampled_from("./\\\0a\n\ud800\udce9é\u202e~$"), max_size=12) | st.text()


def is_accepted(check, name):
    try:
        assert check(name) == name
    except ValueError as error:
        message = str(error)
        assert message.isprintable()
        assert message.isascii()
        assert len(message) < 400
        return False
    return True


@given(HOSTILE)
@example("..")
@example("")
@example("x" * 256)
@example("é" * 128)
@example("x" * 10**6)
def test_an_accepted_name_is_one_component(name):
    if is_accepted(plain_name, name):
        assert posixpath.normpath(f"/folder/{name}") == f"/folder/{name}"
        assert os.path.split(f"/folder/{name}") == ("/folder", name)
        assert len(os.fsencode(name)) <= 255
        assert b"\0" not in os.fsencode(name)
    else:
        surrogates = any("\ud800" <= character <= "\udfff" for character in name)
        too_long = len(name.encode("utf-8", "surrogatepass")) > 255
        assert name in ("", ".", "..") or "/" in name or "\0" in name or surrogates or too_long


@given(st.lists(HOSTILE, min_size=1, max_size=4).map("/".join))
@example("/etc/passwd")
@example("a/../../b")
@example("a//b")
@example("a/./b")
def test_an_accepted_path_stays_below_its_folder(path):
    if is_accepted(relative_path, path):
        assert posixpath.normpath(f"/folder/{path}") == f"/folder/{path}"
    else:
        assert not all(part and is_accepted(plain_name, part) for part in path.split("/"))


def test_usual_names_are_accepted_and_others_refused():
    for name in ("n01440764", "ILSVRC2012_val_00000001.JPEG", "a b", ".hidden", "...", "x" * 255, "日本", "a\\b"):
        assert plain_name(name) == name
        assert relative_path(f"{name}/{name}") == f"{name}/{name}"
    for other in (None, 5, b"x", ["x"], {"x": 1}, "\udce9", "a\x1b[2J/../b"):
        for check in (plain_name, relative_path):
            with pytest.raises(ValueError, match="is refused: ") as caught:
                check(other)
            assert str(caught.value).isprintable()
