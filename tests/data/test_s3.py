"""Data in a bucket of a real S3 server, with a proxy before it that injects faults."""

import json
import os
import resource
import threading
import time

import pytest
import s3fs

from data import files, stage
from data.errors import DataError
from data.prepare import Settings, prepare
from data.source import open_split_pair
from tests.data.conftest import write_folder
from tests.data.test_loader import PLAN, run, same, training
from tests.s3 import ADMIN, Proxy, aws_environment, running

SETTINGS = Settings("mds", ("28", "36"), ("original",), 90, 10)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket="bucket")
        yield server


@pytest.fixture(autouse=True)
def proxy(server, monkeypatch):
    proxy = Proxy(server.port)
    aws_environment(monkeypatch, proxy.endpoint)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own take seconds, before ours
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
def test_batches_do_not_depend_on_where_the_shards_are(tmp_path, url, proxy, prepared, workers):
    plan = [entry._replace(size=size) for entry, size in zip(PLAN, (24, 31, 24), strict=True)]
    local = run(training(open_split_pair(str(prepared), "")[0], plan=plan))
    train, val = open_split_pair(url, str(tmp_path))
    assert len(val) == 10
    assert not here(tmp_path)
    assert same(local, run(training(train, workers, plan=plan)))
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    assert len(here(tmp_path)) == 11
    proxy.set("refuse")  # what was staged is not read from the bucket
    assert same(local, run(training(train, workers, plan=plan)))


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


def wait_for(condition, process):
    """Wait until the follower has done something, then end it."""
    deadline = time.monotonic() + 60
    try:
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def test_a_download_that_broke_off_continues_and_a_damaged_one_is_refused(tmp_path, url, proxy, server, monkeypatch):
    open_split_pair(url, str(tmp_path))
    monkeypatch.setattr(files, "_RETRY_SECONDS", 0.5)
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
        assert len(here(tmp_path)) == 10  # it does not stop the others
        assert not list(tmp_path.rglob(".part*"))
    finally:
        server.client().put_object(Bucket="bucket", Key=shard, Body=whole)
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    assert len(here(tmp_path)) == 11


@pytest.mark.parametrize("fault", ["503", "reset", "refuse"])
def test_a_hiccup_costs_no_image(tmp_path, url, proxy, prepared, fault):
    train, _ = open_split_pair(url, str(tmp_path))
    local = run(training(open_split_pair(str(prepared), "")[0]), [0])
    loader = training(train)
    proxy.set(fault, after=100)
    timer = threading.Timer(1.0, proxy.set, [None])
    timer.start()
    batches = run(loader, [0])
    timer.join()
    assert same(local, batches)
    assert int(loader.dataset.bad.faults.count_nonzero()) == 0


def test_a_bucket_out_of_reach_is_said_once_and_named_in_the_end(tmp_path, url, proxy, monkeypatch, caplog):
    train, _ = open_split_pair(url, str(tmp_path))
    monkeypatch.setattr(files, "_RETRY_SECONDS", 5.0)
    monkeypatch.setattr(files, "_WARN_SECONDS", 0.0)
    proxy.set("503")
    with pytest.raises(DataError, match="s3://bucket/set/train"):
        run(training(train), [0])
    (said,) = [record.message for record in caplog.records if record.name == "data.files"]
    assert "s3://bucket/set/train/28/" in said
    assert "trying again" in said
    monkeypatch.setattr(files, "_RETRY_SECONDS", 0.5)
    proxy.set("refuse")
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


def upload(server, folder, prefix, leave_out=(), changed=()):
    """A prepared dataset as objects, with some left out or with other bytes; the keys are below the prefix."""
    client = server.client()
    for file in folder.rglob("*"):
        key = str(file.relative_to(folder))
        if file.suffix in (".json", ".npy", ".mds") and key not in leave_out:
            body = dict(changed).get(key, file.read_bytes())
            client.put_object(Bucket="bucket", Key=f"{prefix}/{key}", Body=body)
    return f"s3://bucket/{prefix}"


SHARD = "train/28/00002/shard.00000.mds"


def test_a_shard_that_did_not_reach_the_bucket_is_named_before_training(tmp_path, server, prepared):
    url = upload(server, prepared, "part", leave_out=[SHARD], changed={"val/original/images.npy": b"x"})
    for _ in range(2):
        with pytest.raises(DataError, match=f"{url}/{SHARD}: not found, and 1 more; .*data.verify {url}"):
            open_split_pair(url, str(tmp_path))
    body = (prepared / SHARD).read_bytes()
    server.client().put_object(Bucket="bucket", Key=f"part/{SHARD}", Body=body[:-5])
    upload(server, prepared, "part", leave_out=[SHARD])
    with pytest.raises(DataError, match=f"{url}/{SHARD}: has {len(body) - 5} bytes, index.json says {len(body)}"):
        open_split_pair(url, str(tmp_path))
    server.client().put_object(Bucket="bucket", Key=f"part/{SHARD}", Body=body)
    assert len(open_split_pair(url, str(tmp_path))[0]) == 45


@pytest.mark.parametrize(("keep", "reason"), [(0, "the file is missing"), (500, "the file cannot be read")])
def test_a_shard_that_the_bucket_loses_in_training_costs_its_images_only(tmp_path, server, prepared, keep, reason):
    url = upload(server, prepared, f"lost{keep}")
    train, _ = open_split_pair(url, str(tmp_path))
    if keep:
        body = (prepared / SHARD).read_bytes()[:keep]
        server.client().put_object(Bucket="bucket", Key=f"lost{keep}/{SHARD}", Body=body)
    else:
        server.client().delete_object(Bucket="bucket", Key=f"lost{keep}/{SHARD}")
    loader = training(train, plan=[PLAN[0]._replace(size=24)])
    assert sum(len(labels) for _, labels in run(loader, [0])) == 45
    bad = loader.dataset.bad.new()
    assert len(bad) == 10
    assert {one.reason for one in bad} == {reason}
    assert all(SHARD.removeprefix("train/28/") in one.name for one in bad)


def test_metadata_that_the_cache_lost_is_fetched_again(tmp_path, url):
    labels = open_split_pair(url, str(tmp_path))[0].labels.tolist()
    for name in ("train/labels.npy", "val/original/index.json"):
        os.truncate(tmp_path / "bucket--set" / name, 0)
        assert open_split_pair(url, str(tmp_path))[0].labels.tolist() == labels


@pytest.mark.parametrize("spoil", ["cut", "folder"])
def test_a_shard_that_the_cache_lost_is_read_from_the_bucket_and_staged_again(tmp_path, url, prepared, spoil):
    local = run(training(open_split_pair(str(prepared), "")[0]), [0])
    train, _ = open_split_pair(url, str(tmp_path))
    stage.stage(url, str(tmp_path), float("inf"), progress=False)
    for name in here(tmp_path):
        if spoil == "cut":
            os.truncate(tmp_path / name, 20)
        else:
            (tmp_path / name).unlink()
            (tmp_path / name).mkdir()
    loader = training(train)
    assert same(local, run(loader, [0]))
    assert int(loader.dataset.bad.faults.count_nonzero()) == 0
    if spoil == "cut":
        stage.stage(url, str(tmp_path), float("inf"), progress=False)
        assert all((tmp_path / name).stat().st_size > 20 for name in here(tmp_path))


def test_what_the_follower_says_of_a_full_disk_is_logged_here_once(tmp_path, url, caplog):
    open_split_pair(url, str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # which the follower inherits
    try:
        process = stage.start_following(url, str(tmp_path), float("inf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wait_for(lambda: caplog.records, process)
    assert not [path for path in tmp_path.rglob("*.mds") if path.stat().st_size > 4096 or path.name.startswith(".part")]
    assert [record.message for record in caplog.records] == [
        f"data.stage: {tmp_path}/bucket--set: File too large; images whose shards are not in the cache are read from "
        "the bucket each time"
    ]


def test_credentials_that_expire_are_read_again(tmp_path, server, url, prepared, monkeypatch):
    def write(secret):
        (tmp_path / "credentials.new").write_text(
            f"[default]\naws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {secret}\n"
        )
        (tmp_path / "credentials.new").rename(tmp_path / "credentials")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write(ADMIN[1])
    local = run(training(open_split_pair(str(prepared), "")[0]), [0])
    train, _ = open_split_pair(url, str(tmp_path / "cache"))
    write("expired")
    timer = threading.Timer(1.0, write, [ADMIN[1]])
    timer.start()
    loader = training(train, 2)
    batches = run(loader, [0])
    timer.join()
    assert same(local, batches)
    assert int(loader.dataset.bad.faults.count_nonzero()) == 0


def hostile(content, name):
    """`dataset.json` or `index.json` with a name in it that leads elsewhere."""
    if "splits" in content:
        content["splits"]["train"]["resolutions"][name] = content["splits"]["train"]["resolutions"]["28"]
    else:
        content["shards"][0]["raw_data"]["basename"] = f"{name}/x.mds"
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def hostile_url(server, prepared):
    return upload(server, prepared, "hostile")


@pytest.mark.parametrize("file", ["dataset.json", "train/28/index.json"])
def test_a_name_that_leads_out_of_the_cache_is_refused_and_shown(tmp_path, server, prepared, hostile_url, file):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("precious")
    url, client = hostile_url, server.client()
    for name in ("..", "../../../victim", f"{tmp_path}/victim", "a/../../../../victim", ".", "", "a//b"):
        for one in ("dataset.json", "train/28/index.json"):
            body = (prepared / one).read_bytes()
            client.put_object(
                Bucket="bucket", Key=f"hostile/{one}", Body=hostile(json.loads(body), name) if one == file else body
            )
        for start in (open_split_pair, lambda url, cache: stage.stage(url, cache, float("inf"), progress=False)):
            with pytest.raises(DataError, match=f"{url}/{file}: ") as caught:
                start(url, str(tmp_path / "a/b/c/cache"))
            assert ascii(name)[1:-1] in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*.mds")] == []
    assert (victim / "thesis").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["a", "victim"], ["victim"])
