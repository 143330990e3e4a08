"""BlurPool: anti-aliased strided convolutions and max-pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from algorithms import PositiveInt, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class BlurPoolConfig(Technique):
    """Blur before every subsampling (Zhang 2019), by Composer's `BlurPool`."""

    replace_convs: bool = True
    """Blur at strided convolutions."""
    replace_maxpools: bool = True
    """Blur at max-pooling layers."""
    blur_first: bool = True
    """Blur before the strided convolution; false: convolve at stride 1 and blur after, as in the paper; much slower."""
    min_channels: PositiveInt = 16
    """Skip convolutions with fewer input channels, such as the stem's."""

    @model_validator(mode="after")
    def _replaces_something(self) -> BlurPoolConfig:
        if not (self.replace_convs or self.replace_maxpools):
            raise ValueError("replace_convs and replace_maxpools are both false, so nothing would change")
        return self

    def build(self) -> Algorithm:
        """Composer's algorithm with these fields."""
        from composer.algorithms import BlurPool

        return BlurPool(**self.model_dump())
