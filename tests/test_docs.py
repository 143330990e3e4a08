"""The docs are right: every command is parsed; every link, file, message and S3 permission checked."""

import importlib.util
import itertools
import json
import re
import shlex
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path

import pytest
from botocore.client import BaseClient

from recipes.checkpoints.store import S3Store
from recipes.cli import parse
from recipes.load import load_config
from tests.support import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
LAUNCHER = {"-n", "--world_size", "--base_rank", "--node_rank", "--master_addr", "--master_port"}
OTHERS = {".", "coverage", "mutmut", "pip", "aws", "export", "nvidia-smi", "tensorboard"}
"""Commands that are not ours, which are not checked."""


def commands(page):
    """Each command of a page's `sh` blocks, as words."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


def check_config(words):
    """The YAML files and the overrides among the words describe runs."""
    files = [word for word in words if word.endswith(".yaml") and "=" not in word]
    assert len(files) == 1 or "--machine" in words  # recipes.plan compares several
    for file in files:
        load_config(ROOT / file, [word for word in words if re.match(r"[\w.-]+=", word)])


def check_module(module, words):
    """`python -m MODULE ...`: it exists, has the flags, and takes the YAML."""
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if "/" in word)
        return
    spec = importlib.util.find_spec(module)
    files = [Path(spec.origin), ROOT / "recipes" / "cli.py"]
    if module == "benchmarks.fixres_resolutions":  # takes the other's flags too
        files.append(ROOT / "benchmarks" / "time_to_accuracy.py")
    if spec.submodule_search_locations is not None:
        files[:1] = files[0].parent.glob("*.py")
        assert files[0].with_name("__main__.py") in files, f"{module} is no command"
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in text, f"{module} has no {flag}"
    if module == "recipes.checkpoints":
        assert f'"{words[0]}":' in text
    if module.startswith("recipes.") and module != "recipes.report":
        check_config(words)


def check_program(words):
    """What `python` or `composer` starts."""
    if words[0] == "-m":
        check_module(words[1], words[2:])
        return
    assert (ROOT / words[0]).is_file()
    given = parse(words[1:], "")
    if given.path is not None:
        load_config(ROOT / given.path, given.overrides)


def check(words):
    program, rest = words[0], words[1:]
    if program == "make":
        targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program == "python":
        check_program(rest)
    elif program == "composer":
        while rest[0] in LAUNCHER:
            rest = rest[2:]
        check_program(rest)
    elif program == "sbatch":
        script = next(word for word in rest if not word.startswith("-"))
        assert (ROOT / script).is_file()
        check_config(rest[rest.index(script) + 1 :])
    elif program == "sky":
        assert rest[:2] == ["jobs", "launch"]
        given = (ROOT / rest[2]).read_text()
        names = [word.split("=")[0] for before, word in itertools.pairwise(rest) if before == "--env"]
        assert all(f"\n  {name}: " in given for name in names)
    else:
        assert program in OTHERS, f"no check for {program}"


@pytest.mark.parametrize(("page", "words"), ALL, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_command_of_the_docs_is_valid(page, words):
    check(words)


def slug(heading):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_something(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\n(?=[^\n])", " ", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    rooms = "recipes|algorithms|data|tests|cloud|docs|yamls|benchmarks"
    for path in re.findall(rf"(?<![\w/.])((?:{rooms})/[\w/.-]+\.(?:py|yaml|sh|md))\b", text):
        if "gradient_centralization" not in path:  # the example of how to add one
            assert (ROOT / path).is_file(), path
    for module in set(re.findall(r"python -m ((?:recipes|data|benchmarks)\.\w+)", text)):
        assert importlib.util.find_spec(module) is not None, module


def test_the_messages_in_troubleshooting_exist():
    files = sorted(path for package in ("recipes", "algorithms", "data") for path in (ROOT / package).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    messages = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(messages) > 15
    parts = [part.strip() for message in messages for part in message.split("...")]
    assert [part for part in parts if part not in " ".join(source.split())] == []


NEEDS = {name: f"s3:{name}" for name in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")}
NEEDS |= {"HeadObject": "s3:GetObject", "ListObjectsV2": "s3:ListBucket"}
NEEDS |= {"ListMultipartUploads": "s3:ListBucketMultipartUploads"}
"""The permission that an operation needs."""


def test_the_least_policy_allows_what_the_store_calls_and_nothing_else(monkeypatch, tmp_path):
    called = set()

    def answer(client, operation, parameters):
        called.add(NEEDS[operation])
        http = {"HTTPHeaders": {"date": "Thu, 26 Nov 2026 20:00:00 GMT"}, "HTTPStatusCode": 200}
        found = {"Body": BytesIO(b"x"), "ContentLength": 1, "LastModified": datetime.now(timezone.utc)}
        return {"ResponseMetadata": http, "Uploads": [{"Key": "runs/x/a", "UploadId": "1"}], **found}

    monkeypatch.setattr(BaseClient, "_make_api_call", answer)
    store, file = S3Store("s3://my-bucket/runs/x"), tmp_path / "file"
    store.entries()
    store.read("a")
    store.fetch("a", file)
    store.put("a", b"x")
    store.put("a", file)
    store.delete(["a"])
    store.abort_leftovers()

    text = (ROOT / "docs" / "s3.md").read_text()
    policy, lifecycle = map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL))
    assert lifecycle["Rules"][0]["AbortIncompleteMultipartUpload"]
    on = {action: statement["Resource"] for statement in policy["Statement"] for action in statement["Action"]}
    assert called == on.keys() == set(re.findall(r"^\|.*?\| `(s3:\w+)` \|", text, re.MULTILINE))
    assert on["s3:ListBucket"] == on["s3:ListBucketMultipartUploads"] == "arn:aws:s3:::my-bucket"
    assert on["s3:PutObject"] == on["s3:DeleteObject"] == "arn:aws:s3:::my-bucket/runs/*"
