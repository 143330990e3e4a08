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
from data.open import open_split_pair
from data.prepare import Settings, prepare
from tests.data.conftest import SETTINGS
from tests.data.test_loader import PLAN, run, same, training
from tests.s3 import ADMIN, Proxy, aws_environment, running
from tests.support import wait_for

SHARD = "train/28/00002/shard.00000.mds"


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
def put(server):
    client = server.client()
    return lambda key, body: client.put_object(Bucket="bucket", Key=key, Body=body)


@pytest.fixture(scope="module")
def upload(put, prepared):
    """A prepared dataset as objects, with some left out or with other bytes; the keys are below the prefix."""

    def upload(prefix, leave_out=(), changed=()):
        for file in prepared.rglob("*"):
            key = str(file.relative_to(prepared))
            if file.suffix in (".json", ".npy", ".mds") and key not in leave_out:
                put(f"{prefix}/{key}", dict(changed).get(key, file.read_bytes()))
        return f"s3://bucket/{prefix}"

    return upload


@pytest.fixture(scope="module")
def url(upload):
    return upload("set")


@pytest.fixture(scope="module")
def local(prepared):
    """The first epoch's batches of the dataset in a folder."""
    return run(training(open_split_pair(str(prepared), "")[0]), [0])


@pytest.fixture
def train(tmp_path, url):
    return open_split_pair(url, str(tmp_path))[0]


def stage_all(url, cache):
    stage.stage(url, str(cache), float("inf"), progress=False)


def here(cache, resolution="*"):
    return sorted(str(path.relative_to(cache)) for path in cache.glob(f"*/*/{resolution}/*/*.mds"))


def test_from_a_bucket_to_a_bucket(server, put, folder, prepared):
    for file in folder.rglob("*.jpg"):
        put(f"raw/{file.relative_to(folder)}", file.read_bytes())
    for _ in range(2):  # the second time everything is there
        assert prepare("s3://bucket/raw", "s3://bucket/made", SETTINGS, 1, print)
    for file in prepared.rglob("*"):
        if file.suffix in (".mds", ".npy") or file.name in ("index.json", "dataset.json"):
            made = server.client().get_object(Bucket="bucket", Key=f"made/{file.relative_to(prepared)}")
            assert made["Body"].read() == file.read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_where_the_shards_are(tmp_path, url, proxy, prepared, workers):
    plan = [entry._replace(size=size) for entry, size in zip(PLAN, (24, 31, 24), strict=True)]
    local = run(training(open_split_pair(str(prepared), "")[0], plan=plan))
    train, val = open_split_pair(url, str(tmp_path))
    assert len(val) == 10
    assert not here(tmp_path)
    assert same(local, run(training(train, workers, plan=plan)))
    stage_all(url, tmp_path)
    assert len(here(tmp_path)) == 11
    proxy.set("refuse")  # what was staged is not read from the bucket
    assert same(local, run(training(train, workers, plan=plan)))


def test_raw_pixels_are_read_by_range_and_then_mapped_in_the_cache(tmp_path, folder, proxy):
    url, cache, raw = "s3://bucket/pixels", tmp_path / "cache", Settings("raw", ("28",), ("original",), 90, 10)
    for target in (str(tmp_path / "set"), url):
        assert prepare(str(folder), target, raw, 1, print)
    local = run(training(open_split_pair(str(tmp_path / "set"), "")[0]), [0])
    train = open_split_pair(url, str(cache))[0]
    assert same(local, run(training(train), [0]))
    assert not train.resolutions["28"].maps
    stage_all(url, cache)
    proxy.set("refuse")
    assert same(local, run(training(train), [0]))
    assert len(train.resolutions["28"].maps) == 5


def test_the_cache_is_bounded_and_follows_the_resolution_in_use(tmp_path, url, train):
    sizes = {name: sum(shard.size for shard in one.shards) for name, one in train.resolutions.items()}
    limit = max(sizes.values()) * 1.1
    for size, name in ((24, "28"), (31, "36")):
        time.sleep(0.02)  # file times must differ
        run(training(train, plan=[PLAN[0]._replace(size=size)]), [0])
        (tmp_path / "bucket--set/train" / name / ".used").touch()
        stage.stage(url, str(tmp_path), limit, progress=False)
        assert len(here(tmp_path, name)) == 5
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*/*/*/*.mds")) <= limit


def test_a_download_that_broke_off_continues_and_a_damaged_one_is_refused(
    tmp_path, upload, prepared, put, proxy, monkeypatch
):
    url = upload("broken")
    open_split_pair(url, str(tmp_path))
    monkeypatch.setattr(files, "_RETRY_SECONDS", 0.5)
    proxy.set("truncate", after=3000)
    with pytest.raises(DataError, match=url):
        stage_all(url, tmp_path)
    proxy.set(None)
    whole = (prepared / SHARD).read_bytes()
    (tmp_path / "bucket--broken" / SHARD).unlink(missing_ok=True)
    put(f"broken/{SHARD}", whole[:-9] + bytes(9))
    with pytest.raises(DataError, match=f"{url}/{SHARD}: SHA-256"):
        stage_all(url, tmp_path)
    assert len(here(tmp_path)) == 10  # it does not stop the others
    assert not list(tmp_path.rglob(".part*"))
    put(f"broken/{SHARD}", whole)
    stage_all(url, tmp_path)
    assert len(here(tmp_path)) == 11


@pytest.mark.parametrize("fault", ["503", "reset", "refuse"])
def test_a_hiccup_costs_no_image(train, proxy, local, fault):
    loader = training(train)
    proxy.set(fault, after=100)
    timer = threading.Timer(1.0, proxy.set, [None])
    timer.start()
    batches = run(loader, [0])
    timer.join()
    assert same(local, batches)
    assert int(loader.dataset.bad.faults.count_nonzero()) == 0


def test_a_bucket_out_of_reach_is_said_once_and_named_in_the_end(tmp_path, url, train, proxy, monkeypatch, caplog):
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
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("S3_ENDPOINT_URL", server.endpoint)  # fsspec keeps its connections to an endpoint
    with pytest.raises(DataError, match=r"s3://bucket/set/dataset.json: (access denied|.*[Ss]ignature)"):
        open_split_pair(url, str(tmp_path))


def test_a_changed_dataset_replaces_the_cached_one(tmp_path, upload, put, prepared):
    url = upload("changing")
    labels = open_split_pair(url, str(tmp_path))[0].labels.tolist()
    for name in ("train/labels.npy", "val/original/index.json"):  # what the cache lost is fetched again
        os.truncate(tmp_path / "bucket--changing" / name, 0)
        assert open_split_pair(url, str(tmp_path))[0].labels.tolist() == labels
    stage_all(url, tmp_path)
    put("changing/dataset.json", (prepared / "dataset.json").read_bytes() + b"\n")
    assert open_split_pair(url, str(tmp_path))[0].labels.tolist() == labels
    assert not here(tmp_path)


def test_a_shard_that_did_not_reach_the_bucket_is_named_before_training(tmp_path, upload, put, prepared):
    url = upload("part", leave_out=[SHARD], changed={"val/original/images.npy": b"x"})
    for _ in range(2):
        with pytest.raises(DataError, match=f"{url}/{SHARD}: not found, and 1 more; .*data.verify {url}"):
            open_split_pair(url, str(tmp_path))
    body = (prepared / SHARD).read_bytes()
    upload("part", changed={SHARD: body[:-5]})
    with pytest.raises(DataError, match=f"{url}/{SHARD}: has {len(body) - 5} bytes, index.json says {len(body)}"):
        open_split_pair(url, str(tmp_path))
    put(f"part/{SHARD}", body)
    assert len(open_split_pair(url, str(tmp_path))[0]) == 45


def test_a_shard_that_the_bucket_loses_in_training_costs_its_images_only(tmp_path, server, upload, put, prepared):
    url = upload("lost")
    train, _ = open_split_pair(url, str(tmp_path))
    for reason in ("the file cannot be read", "the file is missing"):
        put(f"lost/{SHARD}", (prepared / SHARD).read_bytes()[:500])
        if reason == "the file is missing":
            server.client().delete_object(Bucket="bucket", Key=f"lost/{SHARD}")
        loader = training(train, plan=[PLAN[0]._replace(size=24)])
        assert sum(len(labels) for _, labels in run(loader, [0])) == 45
        bad = loader.dataset.bad.new()
        assert [one.reason for one in bad] == [reason] * 10
        assert all(SHARD.removeprefix("train/28/") in one.name for one in bad)


def test_shards_that_the_cache_lost_are_read_from_the_bucket_and_staged_again(tmp_path, url, train, local):
    stage_all(url, tmp_path)
    shards = [tmp_path / name for name in here(tmp_path)]
    for shard in shards:
        os.truncate(shard, 20)
    assert same(local, run(training(train), [0]))
    stage_all(url, tmp_path)
    assert all(shard.stat().st_size > 20 for shard in shards)
    for shard in shards:
        shard.unlink()
        shard.mkdir()
    loader = training(train)
    assert same(local, run(loader, [0]))
    assert int(loader.dataset.bad.faults.count_nonzero()) == 0


def test_what_the_follower_says_of_a_full_disk_is_logged_here_once(tmp_path, url, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # which the follower inherits
    try:
        process = stage.start_following(url, str(tmp_path), float("inf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        wait_for(lambda: caplog.records, limit=60)
    finally:
        process.kill()
        process.wait()
    assert not [path for path in tmp_path.rglob("*.mds") if path.stat().st_size > 4096 or path.name.startswith(".part")]
    why = "File too large; images whose shards are not in the cache are read from the bucket each time"
    assert [record.message for record in caplog.records] == [f"data.stage: {tmp_path}/bucket--set: {why}"]


def test_credentials_that_expire_are_read_again(tmp_path, url, local, monkeypatch):
    def write(secret):
        (tmp_path / "credentials.new").write_text(
            f"[default]\naws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {secret}\n"
        )
        (tmp_path / "credentials.new").rename(tmp_path / "credentials")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write(ADMIN[1])
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


@pytest.mark.parametrize("file", ["dataset.json", "train/28/index.json"])
def test_a_name_that_leads_out_of_the_cache_is_refused_and_shown(tmp_path, upload, put, prepared, file):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("precious")
    url = upload("hostile")
    for name in ("..", "../../../victim", f"{tmp_path}/victim", "a/../../../../victim", ".", "", "a//b"):
        put(f"hostile/{file}", hostile(json.loads((prepared / file).read_bytes()), name))
        for start in (open_split_pair, stage_all):
            with pytest.raises(DataError, match=f"{url}/{file}: ") as caught:
                start(url, str(tmp_path / "a/b/c/cache"))
            assert ascii(name)[1:-1] in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*.mds")] == []
    assert (victim / "thesis").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["a", "victim"], ["victim"])
