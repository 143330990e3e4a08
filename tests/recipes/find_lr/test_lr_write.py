"""The table of what the methods suggest."""

from recipes.find_lr.suggest import METHODS, over_runs
from recipes.find_lr.write import HEADERS, rows


def test_every_method_has_a_row_also_where_it_found_nothing():
    found = [over_runs("steepest", (0.01, None, 0.04)), over_runs("minimum", (0.1, 0.1, 0.1))]
    shown = rows([one for one in found if one is not None])
    assert [row[0].split(" (")[0] for row in shown] == [method.name for method in METHODS]
    assert all(len(row) == len(HEADERS) for row in shown)
    by_name = {row[0]: row[1:] for row in shown}
    assert by_name["steepest (2 of 3)"][:3] == ("0.02", "0.025", "0.025")
    assert by_name["minimum"] == ("0.1", "0.1", "0.1", "x1.00", "0.1", "0.1")
    assert set(by_name["sliding window"]) == {"-"}
