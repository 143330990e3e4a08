import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.results import Evaluation, first_reached, read_results


def leave(folder, summary, lines):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return folder


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_a_target_is_reached_no_later_than_the_first_evaluation_above_it_and_after_the_one_before(accuracies, target):
    curve = [Evaluation(float(place), 10.0 * place, top1) for place, top1 in enumerate(accuracies, 1)]
    first = next((place for place, entry in enumerate(curve) if entry.top1 >= target), None)
    found = first_reached(curve, target)
    if first is None:
        assert found is None
    else:
        assert curve[max(first - 1, 0)].epoch <= found.epoch <= curve[first].epoch
        assert found.wall_seconds == pytest.approx(10 * found.epoch)


def test_a_run_is_read_with_damaged_lines_skipped(tmp_path):
    lines = [
        {"batch": 9, "epoch": 1.0, "wall_seconds": 10.0, "eval/32/top1": 0.25, "eval/36/top1": 0.5},
        {"batch": 1, "epoch": 0.1, "wall_seconds": 1.0, "train/loss": 2.0, "train/lr": 0.1},
        "7",
        {"batch": 18, "epoch": 2.0, "wall_seconds": 20.0, "eval/32/top1": None, "eval/36/top1": 0.75},
        {"batch": 20, "epoch": 2.1, "wall_seconds": 21.0, "train/loss": None, "train/lr": 0.2, "other": "x"},
        '{"batch": 27, "epo',
    ]
    run = read_results(leave(tmp_path / "run", {"finished": True}, lines))
    assert run.summary == {"finished": True}
    assert run.finished
    assert run.metrics["batch"].tolist() == [1, 9, 18, 20], "in the order of the batches"
    assert run.training["batch"].tolist() == [1, 20]
    np.testing.assert_array_equal(run.training["train/loss"], [2.0, np.nan])
    assert run.problems == (f"{tmp_path / 'run' / 'metrics.jsonl'}: 2 damaged lines skipped",)
    assert run.sizes == [32, 36]
    assert run.evaluations(36) == (Evaluation(1.0, 10.0, 0.5), Evaluation(2.0, 20.0, 0.75))
    assert run.evaluations(32) == (Evaluation(1.0, 10.0, 0.25),)
    assert run.evaluations(224) == ()
    assert first_reached(run.evaluations(36), 0.625) == (1.5, 15.0, 0.625)


def test_what_is_missing_or_damaged_is_a_problem_in_one_line(tmp_path):
    nothing = read_results(tmp_path)
    assert [problem.rpartition(": ")[0] for problem in nothing.problems] == [
        f"{tmp_path / name}: cannot be read" for name in ("summary.json", "metrics.jsonl")
    ]
    assert len(nothing.training["epoch"]) == len(nothing.evaluations(36)) == 0
    (tmp_path / "metrics.jsonl").write_text("")
    for data in (b"{", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "summary.json").write_bytes(data)
        run = read_results(tmp_path)
        assert (len(run.problems), run.summary, run.finished) == (1, {}, False)
