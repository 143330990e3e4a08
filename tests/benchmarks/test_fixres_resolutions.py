"""What the benchmark makes of the three curves."""

from benchmarks.fixres_resolutions import draw, gains, table

CURVES = {
    "before": [{32: 50.0, 64: 60.0}, {32: 52.0, 64: 61.0}],
    "without": [{32: 55.0, 64: 63.0}, {32: 54.0, 64: 64.0}],
    "after": [{32: 51.0, 64: 66.0}, {32: 51.0, 64: 65.0}],
}


def test_gains_are_taken_seed_by_seed():
    assert gains(CURVES, 64) == {"before": [6.0, 4.0], "without": [3.0, 1.0]}
    assert gains(CURVES, 32) == {"before": [1.0, -1.0], "without": [-4.0, -3.0]}


def test_table_and_picture(tmp_path):
    rows = table(CURVES, [32, 64]).splitlines()
    assert rows[2:5] == [
        "| before the stage | 51.00 | 60.50 |",
        "| at the end, without a stage | 54.50 | 63.50 |",
        "| after the stage | 51.00 | 65.50 |",
    ]
    assert rows[5].endswith("| +0.00 ± 1.41 | +5.00 ± 1.41 |")
    assert rows[6].endswith("| -3.50 ± 0.71 | +2.00 ± 1.41 |")
    draw(CURVES, [32, 64], {"trained": 48}, tmp_path / "fixres.png")
    assert (tmp_path / "fixres.png").stat().st_size > 5000


def test_one_seed_has_no_spread():
    alone = {kind: curves[:1] for kind, curves in CURVES.items()}
    assert table(alone, [64]).splitlines()[-1].endswith("| +3.00 |")
