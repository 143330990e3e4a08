"""Squeeze-and-Excitation: channel attention after wide convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from algorithms.technique import PositiveInt, Technique

if TYPE_CHECKING:
    from composer.core import Algorithm


class SqueezeExciteConfig(Technique):
    """A Squeeze-and-Excitation block (Hu et al. 2018) after each wide convolution, by Composer's `SqueezeExcite`."""

    latent_channels: Annotated[float, Field(gt=0)] = 64.0
    """Width of the block's hidden layer in channels; below 1: a share of the convolution's output channels."""
    min_channels: PositiveInt = 128
    """Only convolutions with at least this many input and output channels get a block."""

    def build(self) -> Algorithm:
        """Composer's algorithm with these fields."""
        from algorithms.squeeze_excite.squeeze_excite import CheckedSqueezeExcite

        return CheckedSqueezeExcite(**self.model_dump())
