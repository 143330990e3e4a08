import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.errors import InputError
from recipes.read_run import Evaluation, Reached, evaluation_curve, mean_curve, reach, read_run

CURVE = (Evaluation(1.0, 10.0, 0.2), Evaluation(2.0, 30.0, 0.6), Evaluation(3.0, 40.0, 0.5), Evaluation(4.0, 80.0, 0.9))


def leave(folder, summary, lines):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return folder


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.1, (1.0, 10.0)),  # the first evaluation counts as it is
        (0.2, (1.0, 10.0)),
        (0.4, (1.5, 20.0)),
        (0.55, (1.875, 27.5)),  # reached at once, though the curve falls below it again
        (0.6, (2.0, 30.0)),
        (0.7, (3.5, 60.0)),
        (0.9, (4.0, 80.0)),
        (0.91, None),
    ],
)
def test_an_accuracy_is_reached_on_a_line_between_two_evaluations(target, expected):
    found = reach(CURVE, target)
    assert found == (None if expected is None else pytest.approx(expected))


def test_nothing_is_reached_by_a_run_without_evaluations():
    assert reach((), 0.0) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_a_target_is_reached_no_later_than_the_first_evaluation_above_it_and_after_the_one_before(accuracies, target):
    curve = [Evaluation(float(place), 10.0 * place, top1) for place, top1 in enumerate(accuracies, 1)]
    first = next((place for place, entry in enumerate(curve) if entry.top1 >= target), None)
    found = reach(curve, target)
    if first is None:
        assert found is None
    else:
        assert curve[max(first - 1, 0)].epoch <= found.epoch <= curve[first].epoch
        assert found.wall_seconds == pytest.approx(10 * found.epoch)


def test_the_mean_of_curves_is_over_the_epochs_that_all_have():
    other = (Evaluation(2.0, 50.0, 0.8), Evaluation(4.0, 100.0, 0.7), Evaluation(5.0, 120.0, 1.0))
    assert mean_curve([CURVE, other]) == (
        Evaluation(2.0, 40.0, pytest.approx(0.7)),
        Evaluation(4.0, 90.0, pytest.approx(0.8)),
    )
    assert mean_curve([CURVE]) == CURVE
    assert mean_curve([]) == ()


def test_a_run_is_read_with_torn_lines_left_out(tmp_path):
    lines = [
        {"batch": 1, "epoch": 0.1, "wall_seconds": 1.0, "train/loss": 2.0},
        {"batch": 9, "epoch": 1.0, "wall_seconds": 10.0, "eval/32/top1": 0.25, "eval/36/top1": 0.5},
        "7",
        {"batch": 18, "epoch": 2.0, "wall_seconds": 20.0, "eval/32/top1": None, "eval/36/top1": 0.75},
        '{"batch": 27, "epo',
    ]
    run = read_run(leave(tmp_path / "run", {"finished": True}, lines))
    assert run.summary == {"finished": True}
    assert len(run.figures) == 3
    assert evaluation_curve(run, 36) == (Evaluation(1.0, 10.0, 0.5), Evaluation(2.0, 20.0, 0.75))
    assert evaluation_curve(run, 32) == (Evaluation(1.0, 10.0, 0.25),)
    assert evaluation_curve(run, 224) == ()
    assert reach(evaluation_curve(run, 36), 0.625) == Reached(1.5, 15.0)


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="not the folder of a run"):
        read_run(tmp_path)
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "summary.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError) as caught:
            read_run(tmp_path)
        assert len(caught.value.lines) == 1
    (tmp_path / "summary.json").write_text("{}")
    assert read_run(tmp_path).figures == ()
