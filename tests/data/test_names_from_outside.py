"""Names from outside: whatever is accepted stays below the folder that it is joined to, and fits on a disk."""

import os
import posixpath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.names import plain_name, relative_path

HOSTILE = st.text(st.sampled_from("./\\\0a\n\ud800\udce9é\u202e~$"), max_size=12) | st.text()


def is_accepted(check, name):
    try:
        assert check(name) == name
    except ValueError as error:
        message = str(error)
        assert message.isprintable()
        assert message.isascii()
        assert len(message) < 400
        return False
    return True


@given(HOSTILE)
@example("..")
@example("")
@example("x" * 256)
@example("é" * 128)
@example("x" * 10**6)
def test_an_accepted_name_is_one_component(name):
    if is_accepted(plain_name, name):
        assert posixpath.normpath(f"/folder/{name}") == f"/folder/{name}"
        assert os.path.split(f"/folder/{name}") == ("/folder", name)
        assert len(os.fsencode(name)) <= 255
        assert b"\0" not in os.fsencode(name)
    else:
        surrogates = any("\ud800" <= character <= "\udfff" for character in name)
        too_long = len(name.encode("utf-8", "surrogatepass")) > 255
        assert name in ("", ".", "..") or "/" in name or "\0" in name or surrogates or too_long


@given(st.lists(HOSTILE, min_size=1, max_size=4).map("/".join))
@example("/etc/passwd")
@example("a/../../b")
@example("a//b")
@example("a/")
@example("a/./b")
def test_an_accepted_path_stays_below_its_folder(path):
    if is_accepted(relative_path, path):
        assert posixpath.normpath(f"/folder/{path}") == f"/folder/{path}"
    else:
        assert not all(part and is_accepted(plain_name, part) for part in path.split("/"))


@pytest.mark.parametrize("name", [None, 5, b"x", ["x"], {"x": 1}, float("nan"), True])
def test_what_is_no_text_is_no_name(name):
    for check in (plain_name, relative_path):
        with pytest.raises(ValueError, match="is not text"):
            check(name)


@pytest.mark.parametrize(
    "name", ["n01440764", "ILSVRC2012_val_00000001.JPEG", "a b", ".hidden", "...", "x" * 255, "日本", "a\\b"]
)
def test_usual_names_are_accepted(name):
    assert plain_name(name) == name
    assert relative_path(f"{name}/{name}") == f"{name}/{name}"


def test_the_message_shows_the_name_and_why():
    with pytest.raises(ValueError, match=r"the name '\.\.' is refused: it leads to another folder, in 'a/\.\./b'"):
        relative_path("a/../b")
    with pytest.raises(ValueError, match=r"'\\udce9'.*not UTF-8"):
        plain_name("\udce9")
    with pytest.raises(ValueError, match=r"'a\\x1b\[2J/b'.*path"):
        plain_name("a\x1b[2J/b")
