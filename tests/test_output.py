"""What real commands print and write of hostile names, and of secrets."""

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from tests.support import Process, end, start_two, write_images

CLASSES = [
    b"=HYPERLINK(1)",
    b"<img src=x onerror=alert(1)>",
    b"a\nINFO forged line",
    b"\x1b]0;owned\x07\x1b[2J",
    b"exe\xe2\x80\xae|gpj",
    b"\xe9l\xe9phant[b]",
]
SHOWN = ["=HYPERLINK(1)", "<img src=x onerror=alert(1)>", r"a\nINFO forged line", r"\x1b]0;owned\x07\x1b[2J"]
SHOWN += [r"exe\u202e|gpj", r"\xe9l\xe9phant[b]"]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIDSECRETID",
    "AWS_SECRET_ACCESS_KEY": "TOP/SECRET+KEY",
    "AWS_SESSION_TOKEN": "TOP/SECRET+TOKEN",
    "WANDB_API_KEY": "WANDBSECRETKEY",
}
ONCE = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1"}
LEAK = re.compile(rb"AKIDSECRETID|SECRET.{1,3}KEY|SECRET.{1,3}TOKEN|WANDBSECRET|P.{1,3}SSW0RD")
SMALL = [
    *("yamls/demo.yaml", "run_name=hostile", "model.name=timm/test_resnet", "device_batch_size=6", "max_duration=1ep"),
    *("eval.sizes=32", "algorithms.fixres=off", "algorithms.progressive_resizing=off", "loggers.tensorboard=false"),
    *("data.workers=1", "data.max_bad_fraction=0.5", "device=cpu"),
]


@pytest.fixture(scope="module", autouse=True)
def _secrets():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in (SECRETS | ONCE).items():
            patch.setenv(name, value)
        yield


def run(*words, **environment):
    """A command with the secrets in its environment; (status, stdout, stderr), both bytes."""
    with TemporaryFile() as out, TemporaryFile() as err:
        status = Process(words, os.environ | environment, out, err).wait()
        out.seek(0)
        err.seek(0)
        printed = out.read(), err.read()
    assert not LEAK.search(b"".join(printed))
    return status, *printed


def harmless(data):
    """No sequence for a terminal, no mark of direction, no forged line; well-formed UTF-8."""
    text = data.decode()
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]", text)
    assert not re.search("^INFO forged", text, re.MULTILINE)
    return text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on class folders and files with hostile names, trained with an ASCII terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    write_images(folder / "data", classes=len(CLASSES), train=4, val=2)
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            place = folder / "data" / split / f"class{label}"
            place.rename(os.fsdecode(os.fsencode(place.parent) + b"/" + name))
    evil = Path(os.fsdecode(os.fsencode(folder / "data" / "val") + b"/" + CLASSES[0]))
    (evil / os.fsdecode(b"\x1b[31mred\n\xff" + SECRETS["WANDB_API_KEY"].encode() + b".jpg")).write_bytes(b"no image")
    status, out, err = run(
        *("entrypoint.py", *SMALL, f"data.path={folder / 'data'}", f"runs_folder={folder / 'runs'}"),
        PYTHONIOENCODING="ascii",
    )
    assert status == 0, err
    return folder, out, err


def command(hostile, *words):
    folder = hostile[0]
    return (*words[:2], *SMALL, f"data.path={folder / 'data'}", f"runs_folder={folder / 'runs'}", *words[2:])


def test_training_prints_and_logs_hostile_names_as_they_may_be_shown(hostile):
    folder, out, err = hostile
    bad = rb"\x1b[31mred\n\xff***.jpg"
    assert bad in out
    log = (folder / "runs" / "hostile" / "log.txt").read_bytes()
    assert bad in log
    for data in (out, err, log):
        harmless(data)
    assert "results: " in log.decode()  # what is said at the end, too


def test_what_a_run_writes_for_people_is_harmless(hostile):
    folder = hostile[0] / "runs" / "hostile"
    written = [
        path for path in folder.rglob("*") if path.suffix in (".txt", ".json", ".jsonl", ".html", ".yaml", ".md")
    ]
    assert {"log.txt", "summary.json", "metrics.jsonl", "report.html", "config.yaml"} <= {path.name for path in written}
    for path in written:
        if path.parent.name == "checkpoints":
            continue  # the manifest's names are data: they are read back
        harmless(path.read_bytes())
        assert not LEAK.search(path.read_bytes()), path
    page = (folder / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert r"exe\u202e|gpj" in page


def test_evaluate_shows_and_writes_hostile_names(hostile, tmp_path):
    files = ("--csv", str(tmp_path / "classes.csv"), "--save", str(tmp_path / "figures.json"))
    words = command(hostile, "-m", "recipes.evaluate", "--per-class", *files)
    status, out, err = run(*words, PYTHONIOENCODING="ascii")
    assert status == 0, err
    text = harmless(out)
    for name in SHOWN[:2]:
        assert name[:12] in text
    assert r"\xe9l\xe9phant[b]" in text
    csv = harmless((tmp_path / "classes.csv").read_bytes())
    assert ",'=HYPERLINK(1)," in csv
    assert not re.search(r"(^|,)[=+@]", csv)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["class"] for row in figures["results"][0]["classes"]} == set(SHOWN)
    assert not LEAK.search((tmp_path / "figures.json").read_bytes())


def test_predict_names_hostile_files_and_classes(hostile):
    val = hostile[0] / "data" / "val"
    words = command(hostile, "-m", "recipes.predict", "--json", "--top", "6", str(val))
    status, out, err = run(*words, PYTHONIOENCODING="ascii")
    assert status == 2  # one is no image
    assert rb"\x1b[31mred\n\xff***.jpg" in err
    harmless(err)
    lines = [json.loads(line) for line in harmless(out).splitlines()]
    assert len(lines) == 2 * len(CLASSES)
    assert {one["name"] for one in lines[0]["predictions"]} == set(SHOWN)
    assert all(os.fsdecode(CLASSES[-1]) not in line["image"] for line in lines)


def test_an_export_has_hostile_classes_as_data_and_a_harmless_card(hostile, tmp_path):
    target = tmp_path / "exported"
    words = command(hostile, "-m", "recipes.export", "--output", str(target), "--formats", "safetensors")
    status, out, err = run(*words)
    assert status == 0, err
    harmless(out)
    harmless((target / "README.md").read_bytes())
    names = json.loads((target / "classes.json").read_text(encoding="utf-8"))
    assert {one["class"] for one in names} == set(SHOWN)


def test_verify_and_report_name_hostile_files(hostile, tmp_path):
    status, out, err = run("-m", "data.verify", str(hostile[0] / "data"), "--workers", "1", PYTHONIOENCODING="ascii")
    assert status == 1
    assert rb"\x1b[31mred\n\xff***.jpg" in harmless(out).encode()
    status, out, err = run("-m", "data.verify", str(hostile[0] / "data"), "--workers", "1", "--json")
    assert json.loads(out)["broken"][0]["name"].endswith(r"\x1b[31mred\n\xff***.jpg")
    copy = shutil.copytree(hostile[0] / "runs" / "hostile", tmp_path / "\x1b[2Jcopy\u202e")
    status, out, err = run("-m", "recipes.report", str(copy))
    assert status == 0, err
    assert r"\x1b[2Jcopy\u202e" in harmless(out)


@pytest.mark.parametrize(
    "words",
    [
        ("entrypoint.py", "\x1b[2J\u202e.yaml"),
        ("entrypoint.py", "yamls/demo.yaml", "data.path=/no/\x1b]0;x\x07\nINFO forged"),
        ("entrypoint.py", "yamls/demo.yaml", "se\u202eed=3"),
        ("-m", "recipes.plan", "yamls/demo.yaml", "\x1b[2J=3"),
        ("-m", "recipes.report", "/no/\x1b[2J\nINFO forged"),
        ("-m", "data.verify", "/no/\x1b[2J\nINFO forged"),
        ("-m", "data.prepare", "/no/\x1b[2J\nINFO forged", "/no/where"),
        ("-m", "recipes.checkpoints", "list\x1b[2J", "yamls/demo.yaml"),
    ],
)
def test_a_hostile_word_is_answered_in_harmless_lines(words):
    status, out, err = run(*words, PYTHONIOENCODING="ascii")
    assert status == 2, err
    harmless(out + err)
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("url", "module"),
    [
        ("http://bob:P%40SSW0RD@127.0.0.1:9", "data.verify"),
        ("http//bob:P@SSW0RD@x", "data.stage"),
        ("http://bob:PASSW0RD@[::1", "data.verify"),
    ],
)
def test_no_command_shows_a_secret(url, module, tmp_path):
    hasty = "import runpy, s3fs; s3fs.S3FileSystem.retries = 1; import data.files; data.files._RETRY_SECONDS = 1.0; "
    hasty += f"runpy.run_module('{module}', run_name='__main__')"
    status, out, err = run("-c", hasty, "s3://bucket/x", "--cache-folder", str(tmp_path), S3_ENDPOINT_URL=url)
    assert status == 2
    assert out + err
    assert b"Traceback" not in err


def test_neither_do_launched_processes_nor_their_files(tmp_path):
    words = ["entrypoint.py", *SMALL, f"runs_folder={tmp_path / 'runs'}", "checkpoints.folder=s3://bucket/x"]
    words += [f"data.path={write_images(tmp_path / 'data', classes=2, train=12)}", "checkpoints.patience=1s"]
    processes = start_two(words, S3_ENDPOINT_URL="http://bob:P%40SSW0RD@127.0.0.1:9")
    printed = "".join(output for _, output in map(end, processes))
    assert "127.0.0.1:9" in printed, printed
    assert not LEAK.search(printed.encode())
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or not LEAK.search(path.read_bytes()), path


@pytest.mark.parametrize(
    "key", ["data.path=s3://KEY:PASSW0RD@bucket/x", "loggers.mlflow.tracking_uri=http://b:PASSW0RD@h"]
)
def test_a_config_holds_no_password(key):
    status, out, err = run("entrypoint.py", "yamls/demo.yaml", "--show", key)
    assert (status, out) == (2, b"")
    assert f"on the command line: {key.partition('=')[0]}: holds a password" in err.decode()
