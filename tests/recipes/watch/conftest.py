from functools import partial

import pytest

from tests.recipes.watch.tiny import Invert, train_tiny


@pytest.fixture
def run(tmp_path):
    """`run(...)` trains a tiny model in tmp_path/run and returns what is left."""
    return partial(train_tiny, tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that was trained to its end, with figures after each batch, to look at only."""
    invert = Invert()
    result = train_tiny(tmp_path_factory.mktemp("finished"), interval=1, callbacks=[invert])
    assert result.error is None
    result.seen = invert.seen
    return result
