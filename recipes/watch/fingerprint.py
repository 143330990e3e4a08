"""One number for the weights of a model, so that two runs can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from algorithms.ema import bare_name


def weights_sha256(state_dict: Mapping[str, object]) -> str:
    """SHA-256 of a model's parameters and buffers.

    Over the tensors in the order of their bare names (Unicode code points), for each: the bare name in UTF-8, a zero
    byte, the dtype (`float32`), a zero byte, the shape (`64,3,7,7`; nothing for a scalar), a zero byte, and the
    elements in row-major order of the logical shape, little-endian. So the hash depends neither on the memory format
    (channels last) nor on the device, DDP or torch.compile, nor on the order of insertion. Entries that are no tensors
    are left out.

    Args:
        state_dict: As `model.state_dict()` gives it.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: Two entries have the same bare name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, torch.Tensor):
            if bare_name(name) in tensors:
                raise ValueError(f"two tensors are named {bare_name(name)!r} once their wrappers are removed")
            tensors[bare_name(name)] = value
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = ",".join(str(length) for length in tensor.shape)
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
