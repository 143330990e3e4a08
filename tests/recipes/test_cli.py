import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import DataError, InputError, StalledError
from recipes.cli import YAMLS, command_parser, list_configs, parse, run_command, yaml_and_overrides

ROOT = YAMLS.parent
AS_MAIN = """
import runpy, sys
try:
    sys.argv = [{0!r}, *{1!r}]
    runpy.run_path({0!r}, run_name="__main__")
finally:
    print("heavy:", sorted({{"torch", "composer", "torchvision", "cv2", "numpy"}} & set(sys.modules)))
"""


def arguments(*argv):
    return parse(argv, "Train.", prog="train")


@pytest.mark.parametrize(
    ("argv", "path", "overrides"),
    [
        (["a.yaml"], "a.yaml", []),
        (["a.yaml", "seed=1", "eval.sizes=[1, 2]"], "a.yaml", ["seed=1", "eval.sizes=[1, 2]"]),
        (["seed=1", "a.yaml"], "a.yaml", ["seed=1"]),
        (["a.yaml", "model.name=" + 300 * "x"], "a.yaml", ["model.name=" + 300 * "x"]),  # no file has so long a name
        (["a.yaml", "--lr", "0.5", "seed=1"], "a.yaml", ["seed=1", "optimizer.lr=0.5"]),
        (["--lr=1e-3", "a.yaml", "optimizer.lr=2"], "a.yaml", ["optimizer.lr=2", "optimizer.lr=1e-3"]),
        (["a.yaml", "--resume"], "a.yaml", ["autoresume=true"]),
        (["--resume", "a.yaml"], "a.yaml", ["autoresume=true"]),
        (["a.yaml", "--resume", "seed=1"], "a.yaml", ["seed=1", "autoresume=true"]),
        (["a.yaml", "--resume", "x/ep1.safetensors"], "a.yaml", ["resume=x/ep1.safetensors"]),
        (["a.yaml", "--resume", "s3://bucket/a=b"], "a.yaml", ["resume=s3://bucket/a=b"]),
        (["a.yaml", "--resume=x", "seed=1"], "a.yaml", ["seed=1", "resume=x"]),
        (["--resume", "x", "a.yaml", "seed=1"], "a.yaml", ["seed=1", "resume=x"]),
    ],
)
def test_the_command_line_becomes_a_file_and_overrides(argv, path, overrides):
    assert arguments(*argv) == (Path(path), overrides, False, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "train: no YAML file given"),
        (["seed=1"], "train: no YAML file given"),
        (["a.yaml", "b.yaml"], "train: one YAML file at a time, got a.yaml and b.yaml"),
        (["a.yaml", "--sow"], "train: unrecognized arguments: --sow"),
        (["a.yaml", "--lr"], "train: argument --lr: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_reported_in_one_line(argv, message):
    with pytest.raises(InputError) as caught:
        arguments(*argv)
    (line,) = caught.value.lines
    assert line.startswith(message)
    assert line.endswith("see train --help")


COMMANDS = ("ablate", "checkpoints", "evaluate", "export", "find_lr", "plan", "predict", "report")


DATA_COMMANDS = ("demo", "imagenette", "prepare", "stage", "verify")
MODULES = [*(f"recipes.{name}" for name in COMMANDS), *(f"data.{name}" for name in DATA_COMMANDS), "entrypoint"]


@pytest.mark.parametrize("module", MODULES)
def test_help_is_read_on_80_columns(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 80] == []


def test_overrides_may_follow_an_option_of_several_values():
    parser = command_parser("bake", "Bakes.")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--output")
    parser.add_argument("--list", action="store_true")
    words = "a.yaml seed=1 --seeds 0 1 lr=2 --output b=c d=3 --list e=4"
    given = parser.parse_intermixed_args(words.split())
    assert yaml_and_overrides(parser, given.words) == (Path("a.yaml"), ["seed=1", "lr=2", "d=3", "e=4"])
    assert (given.seeds, given.output, given.list) == ([0, 1], "b=c", True)
    with pytest.raises(InputError, match="argument --seeds: invalid int value: 'lr=2'"):
        parser.parse_intermixed_args(["a.yaml", "--seeds", "lr=2"])


def test_every_yaml_is_listed_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = list_configs().splitlines()
    assert table[0].split()[:3] == ["CONFIG", "MODEL", "EPOCHS"]
    rows = [line.split()[0] for line in table[1:] if not line.startswith(" ")]
    assert rows == [str(path) for path in sorted(YAMLS.rglob("*.yaml"))]
    monkeypatch.chdir(ROOT)
    (row,) = (line for line in list_configs().splitlines() if line.startswith("yamls/p3.yaml "))
    for word in ("resnet50", " 90 ", "8x V100 16 GB (p3.16xlarge)"):
        assert word in row
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, list_configs().splitlines())) <= 80


def test_a_command_ends_with_lines_and_a_status(capsys, monkeypatch):
    def ended(error):
        def main():
            raise error

        return run_command(main), capsys.readouterr().err

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run_command(lambda: 75) == 75
    assert ended(InputError("a: b", "c: d")) == (2, "a: b\nc: d\n")
    assert ended(DataError("x: empty")) == (2, "x: empty\n")
    assert ended(StalledError("no batch")) == (1, "no batch\n")
    assert ended(KeyboardInterrupt()) == (1, "interrupted; run the same command again\n")
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError())


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (["--list-configs"], 0, "yamls/p3.yaml"),
        (["yamls/p3.yaml", "--show", "algorithms.mixup=off"], 0, "  mixup: off\n"),
        (["yamls/p3.yaml", "sed=3", "optimizer.lr=x"], 2, "optimizer.lr: got 'x'"),
    ],
)
def test_entrypoint_answers_without_torch_in_a_second(argv, status, expected):
    command = [sys.executable, "-c", AS_MAIN.format("entrypoint.py", argv)]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert time.perf_counter() - begin < 3  # half a second on an idle core
    assert done.returncode == status
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
