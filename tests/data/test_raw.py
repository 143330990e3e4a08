"""Datasets of raw pixels: the same pictures as the JPEG path's, from a memory map, and told sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import prepare as module
from data import verify
from data.augment import eval_picture, train_picture
from data.config import AugmentConfig, EpochPlan
from data.decode import BadImage, Fault, Picture
from data.errors import run_main
from data.imagefolder import ImageFolder
from data.open import open_split_pair
from data.prepare import Settings, Task, expected_bytes, main, prepare
from tests.data.conftest import encode, make_photo
from tests.data.test_loader import run, same, training
from tests.support import decode

SETTINGS = Settings("raw", ("28", "36"), ("original",), 90, 10)


@pytest.fixture(scope="module")
def raw_set(tmp_path_factory, folder):
    target, lines = tmp_path_factory.mktemp("raw") / "set", []
    assert prepare(str(folder), str(target), SETTINGS, 1, lines.append)
    return target, lines


@pytest.mark.parametrize("size", [20, 32, 64, 150, 200])
def test_a_crop_of_raw_pixels_is_that_of_the_same_pixels_compressed(size):
    photo = make_photo(201, 161, seed=3)
    jpeg = encode(photo, subsampling=0)
    ppm = encode(decode(jpeg), "PPM")
    for seed in range(12):
        augment = AugmentConfig(area=(0.1, 1.0) if size < 100 else (0.6, 1.0))
        crops = [
            train_picture(data, size, augment, np.random.default_rng(seed))
            for data in (ppm, memoryview(ppm), encode(decode(jpeg), "PNG"), jpeg)
        ]
        assert np.array_equal(crops[0], crops[1])
        assert np.array_equal(crops[0], crops[2])
        # libjpeg's reduced scales are not averages of pixels.
        assert np.array_equal(crops[0], crops[3]) if size >= 100 else np.abs(crops[0].astype(int) - crops[3]).mean() < 2
    assert np.array_equal(eval_picture(memoryview(ppm), size, 0.875), eval_picture(jpeg, size, 0.875))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"P6\n4 3\n255\n" + bytes(35), Fault.TRUNCATED),
        (b"P6\n99999 99999\n255\n" + bytes(35), Fault.TOO_LARGE),
        (b"P6\n0 3\n255\n" + bytes(36), Fault.NOT_AN_IMAGE),
    ],
)
def test_a_false_header_is_a_bad_image(data, fault):
    for one in (data, memoryview(data)):
        with pytest.raises(BadImage) as caught:
            Picture(one).decode(1)
        assert caught.value.fault in (fault, Fault.CORRUPT)


def test_other_headers_are_read_by_pillow():
    pixels = make_photo(3, 4)
    for header in (b"P6\n# comment\n4 3\n255\n", b"P6 4\t3\r255\n"):
        assert np.array_equal(decode(header + pixels.tobytes()), pixels)
    deep = b"P6\n4 3\n65535\n" + pixels.astype(">u2").tobytes()
    assert decode(deep).shape == (3, 4, 3)


def test_the_pixels_are_those_of_the_resized_originals(folder, raw_set):
    origin, raw = open_split_pair(str(folder), "")[0], open_split_pair(str(raw_set[0]), "")[0]
    assert raw.classes == origin.classes
    assert raw.labels.tolist() == origin.labels.tolist()
    read = raw.reader(24, range(45))
    for index in range(45):
        assert Path(raw.name(index)).name == Path(origin.name(index)).name
        whole = Image.fromarray(decode(origin.read(index)))
        height, width = Picture(read(index)).height, Picture(read(index)).width
        assert min(height, width) == 28
        assert np.array_equal(decode(read(index)), whole.resize((width, height), Image.Resampling.BICUBIC))
        if min(whole.size) <= 36:  # never enlarged
            assert np.array_equal(decode(raw.read(index)), whole)
    assert open_split_pair(str(raw_set[0]), "")[1].read(0) == open_split_pair(str(folder), "")[1].read(0)


def test_batches_are_those_of_the_same_pixels_in_files_whatever_the_workers_and_the_start(tmp_path, raw_set):
    raw = open_split_pair(str(raw_set[0]), "")[0]
    for index in range(45):
        place = tmp_path / raw.classes[raw.labels[index]]
        place.mkdir(exist_ok=True)
        (place / f"{index:04}.png").write_bytes(encode(decode(raw.read(index)), "PNG"))
    plan = [EpochPlan(32, "random", 16), EpochPlan(40, "center", 8)]
    expected = run(training(ImageFolder(tmp_path, None), plan=plan), range(2))
    assert same(run(training(raw, plan=plan), range(2)), expected)
    loader = training(raw, workers=2, plan=plan)
    assert same(run(loader, range(2)), expected)
    assert same(run(loader, [0], start=2), expected[2:3])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_shards_of_the_resolution_in_use_are_mapped_without_an_open_file(raw_set):
    raw = open_split_pair(str(raw_set[0]), "")[0]
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for size, resolution in ((24, "28"), (32, "36")):
        read = raw.reader(size, range(45))
        views = [read(index) for index in range(45)]
        assert all(isinstance(view, memoryview) and view.readonly for view in views)
        del views
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".mds")]
        assert len(maps) == 5
        assert all(f"{raw_set[0]}/train/{resolution}/0000" in line for line in maps)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


def test_damage_costs_the_image_as_in_other_shards(tmp_path, raw_set, capsys):
    target = shutil.copytree(raw_set[0], tmp_path / "set")
    train = open_split_pair(str(target), "")[0]
    for index, size in ((4, "28"), (20, "36")):
        file, offset, _ = train.resolutions[size].where(index)
        with (target / "train" / size / file).open("r+b") as shard:
            shard.seek(offset)
            shard.write(bytes(16))
    assert verify.main([str(target), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert out.count("SHA-256 differs from index.json") == 2
    assert all(f"{train.name(index)}: not an image" in out for index in (4, 20))
    loader = training(open_split_pair(str(target), "")[0], plan=[EpochPlan(32, "random", 45)])
    (target / "train/36" / train.resolutions["36"].where(40)[0]).unlink()
    assert sum(len(labels) for _, labels in run(loader, [0])) == 45
    reasons = {bad.index: bad.reason for bad in loader.dataset.bad.new()}
    damaged = {20: "not an image, or of an unknown format"}
    assert reasons == damaged | dict.fromkeys(range(40, 45), "the file is missing")


@pytest.mark.parametrize("layout", ["raw", "mds"])
def test_the_size_is_told_before_anything_is_written(tmp_path, folder, raw_set, layout, monkeypatch, capsys):
    lines = []
    if layout == "raw":
        assert raw_set[1][0].startswith("expected: about 0.000 GB (train at 28: 0.000 GB, train at 36: ")
        train = open_split_pair(str(folder), "")[0]
        expected = expected_bytes(Task("train", train, str(tmp_path), SETTINGS))
        for size, bytes_ in expected.items():
            written = sum(file.stat().st_size for file in (raw_set[0] / "train" / size).rglob("*.mds"))
            assert 0.9 * written < bytes_ < written
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 20_000))
    words = [str(folder), str(tmp_path / "new/set"), "--format", layout, "--train-sizes", "28"]
    assert run_main(lambda: main(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}/new/set: the images take about 0.000 GB (train at 28: " in error
    assert "but only 0.000 GB are free there" in error
    assert not (tmp_path / "new").exists()
    # What is written already needs no more space.
    assert prepare(str(folder), str(raw_set[0]), SETTINGS, 1, lines.append)
