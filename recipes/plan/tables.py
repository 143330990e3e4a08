"""The figures that people keep in YAML: prices of machines, published throughput; checked as a config is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from recipes.config import Part, PositiveFloat, PositiveInt

PRICES = Path(__file__).with_name("prices.yaml")
THROUGHPUT = Path(__file__).with_name("throughput.yaml")

Text = Annotated[str, Field(min_length=1)]
Day = Annotated[str, Field(pattern=r"^(after )?[0-9]{4}(-[0-9]{2}){0,2}$", examples=["2026-11-09", "after 2025-08"])]
Price = Annotated[float, Field(ge=0)]


class PriceConfig(Part):
    """What an hour of a machine cost, where, when, and who says so."""

    usd_per_hour: Price
    region: Text
    date: Day
    """When it was so: a day, a month or a year, or `after` one."""
    source: Text


class MachineConfig(Part):
    """A machine that can be rented."""

    device: Text
    """As in throughput.yaml."""
    devices: PositiveInt
    vcpus: PositiveInt | None = None
    device_memory_gb: PositiveFloat | None = None
    """Memory of one device that programs get, in GB (1e9 bytes)."""
    note: Text | None = None
    on_demand: PriceConfig | None = None
    spot: PriceConfig | None = None


class PricesConfig(Part):
    """prices.yaml."""

    machines: dict[str, MachineConfig]


class PublishedConfig(Part):
    """A published throughput of training."""

    model: Text
    device: Text
    devices: PositiveInt
    half: bool
    """Mixed precision."""
    channels_last: bool
    size: PositiveInt
    """Side of the images in pixels."""
    images_per_second: PositiveFloat
    """Over all devices."""
    source: Text


class FactorConfig(Part):
    """What a technique does to the images per second."""

    factor: PositiveFloat
    source: Text


class FactorsConfig(Part):
    """Factors in mixed precision."""

    channels_last: FactorConfig
    blurpool: FactorConfig
    """Beside channels_last ..."""
    blurpool_without_channels_last: FactorConfig
    """... and without it."""


class ThroughputConfig(Part):
    """throughput.yaml."""

    published: tuple[PublishedConfig, ...]
    factors: FactorsConfig
