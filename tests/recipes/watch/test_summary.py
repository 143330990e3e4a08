import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from recipes.watch.fingerprint import weights_sha256
from recipes.watch.versions import commit, versions

CONTRACT = [
    "run_name",
    "finished",
    "epochs",
    "batches",
    "samples",
    "wall_seconds",
    "images_per_second",
    "top1",
    "top5",
    "eval_by_size",
    "weights_sha256",
    "resumed_from",
    "config_digest",
    "versions",
]


def read(result):
    return json.loads((result.folder / "summary.json").read_text())


def test_finished_run(run):
    result = run()
    summary = read(result)
    assert list(summary)[: len(CONTRACT)] == CONTRACT
    assert (summary["run_name"], summary["finished"], summary["config_digest"]) == ("tiny", True, "c0ffee")
    assert (summary["epochs"], summary["batches"], summary["samples"]) == (4, 12, 80)
    assert list(summary["eval_by_size"]) == ["8", "16"]
    assert (summary["top1"], summary["top5"]) == tuple(summary["eval_by_size"]["16"][name] for name in ("top1", "top5"))
    assert summary["weights_sha256"] == weights_sha256(result.trainer.state.model.state_dict())
    assert summary["resumed_from"] == []
    assert 0 < summary["seconds"]["train"] < summary["wall_seconds"] < 60
    seconds = summary["seconds"]["train"] + summary["seconds"]["loader_wait"]
    assert summary["images_per_second"] == pytest.approx(80 / seconds, rel=0.05)


def test_from_the_start_and_at_each_save(run):
    seen = []

    def look(result):
        seen.append((result.folder / "summary.json").exists())

    dead = run(die_at=2, prepare=look)
    summary = read(dead)
    assert seen == [False]
    assert (summary["finished"], summary["batches"], summary["top1"], summary["weights_sha256"]) == (
        False,
        0,
        None,
        None,
    )
    assert read(run(die_at=5, save_at=["ba5"]))["batches"] == 5
    assert read(run(die_at=8))["batches"] == 6, "the last epoch's end"


def test_times_and_resumes_add_up(run):
    first = run(save_at=["ba5"], die_at=5)
    wall = read(first)["wall_seconds"]
    second = run(load="ba5", save_at=["ba10"], die_at=10)
    wall_later = read(second)["wall_seconds"]
    assert wall_later > wall
    summary = read(run(load="ba10"))
    assert summary["wall_seconds"] > wall_later
    assert summary["resumed_from"] == ["ba5.pt", "ba10.pt"]
    assert (summary["finished"], summary["samples"]) == (True, 80)


def test_state_is_plain_data(run, tmp_path):
    run(save_at=["ep2"])
    state = torch.load(tmp_path / "ep2.pt", weights_only=False)["state"]
    ours = {
        name: state["callbacks"][name]
        for name in ("Figures", "Summary", "BadImages", "TrainingImages", "MetricsFile", "TensorBoard")
    }
    torch.save(ours, tmp_path / "ours.pt")
    assert torch.load(tmp_path / "ours.pt", weights_only=True) == ours

    def plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(plain(item) for item in value)
        return type(value) in (str, int, float, bool)

    assert plain(ours)


def test_versions():
    found = versions("cpu")
    packages = ["torch", "torchvision", "composer", "timm", "numpy"]
    assert list(found) == ["python", *packages, "commit", "device", "cpu", "memory"]
    assert found["python"] == platform.python_version()
    assert found["composer"] == "0.32.1"
    assert found["device"].startswith("1 x CPU")
    assert found["cpu"].startswith(f"{os.cpu_count()} x ")
    assert int(found["memory"].removesuffix(" GB")) > 0


def test_commit(tmp_path: Path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert commit(tmp_path) is None
    git("init", "-q")
    assert commit(tmp_path) is None, "no commit yet"
    (tmp_path / "file").write_text("a")
    git("add", ".")
    git("commit", "-qm", "first")
    assert commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "inside").mkdir()
    assert commit(tmp_path / "inside") is None, "a folder in someone else's checkout"
