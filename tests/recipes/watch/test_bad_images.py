import json

import pytest

from data.source import BadSample
from recipes.errors import InputError
from tests.recipes.watch.tiny import SAMPLES

REASON = "not an image"


def breaking(count, split="train"):
    def prepare(result):
        getattr(result, split).broken.update(dict.fromkeys(range(count), REASON))

    return prepare


def named(result):
    return [line for line in (result.folder / "log.txt").read_text().splitlines() if "bad image in" in line]


def test_named_once_and_counted(run):
    result = run(prepare=breaking(2), max_bad_fraction=2 / SAMPLES)
    assert result.error is None
    lines = named(result)
    assert [line.partition("WARNING ")[2] for line in lines] == [
        f"recipes.watch.bad_images: bad image in train, replaced: n01/{index}.jpeg: {REASON}" for index in range(2)
    ]
    assert result.stream.getvalue().count("bad image in train") == 2
    assert json.loads((result.folder / "summary.json").read_text())["bad_images"] == 2


def test_the_same_image_at_two_evaluation_sizes_counts_once(run):
    result = run(prepare=breaking(2, "val"))
    assert len(named(result)) == 2
    assert "bad image in val" in named(result)[0]
    assert json.loads((result.folder / "summary.json").read_text())["bad_images"] == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_end_the_run(run, split):
    result = run(prepare=breaking(3, split), max_bad_fraction=2 / SAMPLES)
    assert isinstance(result.error, InputError)
    [line] = result.error.lines
    assert line.startswith(f"data.max_bad_fraction: 3 of {SAMPLES} images of {split} cannot be decoded")
    assert "n01/2.jpeg: not an image" in line
    assert "\n" not in line
    # What was written stays whole.
    assert len(named(result)) == 3
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["finished"] is False
    for entry in (result.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(entry)


def test_a_look_within_an_epoch(run, monkeypatch):
    monkeypatch.setattr("recipes.watch.bad_images.POLL_BATCHES", 2)
    result = run(prepare=breaking(3), max_bad_fraction=2 / SAMPLES)
    assert isinstance(result.error, InputError)
    assert int(result.trainer.state.timestamp.batch) == 2


def test_none_is_allowed_to_be_bad(run):
    assert run(max_bad_fraction=0.0).error is None
    assert isinstance(run(max_bad_fraction=0.0, prepare=breaking(1)).error, InputError)


def test_a_resume_remembers(run):
    run(prepare=breaking(2), save_at=["ep2"], die_at=7)
    result = run(load="ep2", prepare=breaking(2))
    assert len(named(result)) == 2, "named by the first process, not again"
    assert json.loads((result.folder / "summary.json").read_text())["bad_images"] == 2
    result = run(load="ep2", prepare=breaking(3))
    assert isinstance(result.error, InputError)


def test_the_console_is_not_flooded(run):
    def many(result):
        for index in range(30):
            result.train.bad.all.append(BadSample(index, f"n02/{index:02d}.jpeg", REASON))

    result = run(prepare=many, max_bad_fraction=2.0)
    assert result.error is None
    console = result.stream.getvalue()
    assert console.count("bad image in train") == 20
    assert console.count("further bad images are named in log.txt only") == 1
    assert len(named(result)) == 30
