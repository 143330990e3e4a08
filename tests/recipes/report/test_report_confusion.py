import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as published

from recipes.report import Confusions, Predictions

ANSWERS = st.lists(st.tuples(st.integers(-2, 6), st.integers(-1, 8)), max_size=60).map(
    lambda rows: np.array(rows, np.int32).reshape(-1, 2).T
)


@given(ANSWERS)
def test_agrees_with_scikit_learn(answers):
    label, predicted = answers
    kept = Predictions(label, predicted, None, None, [], [], 36).evaluated
    assert set(kept) == {index for index in range(len(label)) if label[index] >= 0 and predicted[index] >= 0}
    found = Confusions(label[kept], predicted[kept])
    whole = published(label[kept], predicted[kept], labels=range(9)) if len(kept) else np.zeros((9, 9), int)
    off = whole.copy()
    np.fill_diagonal(off, 0)
    assert {pair[:2]: pair[2:] for pair in found.pairs} == {
        (row, column): (off[row, column], whole[row].sum()) for row, column in zip(*np.nonzero(off), strict=True)
    }
    assert [pair[2] for pair in found.pairs] == sorted((pair[2] for pair in found.pairs), reverse=True)
    chosen = found.most_confused(4)
    assert len(chosen) <= 4
    assert chosen == sorted(set(chosen))
    matrix = np.array(found.matrix(chosen), int).reshape(len(chosen), len(chosen) + 1)
    np.testing.assert_array_equal(matrix[:, :-1], whole[np.ix_(chosen, chosen)])
    np.testing.assert_array_equal(matrix.sum(1), whole[chosen].sum(1))
    for one, right, images in found.hardest(9):
        assert (right, images) == (whole[one, one], whole[one].sum())
        assert right < images
