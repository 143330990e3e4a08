"""One run, one owner, on a disk and in a bucket."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap

import pytest

from recipes.checkpoints import owner as module
from recipes.checkpoints.owner import NOTE, Owner
from recipes.checkpoints.places import Places
from recipes.checkpoints.s3 import S3Store
from recipes.errors import InputError
from tests.support import ROOT

HOLD = """
    import sys
    from pathlib import Path
    from recipes.checkpoints.owner import Owner
    from recipes.checkpoints.places import Places
    from recipes.errors import InputError
    folder, remote = Path(sys.argv[1]), sys.argv[2] or None
    try:
        with Owner(Places(folder / "checkpoints", remote, folder), "x"):
            print("owner", flush=True)
            sys.stdin.read()
    except InputError as error:
        print("refused:", error, flush=True)
"""


@contextlib.contextmanager
def another_process(folder, remote=""):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), remote]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def places(folder, remote=None):
    return Places(folder / "checkpoints", remote, folder)


def note(**changes):
    return json.dumps(
        {"id": "other", "host": "far", "pid": 7, "since": "then", "machine": "m/1", "started": 1} | changes
    )


def test_a_second_start_on_one_disk_is_refused_and_a_killed_owner_is_succeeded_at_once(tmp_path):
    with another_process(tmp_path) as other:
        assert other.stdout.readline() == "owner\n"
        with pytest.raises(InputError, match=f"another process is training x .process {other.pid} on .*, since 2"):
            Owner(places(tmp_path), "x").__enter__()
        other.kill()
        other.wait()
        with Owner(places(tmp_path), "x"):
            assert json.loads((tmp_path / NOTE).read_text())["pid"] == os.getpid()


def test_two_runs_that_share_a_folder_of_checkpoints_are_two_owners(tmp_path):
    with another_process(tmp_path / "a") as other:
        assert other.stdout.readline() == "owner\n"
        with pytest.raises(InputError, match="another process"):
            Owner(Places(tmp_path / "a" / "checkpoints", None, tmp_path / "a"), "x").__enter__()
        with Owner(places(tmp_path / "b"), "x"):
            pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        Owner(places(tmp_path / "file" / "run"), "x").__enter__()


def test_a_disk_without_locks_is_used_unless_the_note_names_a_live_process(tmp_path, monkeypatch, caplog):
    with another_process(tmp_path) as other:
        assert other.stdout.readline() == "owner\n"
        monkeypatch.setattr(module, "_refused", lambda descriptor: module.errno.ENOLCK)
        with pytest.raises(InputError, match="another process"):
            Owner(places(tmp_path), "x").__enter__()
    with Owner(places(tmp_path), "x"):
        assert "takes no locks" in caplog.text


def test_in_a_bucket_a_second_start_is_refused_and_a_killed_owner_succeeded_at_once(tmp_path, url):
    with another_process(tmp_path / "here", url) as other:
        assert other.stdout.readline() == "owner\n"
        with pytest.raises(InputError, match=f"{url}: another process is training x .process {other.pid}"):
            Owner(places(tmp_path / "there", url), "x").__enter__()
        other.kill()
        other.wait()
        with Owner(places(tmp_path / "there", url), "x") as owner:
            assert not owner.superseded
        assert json.loads(S3Store(url).read(NOTE))["released"] is True
    with Owner(places(tmp_path / "elsewhere", url), "x"):
        pass


@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"{" * 3000, b'{"pid": 1e400, "host": 3}', b"\xff\x00"])
def test_a_note_that_is_none_is_of_another_machine(text):
    assert module._lives(module._parsed(text)) is None


def test_a_note_whose_process_is_no_number_names_none(tmp_path):
    """It would be a part of a path below /proc."""
    os.mkfifo(tmp_path / "stat")
    note = {"pid": f"../{tmp_path}", "machine": module._machine(), "started": 1}
    assert module._machine() is None or module._lives(note) is False


def test_an_owner_on_another_machine_is_waited_for_until_its_note_is_old(tmp_path, url, monkeypatch):
    monkeypatch.setattr(module, "DEAD_AFTER", 3.0)
    S3Store(url).put(NOTE, note().encode())
    with Owner(places(tmp_path, url), "x"):
        assert S3Store(url).read_with_age(NOTE)[1] < 3.0
        assert json.loads(S3Store(url).read(NOTE))["pid"] == os.getpid()


def test_an_owner_on_another_machine_that_renews_its_note_is_alive(tmp_path, url, monkeypatch):
    store, beats = S3Store(url), []
    store.put(NOTE, note().encode())

    def beat(seconds):
        beats.append(seconds)
        store.put(NOTE, note(since=f"beat {len(beats)}").encode())

    monkeypatch.setattr(module.time, "sleep", beat)
    with pytest.raises(InputError, match=r"process 7 on far, since beat 1"):
        Owner(places(tmp_path, url), "x").__enter__()


def test_a_superseded_owner_copies_nothing_more_and_leaves_the_note(tmp_path, url, caplog):
    store = S3Store(url)
    with Owner(places(tmp_path, url), "x") as owner:
        store.put(NOTE, note().encode())
        owner.renew(store)
        owner.renew(store)
        assert owner.superseded
    assert caplog.text.count("nothing more is copied there") == 1
    assert json.loads(store.read(NOTE))["id"] == "other"


def test_an_owner_that_could_not_reach_the_bucket_at_its_start_does_not_take_it_from_a_live_one(tmp_path, proxy, url):
    proxy.set("refuse")
    with Owner(places(tmp_path, url), "x") as owner:
        proxy.set(None)
        S3Store(url).put(NOTE, note().encode())
        owner.renew(S3Store(url))
        assert owner.superseded
