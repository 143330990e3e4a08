"""Training pictures, images that cannot be decoded, predictions."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import InputError
from recipes.watch.pictures import picture_grid
from tests.recipes.watch.test_sinks import events
from tests.recipes.watch.tiny import CLASSES, MEAN, SAMPLES, STD
from tests.support import ROOT


def expected(images):
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_shows_what_the_model_saw(finished):
    for epoch, size in ((0, 8), (2, 12), (3, 16)):
        with Image.open(finished.folder / "images" / f"ep{epoch:03d}-{size}px.png") as file:
            picture = np.asarray(file)
        assert picture.shape == (size, 8 * size + 14, 3)
        for index, image in enumerate(expected(finished.seen[epoch])):
            left = index * (size + 2)
            np.testing.assert_array_equal(picture[:, left : left + size], image)
    [first, *_] = events(finished.folder).Images("train/images")
    assert (first.width, first.height) == (8 * 8 + 14, 8)


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


REASON = "not an image"


def breaking(count, split="train"):
    def prepare(result):
        getattr(result, split).broken.update(dict.fromkeys(range(count), REASON))

    return prepare


def named(result):
    return [line for line in (result.folder / "log.txt").read_text().splitlines() if "bad image in" in line]


@pytest.mark.parametrize("split", ["train", "val"])  # val: at two evaluation sizes
def test_named_once_and_counted(run, split):
    result = run(prepare=breaking(2, split), max_bad_fraction=2 / SAMPLES)
    assert result.error is None
    instead = "replaced" if split == "train" else "not counted"
    assert [line.partition("WARNING ")[2] for line in named(result)] == [
        f"recipes.watch.pictures: bad image in {split}, {instead}: n01/0{index}.jpeg: {REASON}" for index in range(2)
    ]
    assert result.stream.getvalue().count(f"bad image in {split}") == 2
    assert result.summary()["bad_images"] == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_end_the_run(run, split):
    result = run(prepare=breaking(3, split), max_bad_fraction=2 / SAMPLES)
    assert isinstance(result.error, InputError)
    [line] = result.error.lines
    assert line.startswith(f"data.max_bad_fraction: 3 of {SAMPLES} images of {split} cannot be decoded")
    assert "n01/02.jpeg: not an image" in line
    assert "\n" not in line
    # What was written stays whole.
    assert len(named(result)) == 3
    assert result.summary()["finished"] is False
    assert result.lines()


def test_a_resume_remembers(run):
    run(prepare=breaking(2), save_at=["ep2"], die_at=7)
    result = run(load="ep2", prepare=breaking(2))
    assert len(named(result)) == 2, "named by the first process, not again"
    assert result.summary()["bad_images"] == 2
    assert isinstance(run(load="ep2", prepare=breaking(3)).error, InputError)


def test_the_console_is_not_flooded(run, monkeypatch):
    monkeypatch.setattr("recipes.watch.pictures.NAMED_ON_CONSOLE", 5)
    result = run(prepare=breaking(15), max_bad_fraction=1.0)
    assert result.error is None
    console = result.stream.getvalue()
    assert console.count("bad image in train") == 5
    assert console.count("further bad images are logged in log.txt only") == 1
    assert len(named(result)) == 15


def load(folder):
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        return dict(file)


def test_the_last_evaluation_image_by_image(finished):
    found = load(finished.folder)
    model, images = finished.trainer.state.model.eval(), [finished.val[index] for index in range(SAMPLES)]
    with torch.no_grad():
        chances = torch.softmax(model.module(torch.stack([image for image, _ in images])), 1)
    top, predicted = chances.max(1)
    labels = [label for _, label in images]
    assert found["label"].tolist() == labels
    np.testing.assert_array_equal(found["predicted"], predicted)
    np.testing.assert_allclose(found["probability"], top, rtol=1e-5)
    np.testing.assert_allclose(found["label_probability"], chances[range(SAMPLES), labels], rtol=1e-5)
    assert found["classes"].tolist() == [f"n{label:02d}" for label in range(CLASSES)]
    assert found["names"].tolist() == [f"class {label}" for label in range(CLASSES)]
    assert (found["size"], found["batch"]) == (16, 12)


def test_a_disk_that_fails_does_not_spoil_the_run(run):
    def prepare(result):
        (result.folder / "predictions.npz").mkdir(parents=True)

    result = run(prepare=prepare, tensorboard=False)
    assert result.error is None
    assert "predictions.npz cannot be written" in result.stream.getvalue()


def test_a_whole_run_leaves_its_predictions_and_names_its_report(train, tmp_path, images, capsys):
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "val" / "class1" / "1.jpg").write_bytes(b"no image")
    small = ["model.name=timm/test_resnet", "max_duration=2ep", "data.workers=0", "loggers.tensorboard=off"]
    more = [f"data.path={damaged}", "data.max_bad_fraction=0.5", "run_name=small"]
    status, summary = train(ROOT / "yamls" / "demo.yaml", *small, *more)
    folder = tmp_path / "small"
    found = load(folder)
    kept = found["label"] >= 0
    assert (status, kept.sum()) == (0, 8)
    # The figures of the summary are EMA's, so the answers are, too.
    assert np.mean(found["label"][kept] == found["predicted"][kept]) == pytest.approx(summary["top1"], abs=1e-6)
    loss = -np.log(found["label_probability"][kept]).mean()
    assert loss == pytest.approx(summary["eval_by_size"]["36"]["loss"], rel=1e-4)
    page = folder / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {page}"
    assert "of 8 images at 36 px were predicted as another class" in page.read_text()
