import pytest
import torch
from composer.algorithms import ProgressiveResizing
from composer.core import Event, Timestamp
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from algorithms.config import ProgressiveResizingConfig
from algorithms.progressive_resizing import build

BATCHES = 90


def composers_widths(algorithm, state, full_size):
    """Width of the images at each batch of a run, as Composer's algorithm makes them."""
    run = state(nn.Conv2d(3, 1, 1))
    run.max_duration = f"{BATCHES}ba"
    picture = torch.randint(0, 256, (1, 3, full_size, full_size), dtype=torch.uint8)
    picture = picture.to(memory_format=torch.channels_last)
    widths = []
    for batch in range(BATCHES):
        run.timestamp = Timestamp(batch=batch)
        run.batch = (picture, torch.zeros(1, dtype=torch.int64))
        algorithm.apply(Event.AFTER_DATALOADER, run, None)
        assert run.batch[0].dtype == torch.uint8
        widths.append(run.batch[0].shape[3])
    return widths


@pytest.mark.parametrize(("full_size", "increment"), [(32, 1), (176, 4), (224, 32)])
@pytest.mark.parametrize(("scale", "delay", "finetune"), [(0.5, 0.5, 0.2), (0.5, 0.4, 0.2), (0.3, 0.0, 0.0)])
def test_the_sizes_are_composers_over_a_whole_run(full_size, increment, scale, delay, finetune, state):
    names = ("initial_scale", "delay_fraction", "finetune_fraction", "size_increment")
    fields = dict(zip(names, (scale, delay, finetune, increment), strict=True))
    theirs = composers_widths(ProgressiveResizing(**fields), state, full_size)
    config = ProgressiveResizingConfig(**fields)
    ours = [config.size_at(batch / BATCHES, full_size) for batch in range(BATCHES)]
    # torch rounds size * (wanted / size) down, so Composer's picture can be one pixel short of what it computed.
    assert all(mine - 1 <= their <= mine for mine, their in zip(ours, theirs, strict=True))
    assert sum(mine != their for mine, their in zip(ours, theirs, strict=True)) <= len(ours) / 10


@pytest.mark.parametrize(("delay", "finetune"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_where_batch_takes_every_split_without_a_ramp(delay, finetune, state):
    config = ProgressiveResizingConfig(where="batch", delay_fraction=delay, finetune_fraction=finetune)
    expected = [32] * round(delay * BATCHES) + [64] * round(finetune * BATCHES)
    assert composers_widths(build(config), state, 64) == expected


fractions = st.floats(0, 1)


@given(
    full=st.integers(8, 400),
    scale=st.floats(0.01, 0.99),
    shares=st.tuples(fractions, fractions).filter(lambda pair: sum(pair) <= 1),
    increment=st.integers(1, 64),
    times=st.lists(fractions, min_size=2).map(sorted),
)
@example(full=224, scale=0.5, shares=(0.1, 0.9), increment=32, times=[0.0, 0.1, 1.0])
def test_sizes_grow_from_the_first_to_the_full_one(full, scale, shares, increment, times):
    config = ProgressiveResizingConfig(
        initial_scale=scale, delay_fraction=shares[0], finetune_fraction=shares[1], size_increment=increment
    )
    sizes = [config.size_at(time, full) for time in times]
    assert sizes == sorted(sizes)
    assert all(size == full or size % increment == 0 for size in sizes)
    assert all(0 < size <= full for size in sizes)
    first, last = (config.size_at(time, full) for time in (0.0, 1.0))
    if shares[0] > 1e-6:
        assert abs(first - scale * full) <= max(increment, full - first if first == full else 0)
    assert full - last < increment
