"""`make install` installs the lock that TORCH names, and the other targets keep what is installed."""

import os
import shutil
import subprocess

import pytest

from tests.support import ROOT

STUB = """#!/bin/sh
case "$*" in *"sync "*) echo "${0##*/} $*" >> log; test ! -e fail;; esac
"""


@pytest.fixture
def make(tmp_path):
    """`make(*words)` runs make with programs that only note what would be installed: the lock, or None."""
    for name in ("Makefile", "requirements.lock", "requirements-new.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "uv", "ruff", "mypy"):
        path = tmp_path / ".venv" / "bin" / name
        path.write_text(STUB)
        path.chmod(0o755)

    # The tests may run in a make of their own, with a TORCH of its own.
    env = {name: value for name, value in os.environ.items() if name != "TORCH" and not name.startswith("MAKE")}

    def make(*words, status=0):
        (tmp_path / "log").write_text("")
        command = ["make", "PYTHON=.venv/bin/python", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        installed = (tmp_path / "log").read_text().split()
        return installed[-1] if installed else None

    return make


def test_install_switches_and_the_other_targets_keep(make):
    assert make("install") == "requirements.lock"
    assert make("install") is None
    assert make("install", "TORCH=new") == "requirements-new.lock"
    assert make("install", "TORCH=new") is None
    assert make("lint") is None, "it keeps the new torch"
    assert make() == "requirements.lock", "install is the first target"
    assert make("lint") is None
    assert make("lint", "TORCH=new") == "requirements-new.lock"


def test_an_old_or_broken_environment_is_installed_again(make, tmp_path):
    (tmp_path / ".venv" / "installed").touch()
    assert make("lint") == "requirements.lock"
    (tmp_path / "fail").touch()
    assert make("install", "TORCH=new", status=2) == "requirements-new.lock"
    (tmp_path / "fail").unlink()
    assert make("install") == "requirements.lock", "what is installed is neither"


def test_another_torch_is_refused(make):
    assert make("install", "TORCH=2.9", status=2) is None
