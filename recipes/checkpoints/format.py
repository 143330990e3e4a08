"""A checkpoint file: tensors as safetensors, and everything else as a JSON tree in one of them. Data, never code.

There is no pickle. The file is read once into memory, compared with its manifest, and rebuilt as dicts, lists, tuples,
strings, numbers and tensors. `restore` fills the running Trainer from these, whose algorithms are always the run's own:
Composer would evaluate the text of an algorithm that it finds in a checkpoint (core/state.py,
`_apply_required_algorithms`). Any safetensors reader opens the file:

    tensors = safetensors.torch.load_file("ep003-ba000123.safetensors")
    tree = json.loads(bytes(tensors["tree.json"].numpy()))

What JSON cannot express is an object in the tree whose first key begins with `$`: `{"$tensor": NAME}`, with `"order"`
if the dimensions are not stored in their own order (channels last); `$array` (NumPy), `$tuple`, `$dict` (a list of
pairs, for keys that are not plain strings), `$float` (nan, inf, -inf) and `$timedelta` (microseconds).
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import safetensors
import torch
from composer import Logger, State
from composer.utils import reproducibility
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import InputError
from recipes.checkpoints.manifest import Manifest, parse_int
from recipes.checkpoints.store import DamagedError

TREE = "tree.json"  # name of the uint8 tensor that holds the tree
_SAVED = ("model", "optimizers", "timestamp", "algorithms", "callbacks", "scaler", "schedulers")
"""The saved part of Composer's state. The rest (run name, microbatch size, versions) is each process's own."""
_REQUIRED = {"model", "optimizers", "timestamp", "algorithms"}
_MAX_DEPTH = 48
_MAX_DIMS = 16  # limit of a tensor's dimensions; putting them in order takes quadratic time
_LARGEST_KEY = 2**60
"""Limit of a dict's numeric keys; larger ones can be chosen so that Python's dict takes hours."""
_LONGEST_TIME = datetime.timedelta(days=10**6)
_SMALL = 256 * 1024  # bytes that the header and the tree may each have in a file of any size ...
_SHARE = 64
"""... or else this fraction of the file, since Python needs up to 60 times the memory of the JSON it parses."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES: dict[str, torch.dtype] = {**_FLOATS, **_INTEGERS, "U32": torch.uint32, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack(content: Any) -> list[memoryview]:
    """A file's bytes, in pieces. Tensors are copied to host memory once, so training may continue when this returns.

    `content`: dicts, lists, tuples, strings, numbers, None, tensors, NumPy arrays and time spans, nested; TypeError
    says where anything else is.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(encode(content, "", tensors), allow_nan=False, separators=(",", ":")).encode()
    tensors[TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    header: dict[str, Any] = {}
    pieces, end = list[memoryview](), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # to align each
        copied = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        piece = copied.reshape(-1).view(torch.uint8).numpy().data
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (end, end + len(piece))}
        end += len(piece)
        pieces.append(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as a tree node, or the TypeError of `pack`; its tensors go to `tensors`, not copied, named by path."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if isinstance(value, np.ndarray):
        return {"$array": _encode_tensor(torch.from_numpy(value).contiguous(), path, tensors)["$tensor"]}
    if isinstance(value, datetime.timedelta):
        return {"$timedelta": value // datetime.timedelta(microseconds=1)}
    if isinstance(value, tuple | list):
        items = [encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        items = [[key, encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in items)
        return dict(items) if plain else {"$dict": items}
    raise TypeError(f"{path.lstrip('/') or 'the state'}: a checkpoint cannot hold a {type(value).__name__}")


def _encode_tensor(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        raise TypeError(f"{path.lstrip('/')}: a checkpoint cannot hold a tensor of {tensor.dtype}, {tensor.layout}")
    name = path.lstrip("/")
    while name in tensors or name == TREE:
        name += "'"  # two paths can be equal if a key holds a slash
    order = sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride()[dim], -tensor.shape[dim]))
    permuted = tensor.permute(order)
    if order == sorted(order) or permuted.stride() != torch.empty(permuted.shape, device="meta").stride():
        tensors[name] = tensor
        return {"$tensor": name}
    tensors[name] = permuted
    return {"$tensor": name, "order": order}


def unpack(data: bytes) -> Any:
    """The content that `pack` was given, from bytes that anybody may have written; DamagedError if malformed.

    Memory use is at most a few times the size of the bytes; tensors are copies, each used once.
    """
    bound = max(_SMALL, len(data) // _SHARE)
    if len(data) < 8 or int.from_bytes(data[:8], "little") > min(bound, len(data) - 8):
        raise DamagedError("is not a checkpoint: no safetensors header of a plausible length")
    try:
        # safetensors checks that shapes, types and offsets agree and cover the file without gaps.
        tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except Exception as error:
        raise DamagedError(f"is not a checkpoint: {str(error)[:200]!r}") from None
    tree = tensors.pop(TREE, None)
    if tree is None or tree["dtype"] != "U8" or len(tree["data"]) > bound:
        raise DamagedError(f"is not a checkpoint: {TREE} is missing, or too long for a file of {len(data)} bytes")
    try:
        # NaN and Infinity, which are not JSON, are refused because `parse_int` cannot read them.
        parsed = json.loads(tree["data"].decode(), parse_int=parse_int, parse_constant=parse_int)
        content = _decode(parsed, tensors, 0)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, RuntimeError) as error:
        raise DamagedError(f"its {TREE} is malformed: {str(error)[:200]!r}") from None
    if tensors:
        raise DamagedError(f"holds {len(tensors)} tensors that its {TREE} does not name")
    return content


def _decode(node: Any, tensors: dict[str, Any], depth: int) -> Any:
    """The value of a tree node; a tensor is removed from `tensors`, so that no two values share memory."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} levels")
    if isinstance(node, list):
        return [_decode(item, tensors, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    kind = next(iter(node), "")
    if not kind.startswith("$"):
        return {key: _decode(item, tensors, depth + 1) for key, item in node.items()}
    value = node[kind]
    if kind == "$tensor" and node.keys() <= {"$tensor", "order"}:
        return _decode_tensor(tensors.pop(value), node.get("order"))
    if len(node) != 1:
        raise ValueError(f"{kind[:40]} beside other keys")
    return _decode_marked(kind, value, tensors, depth)


def _decode_marked(kind: str, value: Any, tensors: dict[str, Any], depth: int) -> Any:
    if kind == "$array":
        return _decode_tensor(tensors.pop(value), None).numpy()
    if kind == "$tuple" and isinstance(value, list):
        return tuple(_decode(item, tensors, depth + 1) for item in value)
    if kind == "$dict" and isinstance(value, list):
        pairs = [(key, _decode(item, tensors, depth + 1)) for key, item in value]
        if all(type(key) is str or (type(key) is int and abs(key) < _LARGEST_KEY) for key, _ in pairs):
            return dict(pairs)
    if kind == "$float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind == "$timedelta" and type(value) is int:
        return datetime.timedelta(microseconds=value)
    raise ValueError(f"{kind[:40]} is unknown or malformed")


def _decode_tensor(stored: dict[str, Any], order: list[int] | None) -> Tensor:
    dtype, shape, data = _DTYPES[stored["dtype"]], stored["shape"], stored["data"]
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    tensor = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    if order is None:
        return tensor
    if not all(type(dim) is int for dim in order) or sorted(order) != list(range(tensor.ndim)):
        raise ValueError("the order of a tensor's dimensions")
    return tensor.permute([order.index(dim) for dim in range(tensor.ndim)])


def read_state(data: bytes, manifest: Manifest) -> dict[str, Any]:
    """A checkpoint's content: `state`, in the form of Composer's `State.state_dict`, and `rng`; tensors on the CPU.

    DamagedError: it differs from the manifest, or is not a training state.
    """
    if hashlib.sha256(data).hexdigest() != manifest.file.sha256:
        raise DamagedError("its SHA-256 differs from the manifest's")
    content: dict[str, Any] = unpack(data)
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state.keys() >= _REQUIRED or not isinstance(content.get("rng"), list):
        raise DamagedError("is not a training state")
    found, model = state["algorithms"], state["model"]
    if not isinstance(model, dict) or not is_tensors(model):
        raise DamagedError("its weights are malformed")
    if not isinstance(found, list) or not all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)
        for item in found
    ):
        raise DamagedError("its list of algorithms is malformed")
    if _position(state) != (manifest.epoch, manifest.batch_in_epoch, manifest.batch, manifest.samples):
        raise DamagedError("its position differs from the manifest's")
    return content


def is_tensors(found: Any) -> bool:
    """Whether this maps names to tensors."""
    return isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    )


def _position(state: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        timestamp = state["timestamp"]["Timestamp"]
        return tuple(timestamp[key] for key in ("epoch", "batch_in_epoch", "batch", "sample"))
    except (TypeError, KeyError):
        return ()


def to_save(state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved part of `State.state_dict()`, without the text of algorithms that Composer would evaluate."""
    algorithms = [
        (name, {key: part for key, part in own.items() if key != "repr"}) for name, own in state["algorithms"]
    ]
    return {key: state[key] for key in _SAVED if key in state} | {"algorithms": algorithms}


def restore(state: State, saved: Mapping[str, Any], logger: Logger, location: str) -> None:
    """Fill a Trainer's state from a checkpoint's, after surgery and before the model is wrapped for several processes.

    InputError: a tensor, or the state of an algorithm or callback, does not fit this run.
    """
    own: dict[str, Any] = {
        "model": state.get_model_state_dict(),
        "algorithms": {type(item).__qualname__: item.state_dict() for item in state.algorithms},
        "timestamp": {"Timestamp": state.timestamp.state_dict()},
    }
    for item in own["algorithms"].values():
        del item["repr"]
    if state.scaler is not None and isinstance(scaler := saved.get("scaler"), Mapping):
        kind = type(state.scaler).__qualname__
        own["scaler"] = {kind: state.scaler.state_dict()}
        # Older checkpoints have it by the name of Composer's other class, with the same state.
        saved = {**saved, "scaler": {kind: scaler.get(kind, scaler.get("ClosureGradScaler"))}}
    theirs = {**saved, "algorithms": dict(saved["algorithms"])}
    fit, optimizer = f"{location}: does not fit this run: ", state.optimizers[0]
    name = type(optimizer).__qualname__
    for key, expected in own.items():
        _require_like(expected, theirs[key], fit + key)
    _require_like({name: None}, theirs["optimizers"], f"{fit}optimizers")
    numbered = numbered_state(optimizer, theirs["optimizers"][name], state.model, f"{fit}optimizers/{name}")
    others = {key: item for key, item in to_save(saved).items() if key != "optimizers"}
    try:
        # Excluded: Composer would evaluate their text, and then add its own BlurPool beside our subclass of that name.
        state.load_state_dict(others, logger, strict=True, exclude_algorithms=list(own["algorithms"]))
        optimizer.load_state_dict(numbered)
    except Exception as error:  # from torch, Composer, or a part's own `load_state_dict`
        raise InputError(fit + _in_a_line(error)) from None


def restore_generators(saved: list[Any], location: str) -> None:
    """Restore this process's random generators from a checkpoint's `rng`; `InputError` if malformed."""
    try:
        for generators in saved:
            if not 0 <= generators["numpy"][2] <= 624:  # NumPy would read outside its memory
                raise ValueError("numpy's position")
        reproducibility.load_rng_state(saved)
    except Exception as error:  # from Python, NumPy or torch
        raise InputError(f"{location}: its random generators are malformed: {_in_a_line(error)}") from None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _require_like(own: Any, theirs: Any, path: str) -> None:
    """Raise InputError where a saved value differs in kind from the run's own initial value."""
    if isinstance(own, Mapping):
        if not isinstance(theirs, Mapping) or own.keys() != theirs.keys():
            raise InputError(f"{path} has other keys than in this run")
        for key in own:
            _require_like(own[key], theirs[key], f"{path}/{key}")
    elif isinstance(own, tuple):
        if not isinstance(theirs, tuple) or len(own) != len(theirs):
            raise InputError(f"{path} is not {len(own)} values")
        for index, (mine, their) in enumerate(zip(own, theirs, strict=True)):
            _require_like(mine, their, f"{path}/{index}")
    elif isinstance(own, Tensor) and (not isinstance(theirs, Tensor) or own.shape != theirs.shape):
        raise InputError(f"{path} is not a tensor of shape {tuple(own.shape)}")
    elif isinstance(own, bool | int | float | str | datetime.timedelta) and type(own) is not type(theirs):
        raise InputError(f"{path} is not of type {type(own).__name__}")
    elif isinstance(own, datetime.timedelta) and abs(theirs) > _LONGEST_TIME:
        raise InputError(f"{path} is longer than any run")


def numbered_state(optimizer: Optimizer, saved: Any, model: nn.Module, path: str) -> dict[str, Any]:
    """A saved state by names of parameters, as `optimizer.load_state_dict` takes it, by number.

    torch's own function for this (torch.distributed.checkpoint.state_dict) makes a step first, and refuses a state that
    lacks a parameter, as one in a block that stochastic depth skipped so far.

    Raises:
        InputError: The groups, their settings, or what is kept of a parameter differ in kind from this optimizer's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _require_like({"state": None, "param_groups": None}, saved, path)
    groups, states = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise InputError(f"{path}/param_groups is not a list of {len(optimizer.param_groups)}")
    if not isinstance(states, Mapping) or not states.keys() <= set(names.values()):
        raise InputError(f"{path}/state is of other parameters than in this run")
    numbered: dict[str, Any] = {"state": {}, "param_groups": []}
    number = itertools.count()
    usual: dict[object, dict[str, Any]] = {}  # what is kept of a parameter, by group and shape
    for index, (own, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        parameters = {names[id(parameter)]: parameter for parameter in own["params"]}
        _require_group(own, group, parameters.keys(), f"{path}/param_groups/{index}")
        numbers = {name: next(number) for name in parameters}
        numbered["param_groups"].append({**group, "params": list(numbers.values())})
        for name in (name for name in parameters if name in states):
            numbered["state"][numbers[name]] = found = states[name]
            if not isinstance(found, Mapping):
                raise InputError(f"{path}/state/{name} is not a mapping")
            if any(value is not None for value in found.values()):  # else no step with momentum was made yet
                kind = index, parameters[name].shape
                usual[kind] = usual.get(kind) or _state_after_a_step(optimizer, own, parameters[name])
                _require_like(usual[kind], found, f"{path}/state/{name}")
    return numbered


def _require_group(own: Mapping[str, Any], theirs: Any, names: Set[str], path: str) -> None:
    """As `_require_like`, for a group of the parameters with these names."""
    if not isinstance(theirs, Mapping) or not theirs.keys() >= own.keys():
        raise InputError(f"{path} has other keys than in this run")
    if not isinstance(theirs["params"], list) or set(map(str, theirs["params"])) != names:
        raise InputError(f"{path} is of other parameters than in this run")
    for key in own.keys() - {"params"}:
        _require_like(own[key], theirs[key], f"{path}/{key}")


def _state_after_a_step(optimizer: Optimizer, group: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """What the optimizer keeps of a parameter: from its beginning, else after a step of another one like it."""
    if first := optimizer.state.get(like):
        return dict(first)
    parameter = nn.Parameter(torch.zeros(like.shape))
    parameter.grad = torch.zeros(like.shape)
    other = copy.copy(getattr(optimizer, "base_optimizer", optimizer))  # SAM's wrapper holds no state of its own
    other.state, other.param_groups = defaultdict(dict), [{**group, "params": [parameter]}]
    other.step()
    return dict(other.state[parameter])
