import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recipes.watch.fingerprint import weights_sha256


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


@given(
    st.permutations(list(network().state_dict())),
    st.sampled_from(["", "module.", "module.module.", "_orig_mod.module."]),
)
@settings(max_examples=20, deadline=None)
def test_neither_order_nor_wrappers_count(names, prefix):
    state = network().state_dict()
    assert weights_sha256({prefix + name: state[name] for name in names}) == weights_sha256(state)


def test_memory_format_and_wrappers_of_torch():
    model = network()
    digest = weights_sha256(model.state_dict())
    assert weights_sha256(network().to(memory_format=torch.channels_last).state_dict()) == digest
    assert weights_sha256(nn.DataParallel(model).state_dict()) == digest
    assert weights_sha256(torch.compile(model).state_dict()) == digest


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_bit_counts(data):
    state = network().state_dict()
    digest = weights_sha256(state)
    tensor = state[data.draw(st.sampled_from(sorted(state)))]
    octets = tensor.reshape(-1).view(torch.uint8)
    position = data.draw(st.integers(0, len(octets) - 1))
    octets[position] ^= 1 << data.draw(st.integers(0, 7))
    assert weights_sha256(state) != digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}),
        ({"a": torch.zeros(4)}, {"a": torch.zeros(4, dtype=torch.int32)}),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(1), "b": torch.zeros(1)}),
        ({"a": torch.zeros(0)}, {}),
        ({"a": torch.ones(2, dtype=torch.bfloat16)}, {"a": torch.ones(2, dtype=torch.float16)}),
    ],
)
def test_names_shapes_and_dtypes_count(one, other):
    assert weights_sha256(one) != weights_sha256(other)


def test_two_of_one_name():
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        weights_sha256({"a": torch.zeros(1), "module.a": torch.zeros(1)})
