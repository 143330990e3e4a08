"""A checkpoint is data: nothing in one runs, hangs or eats the memory, and what loads is what was saved."""

import datetime
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from composer import Callback
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from recipes.checkpoints.format import pack, restore, restore_generators, unpack
from recipes.checkpoints.manifest import DamagedError
from tests.recipes.checkpoints.mutants import with_tree
from tests.recipes.checkpoints.tiny import Tiny, content_of, plant
from tests.support import ROOT

NEWEST, OLDER = "ep000-ba000004", "ep000-ba000002"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("format"))
    tiny.go(tiny.interrupt_at(4))
    return tiny


@pytest.fixture
def run(saved, tmp_path):
    """A run with two checkpoints, to tamper with."""
    tiny = Tiny(tmp_path)
    shutil.copytree(saved.places.local, tiny.places.local)
    return tiny


def tampered(run, change, stem=NEWEST):
    content = content_of(run.places.local, stem)
    change(content)
    plant(run.places.local, stem, pack(content))


def ema(state):
    return dict(state["algorithms"])["EMA"]


def averages(state):
    return ema(state)["ema_model"]["named_parameters_dict"]


def group(state):
    return state["optimizers"]["SGD"]["param_groups"][0]


def slots(state):
    return state["optimizers"]["SGD"]["state"]["module.4.weight"]


def whole(content):
    return b"".join(pack(content))


def equal(left, right):
    """Deep equality, types and strides included."""
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and left.stride() == right.stride()
        return same and left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right or (left != left and right != right)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8)
tensors = st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.float64]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=4).map(lambda shape: torch.ones(shape, dtype=dtype))
)
layouts = st.lists(st.integers(1, 4), min_size=4, max_size=4).map(
    lambda shape: torch.rand(shape).to(memory_format=torch.channels_last)
)
leaves = scalars | tensors | layouts | st.timedeltas()
keys = st.text(max_size=6) | st.integers(0, 99) | st.sampled_from(["$tensor", "a/b", "tree.json"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=20,
)


@given(trees)
@settings(max_examples=300, deadline=None)
def test_what_is_packed_is_unpacked_with_its_types_and_memory_layout(content):
    assert equal(unpack(whole(content)), content)


def test_what_is_packed_does_not_change_with_what_is_trained():
    for tensor in (torch.ones(3, 4), torch.ones(4, 6)[:, ::2].t(), torch.ones(2, 3, 4, 5).permute(0, 3, 1, 2)):
        before, packed = tensor.clone(), pack({"weights": tensor, "array": tensor.numpy()})
        tensor.zero_()
        content = unpack(b"".join(packed))
        assert torch.equal(content["weights"], before)
        assert np.array_equal(content["array"], before.numpy())


def test_any_safetensors_reader_opens_a_checkpoint_which_holds_no_text_that_composer_would_evaluate(run):
    tensors = safetensors.torch.load_file(run.places.local / f"{NEWEST}.safetensors")
    text = bytes(tensors["tree.json"].numpy())
    assert b"BlurPool(" not in text
    content, node = content_of(run.places.local, NEWEST), json.loads(text)["state"]["model"]["module.4.weight"]
    assert torch.equal(tensors[node["$tensor"]], content["state"]["model"]["module.4.weight"])
    assert not any("repr" in state for _, state in content["state"]["algorithms"])
    (generators,) = content["rng"]
    assert generators["numpy"][1].dtype == np.uint32
    random.Random().setstate(generators["python"])


@pytest.mark.parametrize("value", [object(), {1.5: "x"}, {(1,): 2}, torch.zeros(2, dtype=torch.complex64), b"x", {3}])
def test_what_a_checkpoint_cannot_hold_is_named(value):
    with pytest.raises(TypeError, match=r"^state/x"):
        pack({"state": {"x": value}})


class Strange(Callback):
    def state_dict(self):
        return {"place": object()}


def test_a_state_that_cannot_be_saved_is_told_before_training(tiny):
    with pytest.raises(InputError, match="the state of Strange cannot be saved: place: a checkpoint cannot hold"):
        tiny.go(Strange())
    assert tiny.stems() == []


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("writer", [lambda code, path: path.write_bytes(pickle.dumps(code)), torch.save])
def test_a_pickle_is_refused_and_does_not_run(run, tmp_path, writer, caplog):
    writer(Code(tmp_path / "proof"), tmp_path / "evil")
    plant(run.places.local, NEWEST, [(tmp_path / "evil").read_bytes()])
    assert run.find().manifest.stem == OLDER
    assert "is not a checkpoint" in caplog.text
    assert not (tmp_path / "proof").exists()


def test_a_text_of_an_algorithm_in_the_file_is_not_evaluated(run, tmp_path):
    """Composer evaluates `repr` of what it loads, which is the run's own; a file's is refused."""
    evil = f"BlurPool(*[__import__('os').system('touch {tmp_path}/proof')][:0])"
    tampered(run, lambda content: content["state"]["algorithms"][0][1].update(repr=evil))
    with pytest.raises(InputError, match=f"{NEWEST}.*: does not fit this run: algorithms/BlurPool has other keys"):
        run.go()
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(algorithms={"BlurPool": {}}),
        lambda state: state.update(algorithms=[("BlurPool", {}, 1)]),
        lambda state: state.update(algorithms=[3]),
        lambda state: state.update(algorithms=None),
        lambda state: state.update(model=[]),
        lambda state: state["model"].update(x="text"),
        lambda state: state["model"].update({5: torch.zeros(1)}),
        lambda state: state.pop("optimizers"),
        lambda state: state["timestamp"]["Timestamp"].update(batch=3),
        lambda state: state["timestamp"]["Timestamp"].update(batch="4"),
        lambda state: state["timestamp"].clear(),
        lambda state: state.update(timestamp=7),
    ],
)
def test_what_is_no_state_of_this_run_is_skipped_and_the_older_one_taken(run, change):
    tampered(run, lambda content: change(content["state"]))
    assert run.find().manifest.stem == OLDER


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["algorithms"].append(("SqueezeExcite", {"repr": "exit()"})),
        lambda state: state["algorithms"].pop(),
        lambda state: ema(state).update(apply="text"),
        lambda state: ema(state).pop("ema_model"),
        lambda state: ema(state).update(ema_model=3),
        lambda state: averages(state).popitem(),
        lambda state: averages(state).update(x=torch.zeros(1)),
        lambda state: averages(state).update({"module.4.weight": torch.zeros(1)}),
        lambda state: state["model"].update({"module.4.weight": torch.zeros(1)}),
        lambda state: state["model"].pop("module.4.weight"),
        lambda state: state["model"].update(extra=torch.zeros(1)),
        lambda state: state["optimizers"].clear(),
        lambda state: state["optimizers"]["SGD"].update(param_groups=3),
        lambda state: state["optimizers"]["SGD"].pop("state"),
        lambda state: group(state).update(lr="much"),
        lambda state: group(state).pop("momentum"),
        lambda state: state["optimizers"]["SGD"]["param_groups"].append({}),
        lambda state: state["optimizers"]["SGD"]["state"].update(x={}),
        lambda state: slots(state).update(momentum_buffer=torch.zeros(3)),
        lambda state: slots(state).update(momentum_buffer="x"),
        lambda state: slots(state).update(momentum_buffer=3),
        lambda state: slots(state).update(momentum_buffer=torch.tensor(1.0)),
        lambda state: group(state).update(params=[]),
        lambda state: group(state).update(params=3),
        lambda state: state["timestamp"]["Timestamp"].update(total_wct=datetime.timedelta.max),
        lambda state: state["timestamp"]["Timestamp"].update(total_wct=3),
        lambda state: state["timestamp"]["Timestamp"].update(token="many"),
        lambda state: state.update(callbacks=7),
    ],
)
def test_what_does_not_fit_this_run_is_one_line_and_no_traceback(saved, change):
    state = content_of(saved.places.local, NEWEST)["state"]
    change(state)
    with pytest.raises(InputError) as refused:
        restore(saved.state, state, saved.logger, NEWEST)
    assert len(refused.value.lines) == 1
    assert NEWEST in refused.value.lines[0]


def test_the_gradient_scaler_of_an_older_checkpoint_is_restored(saved):
    """Until 17c0e40 the Trainer had Composer's other class, as 267d64b wrote it."""
    state = content_of(saved.places.local, NEWEST)["state"]
    (own,) = state["scaler"].values()
    restore(saved.state, {**state, "scaler": {"ClosureGradScaler": own}}, saved.logger, NEWEST)
    for wrong in ({}, {"ClosureGradScaler": {"scale": 1.0}}, {"ClosureGradScaler": 3}, 3):
        with pytest.raises(InputError, match=f"{NEWEST}: does not fit this run: "):
            restore(saved.state, {**state, "scaler": wrong}, saved.logger, NEWEST)


def test_generators_that_are_none_are_refused_in_one_line(saved):
    (own,) = content_of(saved.places.local, NEWEST)["rng"]
    changes = [{"torch": torch.zeros(5056, dtype=torch.uint8)}, {"python": (3, (1, 2), None)}]
    changes += [{"numpy": (*own["numpy"][:2], position, 0, 0.0)} for position in (2**31 - 1, -1)]
    for generators in (3, {}, *(own | change for change in changes)):
        with pytest.raises(InputError, match=f"{NEWEST}: its random generators are malformed") as refused:
            restore_generators([generators], NEWEST)
        assert len(refused.value.lines) == 1


def test_dimensions_and_keys_that_take_hours_are_refused():
    with pytest.raises(DamagedError, match="20 dimensions"):
        unpack(whole({"w": torch.ones([1] * 20)}))
    with pytest.raises(DamagedError, match="dict is unknown or malformed"):
        unpack(whole({2**61 - 1: 0}))


TREES = r"""
NaN 1e {} {"$tensor":"tree.json"} {"$tensor":"absent"} {"$tensor":[1]} {"$tensor":"w","order":[0,0]}
{"$tensor":"w","order":[5]} {"$tensor":"w","order":"01"} {"$tensor":"w","more":1} [{"$tensor":"w"},{"$tensor":"w"}]
{"$float":"1"} {"$float":[]} {"$timedelta":"x"} {"$timedelta":99999999999999999999999999999} {"$dict":[[[],1]]}
{"$dict":[[1.5,1]]} {"$dict":3} {"$dict":[1]} {"$tuple":{}} {"$class":"os.system"} {"$tuple":[],"$dict":[]}
"""


def test_a_tree_that_pack_does_not_write_is_refused_in_a_line():
    deep = ['{"a":' * 60 + "1" + "}" * 60, "[" * 5000 + "]" * 5000, "9" * 5000]
    for tree in (*TREES.split(), *deep, "\ud800"):
        text = tree.encode("utf-8", "surrogatepass")
        with pytest.raises(DamagedError) as refused:
            unpack(with_tree(whole({"w": torch.ones(2, 3)}), text))
        assert "\n" not in str(refused.value)


def test_a_thousand_mutants_with_true_manifests_are_refused_or_load_to_equal_values(run):
    """In a process of its own with a bound on its memory: three times the file. A signal would be its status."""
    path = run.places.local / f"{NEWEST}.safetensors"
    content = content_of(run.places.local, NEWEST)
    content["state"]["model"]["ballast"] = torch.rand(1_000_000)  # so that three times the file is above the noise
    path.write_bytes(whole(content))
    command = [sys.executable, "-m", "tests.recipes.checkpoints.mutants", str(path), "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["refused"] + found["loaded"] == 2000
    assert found["refused"] > 400
    assert found["loaded"] > 50
    assert found["longest"] < 400
