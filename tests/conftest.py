"""What tests share: tiny images on disk, and a run of the whole program in this process."""

import json

import pytest
from hypothesis import settings

from tests.support import process_as_before, write_images

# A limit of 200 ms for each example tells how busy the machine is, not whether the code is right.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An ImageFolder of 24 training and 9 validation images in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "dataset")


@pytest.fixture(scope="module", autouse=True)
def _process_as_before_the_module():
    """What a module's own fixtures run leaves the process as it was for the modules after it."""
    with process_as_before():
        yield


@pytest.fixture(autouse=True)
def _process_as_before_the_test():
    with process_as_before():
        yield


@pytest.fixture
def train(tmp_path, images):
    """Run a YAML with overrides in this process: `train(path, "key=value", ...) -> (status, summary)`."""

    def train(path, *overrides):
        from recipes.load import load_config
        from recipes.run import run

        config = load_config(path, [f"runs_folder={tmp_path}", f"data.path={images}", *overrides])
        status = run(config)
        return status, json.loads((tmp_path / config.run_name / "summary.json").read_text())

    return train
