"""The bucket, on a real S3 server: what goes in and out, and what each trouble is called."""

import os
from concurrent.futures import CancelledError

import pytest

from data.errors import StoreError
from recipes.checkpoints import store as s3
from recipes.checkpoints.claim import Owner
from recipes.checkpoints.store import DamagedError, Places, S3Store
from recipes.checkpoints.upload import LogMirror, restore_logs
from tests.s3 import ADMIN

LARGE = 40 * 2**20


@pytest.fixture
def store(url):
    return S3Store(url)


def test_what_goes_in_comes_out(store, tmp_path):
    large = os.urandom(LARGE)
    (tmp_path / "large").write_bytes(large)
    store.put("large", tmp_path / "large")
    store.put("small", b"text")
    assert store.entries() == {"large": LARGE, "small": 4}
    store.fetch("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == store.load("large", LARGE) == large
    with pytest.raises(DamagedError, match=f"{LARGE} bytes instead of 7"):
        store.load("large", 7)
    assert store.read("small") == b"text"
    store.delete(["small", "never was"])
    store.below("logs").put("deep/b", b"22")
    assert store.entries() == {"large": LARGE}
    assert store.below("logs").tree() == {"deep/b": 2}
    for get in (lambda: store.read("small"), lambda: store.fetch("small", tmp_path / "x"), lambda: store.load("x", 1)):
        with pytest.raises(FileNotFoundError):
            get()


@pytest.mark.parametrize(
    ("environment", "where", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, None, "the secret key is wrong"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, None, "the access key is unknown"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, None, "no AWS credentials"),
        ({"AWS_PROFILE": "missing"}, None, "missing"),
        ({}, "s3://absent-bucket/x", "the bucket does not exist"),
    ],
)
def test_a_mistake_is_called_by_its_name(url, monkeypatch, environment, where, message):
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=message) as failed:
        S3Store(where or url).entries()
    assert failed.value.mistake


def test_a_store_out_of_reach_is_no_mistake_and_comes_back(proxy, url, monkeypatch):
    monkeypatch.setitem(s3._CLIENT, "read_timeout", 0.3)
    monkeypatch.setitem(s3._CLIENT, "retries", {"total_max_attempts": 1})
    store = S3Store(url)
    for fault in ("refuse", "500", "503", "hang"):
        proxy.set(fault)
        with pytest.raises(StoreError) as failed:
            store.put("a", b"1")
        assert not failed.value.mistake
        proxy.set(None)
        store.put("a", b"1")
        assert store.read("a") == b"1"


def test_a_transfer_that_breaks_off_leaves_nothing_half(proxy, url, tmp_path):
    store = S3Store(url)
    (tmp_path / "file").write_bytes(os.urandom(4 * 2**20))
    store.put("before", tmp_path / "file")
    proxy.set("reset", after=200_000)
    with pytest.raises(StoreError):
        store.put("after", tmp_path / "file")
    proxy.set("truncate", after=200_000)
    for get in (lambda: store.fetch("before", tmp_path / "back"), lambda: store.load("before", 4 * 2**20)):
        with pytest.raises(StoreError):
            get()
    proxy.set(None)
    assert list(store.entries()) == ["before"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_note_of_which_half_arrives_is_not_a_note(proxy, url):
    """Half of an owner's note names no owner, which would be taken for another's, and end all uploads."""
    store = S3Store(url)
    store.put("note", b"x" * 5000)
    proxy.set("truncate", after=2500)  # the headers and a part of the body
    with pytest.raises(StoreError):
        store.read("note")
    proxy.set(None)
    assert store.read("note") == b"x" * 5000


def test_an_upload_can_be_given_up_and_no_checksum_is_sent_that_another_makers_s3_does_not_know(store, tmp_path):
    sent = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(dict(request.headers)))
    (tmp_path / "file").write_bytes(bytes(LARGE))
    store.put("small", b"1")
    store.put("file", tmp_path / "file")
    store.delete(["small", "file"])
    assert len(sent) > 4
    assert not [name for headers in sent for name in headers if "checksum" in name.lower() or "trailer" in name.lower()]
    store.cancel()
    with pytest.raises(CancelledError):
        store.put("file", tmp_path / "file")
    assert store.entries() == {}


def test_parts_of_dead_uploads_are_dropped(store, server, url):
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = server.client()
    upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/x.pt")["UploadId"]
    client.upload_part(Bucket=bucket, Key=f"{prefix}/x.pt", UploadId=upload, PartNumber=1, Body=b"x" * 6_000_000)
    other = client.create_multipart_upload(Bucket=bucket, Key="elsewhere/x.pt")["UploadId"]
    store.abort_leftovers()
    left = {item["UploadId"] for item in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())}
    assert upload not in left
    assert other in left
    client.abort_multipart_upload(Bucket=bucket, Key="elsewhere/x.pt", UploadId=other)


def test_logs_are_copied_while_they_grow_and_come_back(store, url, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for name, text in (
        ("metrics.jsonl", "1\n"),
        ("tensorboard/events.1", "e"),
        ("checkpoints/ep000-ba000001.safetensors", "not a log"),
        (".hidden.new", "of a moment"),
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    places = Places(run / "checkpoints", url, run)
    mirror = LogMirror(places, Owner(places, "x"))
    mirror.copy()
    with (run / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    mirror.copy_last(10, finished=False)
    assert list(store.tree()) == ["logs/metrics.jsonl", "logs/tensorboard/events.1"]
    (other / "tensorboard").mkdir(parents=True)
    (other / "tensorboard" / "events.1").write_bytes(b"ours is newer")
    assert restore_logs(other, store.below("logs")) == ["metrics.jsonl"]
    assert (other / "metrics.jsonl").read_text() == "1\n2\n"
    assert (other / "tensorboard" / "events.1").read_bytes() == b"ours is newer"


class Hostile:
    """A bucket whose names, which this server would not take, point out of the folder."""

    location = "s3://bucket/x/logs"

    def tree(self):
        names = ["../evil", "a/../../evil", "/evil", "/", "", ".bashrc", "a/.ssh/evil", "harmless"]
        names += ["a//evil", "nul\0evil", "x" * 256, "lone\udc80", "checkpoints/ep000-ba000001.json", "a/./evil"]
        return dict.fromkeys(names, 4) | {"images/": 0, "curves": 0, "curves/a": 4}

    def fetch(self, name, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_a_log_cannot_be_written_elsewhere(tmp_path, caplog):
    assert restore_logs(tmp_path / "run", Hostile()) == ["harmless", "curves/a"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "harmless"]
    assert caplog.text.count("were not downloaded") == 1
    assert "12 of the run's logs" in caplog.text or "13 of the run's logs" in caplog.text


def test_the_longer_of_two_logs_is_kept_on_the_disk_and_in_the_bucket(store, url, tmp_path):
    logs = store.below("logs")
    logs.put("config.yaml", b"data: {path: /elsewhere}")  # is trusted where somebody runs it again: never fetched
    for name in ("log.txt", "metrics.jsonl", "summary.json"):
        logs.put(name, b"1\n2\n3\n")
        (tmp_path / name).write_text("1\n")
    (tmp_path / "metrics.jsonl").write_text("1\n2\n3\n4\n")
    assert restore_logs(tmp_path, logs) == ["log.txt"]  # summary.json is written anew, not appended to
    (tmp_path / "metrics.jsonl").write_text("1\n2\n")  # the resume cuts it at the checkpoint
    places = Places(tmp_path / "checkpoints", url, tmp_path)
    mirror = LogMirror(places, Owner(places, "x"))
    mirror.copy()
    assert logs.read("metrics.jsonl") == b"1\n2\n3\n"
    assert logs.read("summary.json") == b"1\n"
    (tmp_path / "metrics.jsonl").write_text("1\n2\n3\n4\n")
    mirror.copy()
    assert logs.read("metrics.jsonl") == b"1\n2\n3\n4\n"
    (tmp_path / "metrics.jsonl").write_text("1\n3\n")  # logged more rarely by now, and finished
    mirror.copy(finished=True)
    assert logs.read("metrics.jsonl") == b"1\n3\n"


def test_logs_are_copied_once_the_bucket_is_back_and_the_credentials_are_renewed(
    proxy, store, url, tmp_path, monkeypatch, caplog
):
    profile = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("1")
    places = Places(tmp_path / "none", url, tmp_path / "run")
    mirror = LogMirror(places, Owner(places, "x"))
    for fault, secret in (("refuse", ADMIN[1]), ("refuse", ADMIN[1]), (None, "expired"), (None, ADMIN[1])):
        proxy.set(fault)
        profile.write_text(f"[default]\naws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {secret}\n")
        mirror.copy()
    assert caplog.text.count("cannot be copied") == 1
    assert store.below("logs").read("log.txt") == b"1"
