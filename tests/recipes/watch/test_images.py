import numpy as np
import pytest
import torch
from composer import Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recipes.watch.images import picture_grid
from tests.recipes.watch.test_sink import events
from tests.recipes.watch.tiny import MEAN, STD


class Seen(Callback):
    """The first batch of each epoch as the model gets it."""

    def __init__(self):
        self.batches = {}

    def before_forward(self, state, logger):
        self.batches.setdefault(int(state.timestamp.epoch), state.batch[0].clone())


class Invert(Callback):
    """In place of an algorithm that changes the batch before the forward pass."""

    def before_forward(self, state, logger):
        state.batch = (-state.batch[0], state.batch[1])


def expected(images):
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_shows_what_the_model_saw(run):
    seen = Seen()
    result = run(callbacks=[Invert(), seen])
    for epoch, size in ((0, 8), (2, 12), (3, 16)):
        with Image.open(result.folder / "images" / f"ep{epoch:03d}-{size}px.png") as file:
            picture = np.asarray(file)
        assert picture.shape == (size, 8 * size + 14, 3)
        for index, image in enumerate(expected(seen.batches[epoch])):
            left = index * (size + 2)
            np.testing.assert_array_equal(picture[:, left : left + size], image)
    [first, *_] = events(result.folder).Images("train/images")
    assert (first.width, first.height) == (8 * 8 + 14, 8)


def test_half_precision_on_many_images():
    images = torch.randn(40, 3, 5, 7).half().to(memory_format=torch.channels_last)
    grid = picture_grid(images[:32], MEAN, STD)
    assert grid.shape == (4 * 7 - 2, 8 * 9 - 2, 3)
    np.testing.assert_array_equal(grid[7:12, 9:16], expected(images.float())[9])


@given(
    count=st.integers(1, 32),
    size=st.integers(1, 9),
    value=st.sampled_from([0.0, 1e9, -1e9, float("nan"), float("inf")]),
)
@settings(max_examples=30, deadline=None)
def test_grid_has_room_for_all(count, size, value):
    grid = picture_grid(torch.full((count, 3, size, size), value), (0.5,) * 3, (0.2,) * 3)
    columns = min(8, count)
    assert grid.dtype == np.uint8
    assert grid.shape == (-(-count // 8) * (size + 2) - 2, columns * (size + 2) - 2, 3)
    shade = 255 if value > 1e8 else 0 if value < -1e8 or value != value else 128
    assert set(np.unique(grid[:size, :size])) == {shade}


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 12, 8, 12)])
def test_one_picture_per_change_of_size(run, sizes):
    result = run(sizes=sizes, tensorboard=False)
    changes = [epoch for epoch in range(4) if epoch == 0 or sizes[epoch] != sizes[epoch - 1]]
    assert sorted(path.name for path in (result.folder / "images").iterdir()) == [
        f"ep{epoch:03d}-{sizes[epoch]}px.png" for epoch in changes
    ]
