"""JSON that every reader accepts: Python's json writes NaN and Infinity, which RFC 8259 does not allow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(content: object, **options: Any) -> str:
    """JSON in which a number that is not finite is null; `options` are `json.dumps`'s."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
