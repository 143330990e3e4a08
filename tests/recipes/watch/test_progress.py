import fcntl
import os
import re
import struct
import termios
import threading

import pytest

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
