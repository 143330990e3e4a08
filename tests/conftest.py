"""What tests share: tiny images on disk, and a run of the whole program in this process."""

import json
import os
import signal

import pytest

from tests.support import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An ImageFolder of 24 training and 9 validation images in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "dataset")


@pytest.fixture
def train(tmp_path, images):
    """Run a YAML with overrides in this process: `train(path, "key=value", ...) -> (status, summary)`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")

    def train(path, *overrides):
        from recipes.load import load_config
        from recipes.run import run

        config = load_config(path, [f"runs_folder={tmp_path}", f"data.path={images}", *overrides])
        status = run(config)
        return status, json.loads((tmp_path / config.run_name / "summary.json").read_text())

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if forced is None:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
