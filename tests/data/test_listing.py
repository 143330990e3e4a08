"""The index of a folder of images: used while it is true, and never a moment longer."""

import os
import pickle
import shutil
import time
from pathlib import Path

import pytest

from data import listing as module
from data.imagefolder import ImageFolder
from data.listing import class_folders, list_images

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
        tick()
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


def test_a_disk_whose_folders_all_show_the_same_time_is_listed_each_time(folder, scans, monkeypatch):
    monkeypatch.setattr(module, "_change", lambda folder: (OLD, OLD, 4096, 1))
    names(folder)
    (folder / "bee/5.jpg").touch()
    (folder / "ant/1.jpg").unlink()
    assert names(folder) == ["ant/a/3.jpg", "ant/b/2.jpg", "bee/4.JPEG", "bee/5.jpg", "é/ü.png"]
    assert len(scans) == 2


def test_a_disk_whose_folders_times_do_not_move_is_found_out(folder, scans, monkeypatch):
    monkeypatch.setattr(module, "_change", lambda folder: (OLD + len(folder), OLD, 4096, 1))
    names(folder)
    (folder / "bee/5.jpg").touch()
    assert "bee/5.jpg" in names(folder)
    assert len(scans) == 2
    assert not (folder.parent / ".train.index").exists()


@pytest.mark.parametrize("fuse", [True, False])
def test_where_that_cannot_be_tried_a_mounted_buckets_times_are_not_believed(folder, scans, monkeypatch, fuse):
    real = module._write

    def write(file, *rest):
        if file.parent == folder.parent:
            raise OSError(30, "Read-only file system")
        real(file, *rest)

    monkeypatch.setattr(module, "_write", write)
    monkeypatch.setattr(module, "_is_fuse", lambda path: fuse)
    assert names(folder) == names(folder) == WHOLE
    assert len(scans) == (2 if fuse else 1)


def test_this_disk_is_no_programs(folder):
    assert not module._is_fuse(folder)


def test_a_folders_size_counts_where_its_times_do_not(folder, scans, monkeypatch):
    real = module._change
    times = {}

    def change(one):
        return (*times.setdefault(one, real(one)[:2]), len(list(Path(one).iterdir())), 1)

    monkeypatch.setattr(module, "_change", change)
    names(folder)
    assert (folder.parent / ".train.index").exists()
    (folder / "bee/5.jpg").touch()
    assert "bee/5.jpg" in names(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b'"counts": [3, 1, 1]', b'"counts": [1, 3, 1]'),
        lambda line: line.replace(b'["ant", "bee"', b'["bee", "ant"'),
        lambda line: line.replace(b'"images": 5', b'"images": 500000000000'),
        lambda line: line.replace(b'"images": 5', b'"images": 1e999'),
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"7\n",
    ],
)
def test_an_index_whose_head_was_changed_is_made_anew(folder, scans, damage):
    names(folder)
    index = folder.parent / ".train.index"
    line, _, rest = index.read_bytes().partition(b"\n")
    assert damage(line + b"\n") != line + b"\n"
    index.write_bytes(damage(line + b"\n") + rest)
    tick()
    assert names(folder) == WHOLE
    assert len(scans) == 2
    assert ImageFolder(folder, None).labels.tolist() == [0, 0, 0, 1, 2]


LOOPS = {
    "itself": ("ant/again", "."),
    "the split": ("ant/up", ".."),
    "the dataset": ("ant/a/up", "../../.."),
    "everything": ("ant/root", "/"),
    "its class from deep inside": ("ant/a/up", "../../ant"),
    "a class that is the split": ("cow", "."),
    "a class that is the dataset": ("cow", ".."),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_link_to_a_parent_folder_is_named_and_not_followed(folder, scans, caplog, loop):
    link, target = LOOPS[loop]
    for number in range(3):  # each would double the work
        (folder / f"{link}{number or ''}").symlink_to(target)
    assert names(folder) == WHOLE
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    expected = f"{folder}/{link}: not followed: it is a link to {(folder / link).resolve()}, a folder that it lies in"
    assert expected in said
    assert class_folders(folder) == ["ant", "bee", "é"]
    caplog.clear()
    assert names(folder) == WHOLE
    assert [record.getMessage() for record in caplog.records] == said
    assert len(scans) == 1


def test_links_that_lead_to_themselves_or_nowhere_leave_the_rest(folder, scans):
    for where in (folder, folder / "ant", folder / "ant/a"):
        (where / "x").symlink_to("x")
        (where / "y").symlink_to("z")
        (where / "z").symlink_to("y")
        (where / "w").symlink_to("/nowhere")
        (where / "v").symlink_to("/dev/null")
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
    assert [name for name in names(folder) if name.startswith("ant")] == [
        "ant/1.jpg",
        "ant/a/3.jpg",
        "ant/a/three/7.jpg",
        "ant/a/three/deep/8.jpg",
        "ant/b/2.jpg",
    ]
    assert len(caplog.records) == 5


def test_a_class_may_be_a_link_and_two_classes_the_same_folder(folder, tmp_path, caplog):
    (folder / "cow").symlink_to("bee")
    assert "cow/4.JPEG" in names(folder)
    assert "bee/4.JPEG" in names(folder)
    assert not caplog.records


def test_a_ladder_of_links_ends(folder, tmp_path):
    """Two links to the next folder in each: 2^40 paths."""
    for step in range(40):
        (tmp_path / f"ladder/{step}").mkdir(parents=True)
        (tmp_path / f"ladder/{step}/{step}.jpg").touch()
        for side in "lr":
            (tmp_path / f"ladder/{step}/{side}").symlink_to(f"../{step + 1}")
    (folder / "ant/ladder").symlink_to(tmp_path / "ladder/0")
    found = names(folder)
    assert len(found) == len(WHOLE) + 40


def test_many_loops_are_counted_not_listed(folder, caplog):
    for number in range(50):
        (folder / f"ant/{number}").symlink_to(".")
    assert names(folder) == WHOLE
    assert len(caplog.records) == module._NOTES + 1
    assert caplog.records[-1].getMessage() == f"{folder}: 40 more folders were not listed"


def test_folders_that_begin_with_a_dot_are_passed_over_at_any_depth(folder):
    for place in (".hidden", "ant/.thumbnails", "ant/a/.ipynb_checkpoints"):
        (folder / place).mkdir()
        (folder / place / "1.jpg").touch()
    assert names(folder) == WHOLE


def test_without_a_home_folder(folder, scans, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert names(folder) == names(folder) == WHOLE
    assert len(scans) == 1
