import numpy as np
import torch
from composer.algorithms import ColOut, ColOutTransform
from composer.core import Event
from PIL import Image
from torch import nn

from algorithms.colout import build, image_transform
from algorithms.config import ColOutConfig


def indexed(rows, columns):
    """A picture whose first channel is the row and whose second is the column."""
    grid = np.zeros((rows, columns, 3), dtype=np.uint8)
    grid[..., 0], grid[..., 1] = np.indices((rows, columns))
    return grid


def check_rows_and_columns(grid, rows, columns):
    """Whole rows and columns are left, in order, `rows` x `columns` of them."""
    assert grid.shape[:2] == (rows, columns)
    kept_rows, kept_columns = grid[:, :1, 0], grid[:1, :, 1]
    assert (grid[..., 0] == kept_rows).all()
    assert (grid[..., 1] == kept_columns).all()
    assert (np.diff(kept_rows.ravel().astype(int)) > 0).all()
    assert (np.diff(kept_columns.ravel().astype(int)) > 0).all()


def test_whole_batches_lose_the_same_rows_and_columns(state, logger):
    algorithm = build(ColOutConfig(p_row=0.25, p_col=0.1))
    assert type(algorithm) is ColOut
    run = state(nn.Conv2d(3, 1, 1))
    pictures = torch.from_numpy(np.stack([indexed(40, 40)] * 3)).permute(0, 3, 1, 2)
    run.batch = (pictures, torch.zeros(3, dtype=torch.int64))
    assert algorithm.match(Event.AFTER_DATALOADER, run)
    algorithm.apply(Event.AFTER_DATALOADER, run, logger)
    out, labels = run.batch
    assert (out.dtype, labels.shape) == (torch.uint8, (3,))
    assert torch.equal(out[0], out[1])
    check_rows_and_columns(out[0].permute(1, 2, 0).numpy(), 30, 36)


def test_single_images_lose_their_own_in_the_loader():
    config = ColOutConfig(p_row=0.25, p_col=0.1, batch=False)
    assert build(config) is None
    transform = image_transform(config)
    assert type(transform) is ColOutTransform
    first, second = (np.asarray(transform(Image.fromarray(indexed(40, 40)))) for _ in range(2))
    for grid in (first, second):
        check_rows_and_columns(grid, 30, 36)
    assert not np.array_equal(first, second)
    assert image_transform(ColOutConfig()) is None
