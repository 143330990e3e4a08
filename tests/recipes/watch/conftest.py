from functools import partial

import pytest

from tests.recipes.watch.tiny import train_tiny


@pytest.fixture
def run(tmp_path):
    """`run(...)` trains a tiny model in tmp_path/run and returns what is left."""
    return partial(train_tiny, tmp_path)
