import hashlib
import tarfile
from io import BytesIO

import pytest

from data import imagenette
from data.errors import run_main
from data.imagefolder import open_folders
from tests.data.conftest import encode, make_photo


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A stand-in for the download: a small archive of the same layout, behind a file: address."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with tarfile.open(folder / "imagenette2-160.tgz", "w:gz") as tar:
        for split in ("train", "val"):
            for name in ("n01440764", "n02102040"):
                jpeg = encode(make_photo(10, 12))
                entry = tarfile.TarInfo(f"imagenette2-160/{split}/{name}/1.JPEG")
                entry.size = len(jpeg)
                tar.addfile(entry, BytesIO(jpeg))
    digest = hashlib.sha256((folder / "imagenette2-160.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(imagenette, "_MIRROR", folder.as_uri())
    monkeypatch.setitem(imagenette._ARCHIVES, "160", ("imagenette2-160", digest))
    return folder


def test_it_unpacks_to_train_and_val_and_then_rests(tmp_path, mirror, capsys):
    target = tmp_path / "out" / "imagenette"
    imagenette.main([str(target), "--size", "160"])
    train, val = open_folders(target)
    assert (len(train), len(val)) == (2, 2)
    assert [path.name for path in target.parent.iterdir()] == ["imagenette"]
    (mirror / "imagenette2-160.tgz").unlink()
    imagenette.main([str(target), "--size", "160"])
    assert capsys.readouterr().out.count(str(target)) == 2


def test_a_download_that_fails_leaves_nothing_and_says_why(tmp_path, mirror, capsys):
    archive, target = mirror / "imagenette2-160.tgz", tmp_path / "out" / "imagenette"
    target.parent.mkdir()
    for spoil, reason, left in (
        (lambda: archive.write_bytes(archive.read_bytes()[:-1] + b"x"), "invalid hash value", []),
        (archive.unlink, "cannot download", []),
        (lambda: target.write_text("a file"), "holds something else", ["imagenette"]),
    ):
        spoil()
        assert run_main(lambda: imagenette.main([str(target), "--size", "160"])) == 2
        assert reason in capsys.readouterr().err.strip().splitlines()[-1]
        assert [path.name for path in target.parent.iterdir()] == left
