"""`python -m recipes.checkpoints list|verify|pull|prune`, as typed."""

import shutil
import sys

import pytest

from recipes.checkpoints.__main__ import main
from recipes.checkpoints.store import LocalStore, S3Store
from recipes.cli import run_command
from tests.recipes.checkpoints.tiny import damage, save

YAML = "run_name: tiny\ndevice_batch_size: 8\ndata: {path: nowhere}\n"


@pytest.fixture
def type_in(tmp_path, monkeypatch, capsys):
    """Run a command on the run's YAML: its status, and what it printed on both streams."""
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(YAML)

    def type_in(command, *overrides):
        words = [command, str(yaml), f"runs_folder={tmp_path / 'runs'}", *overrides]
        monkeypatch.setattr(sys, "argv", ["checkpoints", *words])
        status = run_command(main)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return type_in


@pytest.fixture
def disk(tmp_path):
    return LocalStore(tmp_path / "runs" / "tiny" / "checkpoints")


def five(store, into=None):
    """Checkpoints of which the second is the best, in one store or two."""
    stems = [save(store, batch, top1=0.9 if batch == 2 else 0.1 * batch) for batch in range(1, 6)]
    if into is not None:
        for name in store.entries():
            into.put(name, store.path(name))
    return stems


def stems_in(store):
    return {name.split(".")[0] for name in store.entries()}


def test_list_names_each_checkpoint_and_verify_finds_what_is_damaged_or_torn(disk, type_in):
    assert type_in("list")[:2] == (0, f"{disk.location}\n  no checkpoints\n")
    assert type_in("verify")[0] == 0
    stems = five(disk)
    status, out, _ = type_in("list")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == disk.location
    assert [line.split()[0] for line in lines[1:]] == stems
    assert lines[2].endswith("16 images  top-1 90.00 %")
    assert type_in("verify")[0] == 0
    damage(disk.path(f"{stems[0]}.safetensors"), "bit")
    disk.path(f"{stems[1]}.json").unlink()
    status, out, _ = type_in("verify")
    assert status == 1
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["damaged:", "torn:", "good", "good", "good"]


def test_pull_fetches_the_newest_good_one_to_an_emptied_disk(disk, url, type_in):
    *_, older, newest = five(disk, S3Store(url))
    shutil.rmtree(disk.folder)
    folder = f"checkpoints.folder={url}"
    assert type_in("pull", folder)[:2] == (0, f"{disk.path(newest)}.safetensors\n")
    assert stems_in(disk) == {newest}
    S3Store(url).put(f"{newest}.safetensors", b"x")
    status, out, err = type_in("pull", folder)
    assert (status, out) == (0, f"{disk.path(older)}.safetensors\n")
    assert newest in err
    assert type_in("verify", folder)[0] == 1


def test_prune_keeps_the_newest_and_the_best_in_both_places(disk, url, type_in):
    stems = five(disk, S3Store(url))
    keeps = (f"checkpoints.folder={url}", "checkpoints.keep=1", "checkpoints.keep_remote=2")
    status, out, _ = type_in("prune", *keeps)
    assert status == 0
    assert stems_in(disk) == {stems[1], stems[4]}
    assert stems_in(S3Store(url)) == {stems[1], stems[3], stems[4]}
    assert len(out.splitlines()) == 5
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
    status, _, err = type_in("pull")
    assert status == 2
    assert err.startswith("checkpoints.folder: is not a bucket")
