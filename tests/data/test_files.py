"""What stands where an image should: pipes, sockets, devices, folders, links to nowhere, files without end."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data.decode import MAX_BYTES, BadImage, Fault
from data.errors import DataError
from data.files import NotRegularError, open_regular, read_regular
from data.imagefolder import ImageFolder, read_image
from data.parts import Settings, Task, make_part
from data.verify import main as verify
from tests.data.conftest import encode, make_photo, write_folder
from tests.support import ROOT, decode


@pytest.fixture(autouse=True)
def _no_waiting():
    """A test that waits for a pipe fails rather than stands still."""

    def fail(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_socket(path):
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may not be long
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def make_folder(path):
    path.mkdir()
    (path / "inside.jpg").write_bytes(b"not looked at")


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


PHOTO = encode(make_photo(40, 40))
HALF = PHOTO[: len(PHOTO) // 2]
KINDS = {
    "pipe": (os.mkfifo, Fault.NOT_A_FILE),
    "link_to_a_pipe": (lambda path: (os.mkfifo(f"{path}.p"), path.symlink_to(f"{path}.p")), Fault.NOT_A_FILE),
    "socket": (make_socket, Fault.NOT_A_FILE),
    "endless": (lambda path: path.symlink_to("/dev/zero"), Fault.NOT_A_FILE),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), Fault.NOT_A_FILE),
    "folder": (make_folder, Fault.NOT_A_FILE),
    "link_to_a_folder": (lambda path: path.symlink_to(".."), Fault.NOT_A_FILE),
    "nowhere": (lambda path: path.symlink_to("nothing/here"), Fault.BROKEN_LINK),
    "through_a_file": (lambda path: path.symlink_to("0000.jpg/x"), Fault.BROKEN_LINK),
    "itself": (lambda path: path.symlink_to(path.name), Fault.BROKEN_LINK),
    "large": (make_sparse, Fault.TOO_MANY_BYTES),
    "empty": (lambda path: path.touch(), Fault.EMPTY),
    "half": (lambda path: path.write_bytes(HALF), Fault.TRUNCATED),
}


@pytest.fixture
def dataset(tmp_path):
    """Two classes of good images, with one of each kind among ant's in either split."""
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 12, "bee": 12})
        for name, (make, _) in KINDS.items():
            make(tmp_path / "set" / split / "ant" / f"{name}.jpg")
    return tmp_path / "set"


def test_reading_says_what_it_is_and_leaves_no_descriptor_open(tmp_path):
    (tmp_path / "0000.jpg").write_bytes(b"bytes")
    (tmp_path / "link.jpg").symlink_to("0000.jpg")
    before = len(list(Path("/dev/fd").iterdir()))
    for kind, (make, fault) in KINDS.items():
        path = tmp_path / f"{kind}.jpg"
        make(path)
        for same in (path, os.fsencode(path), str(path)) if kind not in ("empty", "half") else ():
            with pytest.raises(BadImage) as caught:
                read_image(same)
            assert caught.value.fault == fault
    with pytest.raises(NotRegularError):
        open_regular(tmp_path / "pipe.jpg")
    assert read_image(tmp_path / "link.jpg") == read_regular(tmp_path / "0000.jpg", 5) == b"bytes"
    with pytest.raises(OSError, match="5 bytes, more than the 4 allowed"):
        read_regular(tmp_path / "0000.jpg", 4)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.jpg")
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_verify_names_each_and_moves_it_aside(dataset, tmp_path, capsys):
    words = [str(dataset), "--workers", "1"]
    assert verify(words) == 1
    out = capsys.readouterr().out
    for name, (_, fault) in KINDS.items():
        assert f"{dataset}/train/ant/{name}.jpg: {fault.reason}\n" in out
    assert f"{48 + 2 * len(KINDS)} images, {2 * len(KINDS)} broken" in out
    assert verify([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    found = {(one["split"], Path(one["name"]).stem, one["reason"]) for one in report["broken"]}
    assert found == {(split, name, KINDS[name][1].reason) for split in ("train", "val") for name in KINDS}
    assert report["images"] == 48 + 2 * len(KINDS)
    (tmp_path / "aside/train/ant").mkdir(parents=True)
    (tmp_path / "aside/train/ant/pipe.jpg").symlink_to("nothing")  # what stands there is kept
    assert verify([*words, "--quarantine", str(tmp_path / "aside")]) == 1
    assert f"; moved to {tmp_path / 'aside'}\n" in capsys.readouterr().out
    assert (tmp_path / "aside/train/ant/pipe.jpg").is_symlink()
    assert (tmp_path / "aside/train/ant/_pipe.jpg").is_fifo()
    assert (tmp_path / "aside/val/ant/nowhere.jpg").readlink() == Path("nothing/here")
    assert (tmp_path / "aside/val/ant/folder.jpg/inside.jpg").is_file()
    assert verify(words) == 0
    assert capsys.readouterr().out == "48 images, 0 broken\n"


def test_a_jpeg_whose_middle_is_overwritten_is_corrupt_though_it_decodes(tmp_path, capsys):
    for split in ("train", "val"):
        write_folder(tmp_path / split, {"ant": 1, "bee": 1})
    data = bytearray(encode(make_photo(200, 200)))
    middle = len(data) // 2
    data[middle : middle + 1000] = bytes(1000)
    (tmp_path / "train/ant/0000.jpg").write_bytes(data)
    decode(bytes(data))  # as Pillow does
    assert verify([str(tmp_path), "--workers", "1"]) == 1
    assert capsys.readouterr().out == f"{tmp_path}/train/ant/0000.jpg: corrupt\n4 images, 1 broken; 1 corrupt\n"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a second file system is needed")
def test_verify_moves_to_another_disk_what_can_be_copied(dataset, capsys):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == dataset.stat().st_dev:
            pytest.skip("the same file system")
        for split in ("train", "val"):
            (dataset / split / "ant/large.jpg").unlink()
        assert verify([str(dataset), "--workers", "1", "--quarantine", other]) == 1
        out, err = capsys.readouterr()
        assert (Path(other) / "train/ant/empty.jpg").is_file()
        assert not (dataset / "train/ant/empty.jpg").exists()
        assert (Path(other) / "val/ant/nowhere.jpg").readlink() == Path("nothing/here")
        lines = [line for line in err.splitlines() if "cannot be moved" in line]
        assert len(lines) == 4
        assert {Path(line.partition(": ")[0]).stem for line in lines} == {"pipe", "socket"}
        assert f"moved to {other} except 4" in out
        assert (Path(other) / "val/ant/folder.jpg/inside.jpg").is_file()


def test_links_that_all_lead_to_a_disk_that_is_away_stop_prepare(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0000.jpg").symlink_to("/not/mounted/x.jpg")
    train = ImageFolder(tmp_path / "train", None)
    task = Task("train", train, str(tmp_path / "out"), Settings("mds", ("24",), ("24",), 90))
    with pytest.raises(DataError, match=r"ant/0000.jpg: a broken link \(and 1 more\); .* mounted\?"):
        make_part(task, 0)
    assert not list(tmp_path.glob("out/**/*.npz"))


def test_no_program_is_started_whatever_the_file_says(tmp_path):
    """Stand-ins for Ghostscript and others on the PATH would leave a trace."""
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 1, "bee": 1})
    for name in ("gs", "gswin64c", "convert", "magick", "wmf2gd", "pdftoppm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\necho 10.0\n")
        program.chmod(0o755)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    dos_eps = b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(eps).to_bytes(4, "little") + bytes(20) + eps
    wmf = b"\xd7\xcd\xc6\x9a" + bytes(2) + b"\0\0\0\0\x40\0\x40\0\x60\0" + bytes(6) + b"\x01\0\x09\0" + bytes(40)
    for number, data in enumerate((eps, dos_eps, wmf, b"%PDF-1.4\n1 0 obj\n")):
        for suffix in ("jpg", "png", "tiff"):
            (tmp_path / f"set/train/ant/{number}.{suffix}").write_bytes(data)
    command = [sys.executable, "-m", "data.verify", str(tmp_path / "set"), "--workers", "1"]
    path = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    ended = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout.endswith("16 images, 12 broken; 12 not an image, or of an unknown format\n")
    assert not (tmp_path / "called").exists()
