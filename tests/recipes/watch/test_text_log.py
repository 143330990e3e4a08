import logging
import re
import warnings

import pytest
from composer import Callback

STAMP = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} "


class Speak(Callback):
    """Says something in the middle of training."""

    def epoch_start(self, state, logger):
        if int(state.timestamp.epoch) == 1:
            logging.getLogger("recipes.somewhere").info("ours")
            logging.getLogger("data").debug("ours, in detail")
            logging.getLogger("recipes.somewhere").warning("only for the file", extra={"file_only": True})
            logging.getLogger("composer.somewhere").info("theirs")
            logging.getLogger("composer.somewhere").warning("their warning")
            warnings.warn("Python's warning", UserWarning, stacklevel=1)


@pytest.fixture
def result(run):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        return run(callbacks=[Speak()])


def test_file(result):
    lines = (result.folder / "log.txt").read_text().splitlines()
    text = "\n".join(lines)
    assert re.match(STAMP + r"INFO recipes\.watch\.text_log: tiny starts$", lines[0])
    for expected in ("recipes.somewhere: ours", "only for the file", "their warning", "UserWarning: Python's warning"):
        assert text.count(expected) == 1
    for unwanted in ("theirs", "in detail"):
        assert unwanted not in text
    epochs = [line for line in lines if re.search(r": epoch \d done, batch \d+: \d+ px, loss \d\.\d{4}, lr ", line)]
    assert len(epochs) == 4
    assert (
        len([line for line in lines if re.search(r"evaluation at (8|16) px: top-1 10\.00 %, top-5 50\.00 %", line)])
        == 4
    )


def test_console(result):
    lines = result.stream.getvalue().splitlines()
    assert lines[0] == "tiny starts"
    for expected in ("ours", "their warning"):
        assert lines.count(expected) == 1
    assert len([line for line in lines if line.endswith("UserWarning: Python's warning")]) == 1
    assert "warnings.warn(" not in result.stream.getvalue()
    assert "only for the file" not in lines


def test_python_logging_is_left_as_it_was(run):
    def settings():
        names = ("recipes", "data", "algorithms", "composer")
        return [
            logging.getLogger().handlers[:],
            [logging.getLogger(name).level for name in names],
            warnings.showwarning,
        ]

    before = settings()
    run()
    assert settings() == before


def test_going_on_appends_and_says_so(run):
    dead = run(save_at=["ba5"], die_at=7)
    path = dead.folder / "log.txt"
    before = path.read_text()
    with path.open("a") as file:
        file.write("2026-01-01 00:00:00+0000 INFO recip")
    after = run(load="ba5").folder.joinpath("log.txt").read_text()
    assert after.startswith(before)
    rest = after[len(before) :].splitlines()
    assert re.match(STAMP + r".*: tiny goes on from ba5\.pt: 1 epoch and [0-9]+ batch(es)? are done$", rest[1])
    assert sum("done, batch" in line for line in rest) == 3


def test_what_was_said_before_the_trainer_is_there(run):
    def prepare(result):
        assert logging.getLogger("recipes").level == logging.INFO
        logging.getLogger("recipes").info("between")

    result = run(prepare=prepare)
    assert "between" in (result.folder / "log.txt").read_text()
