"""How the commands of data/ read their arguments, and how they end."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from data.errors import WorkerKilledError, run_main
from tests.support import ROOT


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("demo", [], "the following arguments are required: DIR"),
        ("demo", ["x", "--size", "4"], "--size: got 4; allowed: 8 to 1024"),
        ("demo", ["x", "--size", "x"], "argument --size: invalid int value: 'x'"),
        ("imagenette", ["x", "--size", "5"], "argument --size: invalid choice: '5' (choose from"),
        ("prepare", ["x"], "the following arguments are required: DST"),
        ("prepare", ["x", "y", "--quality", "0"], "--quality: got 0; allowed: 1 to 100"),
        ("prepare", ["x", "y", "--val-sizes", "7"], "argument --val-sizes: got '7'; allowed: 8 to 4096, original"),
        ("prepare", ["x", "y", "--workers", "0"], "argument --workers: got 0; allowed: at least 1"),
        ("stage", ["x"], "x: expected s3://BUCKET/PREFIX"),
        ("verify", ["x", "--quaran", "y"], "unrecognized arguments: --quaran y"),
        ("verify", ["x", "\x1b[2Jy\n"], r"unrecognized arguments: \x1b[2Jy\n"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(command, words, message, capsys):
    main = importlib.import_module(f"data.{command}").main
    assert run_main(lambda: main(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m data.{command}: {message}")
    assert said.endswith(f"; see python -m data.{command} --help\n")
    assert said.count("\n") == 1


def test_a_command_that_was_stopped_ends_with_status_1(capsys):
    for error, said in (
        (KeyboardInterrupt(), "interrupted; run the same command again\n"),
        (WorkerKilledError(), f"{WorkerKilledError()}\n"),
    ):

        def main(error=error):
            raise error

        assert run_main(main) == 1
        assert capsys.readouterr().err == said
    assert (run_main(lambda: None), run_main(lambda: 1)) == (0, 1)


def test_ctrl_c_is_one_line_and_the_same_command_continues(tmp_path, folder):
    words = [sys.executable, "-m", "data.prepare", str(folder), str(tmp_path / "out"), "--workers", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, **streams) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/settings.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert output.splitlines()[-1] == "interrupted; run the same command again"
    assert "Traceback" not in output
    done = subprocess.run(words, cwd=ROOT, timeout=60, check=False, **streams)
    assert done.returncode == 0, done.stdout
