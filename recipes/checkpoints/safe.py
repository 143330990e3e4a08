"""A checkpoint is data, never code: what may be in one, and what Composer must not get to see."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Algorithm

from recipes.checkpoints.manifest import DamagedError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_STATE_KEYS = {"model", "optimizers", "timestamp", "algorithms"}


def allow_only_data() -> None:
    """Make every `torch.load` of this process, Composer's included, weights-only with a short list of plain types.

    Composer asks for `weights_only=False` (composer/utils/checkpoint.py), which runs whatever a pickle says.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    rebuild: Any = np.zeros(1).__reduce__()[0]
    torch.serialization.add_safe_globals(
        [
            datetime.timedelta,
            np.ndarray,
            np.dtype,
            type(np.dtype(np.uint32)),
            (rebuild, "numpy._core.multiarray._reconstruct"),
            (rebuild, "numpy.core.multiarray._reconstruct"),
            torch.torch_version.TorchVersion,
        ]
    )


def disallowed(payload: bytes | memoryview) -> list[str]:
    """The types in a serialised state that `allow_only_data` would refuse to load."""
    allow_only_data()
    return list(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(payload)))


def signature(algorithms: Sequence[Algorithm]) -> list[tuple[str, str]]:
    """Class name and text of each algorithm, in an order and form that two processes agree on."""
    return sorted((type(item).__qualname__, _ADDRESS.sub("", repr(item))) for item in algorithms)


def load_state(path: Path) -> dict[str, Any]:
    """A verified file's training state, loaded as data; its tensors are mapped from the file, on the CPU.

    Args:
        path: A checkpoint whose bytes are those of its manifest.

    Raises:
        DamagedError: The file is not a checkpoint, or holds more than data.
    """
    allow_only_data()
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises about ten kinds, from RuntimeError to KeyError
        raise DamagedError(_refusal(path, error)) from None
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS:
        raise DamagedError("is not a training state")
    return state


def check_file(path: Path, algorithms: Sequence[tuple[str, str]]) -> None:
    """Look at what Composer would evaluate in a verified file.

    Composer 0.32.1 runs `eval` on the algorithms' texts in a checkpoint (composer/core/state.py:1132), so these must be
    the run's own, letter by letter.

    Args:
        path: A checkpoint whose bytes are those of its manifest.
        algorithms: `signature` of the run's own algorithms.

    Raises:
        DamagedError: The file is not a checkpoint, holds more than data, or names other algorithms.
    """
    theirs = _named(load_state(path)["algorithms"])
    if theirs != list(algorithms):
        strange = [item for item in theirs if item not in algorithms] or theirs
        raise DamagedError(f"its algorithms are not this run's: {strange[:3]!r:.300}")


def _refusal(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded as data, without torch's advice to load it as code."""
    with contextlib.suppress(Exception):
        if strange := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)):
            return f"holds more than data: {', '.join(strange)[:300]}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"cannot be loaded as data ({type(error).__name__ if first.startswith('Weights only') else first[:200]})"


def _named(algorithms: Any) -> list[tuple[str, str]]:
    try:
        named = [(name, _ADDRESS.sub("", state["repr"])) for name, state in algorithms]
    except (TypeError, ValueError, KeyError):
        raise DamagedError("its list of algorithms is malformed") from None
    if not isinstance(algorithms, list) or not all(isinstance(name, str) for name, _ in named):
        raise DamagedError("its list of algorithms is malformed")
    return sorted(named)
