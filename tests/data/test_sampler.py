import time
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from data.config import EpochPlan
from data.errors import DataError
from data.sampler import EvalSampler, PositionSampler, epoch_order

SEEDS = st.integers(0, 2**32 - 1)


def plan(*batch_sizes):
    return [EpochPlan(32 + 8 * epoch, "random", size) for epoch, size in enumerate(batch_sizes)]


def indices(sampler):
    return [request.indices.tolist() for request in sampler]


def over_ranks(samples, epochs, seed, world_size, epoch, start=0):
    """The global batches of an epoch, put together from all ranks."""
    ranks = []
    for rank in range(world_size):
        sampler = PositionSampler(samples, epochs, seed, rank, world_size)
        sampler.set_epoch(epoch)
        if start:
            sampler.start_at(epoch, start)
        ranks.append(indices(sampler))
    for parts in zip(*ranks, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


@given(samples=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 500))
def test_an_order_is_a_permutation_and_a_function_of_its_arguments(samples, seed, epoch):
    order = epoch_order(samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(samples))
    assert np.array_equal(order, epoch_order(samples, seed, epoch))


def test_an_order_stays_what_it_was():
    # Checkpoints hold a position, not an order: another order would repeat and leave out images after an upgrade.
    assert epoch_order(10, 17, 0).tolist() == [7, 4, 3, 2, 0, 1, 5, 8, 6, 9]
    assert epoch_order(10, 17, 1).tolist() == [2, 5, 1, 7, 8, 3, 9, 4, 0, 6]


def test_orders_of_epochs_and_seeds_are_unrelated():
    orders = [epoch_order(4000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    ranks = np.corrcoef(np.array(orders))
    assert np.abs(ranks - np.eye(4)).max() < 0.06  # 4 standard errors of 4,000 pairs


def test_the_order_of_imagenet_takes_less_than_a_second():
    begin = time.process_time()
    epoch_order(1_281_167, 17, 3)
    assert time.process_time() - begin < 1.0


@settings(deadline=None)
@given(samples=st.integers(8, 400), batch=st.integers(16, 64), seed=SEEDS, data=st.data())
def test_every_world_size_and_every_resume_sees_the_same_batches(samples, batch, seed, data):
    epochs, epoch = plan(batch, batch + 5, batch), data.draw(st.integers(0, 2))
    whole = over_ranks(samples, epochs, seed, 1, epoch)
    assert sorted(chain(*whole)) == list(range(samples))
    assert list(chain(*whole)) == epoch_order(samples, seed, epoch).tolist()
    sampler = PositionSampler(samples, epochs, seed, 0, 1)
    assert [sampler.images(epoch, batch) for batch in range(len(whole))] == [len(batch) for batch in whole]
    # As few batches and as equal as can be.
    sizes = list(map(len, whole))
    assert len(sizes) == -(-samples // epochs[epoch].global_batch_size)
    assert max(sizes) <= epochs[epoch].global_batch_size
    assert max(sizes) - min(sizes) <= 1
    assert over_ranks(samples, epochs, seed, data.draw(st.integers(1, 8)), epoch) == whole
    start = data.draw(st.integers(0, len(whole)))
    assert over_ranks(samples, epochs, seed, data.draw(st.integers(1, 8)), epoch, start) == whole[start:]


def test_repeats_are_timms_in_each_batch_and_apart():
    samples, batch, world = 512, 64, 4
    order = epoch_order(samples, 3, 0)
    theirs = [list(RepeatAugSampler(range(samples), world, rank, shuffle=False)) for rank in range(world)]
    ours = [indices(PositionSampler(samples, plan(batch), 3, rank, world, repeats=3)) for rank in range(world)]
    for number in range(samples // batch):
        mine = [key for rank in range(world) for key in ours[rank][number]]
        assert len(set(mine)) == batch  # each copy once
        share = slice(number * batch // world, (number + 1) * batch // world)
        assert sorted(key % samples for key in mine) == sorted(order[key] for rank in theirs for key in rank[share])
        assert all(len({key % samples for key in ours[rank][number]}) == batch // world for rank in range(world))
        assert mine == indices(PositionSampler(samples, plan(batch), 3, 0, 1, repeats=3))[number]


def test_size_and_batch_size_follow_the_plan():
    sampler = PositionSampler(100, [EpochPlan(24, "random", 50), EpochPlan(48, "center", 25)], 1, 0, 1)
    for epoch, size, crop, batches in ((0, 24, "random", 2), (1, 48, "center", 4), (2, 48, "center", 4)):
        sampler.set_epoch(epoch)
        requests = list(sampler)
        assert sampler.batches(epoch) == len(sampler) == len(requests) == batches
        assert {(request.epoch, request.size, request.crop) for request in requests} == {(epoch, size, crop)}


def test_only_the_epoch_that_is_resumed_begins_late_and_one_once_begun_stays():
    sampler = PositionSampler(100, plan(10, 10, 10), 1, 0, 1)
    sampler.start_at(1, 7)
    assert len(sampler) == 10  # Composer measures epochs by it
    for epoch, batches in ((1, 3), (1, 3), (2, 10)):
        sampler.set_epoch(epoch)
        assert len(indices(sampler)) == batches
    iterator = iter(sampler)
    sampler.set_epoch(0)
    assert [request.epoch for request in iterator] == [2] * 10


@pytest.mark.parametrize(("samples", "batch", "world"), [(100, 2, 4), (3, 64, 4), (9, 4, 4)])
def test_a_batch_that_leaves_a_rank_without_images_is_refused(samples, batch, world):
    with pytest.raises(DataError, match=f"{samples} training images in batches of {batch}"):
        PositionSampler(samples, plan(batch), 1, 0, world)


@given(samples=st.integers(1, 500), batch=st.integers(1, 64), world=st.integers(1, 16))
def test_evaluation_sees_each_image_once_in_equally_many_batches(samples, batch, world):
    if samples < world:
        with pytest.raises(DataError, match=f"{samples} validation images for {world} devices"):
            EvalSampler(samples, 32, batch, 0, world)
        return
    samplers = [EvalSampler(samples, 32, batch, rank, world) for rank in range(world)]
    ranks = [indices(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}
    assert sorted(chain(*chain(*ranks))) == list(range(samples))
    sizes = [len(part) for batches in ranks for part in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= batch + (batch == 1 or samples < batch * world * 2)


def test_evaluation_takes_no_more_batches_than_it_needs_and_crops_the_centre():
    assert len(EvalSampler(50_000, 224, 256, 3, 8)) == 25
    requests = list(EvalSampler(100, 48, 10, 1, 4))
    assert [(request.epoch, request.size, request.crop) for request in requests] == [(0, 48, "center")] * 3
