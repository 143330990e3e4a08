"""One run, one owner, on a disk and in a bucket."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap

import pytest

from data.errors import InputError
from recipes.checkpoints import claim as module
from recipes.checkpoints.claim import NOTE, Owner
from recipes.checkpoints.store import Places, S3Store
from tests.support import ROOT

HOLD = """
    import sys
    from pathlib import Path
    from recipes.checkpoints.claim import Owner
    from recipes.checkpoints.store import Places
    folder = Path(sys.argv[1])
    with Owner(Places(folder / "checkpoints", sys.argv[2], folder), "x"):
        print("owner", flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(folder, remote):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder), remote]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "owner\n"
        yield process
        process.kill()


def places(folder, remote=None):
    return Places(folder / "checkpoints", remote, folder)


def note(**changes):
    return json.dumps(
        {"id": "other", "host": "far", "pid": 7, "since": "then", "machine": "m/1", "started": 1} | changes
    )


def test_a_second_start_is_refused_and_a_killed_owner_is_succeeded_at_once(tmp_path, url, monkeypatch, caplog):
    here = tmp_path / "here"
    with another_process(here, url) as other:
        who = f"another process is training x .process {other.pid} on .*, since 2"
        for second, where in ((places(here), here), (places(tmp_path / "there", url), url)):
            with pytest.raises(InputError, match=f"{where}.*: {who}"):
                Owner(second, "x").__enter__()
        with monkeypatch.context() as patch:
            patch.setattr(module, "_lock_error", lambda descriptor: module.errno.ENOLCK)
            with pytest.raises(InputError, match=who):
                Owner(places(here), "x").__enter__()
        with Owner(places(tmp_path / "another run"), "x"):
            pass
        other.kill()
        other.wait()
        with Owner(places(here), "x"):
            assert json.loads((here / NOTE).read_text())["pid"] == os.getpid()
        with Owner(places(tmp_path / "there", url), "x") as owner:
            assert not owner.superseded
        assert json.loads(S3Store(url).read(NOTE))["released"] is True
    with Owner(places(tmp_path / "elsewhere", url), "x"):
        pass
    monkeypatch.setattr(module, "_lock_error", lambda descriptor: module.errno.ENOLCK)
    with Owner(places(here), "x"):
        assert "does not support locks" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        Owner(places(tmp_path / "file" / "run"), "x").__enter__()


def test_a_note_that_is_none_is_of_another_machine_and_a_process_that_is_no_number_names_none(tmp_path):
    for text in (b"", b"null", b"[1]", b"{" * 3000, b'{"pid": 1e400, "host": 3}', b"\xff\x00"):
        assert module._lives(module._parsed(text)) is None
    os.mkfifo(tmp_path / "stat")  # it would be a part of a path below /proc
    note = {"pid": f"../{tmp_path}", "machine": module._machine(), "started": 1}
    assert module._machine() is None or module._lives(note) is False


def test_an_owner_on_another_machine_is_waited_for_until_its_note_is_old(tmp_path, url, monkeypatch):
    monkeypatch.setattr(module, "DEAD_AFTER", 2.0)
    S3Store(url).put(NOTE, note().encode())
    with Owner(places(tmp_path, url), "x"):
        assert S3Store(url).read_with_age(NOTE)[1] < 2.0
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


def test_a_dead_owners_note_that_a_slow_bucket_stores_late_or_in_part_supersedes_nobody(tmp_path, url):
    store = S3Store(url)
    with Owner(places(tmp_path / "first", url), "x"):
        pass
    late = store.read(NOTE)
    with Owner(places(tmp_path / "second", url), "x") as owner:
        for text in (late, late[: len(late) // 2], b""):
            store.put(NOTE, text)
            owner.renew(store)
            assert not owner.superseded
            assert json.loads(store.read(NOTE))["id"] not in (json.loads(late)["id"], None)


@pytest.mark.parametrize("reached", [True, False])
def test_a_superseded_owner_copies_nothing_more_and_leaves_the_note(tmp_path, proxy, url, caplog, reached):
    """Also one that could not reach the bucket at its start, and finds a live one there."""
    proxy.set(None if reached else "refuse")
    with Owner(places(tmp_path, url), "x") as owner:
        proxy.set(None)
        store = S3Store(url)
        store.put(NOTE, note().encode())
        owner.renew(store)
        owner.renew(store)
        assert owner.superseded
    assert caplog.text.count("nothing more will be copied there") == 1
    assert json.loads(store.read(NOTE))["id"] == "other"
