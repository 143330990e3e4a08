"""Data in a bucket of a real S3 server, with a proxy before it that injects faults."""

import os
import time

import numpy as np
import pytest
import torch

from data import remote, stage
from data.errors import DataError
from data.open import open_split_pair
from data.prepare import Settings, prepare
from tests.data.conftest import write_folder
from tests.data.test_loader import PLAN, run, same, training
from tests.s3 import ADMIN, Proxy, running

SETTINGS = Settings("mds", ("28", "36"), ("original",), 90, 10)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket="bucket")
        yield server


@pytest.fixture(autouse=True)
def proxy(server, monkeypatch):
    proxy = Proxy(server.port)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", ADMIN[0]),
        ("AWS_SECRET_ACCESS_KEY", ADMIN[1]),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_CONFIG_FILE", os.devnull),
        ("AWS_SHARED_CREDENTIALS_FILE", os.devnull),
        ("S3_ENDPOINT_URL", proxy.endpoint),
    ):
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    write_folder(path / "train", {"ant": 25, "bee": 20})
    write_folder(path / "val", {"ant": 5, "bee": 5})
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, folder):
    target = tmp_path_factory.mktemp("prepared")
    assert prepare(str(folder), str(target), SETTINGS, 1, print)
    return target


@pytest.fixture(scope="module")
def url(server, prepared):
    client = server.client()
    for file in prepared.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="bucket", Key=f"set/{file.relative_to(prepared)}", Body=file.read_bytes())
    return "s3://bucket/set"


def here(cache, resolution="*"):
    return sorted(str(path.relative_to(cache)) for path in cache.glob(f"*/*/{resolution}/*/*.mds"))


def test_from_a_bucket_to_a_bucket(server, folder, prepared):
    client = server.client()
    for file in folder.rglob("*.jpg"):
        client.put_object(Bucket="bucket", Key=f"raw/{file.relative_to(folder)}", Body=file.read_bytes())
    for _ in range(2):  # the second time everything is there
        assert prepare("s3://bucket/raw", "s3://bucket/made", SETTINGS, 1, print)
    for file in prepared.rglob("*"):
        if file.suffix in (".mds", ".npy") or file.name in ("index.json", "dataset.json"):
            key = f"made/{file.relative_to(prepared)}"
            assert client.get_object(Bucket="bucket", Key=key)["Body"].read() == file.read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_where_the_shards_are(tmp_path, url, prepared, workers):
    plan = [entry._replace(size=size) for entry, size in zip(PLAN, (24, 31, 24), strict=True)]
    local = run(training(open_split_pair(str(prepared), "")[0], plan=plan))
    train, val = open_split_pair(url, str(tmp_path))
    assert len(val) == 10
    assert not here(tmp_path)
    assert same(local, run(training(train, workers, plan=plan)))
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    assert len(here(tmp_path)) == 11
    assert same(local, run(training(train, workers, plan=plan)))
    whole = [torch.cat([part for part, _ in batch]) for batch in zip(*[local], strict=True)]
    assert len(whole) == len(local)


def test_what_was_staged_is_not_read_from_the_bucket(tmp_path, url, proxy):
    train, _ = open_split_pair(url, str(tmp_path))
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    proxy.set("refuse")
    assert sum(len(labels) for _, labels in run(training(train, 2), [0])) == 45


def test_the_cache_is_bounded_and_follows_the_resolution_in_use(tmp_path, url, proxy):
    train, _ = open_split_pair(url, str(tmp_path))
    sizes = {name: sum(shard.size for shard in one.shards) for name, one in train.resolutions.items()}
    limit = max(sizes.values()) * 1.1
    for size, name in ((24, "28"), (31, "36")):
        time.sleep(0.02)  # file times must differ
        run(training(train, plan=[PLAN[0]._replace(size=size)]), [0])
        (tmp_path / "bucket--set/train" / name / ".used").touch()
        stage.stage(url, str(tmp_path), limit, progress=False)
        assert len(here(tmp_path, name)) == 5
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*/*/*/*.mds")) <= limit


def test_a_follower_stages_while_its_parent_lives(tmp_path, url):
    open_split_pair(url, str(tmp_path))
    process = stage.start_following(url, str(tmp_path), float("inf"))
    try:
        deadline = time.monotonic() + 60
        while len(here(tmp_path)) < 11 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        assert len(here(tmp_path)) == 11
    finally:
        process.kill()
        process.wait()


def test_a_download_that_broke_off_goes_on_and_a_damaged_one_is_refused(tmp_path, url, proxy, server, monkeypatch):
    open_split_pair(url, str(tmp_path))
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    proxy.set("truncate", after=3000)
    with pytest.raises(DataError, match="s3://bucket/set"):
        stage.stage(url, str(tmp_path), float("inf"), progress=False)
    proxy.set(None)
    shard = "set/train/28/00002/shard.00000.mds"
    whole = server.client().get_object(Bucket="bucket", Key=shard)["Body"].read()
    (tmp_path / "bucket--set/train/28/00002/shard.00000.mds").unlink(missing_ok=True)
    server.client().put_object(Bucket="bucket", Key=shard, Body=whole[:-9] + bytes(9))
    try:
        with pytest.raises(DataError, match=f"s3://bucket/{shard}: SHA-256"):
            stage.stage(url, str(tmp_path), float("inf"), progress=False)
    finally:
        server.client().put_object(Bucket="bucket", Key=shard, Body=whole)
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    assert len(here(tmp_path)) == 11


@pytest.mark.parametrize("fault", ["503", "reset", "refuse"])
def test_a_hiccup_costs_no_image(tmp_path, url, proxy, prepared, fault):
    import threading

    train, _ = open_split_pair(url, str(tmp_path))
    local = run(training(open_split_pair(str(prepared), "")[0]), [0])
    loader = training(train)
    proxy.set(fault, after=100)
    timer = threading.Timer(1.0, proxy.set, [None])
    timer.start()
    batches = run(loader, [0])
    timer.join()
    assert same(local, batches)
    assert loader.dataset.bad.count() == 0


def test_a_bucket_out_of_reach_is_named_in_the_end(tmp_path, url, proxy, monkeypatch):
    train, _ = open_split_pair(url, str(tmp_path))
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    proxy.set("refuse")
    with pytest.raises(DataError, match="s3://bucket/set/train"):
        run(training(train), [0])
    with pytest.raises(DataError, match=r"s3://bucket/set/dataset.json"):
        open_split_pair(url, str(tmp_path / "other"))


def test_what_is_not_a_prepared_dataset_is_named(tmp_path, url, server, monkeypatch):
    with pytest.raises(DataError, match=r"s3://bucket/absent/dataset.json: not found"):
        open_split_pair("s3://bucket/absent", str(tmp_path))
    server.client().put_object(Bucket="bucket", Key="odd/dataset.json", Body=b"{}")
    with pytest.raises(DataError, match="prepare the dataset again"):
        open_split_pair("s3://bucket/odd", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("S3_ENDPOINT_URL", server.endpoint)  # fsspec keeps its connections to an endpoint
    with pytest.raises(DataError, match=r"s3://bucket/set/dataset.json: (access denied|.*[Ss]ignature)"):
        open_split_pair(url, str(tmp_path))


def test_a_changed_dataset_replaces_the_cached_one(tmp_path, url, server):
    train, _ = open_split_pair(url, str(tmp_path))
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    manifest = server.client().get_object(Bucket="bucket", Key="set/dataset.json")["Body"].read()
    server.client().put_object(Bucket="bucket", Key="set/dataset.json", Body=manifest + b"\n")
    assert len(open_split_pair(url, str(tmp_path))[0]) == len(train)
    assert not here(tmp_path)
    server.client().put_object(Bucket="bucket", Key="set/dataset.json", Body=manifest)


def test_workers_share_the_labels_and_pickle_small(prepared):
    import pickle

    train, _ = open_split_pair(str(prepared), "")
    assert train.labels.dtype == np.int64
    train.reader(24, [0])(0)
    assert len(pickle.dumps(train)) < 8_000
