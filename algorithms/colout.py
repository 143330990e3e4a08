"""ColOut: drop random rows and columns of the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from algorithms import Technique

if TYPE_CHECKING:
    from composer.core import Algorithm
    from PIL.Image import Image

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class ColOutConfig(Technique):
    """Drop random rows and columns, which makes the images smaller, by Composer's `ColOut`."""

    p_row: Share = 0.15
    """Share of the rows to drop."""
    p_col: Share = 0.15
    """Share of the columns to drop."""
    batch: bool = True
    """Drop the same ones in the whole batch, after loading; false: different ones in each image, in the loader."""

    @model_validator(mode="after")
    def _drops_something(self) -> ColOutConfig:
        if self.p_row == self.p_col == 0:
            raise ValueError("p_row and p_col are both 0, so nothing would change")
        return self

    def build(self) -> Algorithm | None:
        """Composer's algorithm on batches; None with `batch: false`."""
        from composer.algorithms import ColOut

        return ColOut(p_row=self.p_row, p_col=self.p_col, batch=True, resize_target=False) if self.batch else None

    def image_transform(self) -> Callable[[Image], Image] | None:
        """Composer's transform of one image; None with `batch: true`."""
        from composer.algorithms import ColOutTransform

        if self.batch:
            return None
        # It returns the type it is given, image or tensor, although its annotation does not say so.
        return ColOutTransform(p_row=self.p_row, p_col=self.p_col, resize_target=False)  # type: ignore[return-value]
