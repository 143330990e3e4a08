"""The figures behind the page: confusions and curves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as published

from recipes.report import Confusions, SavedPredictions, moving_mean, thin

ANSWERS = st.lists(st.tuples(st.integers(-2, 6), st.integers(-1, 8)), max_size=60).map(
    lambda rows: np.array(rows, np.int32).reshape(-1, 2).T
)


@given(ANSWERS)
def test_confusions_agree_with_scikit_learn(answers):
    label, predicted = answers
    kept = SavedPredictions(label, predicted, None, None, [], [], 36).evaluated
    assert set(kept) == {index for index in range(len(label)) if label[index] >= 0 and predicted[index] >= 0}
    found = Confusions(label[kept], predicted[kept])
    whole = published(label[kept], predicted[kept], labels=range(9)) if len(kept) else np.zeros((9, 9), int)
    off = whole.copy()
    np.fill_diagonal(off, 0)
    assert {pair[:2]: pair[2:] for pair in found.pairs} == {
        (row, column): (off[row, column], whole[row].sum()) for row, column in zip(*np.nonzero(off), strict=True)
    }
    assert [pair[2] for pair in found.pairs] == sorted((pair[2] for pair in found.pairs), reverse=True)
    chosen, rows = found.matrix(4)
    assert len(chosen) <= 4
    assert chosen == sorted(set(chosen))
    matrix = np.array(rows, int).reshape(len(chosen), len(chosen) + 1)
    np.testing.assert_array_equal(matrix[:, :-1], whole[np.ix_(chosen, chosen)])
    np.testing.assert_array_equal(matrix.sum(1), whole[chosen].sum(1))
    for one, right, images in found.hardest(9):
        assert (right, images) == (whole[one, one], whole[one].sum())
        assert right < images


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300), st.integers(1, 50))
def test_thinning_keeps_the_mean_and_the_range(values, points):
    y = np.array(values)
    x, means = thin(np.stack([np.arange(len(y), dtype=float), y]), points)
    assert len(x) == len(means) <= max(points, 1)
    assert (np.diff(x) > 0).all()
    finite = y[np.isfinite(y)]
    assert np.isfinite(means).any() == bool(len(finite))
    for curve in (means, moving_mean(y)):
        assert len(finite) == 0 or np.nanmin(curve) >= finite.min() - 1e-6
        assert len(finite) == 0 or np.nanmax(curve) <= finite.max() + 1e-6
