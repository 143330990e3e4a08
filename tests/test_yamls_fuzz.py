"""Whatever is written into a YAML: a config, or lines that name a key or the file. Never another exception."""

import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.load import load_config
from recipes.resolved import config_digest, resolved
from recipes.schema import paths

YAMLS = sorted((Path(__file__).resolve().parents[1] / "yamls").rglob("*.yaml"))
MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "300"))
KEYS = [".".join(path) for path in paths(RunConfig)]
PLAIN = "null ~ on off yes no true 0 -1 1 3 1e-3 1e999 .nan -.inf 017 0x10 1_0 1:30 2024-01-01 90ep 5ba 0.1dur fp32 gpu"
ODD = "{} [] [1] [32,40] {a:1} {128:3} {x:{y:z}} '' '3' \"\\0\" ! & * *x &x !!int !!binary % @ ` | > - ? : , # [ ] { }"
MORE = "{<<:3} resnet50 constant one_cycle é \ufeff \u2028 \U0001f600 999999999999999999999999 -0.0 1.0 ../x / s3://a"
VALUES = [word for words in (PLAIN, ODD, MORE) for word in words.split(" ")]
LINE = re.compile(
    r"(?P<place>[^:\n]*\.yaml(:\d+)?|'.*' on the command line|\".*\" on the command line): (?P<rest>.+)", re.DOTALL
)


def mutate(text, rng):
    """One to four changes of lines, characters, keys or values."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines[at] = " " * rng.randint(0, 6) + lines[at].strip()
        elif kind == 3:
            lines[at] = lines[at].split(":")[0] + ": " + rng.choice(VALUES)
        elif kind == 4:
            lines.insert(at, " " * rng.choice((0, 2, 4)) + rng.choice(KEYS).split(".")[-1] + ": " + rng.choice(VALUES))
        elif kind == 5 and lines[at]:
            cut = rng.randrange(len(lines[at]))
            lines[at] = (
                lines[at][:cut] + rng.choice(("", "\t", ":", "x", "\x00", "\u0085", "é", "- ")) + lines[at][cut + 1 :]
            )
        elif kind == 6:
            key, colon, rest = lines[at].partition(":")
            letters = list(key)
            rng.shuffle(letters)
            lines[at] = "".join(letters) + colon + rest
        elif kind == 7:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines = lines[: at + 1]
        text = "\n".join(lines)
    return text


def check(path, overrides=()):
    """Load; True for a config, which must read back, and False for errors, which must name their place."""
    try:
        config = load_config(path, overrides)
    except InputError as error:
        lines = error.lines
    else:
        lines = None
    if lines is not None:
        assert lines
        for line in lines:
            assert LINE.fullmatch(line), line
            assert not any(word in line for word in ("\n", "Input should", "Value error", "pydantic")), line
        return False
    again = path.with_name("again.yaml")
    again.write_text(resolved(config), encoding="utf-8")
    assert load_config(again) == config
    assert len(config_digest(config)) == 64
    return True


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)
def test_mutated_yamls(yaml, tmp_path):
    original = resolved(load_config(yaml)) + "\n" + "".join(f"# {line}\n" for line in yaml.read_text().split("\n"))
    short = yaml.read_text(encoding="utf-8")
    (tmp_path / "medium.yaml").write_text((yaml.parent / "medium.yaml").read_text())
    rng = random.Random(yaml.stem)
    valid = 0
    for number in range(MUTANTS // len(YAMLS)):
        path = tmp_path / "mutant.yaml"
        text = mutate(short if number % 2 else original, rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        valid += check(path)
    assert 0 < valid < MUTANTS // len(YAMLS)  # it reaches both


@settings(max_examples=150, deadline=None)
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
