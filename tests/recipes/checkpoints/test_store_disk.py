"""Disks as people have them: folders that cannot be synced, and files that come and go during a listing."""

import errno
import os
import stat

import pytest

from data.errors import StoreError
from data.files import replace_file
from recipes.checkpoints.store import LocalStore


def failing(monkeypatch, number, of):
    """Let fsync fail for folders or for files."""
    real = os.fsync

    def fsync(descriptor):
        if of(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("of", [stat.S_ISDIR, stat.S_ISREG], ids=["folders", "files"])
def test_a_disk_that_cannot_sync_is_written_to_and_one_that_fails_is_said(tmp_path, monkeypatch, of):
    store = LocalStore(tmp_path / "run")
    for number in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
        with monkeypatch.context() as patch:
            failing(patch, number, of)
            store.put("a", b"1")
            assert store.entries() == {"a": 1}
            replace_file(tmp_path / "b", [b"2"])
            assert (tmp_path / "b").read_bytes() == b"2"
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with monkeypatch.context() as patch:
            failing(patch, number, of)
            with pytest.raises(StoreError, match=os.strerror(number)):
                store.put("a", b"1")


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_only_a_file_is_replaced(tmp_path, plant):
    """For root, `--save /dev/null` would make a file of the device."""
    plant(tmp_path / "a")
    with pytest.raises(OSError, match="not a regular file"):
        replace_file(tmp_path / "a", [b"1"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a").is_file()


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("victim")], ids=["pipe", "link"])
def test_what_lies_in_the_place_of_a_part_is_not_written_to(tmp_path, plant):
    (tmp_path / "victim").write_text("precious")
    plant(tmp_path / ".a.new")
    LocalStore(tmp_path).put("a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert (tmp_path / "victim").read_text() == "precious"


def test_what_is_no_file_is_no_entry_and_a_file_that_goes_meanwhile_hides_no_other(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # as a file that is removed after it was listed
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "ep000-ba000001.json")
    assert LocalStore(tmp_path).entries() == {"a": 1}
