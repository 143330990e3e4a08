"""A checkpoint is data: code in it is refused and does not run, and no mutation gets past without a message."""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from composer.algorithms import BlurPool

from recipes.checkpoints.find import load_manifest
from recipes.checkpoints.manifest import DamagedError, FileEntry, sha256_of
from recipes.checkpoints.safe import check_file, disallowed, signature
from recipes.checkpoints.save import serialise
from recipes.checkpoints.store import LocalStore
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Tiny

NEWEST, OLDER = "ep000-ba000004", "ep000-ba000002"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("safe"))
    tiny.go(tiny.interrupt_at(4))
    return tiny


@pytest.fixture
def run(saved, tmp_path):
    """A run with two checkpoints, to tamper with."""
    tiny = Tiny(tmp_path)
    shutil.copytree(saved.places.local, tiny.places.local)
    return tiny


def content(run, stem=NEWEST):
    return torch.load(run.places.local / f"{stem}.pt", weights_only=False)


def plant(run, payload, stem=NEWEST):
    """Put other bytes in a checkpoint's place, with a manifest that is true to them, as a thief of keys could."""
    store = LocalStore(run.places.local)
    (run.places.local / f"{stem}.pt").write_bytes(bytes(payload))
    path = run.places.local / f"{stem}.pt"
    entry = FileEntry(name=path.name, size=path.stat().st_size, sha256=sha256_of(path))
    manifest = load_manifest(store, stem).model_copy(update={"files": (entry,)})
    (run.places.local / f"{stem}.json").write_bytes(manifest.to_json())


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("where", ["top", "model", "rng", "callbacks"])
def test_code_in_a_pickle_is_refused_and_does_not_run(run, tmp_path, where, caplog):
    state = content(run)
    place = {"top": state, "model": state["state"]["model"], "rng": state, "callbacks": state["state"]["callbacks"]}
    place[where]["evil"] = Code(tmp_path / "proof")
    plant(run, serialise(state))
    resume = run.find()
    assert resume.manifest.stem == OLDER
    assert f"{NEWEST} passed over" in caplog.text
    assert "system" in caplog.text
    assert not (tmp_path / "proof").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(run, tmp_path):
    plant(run, pickle.dumps(Code(tmp_path / "proof")))
    assert run.find().manifest.stem == OLDER
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda evil, state: state["state"]["algorithms"].__setitem__(0, ("BlurPool", {"repr": evil})),
        lambda evil, state: state["state"]["algorithms"].append(("BlurPool", {"repr": evil})),
        lambda evil, state: state["state"]["algorithms"].append(("Alibi", {"repr": evil})),
        lambda evil, state: state["state"].__setitem__("algorithms", {"BlurPool": {"repr": evil}}),
        lambda evil, state: state["state"].__setitem__(
            "algorithms", (*state["state"]["algorithms"], ("X", {"repr": evil}))
        ),
        lambda evil, state: state["state"].__setitem__("algorithms", [("BlurPool", {})]),
        lambda evil, state: state["state"].__setitem__("algorithms", [3]),
        lambda evil, state: state["state"].__setitem__("algorithms", None),
        lambda evil, state: state["state"]["algorithms"][0][1].__setitem__("repr", 3),
    ],
)
def test_a_crafted_algorithm_is_refused_and_not_evaluated(run, tmp_path, change):
    proof = tmp_path / "proof"
    state = content(run)
    change(f"BlurPool.__class__ and __import__('os').system('touch {proof}') or BlurPool()", state)
    plant(run, serialise(state))
    assert run.find().manifest.stem == OLDER
    assert not proof.exists()


def test_composer_alone_would_have_run_it(run, tmp_path):
    """The danger is real: without our look, Composer evaluates the text while it loads."""
    proof = tmp_path / "proof"
    state = content(run)
    evil = f"SqueezeExcite() if __import__('os').system('touch {proof}') else None"
    state["state"]["algorithms"].append(("SqueezeExcite", {"repr": evil}))
    (tmp_path / "evil.pt").write_bytes(bytes(serialise(state)))
    from composer.core import State

    loaded = torch.load(tmp_path / "evil.pt", weights_only=True)
    run.go(run.interrupt_at(5))
    with contextlib.suppress(Exception):  # only the trace that it leaves counts
        State._apply_required_algorithms(run.state, loaded["state"], logger=None)
    assert proof.exists()


def test_where_every_checkpoint_carries_code_the_run_is_refused(run, tmp_path):
    for stem in (NEWEST, OLDER):
        state = content(run, stem)
        state["evil"] = Code(tmp_path / "proof")
        plant(run, serialise(state), stem)
    with pytest.raises(InputError, match="none can be used"):
        run.find()
    assert not (tmp_path / "proof").exists()


def test_a_state_that_could_not_be_loaded_again_is_noticed_when_saved(tmp_path):
    assert disallowed(serialise({"state": {"x": torch.zeros(2)}, "rng": [1, "a", None]})) == []
    assert any("PosixPath" in name or "Path" in name for name in disallowed(serialise({"x": tmp_path})))


def test_addresses_in_texts_do_not_count():
    class Plain(BlurPool):
        __repr__ = object.__repr__

    assert signature([Plain()]) == signature([Plain()])
    assert signature([BlurPool(min_channels=1)]) != signature([BlurPool(min_channels=2)])


def mutate(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.choice([1, 1, 2, 8, 64])):
        kind, at = random_.randrange(5), random_.randrange(len(changed))
        if kind == 0:
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            changed[at] = random_.randrange(256)
        elif kind == 2:
            del changed[at : at + random_.randrange(1, 64)]
        elif kind == 3:
            changed[at:at] = random_.randbytes(random_.randrange(1, 64))
        else:
            start = random_.randrange(len(changed))
            changed[at : at + 32] = changed[start : start + 32]
        if not changed:
            return b"\0"
    return bytes(changed)


def test_fuzzed_checkpoints_are_refused_with_a_message_or_load_as_data(run):
    """600 mutants with manifests true to them, half of them mutated within the pickle of a small state."""
    random_ = random.Random(0)
    algorithms = signature(run.algorithms())
    state = content(run)
    small = copy.deepcopy(state)
    small["rng"] = []
    small["state"]["optimizers"] = {}
    original, path = bytes(serialise(small)), run.places.local / "mutant.pt"
    loaded, refusals = 0, []
    for number in range(600):
        if number % 2:
            path.write_bytes(mutate(original, random_))
        else:
            repickled(original, path, random_)
        try:
            check_file(path, algorithms)
            loaded += 1
        except DamagedError as error:
            refusals.append(str(error))
    assert all(text and "\n" not in text for text in refusals)
    assert len(refusals) + loaded == 600
    assert len(refusals) > 100
    assert loaded > 10


def repickled(original, path, random_):
    """The archive with its pickle mutated and its checksums right, so that the mutation reaches the unpickler."""
    with zipfile.ZipFile(io.BytesIO(original)) as source, zipfile.ZipFile(path, "w") as sink:
        for item in source.infolist():
            data = source.read(item)
            sink.writestr(item, mutate(data, random_) if item.filename.endswith("data.pkl") else data)


def test_fuzzed_manifests_are_refused_with_a_message_or_pass_their_own_checks(run):
    random_ = random.Random(1)
    original = (run.places.local / f"{NEWEST}.json").read_bytes()
    taken, refusals = [], []
    for _ in range(300):
        (run.places.local / f"{NEWEST}.json").write_bytes(mutate(original, random_))
        try:
            taken.append(run.find().manifest.stem)
        except InputError as error:
            refusals.append(error.lines)
    assert set(taken) <= {NEWEST, OLDER}
    assert OLDER in taken
    assert not refusals


def test_a_manifest_of_great_depth_or_size_is_refused(run):
    for text in ("[" * 100_000, '{"config":' * 100_000, json.dumps({"files": [{}] * 1000})):
        (run.places.local / f"{NEWEST}.json").write_text(text)
        assert run.find().manifest.stem == OLDER
