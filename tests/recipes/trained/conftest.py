"""One tiny run for all tests, on disk and in a bucket, and its commands run in this process."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from recipes.export import __main__ as export
from recipes.load import load_config
from recipes.run import run
from tests.s3 import aws_environment, running
from tests.support import one_thread, process_as_before

RECIPE = """
run_name: tiny
device: cpu
max_duration: 3ep
device_batch_size: 8
model: {name: timm/test_resnet}
optimizer: {lr: 0.05}
data: {path: IMAGES, train_size: 32, workers: 0, mean: [0.4, 0.4, 0.4], std: [0.25, 0.25, 0.25]}
eval: {sizes: [40, 32], interval: 1, device_batch_size: 4}
checkpoints: {folder: 's3://bucket/runs/{run_name}', keep: 3}
loggers: {progress_bar: false, tensorboard: false}
algorithms: {label_smoothing: {}, ema: {half_life: 3ba}}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket="bucket")
        yield server


@contextmanager
def surroundings(endpoint):
    """The bucket's address and keys, and one thread; what a run sets for its whole process is put back after."""
    with one_thread(), process_as_before(), pytest.MonkeyPatch.context() as patch:
        aws_environment(patch, endpoint)
        yield


@pytest.fixture(scope="module", autouse=True)
def _surroundings(server):
    with surroundings(server.endpoint):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, images, server):
    """The run: its YAML, folder, summary and config; its checkpoints also lie at s3://bucket/runs/tiny."""
    runs = tmp_path_factory.mktemp("runs")
    path = runs / "recipe.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(images)) + f"runs_folder: {runs}\n")
    config = load_config(path, [])
    with surroundings(server.endpoint):
        assert run(config) == 0
    summary = json.loads((runs / "tiny" / "summary.json").read_text())
    return SimpleNamespace(yaml=str(path), folder=runs / "tiny", summary=summary, config=config, images=images)


@pytest.fixture(scope="session")
def exported(tiny, server, tmp_path_factory):
    """The run, exported in all formats."""
    folder = tmp_path_factory.mktemp("export") / "exported"
    with surroundings(server.endpoint), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", tiny.yaml, "--output", str(folder)])
        assert export.main() == 0
    return folder


@pytest.fixture(scope="session")
def val(images):
    """The run's own evaluation images."""
    return images / "val"
