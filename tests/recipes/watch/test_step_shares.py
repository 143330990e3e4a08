import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.watch.step_shares import INPUT, OPTIMIZER, REST, Span, StageProfile, shares, summary


def test_a_step_by_hand():
    spans = [
        Span("event/dataloader", 1, 3),
        Span("algorithm/ColOut/event/after_dataloader", 3, 4),  # outside the batch
        Span("event/batch", 4, 20),
        Span("event/train_batch", 5, 15),
        Span("algorithm/MixUp/event/before_forward", 6, 7),
        Span("event/forward", 7, 10),
        Span("event/loss", 10, 11),
        Span("event/backward", 11, 14),
        Span("algorithm/Clip/event/after_train_batch", 16, 18),  # inside the batch, after the passes
        Span("algorithm/MixUp/event/batch_end", 20, 21),
    ]
    assert shares(spans, 0, 25) == {
        "waiting for the loader": 2,
        "forward pass": 3,
        "loss": 1,
        "backward pass": 3,
        "algorithm ColOut": 1,
        "algorithm MixUp": 2,
        "algorithm Clip": 2,
        INPUT: 10 - 1 - 3 - 1 - 3,
        OPTIMIZER: 16 - 10 - 2,
        REST: 25 - 2 - 16 - 1 - 1,
    }


@st.composite
def steps(draw):
    """Marks of a few steps, as Composer nests them, with any lengths."""
    spans, now = [], 0.0

    def advance():
        nonlocal now
        now += draw(st.floats(0, 2))
        return now

    def leaf(name):
        spans.append(Span(name, advance(), advance()))

    for _ in range(draw(st.integers(1, 3))):
        leaf("event/dataloader")
        outer = advance()
        for _ in range(draw(st.integers(1, 2))):  # SAM makes two passes
            inner = advance()
            for _ in range(draw(st.integers(1, 2))):  # portions
                leaf("algorithm/MixUp/event/before_forward")
                for name in ("forward", "loss", "backward"):
                    leaf(f"event/{name}")
            spans.append(Span("event/train_batch", inner, advance()))
        leaf("algorithm/GradientClipping/event/after_train_batch")
        spans.append(Span("event/batch", outer, advance()))
        leaf("algorithm/EMA/event/batch_end")
    return spans, advance()


@given(steps())
def test_shares_add_up_and_are_never_negative(made):
    spans, end = made
    found = shares(spans, 0.0, end)
    assert sum(found.values()) == pytest.approx(end, abs=1e-9)
    assert min(found.values()) >= 0


def test_the_page_has_a_column_pair_for_each_size():
    found = {"forward pass": 0.06, REST: 0.02, "algorithm EMA": 0.02}
    stages = [
        StageProfile(size, 8, 14, 2, 0.1, plain, "cpu", found, [["aten::mul", 0.5, 12]])
        for size, plain in ((128, 0.04), (224, None))
    ]
    page = summary(stages)
    assert "- 128 px: 2 steps of 8 images a device up to batch 14, 50.0 ms each, 40.0 ms without the profiler\n" in page
    assert "- 224 px: 2 steps of 8 images a device up to batch 14, 50.0 ms each\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert "| forward pass | 30.00 | 60.0% | 30.00 | 60.0% |" in rows
    first_table = [row.split(" | ")[0] for row in rows[2:6]]
    assert first_table == ["| forward pass", "| algorithm EMA", f"| {REST}", "| all"]
    assert "| `aten::mul` | 50.0% | 12 |" in rows
