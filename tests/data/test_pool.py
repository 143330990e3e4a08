"""A worker that is killed, as the system does where memory runs out: one line, status 1, nothing hangs."""

import os
import signal

import pytest

from data import prepare, verify
from data.pool import WorkerKilledError, each_part


def double(held, part):
    return held + 2 * part


def kill_at_three(held, part):
    if part == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def kill(held, part):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(held, part):
    raise ValueError(f"not {part}")


def test_every_part_comes_with_its_result():
    assert dict(each_part(double, 100, range(10), 2, ())) == {part: 100 + 2 * part for part in range(10)}


def test_a_killed_worker_ends_it():
    with pytest.raises(WorkerKilledError, match="a worker process was killed"):
        list(each_part(kill_at_three, None, range(10), 2, ()))


def test_an_error_of_the_work_is_passed_on():
    with pytest.raises(ValueError, match="not 0"):
        list(each_part(refuse, None, [0], 2, ()))


def test_the_commands_say_so_in_one_line(tmp_path, write_folder, monkeypatch, capsys):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 2, "bee": 2})
    words = [str(tmp_path / "set"), str(tmp_path / "out"), "--train-sizes", "24", "--workers", "2"]
    monkeypatch.setattr(verify, "_faults", kill)
    monkeypatch.setattr(prepare, "make_part", kill)
    for command in (lambda: verify.main([words[0], "--workers", "2"]), lambda: prepare.main(words)):
        assert command() == 1
        said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "img" not in line and line]
        assert said == [str(WorkerKilledError())]
    monkeypatch.undo()
    assert prepare.main(words) == 0  # the same command goes on
