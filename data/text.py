"""All text that leaves the process: names from outside are escaped, and secrets are removed."""

from __future__ import annotations

import difflib
import errno
import functools
import html
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

_UNSAFE = (
    "\\x00-\\x1f\\x7f-\\x9f"  # control characters, including those that begin terminal sequences
    "\\u061c\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u206f\\ufeff\\U000e0000-\\U000e007f"  # direction, invisible
    "\\u2028\\u2029\\ud800-\\udfff"  # line ends of Unicode, and undecodable bytes
)
_IN_NAMES = re.compile(f"[{_UNSAFE}]")
_IN_FILES = re.compile(f"(?![\n\t])[{_UNSAFE}]")
# A progress bar moves the cursor, and tables have colours; our output needs no other terminal sequences.
_IN_STREAMS = re.compile(rf"(?!\n|\t|\r|\x1b\[[0-9;]*[A-Km])[{_UNSAFE}]")

_SECRET_NAMES = re.compile(r"(?i)(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(_ID)?|CREDENTIALS?)$")
_ADDRESS_NAMES = re.compile("URL|URI|ENDPOINT|PROXY", re.IGNORECASE)
_IN_PROFILES = re.compile(
    r"(?m)^\s*(aws_access_key_id|aws_secret_access_key|aws_session_token|endpoint_url)\s*=\s*(\S+)"
)
_SHORTEST_SECRET = 8
_PUBLIC = frozenset({"password", "minioadmin"})
"""Default credentials of test servers; a path may well contain these words."""
_SHAPES = (
    # user:password@ of an address, and an X-Amz- parameter or header, with a plain or percent-encoded equals sign
    (re.compile(r"(?<=://)[^/\s\"'<>]+@"), "***@"),
    (re.compile(r"(?<=//)[^/\s\"'<>:]+:[^/\s\"'<>]*@"), "***@"),
    (re.compile(r"(?<=%3A%2F%2F)[^/%\s]+(%3A[^/\s]*?)?%40", re.IGNORECASE), "***%40"),
    (
        re.compile(r"(?i)(X-Amz-(?:Credential|Signature|Security-Token)[\"']?(?:=|%3D|:)\s*b?[\"']?)[^&\s\"',;<>]+"),
        r"\1***",
    ),
    (re.compile(r"\b((?:AWSAccessKeyId|Signature|Credential)=)[^&\s\"',;<>]+"), r"\1***"),
    # AWS access keys and session tokens, from any source
    (re.compile(r"(?<![A-Za-z0-9+/])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9+/=])"), "***"),
    (re.compile(r"(?<![A-Za-z0-9+/=])(?:IQoJ|FwoG|FQoG)[A-Za-z0-9+/=_%-]{80,}"), "***"),
)

_hidden: set[str] = set()


def escape(text: object) -> str:
    r"""A name from outside as one harmless line of text, for use in a message.

    Control characters, line ends, and marks that are invisible or change the direction of writing become `\x1b`, `\n`,
    `\u202e`; a byte of a file name that is not valid UTF-8 becomes `\xNN`. All other characters stay.
    """
    return _IN_NAMES.sub(_escaped, str(text))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how os.fsdecode represents a byte
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if 0x7F <= code <= 0x9F else found[0].encode("unicode_escape").decode()


def hide(*secrets: str | None) -> None:
    """Remove these, credentials that are not in the environment, from every text from now on."""
    _hidden.update(filter(None, secrets))


def scrub(text: str) -> str:
    """A text without this process's secrets, and without anything that looks like one.

    `***` replaces: values of variables such as `AWS_SECRET_ACCESS_KEY`, `WANDB_API_KEY` or `..._TOKEN` and of the AWS
    profiles (if at least 8 characters and not all digits); passwords in addresses in the environment; user and password
    of any address; signatures, credentials and tokens of signed addresses; AWS access keys.
    """
    for secret in _to_replace(tuple(os.environ.items()), frozenset(_hidden), tuple(_profiles())):
        text = text.replace(secret, "***")
    for pattern, instead in _SHAPES:
        text = pattern.sub(instead, text)
    return text


def _profiles() -> Iterator[tuple[str, int]]:
    """The files of AWS profiles, each with the time of its last change, so that renewed keys are read again."""
    for variable, name in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")):
        path = os.path.expanduser(os.environ.get(variable, f"~/.aws/{name}"))  # noqa: PTH111 - Path's raises without a home
        with suppress(OSError, ValueError):
            yield path, os.stat(path).st_mtime_ns  # noqa: PTH116


@functools.lru_cache(maxsize=4)
def _to_replace(
    environment: tuple[tuple[str, str], ...], hidden: frozenset[str], profiles: tuple[tuple[str, int], ...]
) -> list[str]:
    """The secrets in all their forms, longest first, because one may contain another."""
    pairs = list(environment)
    for path, _ in profiles:
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            pairs += _IN_PROFILES.findall(file.read(2**20))
    secrets = set(hidden) | {value for name, value in pairs if _SECRET_NAMES.search(name)}
    for name, value in pairs:
        # The password between user and host may contain `@` or `/` if it is not encoded.
        if _ADDRESS_NAMES.search(name) and (word := value.partition("//")[2].rpartition("@")[0].partition(":")[2]):
            secrets.add(word if len(word) >= _SHORTEST_SECRET else f":{word}@")
    forms: set[str] = set()
    for secret in secrets:
        if (len(secret) < _SHORTEST_SECRET and not secret.endswith("@")) or secret.isdigit() or secret in _PUBLIC:
            continue
        for form in {secret, unquote(secret)}:  # plain, in an address, in HTML, in JSON, in Python
            page = html.escape(form)
            forms |= {form, quote(form, safe=""), quote(form), quote_plus(form)}
            forms |= {page, page.replace("&quot;", "&#34;").replace("&#x27;", "&#39;")}
            forms |= {json.dumps(form)[1:-1], repr(form)[1:-1], escape(form)}
    return sorted(forms, key=len, reverse=True)


def clean(text: str) -> str:
    """A whole text for a file, without secrets and without characters that our texts never contain."""
    return scrub(_IN_FILES.sub(_escaped, text))


def spreadsheet(name: object) -> str:
    """A name for a CSV cell: one that a spreadsheet would evaluate (`=`, `+`, `-`, `@` first) gets a `'` in front."""
    text = escape(name)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def markdown(text: object) -> str:
    """A text for a line or a cell of Markdown, shown literally: no markup, no HTML."""
    return re.sub(r"[\\`*_\[\]<>|#&]", r"\\\g<0>", escape(text))


class _Stream:
    """A text stream without secrets, which never fails because of a text, and discards all once its reader has left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.reader_left = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write without secrets; returns the length of `text`."""
        if not self.reader_left:
            shown = scrub(_IN_STREAMS.sub(_escaped, text)) if text != "\n" else text
            self._attempt(lambda: self._stream.write(shown))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush to the operating system."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.reader_left = True
            # The buffer must go somewhere, or Python would complain at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class Formatter(logging.Formatter):
    """Formats log lines: names are escaped and secrets removed."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one."""
        changed: dict[str, Any] = {"args": _escape_texts(record.args)}
        if record.name == "py.warnings":
            # By default a warning is two lines, the second being the caller's source.
            changed = {"msg": escape(record.getMessage().partition("\n")[0]), "args": ()}
        return clean(super().format(logging.makeLogRecord(record.__dict__ | changed)))


def _escape_texts(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return {key: _escape_texts((value,))[0] for key, value in arguments.items()}
    if not isinstance(arguments, tuple):
        return arguments
    return tuple(escape(one) if isinstance(one, str | os.PathLike | BaseException) else one for one in arguments)


def guard() -> None:
    """Remove secrets from what this process writes to stdout and stderr, and never fail because of a character.

    This includes tracebacks, and output of threads and forks. Call it first in each process that a command starts.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Stream):
            continue
        if stream is None:  # closed by the shell: `>&-`
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - open as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Stream(stream))
    sys.excepthook = _print_traceback
    threading.excepthook = lambda failed: _print_traceback(*failed[:3]) if failed.exc_value else None


def _print_traceback(kind: type[BaseException], error: Any, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(clean("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def did_you_mean(word: str, choices: Iterable[str] | Mapping[str, str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` if one or two choices, names or {name: how it is written}, are similar; else nothing."""
    written = choices if isinstance(choices, Mapping) else {name: name for name in choices}
    lower = {name.lower(): written[name] for name in written}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), lower, n=2, cutoff=cutoff)
    return f"; did you mean {' or '.join(repr(lower[name]) for name in close)}?" if close else ""
