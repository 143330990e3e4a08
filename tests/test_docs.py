"""The docs say what is so: every command is parsed, every link, file, message and picture compared with the source.

Nothing here imports torch: a command's flags are looked up in its source, its config is loaded as `--show` would.
"""

import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from recipes.cli import parse
from recipes.load import load_config
from tests.support import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
LAUNCHER = {"-n", "--world_size", "--base_rank", "--node_rank", "--master_addr", "--master_port"}
OTHERS = {".", "coverage", "mutmut", "pip", "aws", "export", "nvidia-smi", "tensorboard"}
"""Commands that are not ours, and are left alone."""
MESSAGE_SOURCES = sorted(path for room in ("recipes", "algorithms", "data") for path in (ROOT / room).rglob("*.py"))


def commands(page):
    """Each command of a page's `sh` blocks, as words."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


def without_launcher(words):
    """What `composer` is told to start: the words from the script, or from `-m MODULE`, on."""
    while words[0] in LAUNCHER:
        words = words[2:]
    return words


def check_config(words):
    """The YAML file and the overrides among the words describe a run."""
    files = [word for word in words if word.endswith(".yaml") and "=" not in word]
    assert len(files) == 1
    load_config(ROOT / files[0], [word for word in words if re.match(r"[\w.-]+=", word)])


def sources(module):
    """The files in which a module's flags stand."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    shared = ROOT / "recipes" / "cli.py"
    if spec.submodule_search_locations is None:
        return [Path(spec.origin), shared]
    folder = Path(spec.submodule_search_locations[0])
    assert (folder / "__main__.py").is_file(), f"{module} is no command"
    return [*folder.glob("*.py"), shared]


def check_module(module, words):
    """`python -m MODULE ...`: it is there, has the flags, and takes the YAML."""
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if "/" in word)
        return
    text = "".join(path.read_text(encoding="utf-8") for path in sources(module))
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in text, f"{module} has no {flag}"
    if module == "recipes.checkpoints":
        assert f'"{words[0]}":' in text
    if module.startswith("recipes.") and module != "recipes.report":
        check_config(words)


def check_entrypoint(words):
    """`entrypoint.py ...`."""
    given = parse(words, "")
    if given.path is not None:
        load_config(ROOT / given.path, given.overrides)


def check_make(words):
    """`make TARGET ...`."""
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def check(words):
    """One command."""
    program, rest = words[0], words[1:]
    if program == "make":
        check_make(rest)
    elif program in ("composer", "python"):
        rest = without_launcher(rest) if program == "composer" else rest
        if rest[0] == "-m":
            check_module(rest[1], rest[2:])
        else:
            assert (ROOT / rest[0]).is_file()
            check_entrypoint(rest[1:])
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


def flattened(text):
    return re.sub(r"\s+", " ", text)


def test_the_messages_of_troubleshooting_are_the_programs():
    source = "\n".join(path.read_text(encoding="utf-8") for path in MESSAGE_SOURCES)
    source = flattened(re.sub(r'"\s*\n\s*f?"', "", source))
    page = flattened((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    messages = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(messages) > 15
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in source, message


CALLS = {
    "list_objects_v2": "s3:ListBucket",
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "download_object": "s3:GetObject",
    "put_object": "s3:PutObject",
    "upload_object": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
}


def test_the_least_policy_allows_what_the_store_calls_and_nothing_else():
    text = (ROOT / "docs" / "s3.md").read_text()
    policy, lifecycle = map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL))
    assert lifecycle["Rules"][0]["AbortIncompleteMultipartUpload"]
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    source = (ROOT / "recipes" / "checkpoints" / "store.py").read_text()
    calls = set(re.findall(r"client\.(\w+)\(", source)) - {"get_paginator"}
    calls |= set(re.findall(r'get_paginator\("(\w+)"\)', source))
    calls |= set(re.findall(r"_objects\.((?:up|down)load_object)\(", source))
    assert {CALLS[call] for call in calls} == allowed
    assert set(re.findall(r"^\|.*?\| `(s3:\w+)` \|", text, re.MULTILINE)) == allowed
    on = {action: statement["Resource"] for statement in policy["Statement"] for action in statement["Action"]}
    assert on["s3:ListBucket"] == on["s3:ListBucketMultipartUploads"] == "arn:aws:s3:::my-bucket"
    assert on["s3:PutObject"] == on["s3:DeleteObject"] == "arn:aws:s3:::my-bucket/runs/*"
