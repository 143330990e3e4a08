"""The index of a folder of images: used while it is true, and never a moment longer."""

import os
import pickle
import shutil
import time
from pathlib import Path

import pytest

from data import listing as module
from data.imagefolder import ImageFolder
from data.listing import list_images

OLD = 1_000_000_000


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """Small folders are indexed too, and at once."""
    monkeypatch.setattr(module, "INDEXED_FROM", 1)
    monkeypatch.setattr(module, "_SETTLED", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set" / "train"
    for name in ("ant/1.jpg", "ant/b/2.jpg", "ant/a/3.jpg", "bee/4.JPEG", "bee/notes.txt", "é/ü.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


@pytest.fixture
def scans(monkeypatch):
    """How often the disk was listed."""
    done, real = [], module._scan
    monkeypatch.setattr(module, "_scan", lambda path: done.append(path) or real(path))
    return done


def names(path):
    source = ImageFolder(path, None)
    return [os.path.relpath(source.name(index), path) for index in range(len(source))]


def tick():
    """Let the file system's clock go on."""
    time.sleep(0.02)


WHOLE = ["ant/1.jpg", "ant/a/3.jpg", "ant/b/2.jpg", "bee/4.JPEG", "é/ü.png"]


def test_the_second_start_lists_nothing_and_finds_the_same(folder, scans):
    assert names(folder) == WHOLE
    first = ImageFolder(folder, None)
    assert len(scans) == 1
    assert names(folder) == WHOLE
    assert first.labels.tolist() == [0, 0, 0, 1, 2]
    assert pickle.loads(pickle.dumps(first)).name(4) == first.name(4)
    assert ImageFolder(folder, ["é", "bee", "ant"]).labels.tolist() == [2, 2, 2, 1, 0]
    assert len(scans) == 1
    assert (folder.parent / ".train.index").is_file()


CHANGES = {
    "a file more": lambda path: (path / "bee/5.jpg").touch(),
    "a file less": lambda path: (path / "ant/1.jpg").unlink(),
    "a file renamed": lambda path: (path / "ant/1.jpg").rename(path / "ant/9.jpg"),
    "a file moved deep inside": lambda path: (path / "ant/a/3.jpg").rename(path / "ant/b/3.jpg"),
    "a class more": lambda path: shutil.copytree(path / "bee", path / "cow"),
    "a class less": lambda path: shutil.rmtree(path / "bee"),
    "a class renamed": lambda path: (path / "bee").rename(path / "cow"),
    "a folder inside a class more": lambda path: shutil.copytree(path / "ant/a", path / "ant/c"),
    "times set back": lambda path: ((path / "bee/5.jpg").touch(), os.utime(path / "bee", ns=(OLD, OLD))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(folder, scans, change):
    names(folder)
    tick()
    CHANGES[change](folder)
    found = names(folder)
    assert len(scans) == 2
    assert sorted(found) == sorted(
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in (".jpg", ".JPEG", ".png")
    )
    assert names(folder) == found
    assert len(scans) == 2


def test_a_linked_class_is_followed(folder, tmp_path, scans):
    shutil.copytree(folder / "bee", tmp_path / "elsewhere")
    (folder / "cow").symlink_to(tmp_path / "elsewhere")
    names(folder)
    tick()
    (tmp_path / "elsewhere/6.jpg").touch()
    assert "cow/6.jpg" in names(folder)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-3], lambda data: data[:-3] + b"xyz", lambda data: data[9:]]
)
def test_a_damaged_index_is_made_anew(folder, scans, damage):
    names(folder)
    index = folder.parent / ".train.index"
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert names(folder) == WHOLE
    assert len(scans) == 2
    assert index.read_bytes() == whole


def test_a_place_that_cannot_be_written_leaves_it_to_the_users_cache(folder, scans, tmp_path, monkeypatch):
    real = module._write

    def write(file, *rest):
        if file.parent == folder.parent:
            raise PermissionError(13, "Permission denied")  # the tests may run as root, whom nothing stops
        real(file, *rest)

    monkeypatch.setattr(module, "_write", write)
    assert names(folder) == names(folder) == WHOLE
    assert len(scans) == 1
    assert [file.suffix for file in (tmp_path / "cache/composer-resnet").iterdir()] == [".index"]
    monkeypatch.setattr(module, "_write", lambda *rest: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    tick()
    (folder / "ant/1.jpg").unlink()
    assert names(folder) == WHOLE[1:]


def test_a_folder_that_changed_a_moment_ago_is_not_indexed(folder, monkeypatch):
    monkeypatch.setattr(module, "_SETTLED", 60.0)
    names(folder)
    assert not (folder.parent / ".train.index").exists()


def test_a_small_folder_is_not_indexed(folder, monkeypatch):
    monkeypatch.setattr(module, "INDEXED_FROM", 6)
    names(folder)
    assert [file.name for file in folder.parent.iterdir()] == ["train"]


def test_a_copy_with_its_times_is_listed_anew(folder, tmp_path, scans):
    names(folder)
    shutil.copytree(folder.parent, tmp_path / "copy")
    assert names(tmp_path / "copy/train") == WHOLE
    assert len(scans) == 2


def test_names_that_are_not_unicode(folder, scans):
    with open(os.fsencode(folder) + b"/ant/\xff\xfe.jpg", "w"):  # noqa: PTH123
        pass
    assert list_images(folder).names.tobytes() == list_images(Path(folder)).names.tobytes()
    assert len(scans) == 1
    assert b"\xff\xfe.jpg" in list_images(folder).names.tobytes()


def test_a_user_without_a_home_folder_lists_images(folder, monkeypatch):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    assert len(list_images(folder).counts) == 3
