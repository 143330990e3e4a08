"""Whatever is written into a YAML: a config, or status 2 and lines that name their place. Never another exception."""

import contextlib
import io
import json
import os
import random
import re
import sys
from functools import partial

import pytest
import yaml as pyyaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import entrypoint
from data.errors import InputError
from recipes.cli import run_command
from recipes.config import RunConfig
from recipes.load import load_config
from recipes.resolved import config_digest, differing_keys, resolved
from recipes.schema import schema_of
from tests.support import ROOT

YAMLS = sorted((ROOT / "yamls").rglob("*.yaml"))
MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "2000"))
"""Half of them damage the text, half one value of a key."""
KEYS = [".".join(path) for path in schema_of(RunConfig).paths()]
PLAIN = "null ~ on off yes no true 0 -1 1 3 1e-3 1e999 .nan -.inf 017 0x10 1_0 1:30 2024-01-01 90ep 5ba 0.1dur fp32 gpu"
ODD = "{} [] [1] [32,40] {a:1} {128:3} {x:{y:z}} '' '3' \"\\0\" ! & * *x &x !!int !!binary % @ ` | > - ? : , # [ ] { }"
MORE = "{<<:3} resnet50 constant one_cycle é \ufeff \u2028 \U0001f600 999999999999999999999999 -0.0 1.0 ../x / s3://a"
VALUES = [word for words in (PLAIN, ODD, MORE) for word in words.split(" ")]
FOREIGN = re.compile(r"\n|Input should be|Value error,|pydantic|Traceback")
LINE = re.compile(
    r"(?P<place>[^:\n]*\.yaml(:\d+)?|'.*' on the command line|\".*\" on the command line): (?P<rest>.+)", re.DOTALL
)


def mutate(text, rng):
    """One to four changes of lines, characters, keys or values."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        line, kind = lines[at], rng.randrange(9)
        key, colon, rest = line.partition(":")
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[other])
        elif kind == 2:
            lines[at] = " " * rng.randint(0, 6) + line.strip()
        elif kind == 3:
            lines[at] = f"{key}: {rng.choice(VALUES)}"
        elif kind == 4:
            lines.insert(at, f"{' ' * rng.choice((0, 2, 4))}{rng.choice(KEYS).split('.')[-1]}: {rng.choice(VALUES)}")
        elif kind == 5:
            cut = rng.randrange(len(line) + 1)
            lines[at] = line[:cut] + rng.choice(("", "\t", ":", "x", "\x00", "\u0085", "é", "- ")) + line[cut + 1 :]
        elif kind == 6:
            lines[at] = "".join(rng.sample(key, len(key))) + colon + rest
        elif kind == 7:
            lines[at], lines[other] = lines[other], line
        else:
            lines = lines[: at + 1]
        text = "\n".join(lines)
    return text


def check(path, overrides=()):
    """Load; True for a config, which must read back, and False for errors, which must name their place."""
    try:
        config = load_config(path, overrides)
    except InputError as error:
        check_lines(error.lines)
        return False
    path.with_name("again.yaml").write_text(resolved(config), encoding="utf-8")
    again = load_config(path.with_name("again.yaml"))
    assert (again, resolved(again), config_digest(again)) == (config, resolved(config), config_digest(config))
    assert differing_keys(json.loads(json.dumps(config.model_dump(mode="json"))), again.model_dump(mode="json")) == []
    return True


def check_lines(lines):
    """One line per error, each with its place, in words of this project."""
    assert lines
    for line in lines:
        assert LINE.fullmatch(line), line
        assert not FOREIGN.search(re.sub("got .*; allowed", "", line)), line  # Hypothesis tries such words as values


def show(path, monkeypatch):
    """`python entrypoint.py PATH --show` in this process: (exit status, what it printed, lines on stderr)."""
    monkeypatch.setattr(sys, "argv", ["entrypoint.py", str(path), "--show"])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run_command(entrypoint.main)
    return status, out.getvalue(), err.getvalue().splitlines()


@pytest.fixture(params=YAMLS, ids=lambda path: path.stem)
def mutants(request, tmp_path, monkeypatch):
    """`mutants(change)` tries texts `change(number, rng)` in place of a YAML: {number: lines on stderr} of the refused.

    A config that is shown must read back as the same; one that is not must be refused in lines.
    """
    path, again, refused = tmp_path / "mutant.yaml", tmp_path / "again.yaml", {}
    for base in ("medium", "mosaic-medium", "timm-a2"):
        (tmp_path / f"{base}.yaml").write_text((request.param.parent / f"{base}.yaml").read_text())

    def mutants(change):
        rng, count = random.Random(request.param.stem), -(-MUTANTS // 2 // len(YAMLS))
        for number in range(count):
            path.write_bytes(change(number, rng).encode("utf-8", "surrogatepass"))
            status, printed, lines = show(path, monkeypatch)
            if status == 2:
                assert not printed
                check_lines(lines)
                refused[number] = lines
            else:
                assert (status, lines) == (0, [])
                again.write_text(printed, encoding="utf-8")
                assert show(again, monkeypatch) == (0, printed, [])
        assert 0 < len(refused) < count  # it reaches both
        return refused

    mutants.yaml, mutants.whole = request.param, resolved(load_config(request.param))
    return mutants


def test_mutated_yamls(mutants):
    """Damaged text, mostly not YAML any more."""
    short = mutants.yaml.read_text(encoding="utf-8")
    whole = mutants.whole + "\n" + "".join(f"# {line}\n" for line in short.split("\n"))
    mutants(lambda number, rng: mutate(short if number % 2 else whole, rng))


def test_wrong_values_are_reported_by_their_key(mutants):
    """One key of the whole config gets another value; the text stays YAML, so that each complaint can name a key."""
    whole = pyyaml.load(mutants.whole, pyyaml.CSafeLoader)
    odd = [value for word in VALUES for value in parsed(word)]

    def change(number, rng):
        key = KEYS[number % len(KEYS)] if number < len(KEYS) else rng.choice(KEYS)
        values = changed(whole, key.split("."), rng.choice(odd))
        return pyyaml.dump(values, Dumper=pyyaml.CSafeDumper, allow_unicode=True)

    for lines in mutants(change).values():
        for line in lines:
            assert names_a_key(LINE.fullmatch(line)["rest"].split(": ")[0]), line


def parsed(word):
    """What a word of YAML means, in a list; an empty one for what means nothing."""
    try:
        return [pyyaml.safe_load(word)]
    except (pyyaml.YAMLError, ValueError, IndexError):  # `!!int` alone
        return []


def changed(whole, key, value):
    """A nested dict with another value at a path of keys, whose parents are made where they are null."""
    first, *rest = key
    inner = whole.get(first)
    return whole | {first: changed(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def names_a_key(text):
    """Whether a text is a key of the config, one above or one below it."""
    return any(f"{key}.".startswith(f"{text}.") or f"{text}.".startswith(f"{key}.") for key in KEYS)


NUMBER = st.floats(1e-6, 10.0).map(repr)
BY_SIZE = st.dictionaries(st.integers(8, 4096), st.integers(1, 4096), min_size=1).map(str)
IN_JSON = partial(json.dumps, ensure_ascii=False)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
VALID = {
    "run_name": st.sampled_from(["a", "7", "on", "'null'", "1e3", "2024-01-01"]),
    "data.path": TEXT,
    "data.augment.area": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1.0)).map(lambda pair: str(list(pair))),
    "device_batch_size": BY_SIZE,
    "device_microbatch_size": BY_SIZE,
    "optimizer.lr": NUMBER,
    "scheduler.final_div_factor": st.floats(1, 1e9).map(repr),
    "eval.sizes": st.lists(st.integers(8, 4096), min_size=1, unique=True).map(str),
    "loggers.wandb": st.dictionaries(TEXT.filter(str.isprintable), TEXT | st.none() | st.integers()).map(IN_JSON),
    "algorithms.mixup.alpha": NUMBER,
    "algorithms.fixres.start": st.floats(0, 1).map(repr),
    "algorithms.composer": st.just("{CutOut: {num_holes: 2}}"),
}


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_a_config_reads_back_equal(tmp_path_factory, drawn):
    path = tmp_path_factory.getbasetemp() / "valid.yaml"
    path.write_text("run_name: a\ndevice_batch_size: 8\ndata: {path: images}\n")
    valid = check(path, [f"{key}={value}" for key, value in drawn.items()])
    assert valid or any(key in drawn for key in ("data.path", "loggers.wandb"))  # whose text may be anything


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYS) | st.from_regex(r"[a-z_.]{1,20}", fullmatch=True),
            st.sampled_from(VALUES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        ).map("=".join),
        min_size=1,
        max_size=4,
    )
)
@example(["algorithms.mixup=&a [*a]"])
@example(["data.path=\x00"])
@example(["run_name=\x1b[31m"])
def test_any_overrides(tmp_path_factory, overrides):
    folder = tmp_path_factory.getbasetemp() / "overrides"
    folder.mkdir(exist_ok=True)
    path = folder / "a.yaml"
    path.write_text("run_name: a\ndevice_batch_size: 8\ndata: {path: images}\n")
    check(path, overrides)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    path = folder / "a.yaml"
    path.write_bytes(raw)
    check(path)
