import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as published

from recipes.report.confusion import (
    Pair,
    confused_pairs,
    confusion_matrix,
    hardest,
    judged,
    most_confused,
    surest_errors,
)

ANSWERS = st.lists(st.tuples(st.integers(-2, 6), st.integers(-1, 8)), max_size=60).map(
    lambda rows: np.array(rows, np.int32).reshape(-1, 2).T
)


@given(ANSWERS)
def test_agrees_with_scikit_learn(answers):
    label, predicted = answers
    kept = judged(label, predicted)
    whole = published(label[kept], predicted[kept], labels=range(9)) if len(kept) else np.zeros((9, 9), int)
    off = whole.copy()
    np.fill_diagonal(off, 0)
    pairs = confused_pairs(label, predicted)
    assert {(pair.label, pair.predicted): (pair.count, pair.total) for pair in pairs} == {
        (row, column): (off[row, column], whole[row].sum()) for row, column in zip(*np.nonzero(off), strict=True)
    }
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    chosen = most_confused(pairs, 4)
    assert len(chosen) <= 4
    assert chosen == sorted(set(chosen))
    matrix = confusion_matrix(label, predicted, chosen)
    np.testing.assert_array_equal(matrix[:, :-1], whole[np.ix_(chosen, chosen)])
    np.testing.assert_array_equal(matrix.sum(1), whole[chosen].sum(1))
    for one, right, images in hardest(label, predicted, 9):
        assert (right, images) == (whole[one, one], whole[one].sum())
        assert right < images


def test_the_worst_come_first():
    label = np.array([0, 0, 0, 0, 1, 1, 2, 2, -100])
    predicted = np.array([1, 1, 2, 0, 1, 0, 2, 2, 0])
    probability = np.array([0.5, 0.7, np.nan, 1.0, 1.0, 0.9, 1.0, 1.0, 1.0])
    assert confused_pairs(label, predicted)[0] == Pair(0, 1, 2, 4)
    assert hardest(label, predicted, 5) == [(0, 1, 4), (1, 1, 2)]
    assert surest_errors(label, predicted, probability, 3).tolist() == [5, 1, 0]
