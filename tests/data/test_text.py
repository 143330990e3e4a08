"""What leaves the process: names are escaped, secrets are scrubbed, streams do not fail."""

import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError, InputError
from data.text import Formatter, clean, escape, hide, markdown, scrub, spreadsheet
from tests.support import ROOT

AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SHARED_CREDENTIALS_FILE")
HOSTILE = "\x00\x07\x1b\x7f\x85\x9b\n\r\t\u2028\u2029\u202a\u202e\u2066\u2069\u200e\u200f\u061c\ufeff\udce9\ud800"


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch, tmp_path):
    for name in (*AWS, "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_name_is_one_harmless_line():
    for name, shown in (
        ("Zürich 東京 🐈 عربي", "Zürich 東京 🐈 عربي"),
        (os.fsdecode(b"\xe9l\xe9phant"), r"\xe9l\xe9phant"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("a\x9b31m\x85", r"a\u009b31m\u0085"),
        ("gnp\u202egpj.exe", r"gnp\u202egpj.exe"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ):
        assert escape(name) == escape(shown) == shown


@given(st.text(st.characters()))
def test_whatever_the_name_it_can_be_printed(name):
    shown = escape(name)
    assert not set(HOSTILE) & set(shown)
    assert len((shown + "\n").splitlines()) <= 1 or not shown
    shown.encode()


def test_errors_and_log_lines_escape_what_they_name():
    evil = "x\nERROR forged\x1b[2J"
    assert InputError(f"a: {evil}", "b").lines == (r"a: x\nERROR forged\x1b[2J", "b")
    assert str(DataError(f"{evil}: empty")) == r"x\nERROR forged\x1b[2J: empty"
    form = Formatter("%(message)s")

    def shown(message, *arguments, name="recipes"):
        return form.format(logging.LogRecord(name, 30, "", 0, message, arguments, None))

    assert shown("bad: %s, %d %.1f", evil, 3, 0.5) == r"bad: x\nERROR forged\x1b[2J, 3 0.5"
    assert shown("%s", OSError(2, "no", "a\nb")) == r"[Errno 2] no: 'a\nb'"
    assert shown("%(what)s", {"what": evil}) == r"x\nERROR forged\x1b[2J"
    warning = "f.py:3: UserWarning: \x1b[2J100 %\n  source"
    assert shown(warning, name="py.warnings") == r"f.py:3: UserWarning: \x1b[2J100 %"


def test_secrets_are_known_by_their_shape():
    for text, expected in (
        ("http://bob:pa$$@host/x", "http://***@host/x"),
        ("ftp//bob:pw@host", "ftp//***@host"),
        ("url=http%3A%2F%2Fbob%3Apw%40host%2Fx", "url=http%3A%2F%2F***%40host%2Fx"),
        ("?X-Amz-Signature=abc&X-Amz-Credential=AK%2F1&x=1", "?X-Amz-Signature=***&X-Amz-Credential=***&x=1"),
        ("X-Amz-Security-Token%3Dabc", "X-Amz-Security-Token%3D***"),
        ("{'X-Amz-Security-Token': b'abc', 'Host': 'h'}", "{'X-Amz-Security-Token': b'***', 'Host': 'h'}"),
        ("Credential=AK/2/s3, SignedHeaders=host, Signature=ab", "Credential=***, SignedHeaders=host, Signature=***"),
        ("key ASIAABCDEFGHIJKLMNOP.", "key ***."),
        ("token IQoJ" + "b3JpZ2lu/+" * 20, "token ***"),
        ("s3://bucket/user@host/photo.jpg", "s3://bucket/user@host/photo.jpg"),
        ("mail a@b, see https://host/x", "mail a@b, see https://host/x"),
    ):
        assert scrub(text) == expected


def test_secrets_of_the_environment_are_known_in_any_form(monkeypatch):
    secret = 'top"secret/+&key'
    forms = (secret, "top%22secret%2F%2B%26key", r"top\"secret/+&key", "top&#34;secret/+&amp;key")
    for name in (*AWS[:3], "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, secret)
            assert [scrub(f"a {form} b") for form in forms] == ["a *** b"] * 4
    for value in ("one", "20250101", "minioadmin"):  # short and common values do not tear other words
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", value)
        assert scrub(f"/data/{value}/x") == f"/data/{value}/x"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel-words")
    assert scrub("parallel-words") == "parallel-words"


@pytest.mark.parametrize("variable", ["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTPS_PROXY"])
def test_the_password_of_an_endpoint_is_known_without_its_address(variable, monkeypatch):
    monkeypatch.setenv(variable, "http://bob:p%40ss%2Fw0rd@host:9000")
    assert scrub("bad: p%40ss%2Fw0rd or p@ss/w0rd") == "bad: *** or ***"
    monkeypatch.setenv(variable, "http//bob:p@ss/w0rd@host")
    assert scrub("bad: p@ss/w0rd, http//bob:p@ss/w0rd@host") == "bad: ***, http//***@host"


def test_profiles_and_what_was_resolved_are_known_also_when_renewed(tmp_path, monkeypatch):
    profile = tmp_path / ".aws" / "credentials"
    profile.parent.mkdir()
    for number in range(2):
        profile.write_text(
            f"[x]\naws_secret_access_key = first-secret-{number}\n[y]\naws_session_token=other-{number}-to\n"
        )
        os.utime(profile, (number, number))
        assert scrub(f"first-secret-{number} other-{number}-to") == "*** ***"
    hide("from-the-instance", None)
    assert scrub("from-the-instance") == "***"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path))  # no file
    assert scrub("a") == "a"


def test_a_file_keeps_lines_and_no_other_control_character():
    assert clean("a\n\tb\r\x1b[31m\u202e\udce9é") == "a\n\tb\\r\\x1b[31m\\u202e\\xe9é"
    clean("\ud800\udfff").encode()


def test_cells():
    assert [spreadsheet(name) for name in ("=1+1", "+1", "-1", "@a", "\tx", "a=b", "cat")] == [
        "'=1+1", "'+1", "'-1", "'@a", "\\tx", "a=b", "cat"
    ]  # fmt: skip
    assert markdown("a|b<img>`[x](y)\n") == r"a\|b\<img\>\`\[x\](y)\\n"


PROGRAM = """
import sys, threading, warnings
from data.text import guard
guard()
{code}
"""


def ran(code, **environment):
    values = {**os.environ, "WANDB_API_KEY": "topsecret-of-wandb", **environment}
    values["PYTHONPATH"] = str(ROOT)
    program = PROGRAM.format(code=code).encode()  # not through -c, which not every locale can read
    return subprocess.run([sys.executable, "-"], input=program, env=values, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_no_encoding_makes_a_command_fail(environment):
    code = r"print('日本 é \udce9 \x1b]0;x\x07'); print('日本 \udce9', file=sys.stderr); sys.stdout.writelines(['ü'])"
    done = ran(code, **environment)
    assert done.returncode == 0, done.stderr
    assert rb"\xe9 \x1b]0;x\x07" in done.stdout
    assert rb"\xe9" in done.stderr


def test_whatever_prints_there_is_no_secret_and_colours_and_progress_bars_pass():
    done = ran(
        "import os, logging; secret = 'topsecret-of-wandb'\n"
        "from tqdm import tqdm\nfrom rich.console import Console\n"
        "Console(force_terminal=True, color_system='standard').print('[red]a[/red]')\n"
        "for _ in tqdm(range(2), mininterval=0): pass\n"
        "print(sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.fileno())\n"
        "print(secret); sys.stderr.write(secret); warnings.warn(secret)\n"
        "thread = threading.Thread(target=lambda: int(secret)); thread.start(); thread.join()\n"
        "logging.getLogger('botocore').error('%s', [secret])\n"
        "if not os.fork(): print(secret, flush=True); os._exit(0)\n"
        "os.wait(); raise ValueError(secret + ' \\x1b[2J')"
    )
    text = done.stdout + done.stderr
    assert text.count(b"***") >= 7
    assert b"topsecret" not in text
    assert text.count(b"\x1b") == done.stdout.count(b"\x1b[31ma\x1b[0m") * 2 == 2
    assert b"\r100%" in done.stderr
    assert b"False utf-8 1" in done.stdout


def test_closed_streams_are_no_failure():
    program = PROGRAM.format(code="print('a', flush=True); print('b', file=sys.stderr); sys.stdout.flush()")
    done = subprocess.run(["bash", "-c", 'exec "$0" -c "$1" 1>&- 2>&-', sys.executable, program], cwd=ROOT, timeout=60)
    assert done.returncode == 0


def test_a_reader_that_left_ends_nothing():
    program = PROGRAM.format(code="for i in range(10**5): print('x' * 80)\nsys.exit(7)")
    command = ["bash", "-c", 'set -o pipefail; "$0" -c "$1" 2>&1 | head -1', sys.executable, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (7, b"x" * 80, b"")
