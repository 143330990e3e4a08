import itertools
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from composer.core import DataSpec
from composer.trainer.trainer import _get_distributed_sampler
from PIL import ImageOps
from torchmetrics.classification import MulticlassAccuracy

from data.augment import eval_picture
from data.config import AugmentConfig, EpochPlan
from data.errors import DataError, StalledError
from data.imagefolder import ImageFolder
from data.loader import IGNORED_LABEL, eval_loader, train_loader
from data.sampler import PositionSampler
from tests.data.conftest import write_folder

AUGMENT = AugmentConfig(
    area=(0.25, 1.0),
    color_jitter={"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    gaussian_blur={"probability": 0.5, "sigma": (0.1, 2.0)},
    random_erasing={"probability": 0.5, "area": (0.1, 0.3), "aspect_ratio": (0.3, 3.3), "count": 2, "fill": "noise"},
)
PLAN = [EpochPlan(24, "random", 16), EpochPlan(32, "random", 25), EpochPlan(40, "center", 8)]


def shuffle_colours(image):
    """An image transform that draws from all three global generators, as Composer's do."""
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    return ImageOps.posterize(image, 1 + int(4 * draws[0])) if draws[1] < draws[2] else ImageOps.invert(image)


LOADING = {"prefetch_factor": 2, "pin_memory": False}


def training(source, workers=0, plan=PLAN, seed=17, rank=0, world=1, transforms=(shuffle_colours,), augment=AUGMENT):
    sampler = PositionSampler(len(source), plan, seed, rank, world, augment.repeats)
    options = {"augment": augment, "mean": (0.5,) * 3, "std": (0.2,) * 3, "eval_crop_ratio": 0.875} | LOADING
    return train_loader(source, sampler, image_transforms=transforms, seed=seed, workers=workers, **options)


def evaluation(source, workers=0, rank=0, world=1):
    options = {"size": 32, "crop_ratio": 0.875, "device_batch_size": 16} | LOADING
    return eval_loader(source, rank=rank, world_size=world, workers=workers, **options)


def run(loader, epochs=range(3), start=0):
    batches = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        if start:
            loader.batch_sampler.start_at(epoch, start)
        batches.extend(loader)
    return batches


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


@pytest.fixture
def source(small_folder):
    return ImageFolder(small_folder, None)


@pytest.fixture
def damaged(tmp_path):
    """40 images, six of them bad in six ways."""
    source = ImageFolder(write_folder(tmp_path / "train", {"ant": 20, "bee": 20}), None)
    files, whole = [Path(source.name(index)) for index in BAD], source.read(0)
    for file, data in zip(files, (b"", whole[: len(whole) // 2], b"not an image", whole[:30]), strict=False):
        file.write_bytes(data)
    files[4].unlink()
    files[5].unlink()
    files[5].mkdir()
    return source


BAD = {0: "empty", 7: "truncated", 19: "not an image", 20: "truncated", 33: "missing", 39: "not a regular file"}


def test_batches_follow_the_plan(source):
    batches = run(training(source))
    sizes = [(len(labels), images.shape[2]) for images, labels in batches]
    assert sizes == [(15, 24)] * 4 + [(20, 32)] * 3 + [(7, 40), (8, 40), (7, 40), (8, 40)] * 2
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    for epoch in (batches[:4], batches[4:7], batches[7:]):
        assert torch.cat([labels for _, labels in epoch]).bincount().tolist() == [25, 20, 15]


def test_workers_do_not_change_a_byte(source, damaged):
    for images in (source, damaged):
        assert same(run(training(images)), run(training(images, workers=3)))


def test_repeated_images_differ_in_their_augmentation_alone(source):
    loader = training(source, plan=[EpochPlan(32, "random", 20)], augment=AugmentConfig(repeats=2), transforms=())
    for (images, labels), request in zip(loader, list(loader.batch_sampler), strict=True):
        assert (request.indices[:10] + len(source)).tolist() == request.indices[10:].tolist()
        assert torch.equal(labels[:10], labels[10:])
        assert not any(torch.equal(*pair) for pair in zip(images[:10], images[10:], strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_no_reading_thread_is_left_when_the_next_workers_are_forked(source):
    """A thread that ends holds OpenCV's lock for a moment, and a worker forked then would hang at its first image."""
    loader = training(source)
    run(loader)
    before = list(Path("/proc/self/task").iterdir())
    for _ in range(30):
        run(loader, range(1))
        assert list(Path("/proc/self/task").iterdir()) == before


def test_images_and_labels_belong_together(source):
    loader = training(source, plan=[EpochPlan(32, "center", 16)], augment=AugmentConfig(flip=0.0))
    for (images, labels), request in zip(loader, list(loader.batch_sampler), strict=True):
        for image, label, index in zip(images, labels, request.indices, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), eval_picture(source.read(int(index)), 32, 0.875))
            assert label == source.labels[index]


def test_seed_epoch_and_nothing_else_change_the_pictures(source):
    first, plan = run(training(source), [0]), [PLAN[0]] * 2
    assert not same(first, run(training(source, seed=18), [0]))
    images, _ = (torch.cat(parts) for parts in zip(*run(training(source, plan=plan), [1]), strict=True))
    before, _ = (torch.cat(parts) for parts in zip(*first, strict=True))
    assert not any(torch.equal(a, b) for a in images for b in before)


def test_ranks_share_the_batches_of_one_process_and_a_resumed_epoch_goes_on_with_them(source):
    whole = run(training(source))
    ranks = [run(training(source, rank=rank, world=3)) for rank in range(3)]
    together = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*ranks, strict=True)]
    assert same(whole, together)
    for workers in (0, 2):
        loader = training(source, workers)
        assert same(whole[6:], run(loader, [1], start=2) + run(loader, [2]))
    loader.batch_sampler.set_epoch(0)
    list(itertools.islice(loader, 1))  # an interrupted iterator
    assert same(run(loader, [2]), whole[7:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_processs_random_state_stays_as_it_was(source, workers):
    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    loader = training(source, workers)
    iterator = iter(loader)
    next(iterator)
    assert state() == before
    list(iterator)
    list(evaluation(source, workers))
    assert state() == before


def test_bad_images_are_replaced_counted_and_named_once(damaged):
    loader = training(damaged, transforms=())
    bad = loader.dataset.bad
    assert (int(bad.faults.count_nonzero()), bad.new()) == (0, [])
    batches = run(loader, [0])
    assert sum(len(labels) for _, labels in batches) == 40
    assert all(image.float().std() > 5 for images, _ in batches for image in images)
    assert int(bad.faults.count_nonzero()) == 6
    found = {sample.index: sample for sample in bad.new()}
    assert set(found) == set(BAD)
    assert all(BAD[index] in sample.reason and sample.name == damaged.name(index) for index, sample in found.items())
    assert bad.new() == []
    run(loader, [1])
    assert (int(bad.faults.count_nonzero()), bad.new()) == (6, [])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_without_a_good_image_is_an_error(tmp_path, workers):
    for index in range(8):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[index % 2] / f"{index}.jpg").touch()
    loader, told = training(ImageFolder(tmp_path, None), workers), []
    loader.gate = lambda ready, trouble: told.append(trouble) or ready  # which may save the run's state
    with pytest.raises(DataError, match=r"0.jpg|cannot be decoded"):
        run(loader, [0])
    assert isinstance(told[-1], DataError)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_loads_each_image_once(source, workers):
    for world in (1, 4):
        processes = workers if world == 1 else 0
        ranks = [list(evaluation(source, processes, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert torch.cat([labels for _, labels in batches]).tolist() == source.labels.tolist()
        images = torch.cat([images for images, _ in batches])
        for index in (0, 17, 59):
            assert np.array_equal(images[index].permute(1, 2, 0).numpy(), eval_picture(source.read(index), 32, 0.875))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_of_evaluation(damaged, workers):
    loader = evaluation(damaged, workers)
    labels = torch.cat([labels for _, labels in loader])
    assert (labels == IGNORED_LABEL).nonzero().flatten().tolist() == sorted(BAD)
    assert int(loader.dataset.bad.faults.count_nonzero()) == 6
    metric = MulticlassAccuracy(2, average="micro", ignore_index=IGNORED_LABEL)
    metric.update(torch.nn.functional.one_hot(labels.clamp(min=0), 2).float(), labels)
    assert metric.compute() == 1
    assert torch.equal(torch.cat([labels for _, labels in loader]), labels)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_all_processes_and_end_with_the_trainings(source, number):
    loader = training(source, workers=2)
    iterator = iter(loader)
    first = next(iterator)
    workers = loader._iterator._workers
    subprocess.run(["kill", f"-{int(number)}", *(str(worker.pid) for worker in workers)], check=True)
    assert same([first, *iterator], run(training(source), [0]))
    assert all(worker.is_alive() for worker in workers)
    del iterator, loader
    for worker in workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


def test_a_worker_that_stops_between_two_epochs_ends_the_wait(source):
    loader = training(source, workers=2)
    run(loader, [0])
    stopped = psutil.Process(loader._iterator._workers[1].pid)
    stopped.suspend()
    loader.limit = 2.0
    with pytest.raises(StalledError, match="has delivered nothing for"):
        run(loader, [1])
    stopped.resume()


def test_spawned_workers_make_the_same_batches(damaged):
    loader = training(damaged, workers=1)  # as on macOS
    loader.multiprocessing_context = "spawn"
    assert len(pickle.dumps(loader.dataset.source)) < 10_000
    assert same(run(loader, [0]), run(training(damaged), [0]))
    assert int(loader.dataset.bad.faults.count_nonzero()) == 6
    assert {sample.index for sample in loader.dataset.bad.new()} == set(BAD)


def test_composer_sets_the_epoch_and_counts_the_samples(source):
    for loader, batches in ((training(source), 4), (evaluation(source), 4)):
        spec = DataSpec(loader)
        assert _get_distributed_sampler(loader) is loader.batch_sampler
        # Composer drops `total_size - len(dataset)` samples from the last batch of a distributed evaluation.
        assert spec.num_samples == loader.batch_sampler.total_size == len(loader.batch_sampler.dataset) == 60
        assert len(loader) == batches
        assert spec.get_num_samples_in_batch(next(iter(loader))) == 15
