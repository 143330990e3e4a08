import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recipes.watch.summary import commit, weights_sha256

CONTRACT = ["run_name", "finished", "epochs", "batches", "samples", "wall_seconds", "images_per_second", "top1", "top5"]
CONTRACT += ["eval_by_size", "weights_sha256", "resumed_from", "config_digest", "versions"]


def test_finished_run(finished):
    summary = finished.summary()
    assert list(summary)[: len(CONTRACT)] == CONTRACT
    assert (summary["run_name"], summary["finished"], len(summary["config_digest"])) == ("tiny", True, 64)
    assert (summary["epochs"], summary["batches"], summary["samples"]) == (4, 12, 80)
    assert list(summary["eval_by_size"]) == ["8", "16"]
    assert (summary["top1"], summary["top5"]) == tuple(summary["eval_by_size"]["16"][name] for name in ("top1", "top5"))
    assert summary["weights_sha256"] == weights_sha256(finished.trainer.state.model.state_dict())
    assert summary["resumed_from"] == []
    assert 0 < summary["seconds"]["train"] < summary["wall_seconds"] < 60
    seconds = summary["seconds"]["train"] + summary["seconds"]["loader_wait"]
    assert summary["images_per_second"] == pytest.approx(80 / seconds, rel=0.05)


def test_from_the_start_and_at_each_save(run):
    summary = run(die_at=2).summary()
    names = ("finished", "batches", "top1", "weights_sha256")
    assert [summary[name] for name in names] == [False, 0, None, None]
    assert run(die_at=5, save_at=["ba5"]).summary()["batches"] == 5
    assert run(die_at=8).summary()["batches"] == 6, "the last epoch's end"


def test_times_and_resumes_add_up(run):
    first = run(save_at=["ba5"], die_at=5).summary()
    second = run(load="ba5", save_at=["ba10"], die_at=10).summary()
    summary = run(load="ba10").summary()
    assert first["wall_seconds"] < second["wall_seconds"] < summary["wall_seconds"]
    assert summary["resumed_from"] == ["ba5.pt", "ba10.pt"]
    assert (summary["finished"], summary["samples"]) == (True, 80)


def test_commit(tmp_path: Path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

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


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_by_the_description():
    """Computed as the docstring says, with the standard library and NumPy."""
    state = {"b": torch.tensor([[1.5, -2.0], [0.0, 3.0]]), "a": torch.tensor(7), "note": "no tensor"}
    by_hand = hashlib.sha256()
    by_hand.update(b"a\0int64\0\0" + (7).to_bytes(8, "little"))
    by_hand.update(b"b\0float32\0" + b"2,2\0" + state["b"].numpy().astype("<f4").tobytes())
    assert weights_sha256(state) == by_hand.hexdigest()


@given(order=st.permutations(list(network().state_dict())), data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_bit_counts_but_neither_order_nor_wrappers(order, data):
    state = network().state_dict()
    digest = weights_sha256(state)
    prefix = data.draw(st.sampled_from(["", "module.", "module.module.", "_orig_mod.module."]))
    assert weights_sha256({prefix + name: state[name] for name in order}) == digest
    octets = state[order[0]].reshape(-1).view(torch.uint8)
    octets[data.draw(st.integers(0, len(octets) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert weights_sha256(state) != digest


def test_names_shapes_and_dtypes_count():
    for one, other in (
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}),
        ({"a": torch.zeros(4)}, {"a": torch.zeros(4, dtype=torch.int32)}),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(1), "b": torch.zeros(1)}),
        ({"a": torch.zeros(0)}, {}),
        ({"a": torch.ones(2, dtype=torch.bfloat16)}, {"a": torch.ones(2, dtype=torch.float16)}),
    ):
        assert weights_sha256(one) != weights_sha256(other)
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        weights_sha256({"a": torch.zeros(1), "module.a": torch.zeros(1)})
