"""`python -m recipes.checkpoints list|verify|pull|prune`, as typed."""

import shutil
import sys

import pytest

from recipes.checkpoints.__main__ import main
from recipes.checkpoints.places import Places
from recipes.checkpoints.s3 import S3Store
from recipes.cli import run_command
from tests.recipes.checkpoints.tiny import Tiny, damage

YAML = "run_name: tiny\ndevice_batch_size: 8\ndata: {path: nowhere}\n"


@pytest.fixture
def type_in(tmp_path, monkeypatch, capsys):
    """Run a command on the tiny run's YAML: its status, and what it printed on both streams."""
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(YAML)

    def type_in(command, *overrides):
        words = [command, str(yaml), f"runs_folder={tmp_path / 'runs'}", *overrides]
        monkeypatch.setattr(sys, "argv", ["checkpoints", *words])
        status = run_command(main)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return type_in


def trained(tmp_path, remote=None, **settings):
    run = Tiny(tmp_path / "runs" / "tiny", remote, **settings)
    run.places = Places.of(
        "{runs_folder}/{run_name}/checkpoints" if remote is None else remote, str(tmp_path / "runs"), "tiny"
    )
    assert run.go().keys()
    return run


def test_list_names_each_checkpoint_with_its_size_and_accuracy(tmp_path, type_in):
    run = trained(tmp_path)
    status, out, _ = type_in("list")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == str(run.places.local)
    assert [line.split()[0] for line in lines[1:]] == run.stems()
    assert lines[-1].endswith("finished")
    assert "top-1" in lines[-1]


def test_an_empty_place_is_said_to_be_empty(type_in):
    status, out, _ = type_in("list")
    assert status == 0
    assert out.splitlines()[1].strip() == "no checkpoints"
    assert type_in("verify")[0] == 0


def test_verify_finds_what_is_damaged_and_what_is_torn(tmp_path, type_in):
    run = trained(tmp_path)
    assert type_in("verify")[0] == 0
    first, second = run.stems()[:2]
    damage(run.places.local / f"{first}.safetensors", "bit")
    (run.places.local / f"{second}.json").unlink()
    status, out, _ = type_in("verify")
    assert status == 1
    found = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert found[first] == "damaged:"
    assert found[second] == "torn:"
    assert found[run.stems()[-1]] == "good"


def test_pull_brings_the_newest_good_one_to_an_emptied_disk(tmp_path, url, type_in):
    run = trained(tmp_path, url)
    newest = run.stems()[-1]
    shutil.rmtree(tmp_path / "runs")
    folder = f"checkpoints.folder={url}"
    status, out, _ = type_in("pull", folder)
    assert status == 0
    assert out.strip() == str(run.places.local / f"{newest}.safetensors")
    assert run.stems() == [newest]
    (tmp_path / "spoilt").write_bytes(b"x")
    S3Store(url).put(f"{newest}.safetensors", tmp_path / "spoilt")
    status, out, err = type_in("pull", folder)
    assert status == 0
    assert newest in err
    assert newest not in out
    assert type_in("verify", folder)[0] == 1


def test_pull_without_a_bucket_is_a_mistake(type_in):
    status, _, err = type_in("pull")
    assert status == 2
    assert err.startswith("checkpoints.folder: names no bucket")


def test_prune_keeps_the_newest_and_the_best_in_both_places(tmp_path, url, type_in):
    run = trained(tmp_path, url, keep=9, keep_remote=9)
    newest = run.stems()[-1]
    keeps = (f"checkpoints.folder={url}", "checkpoints.keep=1", "checkpoints.keep_remote=1")
    status, out, _ = type_in("prune", *keeps)
    assert status == 0
    left = run.stems()
    assert newest in left
    assert len(left) <= 2
    removed = {line.rpartition("/")[2] for line in out.splitlines() if str(run.places.local) in line}
    assert removed
    assert removed.isdisjoint(left)
    names = {entry.name.split(".")[0] for entry in S3Store(url).entries() if entry.name.startswith("ep")}
    assert newest in names
    assert len(names) <= 2
    assert type_in("verify", *keeps)[0] == 0
    assert type_in("prune", *keeps)[:2] == (0, "nothing to remove\n")


@pytest.mark.parametrize("words", [["lst"], ["list"], ["list", "absent.yaml"]])
def test_what_cannot_be_done_is_one_line_and_status_2(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["checkpoints", *words])
    assert run_command(main) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_missing_bucket_is_one_line_and_status_2(url, type_in):
    status, out, err = type_in("list", "checkpoints.folder=s3://absent-bucket/x")
    assert status == 2
    assert "the bucket does not exist" in err
    assert "Traceback" not in out + err
