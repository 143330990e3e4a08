"""The bucket in trouble, at the start, in the middle and at the end of a run, and what comes of it.

Nothing here may lose a completed checkpoint or end a training that is in progress.
"""

import logging
import shutil
import threading
import time
from datetime import timedelta

import botocore.auth
import pytest

from data.errors import InputError
from recipes.checkpoints import claim, store, upload
from recipes.checkpoints.find import read_checkpoint
from recipes.checkpoints.interrupt import EXIT_NOT_UPLOADED
from recipes.checkpoints.manifest import load_manifest, survey
from recipes.checkpoints.store import LocalStore, S3Store
from recipes.config import seconds
from tests.recipes.checkpoints.tiny import BATCHES, At, Tiny, at_most, same
from tests.s3 import ADMIN, READER
from tests.support import wait_for

NOW = botocore.auth.get_current_datetime
FINAL = f"ep003-ba0000{3 * BATCHES}"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    """Time limits in tenths of seconds instead of tens of seconds."""
    monkeypatch.setitem(store._CLIENT, "read_timeout", 0.4)
    monkeypatch.setitem(store._CLIENT, "connect_timeout", 0.4)
    monkeypatch.setattr(claim, "DEAD_AFTER", 3.0)
    for module in (store, upload):
        monkeypatch.setattr(module, "_FIRST_PAUSE", 0.05)
        monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.2)


@pytest.fixture(autouse=True)
def _no_secret_in_any_log(caplog):
    caplog.set_level(logging.DEBUG, "recipes")
    yield
    secrets = [ADMIN[1], READER[1], "not-the-secret"]
    assert not any(secret in caplog.text for secret in secrets)


@pytest.fixture
def run(tmp_path, url):
    return Tiny(tmp_path / "run", url, patience="30s")


def until_said(caplog, proxy, text):
    """Take the fault away when the log has this text."""

    def watch():
        deadline = time.monotonic() + 20
        while text not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        proxy.set(None)

    threading.Thread(target=watch, daemon=True).start()


def turn_the_clock(monkeypatch, hours):
    """Let requests be signed at another hour."""
    ahead = timedelta(hours=hours)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args: NOW(*args) + ahead)


def emptied(run):
    """The disk of a new machine."""
    shutil.rmtree(run.places.run_folder)


def in_bucket(url):
    return survey(S3Store(url)).complete


def test_the_bucket_keeps_the_newest_and_the_best(run, url):
    run.saving |= {"keep_remote": 2, "interval": "1ba"}
    run.go(*(At("batch_end", batch, lambda state: time.sleep(0.1)) for batch in range(1, 15)))
    wait_for(lambda: len(in_bucket(url)) <= 4)
    assert FINAL in in_bucket(url)
    assert len(in_bucket(url)) <= 3  # two of the newest, one that is the best
    assert not survey(S3Store(url)).incomplete


def test_down_at_start_it_does_not_start_from_zero_and_resumes_from_local_checkpoints(
    run, proxy, url, untouched, caplog
):
    run.saving["patience"] = "1s"
    proxy.set("refuse")
    with pytest.raises(InputError, match=r"(?s)cannot be reached.*checkpoints.restart=true"):
        run.find()
    assert run.find(restart=True).manifest is None
    proxy.set(None)
    run.saving["patience"] = "30s"
    run.go(run.interrupt_at(7))
    run.saving["patience"] = "1s"
    proxy.set("refuse")
    assert run.find().manifest.batch == 7
    assert "resuming from the local disk" in caplog.text
    run.saving["patience"] = "30s"
    threading.Timer(1.0, proxy.set, [None]).start()
    assert same(run.go(), untouched)
    assert run.kept
    assert FINAL in in_bucket(url)


@pytest.mark.parametrize(("fault", "after"), [("503", 0), ("truncate", 20_000)])
def test_down_for_a_moment_at_start_or_in_a_download_is_waited_for(run, proxy, untouched, fault, after):
    run.go(run.interrupt_at(7))
    emptied(run)
    proxy.set(fault, after=after)
    threading.Timer(0.5, proxy.set, [None]).start()
    assert same(run.go(), untouched)
    assert run.resume.manifest.batch == 7


def test_a_disk_without_room_for_the_buckets_checkpoint_is_told_at_once(run):
    run.go(run.interrupt_at(7))
    emptied(run)
    with (
        at_most(2000),
        pytest.raises(
            InputError, match=r"ep001-ba000007.*: File too large; needed for the checkpoint in s3"
        ) as refused,
    ):
        run.find()
    assert "cannot be reached" not in str(refused.value)


def test_what_waiting_does_not_mend_is_refused_before_training(run, tmp_path, monkeypatch):
    train = At("fit_start", 0, lambda state: pytest.fail("it trains"))
    with pytest.raises(InputError, match="the bucket does not exist"):
        Tiny(tmp_path, "s3://absent-bucket/x").go(train)
    with monkeypatch.context() as patch:
        turn_the_clock(patch, 2)
        with pytest.raises(InputError, match="clock"):
            run.go(train)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    with pytest.raises(InputError, match="access denied"):
        run.go(train)


@pytest.mark.parametrize("fault", ["refuse", "hang", "reset"])
def test_an_outage_in_the_middle_costs_nothing(run, proxy, url, untouched, fault, caplog):
    def fail(state):
        proxy.set(fault, after=1000)
        until_said(caplog, proxy, "is not uploaded yet; training continues")

    weights = run.go(At("batch_start", 1, fail))
    assert same(weights, untouched)
    assert run.kept
    assert "is not uploaded yet; training continues" in caplog.text
    assert read_checkpoint(S3Store(url), load_manifest(S3Store(url), FINAL), None)


def test_a_clock_that_jumps_in_the_middle_does_not_stop_the_training(run, url, untouched, monkeypatch, caplog):
    run.saving["patience"] = "1s"
    weights = run.go(At("batch_start", 7, lambda state: turn_the_clock(monkeypatch, 2)))
    assert same(weights, untouched)
    assert run.kept is False
    assert "clock" in caplog.text
    turn_the_clock(monkeypatch, 0)
    run.saving["patience"] = "30s"
    resume = run.find()
    assert resume.finished
    assert run.upload_finished(resume)
    assert FINAL in in_bucket(url)


def test_a_slow_bucket_gets_the_newest_and_the_disk_does_not_fill(run, proxy, url, untouched, caplog, monkeypatch):
    monkeypatch.setitem(store._CLIENT, "read_timeout", 30)
    run.saving |= {"interval": "1ba", "keep": 2}
    most = []

    def count(state):
        most.append(len(list(run.places.local.glob("*.safetensors"))))
        time.sleep(0.1)

    proxy.set("slow", rate=10_000)
    threading.Timer(3.0, proxy.set, [None]).start()
    weights = run.go(*(At("batch_end", batch, count) for batch in range(1, 16)))
    assert same(weights, untouched)
    assert "is newer" in caplog.text
    assert max(most) <= 2 + 3  # kept, one being uploaded, one waiting, one being written
    assert run.kept
    assert FINAL in in_bucket(url)


def test_a_store_that_takes_nothing_does_not_stop_the_training_and_gets_all_when_it_takes_again(
    run, proxy, url, untouched, caplog
):
    run.saving["patience"] = "1s"
    weights = run.go(At("batch_start", 1, lambda state: proxy.set("500")))
    assert same(weights, untouched)
    assert run.kept is False
    assert "InternalError" in caplog.text
    assert "last checkpoint" in caplog.text
    assert survey(LocalStore(run.places.local)).complete[-1] == FINAL
    (run.places.run_folder / "metrics.jsonl").write_text("{}\n")
    proxy.set(None)
    run.saving["patience"] = "30s"
    assert run.upload_finished(run.find())
    assert FINAL in in_bucket(url)
    assert "logs/metrics.jsonl" in S3Store(url).tree()


@pytest.mark.parametrize("fault", ["hang", "slow"])
def test_interrupted_while_the_bucket_is_out_of_reach_the_state_is_on_disk_in_time(run, proxy, untouched, fault):
    def fail(state):
        proxy.set(fault, rate=1000)
        run.interrupt.request("a test", 2.0)

    began = time.monotonic()
    stop = run.go(At("batch_end", 7, fail))
    assert time.monotonic() - began < 10.0
    assert stop.status == 75
    assert "NOT uploaded" in str(stop)
    proxy.set(None)
    assert same(run.go(), untouched)
    assert run.resume.manifest.batch == 7


def test_interrupted_while_it_waits_for_the_last_upload_it_ends_in_time(run, proxy, untouched):
    began = time.monotonic()
    weights = run.go(
        At("batch_start", 14, lambda state: proxy.set("refuse")),
        At("fit_end", 15, lambda state: run.interrupt.request("a test", 1.0)),
    )
    assert time.monotonic() - began < 15.0 < seconds(run.saving["patience"])
    assert same(weights, untouched)
    assert run.status == EXIT_NOT_UPLOADED


def test_interrupted_during_a_slow_upload_of_an_older_one_the_newest_goes_first(run, proxy, url, untouched):
    def unblock(state):
        run.interrupt.request("a test", 15.0)
        threading.Timer(0.5, proxy.set, [None]).start()

    stop = run.go(At("batch_start", 5, lambda state: proxy.set("slow", rate=2000)), At("batch_end", 7, unblock))
    assert "saved in s3://" in str(stop)
    assert in_bucket(url)[-1] == "ep001-ba000007"
    emptied(run)
    assert same(run.go(), untouched)
    assert run.resume.resumed_from == f"{url}/ep001-ba000007.safetensors"
