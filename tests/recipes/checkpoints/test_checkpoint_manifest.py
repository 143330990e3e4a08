"""What a manifest says to people; what it holds is tested with the checkpoints."""

import pytest

from recipes.checkpoints.manifest import position_in_words


@pytest.mark.parametrize(
    ("epochs", "batches", "words"),
    [
        (0, 0, "0 epochs"),
        (0, 1, "1 batch"),
        (0, 30, "30 batches"),
        (1, 0, "1 epoch"),
        (6, 0, "6 epochs"),
        (1, 30, "1 epoch and 30 batches"),
    ],
)
def test_a_position_in_words(epochs, batches, words):
    assert position_in_words(epochs, batches) == words
