"""What every technique's config is made of."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]


class Technique(BaseModel):
    """A technique's YAML line: frozen, and an unknown field is an error.

    A room subclasses this for its fields and adds `build()`, which imports torch and Composer only when it is called,
    so that reading a config stays fast.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    not_resumable: ClassVar[str | None] = None
    """Why an interrupted run cannot go on bit for bit with this technique; None: it can."""
