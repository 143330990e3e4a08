from functools import partial

import pytest

from tests.recipes.watch.tiny import Invert, Recorder, Seen, train_tiny


@pytest.fixture
def run(tmp_path):
    """`run(...)` trains a tiny model in tmp_path/run and returns what is left."""
    return partial(train_tiny, tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that was trained to its end, with figures after each batch, to look at only."""
    recorder, seen = Recorder(), Seen()
    result = train_tiny(tmp_path_factory.mktemp("finished"), interval=1, callbacks=[recorder, Invert(), seen])
    assert result.error is None
    result.recorder, result.seen = recorder, seen
    return result
