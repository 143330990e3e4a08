"""The techniques: each is a module and a card (`NAME.py`, `NAME.md`); `config.py` has their fields and the index."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]


class Technique(BaseModel):
    """A technique's YAML line: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    not_resumable: ClassVar[str | None] = None
    """Why an interrupted run cannot be resumed bit for bit with this technique; None: it can."""


def bare_name(name: str) -> str:
    """A tensor's name without the prefixes of DDP, Composer's model and torch.compile."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name
