"""A whole run on prepared shards in a bucket of a real S3 server: the weights of one on a folder, whole or resumed."""

import pytest

from data.errors import InputError
from data.prepare import Settings, prepare
from tests.s3 import aws_environment, running
from tests.support import upload, write_images
from tests.test_techniques import TINY

SAVING = ("checkpoints.interval=2ba", "checkpoints.keep=100")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, images):
    target = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare(str(images), str(target), Settings("mds", ("32", "40"), ("original",), 90, 10), 1, print)
    return target


@pytest.fixture
def bucket(tmp_path, prepared, monkeypatch):
    with running(tmp_path / "s3") as server:
        upload(server, prepared)
        aws_environment(monkeypatch, server.endpoint)
        yield "s3://bucket/set"


def test_a_run_on_a_bucket_whole_or_resumed_ends_with_the_weights_of_one_on_a_folder(train, tmp_path, prepared, bucket):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.rstrip("\n") + "\n  progressive_resizing: {size_increment: 8}\n")
    status, local = train(path, "run_name=local", f"data.path={prepared}", *SAVING)
    assert (status, local["finished"]) == (0, True)
    caches = [f"data.cache_folder={tmp_path / name}" for name in ("cold", "colder")]
    status, remote = train(path, "run_name=remote", f"data.path={bucket}", "data.workers=2", caches[0], *SAVING)
    assert (status, remote["weights_sha256"]) == (0, local["weights_sha256"])
    (kept,) = (tmp_path / "remote" / "checkpoints").glob("ep001-ba000004.safetensors")
    again = ("data.stage_first=true", caches[1], f"resume={kept}")
    status, resumed = train(path, "run_name=resumed", f"data.path={bucket}", *SAVING, *again)
    assert (status, resumed["weights_sha256"]) == (0, local["weights_sha256"])
    assert kept.stem in resumed["resumed_from"][0]


def test_a_run_does_not_resume_with_another_training_set(train, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.rstrip("\n") + " {}\n")
    assert train(path, "run_name=run", "max_duration=1ep", *SAVING)[0] == 0
    again = (
        "run_name=again",
        "max_duration=1ep",
        f"resume={tmp_path}/run/checkpoints/ep000-ba000002.safetensors",
        *SAVING,
    )
    for changed, message in (({"train": 7}, "21 training images"), ({"classes": 4}, "32 training")):
        other = write_images(tmp_path / message, **changed)
        with pytest.raises(InputError, match=f"data.path: holds {message}.*trained on 24; to resume"):
            train(path, *again, f"data.path={other}")
    status, summary = train(path, *again)
    assert (status, summary["finished"]) == (0, True)
