import fcntl
import io
import os
import re
import struct
import termios
import threading
from types import SimpleNamespace

import pytest
from composer.core import Timestamp

from recipes.results import clock_time
from recipes.watch.figures import Figures
from recipes.watch.progress import Progress
from tests.support import ROOT

LINE = re.compile(
    r"^epoch (\d+)/4 (\d+)px (?:\|(.+)\| *)?(\d+)% "
    r"(\d+) img/s ETA (\d+:\d\d:\d\d|\?)( loss \d+\.\d{3})?( top-1 \d+\.\d\d%)?$"
)


class Screen:
    """A pseudo-terminal of 80 columns whose output is kept."""

    def __init__(self, columns):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self.output = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        while True:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            self.output += chunk

    def close(self):
        self.stream.close()
        self.reader.join(10)
        os.close(self.master)
        return self.output.decode()


def painted(output):
    """The states of the bar's line, without control sequences and padding."""
    texts = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)
    return [
        text for text in re.split(r"[\r\n]+", texts) if text.startswith("epoch") and "img/s" in text and "|" in text
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_bar_fits_the_terminal(run, columns):
    screen = Screen(columns)
    run(stream=screen.stream)
    output = screen.close()
    states = painted(output)
    assert len(states) >= 5
    for state in states:
        assert len(state) <= columns
        assert LINE.match(state.rstrip()), state
    shares = [int(LINE.match(state.rstrip())[4]) for state in states]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    last = LINE.match(states[-1].rstrip())
    assert (last[1], last[2], last[6]) == ("4", "16", "0:00:00")
    assert last[8] == " top-1 10.00%"
    # Lines of the log stand alone: the bar was taken away before each, and is below the last.
    log_lines = [text for text in re.split(r"\r?\n", output) if "done, batch" in text]
    assert len(log_lines) == 4
    assert all(re.match(r"^epoch \d done, batch \d+: ", text.split("\r")[-1]) for text in log_lines)


def test_bar_of_a_long_run_fits_80_columns():
    figures = Figures(1_281_167, 10)
    figures.evaluations = {"288": {"top1": 0.7654}}
    screen = Screen(80)
    state = SimpleNamespace(timestamp=Timestamp(epoch=89, sample=114_023_863), total_loss_dict={})
    progress = Progress(figures, [288] * 90, 288, screen.stream)
    figures.clock.set({"train": 100_000.0})
    progress.fit_start(state, None)
    figures.clock.set({"train": 101_000.0})
    state.timestamp = state.timestamp.copy(sample_in_epoch=12_000, sample=114_035_863)
    state.total_loss_dict = {"loss/train/total": 2.3456}
    progress.batch_end(state, None)
    progress.epoch_end(state, None)
    progress.close(state, None)
    [*_, last] = painted(screen.close())
    assert len(last) <= 80
    assert re.match(
        r"^epoch 90/90 288px \|.{3,}\|  99% 12 img/s ETA 29:22:44 loss 2.346 top-1 76.54%$", last.rstrip()
    ), last


def test_plain_lines_where_there_is_no_terminal(run, monkeypatch):
    monkeypatch.setattr("recipes.watch.progress.PLAIN_LINE_SECONDS", 0.0)
    output = run().stream.getvalue()
    assert "\r" not in output
    assert "\x1b" not in output
    found = [LINE.match(line) for line in output.splitlines() if "img/s" in line]
    assert len(found) == 12
    assert all(found)
    assert [match[3] for match in found] == [None] * 12, "no bar"
    # 20 images an epoch at 8, 8, 12 and 16 px: the share is that of the pixels.
    pixels = [8 * 64, 16 * 64, 20 * 64, 28 * 64, 36 * 64, 40 * 64]
    total = 20 * (64 + 64 + 144 + 256)
    assert [int(match[4]) for match in found[:6]] == [round(100 * done / total) for done in pixels]


def test_few_lines_where_there_is_no_terminal(finished):
    output = finished.stream.getvalue()
    assert "img/s" not in output, "nothing in the first 30 seconds but what the log says"
    assert sum("done, batch" in line for line in output.splitlines()) == 4


def test_begins_at_the_resumed_position(run, monkeypatch):
    monkeypatch.setattr("recipes.watch.progress.PLAIN_LINE_SECONDS", 0.0)
    run(save_at=["ep2"], die_at=7)
    output = run(load="ep2").stream.getvalue()
    found = [LINE.match(line) for line in output.splitlines() if "img/s" in line]
    assert [(match[1], match[2]) for match in found] == [("3", "12")] * 3 + [("4", "16")] * 3
    assert int(found[0][4]) == round(100 * (40 * 64 + 8 * 144) / (20 * 528))
    assert found[0][8] == " top-1 10.00%", "the last evaluation before the resume"

    screen = Screen(80)
    run(load="ep2", stream=screen.stream)
    first = painted(screen.close())[0]
    assert f" {round(100 * 40 * 64 / (20 * 528))}% " in first


def test_remaining_time_counts_pixels():
    state, figures = SimpleNamespace(timestamp=Timestamp(), total_loss_dict={}), Figures(100, 10)
    progress = Progress(figures, [128, 256], 224, io.StringIO())
    progress.fit_start(state, None)
    assert progress.texts(state)[1].startswith("0 img/s ETA ?")
    # Half of the first epoch in 10 s of work and 5 s of evaluation: the other half and four times an epoch remain.
    figures.clock.set({"train": 8.0, "loader_wait": 2.0, "evaluation": 5.0})
    state.timestamp = state.timestamp.copy(sample=50, sample_in_epoch=50)
    progress.batch_end(state, None)
    assert progress.texts(state) == ("epoch 1/2 128px", "5 img/s ETA 0:02:15")


@pytest.mark.parametrize(("stopped", "begins"), [(True, ["interrupted"]), (False, ["results", "curves", "report"])])
def test_what_is_printed_at_the_end_begins_a_line(train, monkeypatch, stopped, begins):
    if stopped:
        monkeypatch.setattr("recipes.run.Interrupt.install", lambda self: self.request("test", 22.0))
    screen = Screen(80)
    monkeypatch.setattr("sys.stdout", screen.stream)
    keys = ("run_name=end", "model.name=timm/test_resnet", "max_duration=2ep", "data.workers=0", "eval.sizes=[16]")
    status, _ = train(ROOT / "yamls" / "demo.yaml", *keys, "algorithms.fixres=off", "data.train_size=16")
    lines = screen.close().splitlines()
    assert status == (75 if stopped else 0)
    assert [line.split("(")[0].split(":")[0].strip() for line in lines[-len(begins) :]] == begins
    assert [line.split("\r")[-1][:6] for line in lines[:-1] if "img/s ETA" in line][-1:] == ["epoch "], lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360000, "100:00:00"), (float("inf"), "?"), (-1, "?")],
)
def test_duration(seconds, text):
    assert clock_time(seconds) == text
