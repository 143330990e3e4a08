"""Curves after a death and a resume are those of the run that nobody touched."""

import json
import math
import resource

import pytest
from composer import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.watch.metrics_file import kept_lines

TIMED = ("time/", "train/images_per_second", "train/loader_wait_fraction")

# Saved in the middle of an epoch; at its last batch, before the evaluation; after the evaluation. Death just after the
# save, one evaluation later, or in another stage.
DEATHS = [("ba5", 5), ("ba5", 7), ("ba6", 6), ("ba6", 8), ("ep2", 7), ("ep2", 11), ("ba4", 12)]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves(entries):
    """All points of metrics.jsonl that do not depend on the time of day, in order."""
    return [
        (entry["batch"], entry["epoch"], entry["samples"], name, value)
        for entry in entries
        for name, value in entry.items()
        if "/" in name and not name.startswith(TIMED)
    ]


def died(result):
    """A process that goes on starts later than the one that died: a second at least, which is what file names tell."""
    assert isinstance(result.error, KeyboardInterrupt)
    for path in (result.folder / "tensorboard").iterdir():
        words = path.name.split(".")
        path.rename(path.with_name(".".join([*words[:3], str(int(words[3]) - 60), *words[4:]])))
    return result


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def points(folder):
    found = events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def untimed(scalars):
    return {tag: values for tag, values in scalars.items() if not tag.startswith(TIMED)}


def test_every_point_once_whenever_it_dies(run):
    whole = run(folder="whole")
    assert whole.error is None
    expected, expected_points = curves(lines(whole.folder)), untimed(points(whole.folder))
    assert len(expected) == len(set(expected)) > 50
    for save, die_at in DEATHS:
        folder = f"{save}-{die_at}"
        dead = died(run(folder=folder, save_at=[save], die_at=die_at))
        with (dead.folder / "metrics.jsonl").open("a") as file:
            file.write('{"batch": 9, "epo')
        resumed = run(folder=folder, load=save)
        assert resumed.error is None
        assert curves(lines(resumed.folder)) == expected, folder
        assert untimed(points(resumed.folder)) == expected_points, folder
        assert resumed.finished == whole.finished, "the position is the same, so the weights are"
        wall = [entry["wall_seconds"] for entry in lines(resumed.folder)]
        assert wall == sorted(wall)


def test_points_in_both_files_are_the_same(run):
    result = run(interval=1)
    scalars = points(result.folder)
    from_lines = {}
    for entry in lines(result.folder):
        for name, value in entry.items():
            if "/" in name:
                from_lines.setdefault(name, []).append((entry["batch"], value))
    epochs = scalars.pop("train/epoch")
    assert [step for step, _ in epochs] == list(range(1, 13))
    assert set(scalars) == set(from_lines), "only our figures"
    for name, values in from_lines.items():
        assert [step for step, _ in scalars[name]] == [step for step, _ in values]
        assert [value for _, value in scalars[name]] == pytest.approx([value for _, value in values], rel=1e-6)


def test_images_are_not_doubled(run):
    died(run(save_at=["ep2"], die_at=8))
    result = run(load="ep2")
    found = events(result.folder)
    assert found.Tags()["images"] == ["train/images"]
    assert [event.step for event in found.Images("train/images")] == [0, 6, 9]
    assert sorted(path.name for path in (result.folder / "images").iterdir()) == [
        "ep000-8px.png",
        "ep002-12px.png",
        "ep003-16px.png",
    ]


def test_torn_event_file(run):
    dead = died(run(save_at=["ba5"], die_at=8))
    [events_file] = (dead.folder / "tensorboard").iterdir()
    with events_file.open("rb+") as file:
        file.truncate(events_file.stat().st_size - 7)
    result = run(load="ba5")
    steps = [step for step, _ in points(result.folder)["train/loss"]]
    assert steps == [1, 2, 3, 4, 6, 8, 9, 10, 12]


def test_start_from_zero_in_a_used_folder(run):
    died(run(die_at=7))
    again = run()
    steps = [entry["batch"] for entry in lines(again.folder) if "train/loss" in entry]
    assert steps == [step for step, _ in points(again.folder)["train/loss"]] == [1, 2, 3, 4, 6, 8, 9, 10, 12]


def test_damaged_lines_go_and_whole_ones_stay(run):
    dead = died(run(save_at=["ba5"], die_at=6))
    path = dead.folder / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_bytes(b"\xff\xfe{]\n" + whole[0].encode() + b"\n[]\n3\n{}\n" + "".join(whole[1:]).encode() + b'{"batch"')
    result = run(load="ba5")
    steps = [entry["batch"] for entry in lines(result.folder) if "train/loss" in entry]
    assert steps == [1, 2, 3, 4, 6, 8, 9, 10, 12]


def test_a_figure_that_is_not_finite_is_null(run):
    def spoil(result):
        result.trainer.state.model.module[3].weight.data.fill_(math.inf)

    result = run(prepare=spoil, tensorboard=False)

    def refuse(text):
        raise AssertionError(text)

    entries = [
        json.loads(line, parse_constant=refuse) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert entries[0]["train/loss"] is None


class FileSizeLimit(Callback):
    """No file grows beyond `limit` bytes from the first epoch on, until `epochs` are done."""

    def __init__(self, limit, epochs):
        self.limit, self.epochs = limit, epochs
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after_load(self, state, logger):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def epoch_start(self, state, logger):
        if int(state.timestamp.epoch) == self.epochs:
            self.lift()

    def lift(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("limit", [0, 1500])
@pytest.mark.parametrize("epochs", [3, 5])
def test_a_full_disk_does_not_stop_the_training(run, limit, epochs):
    full = FileSizeLimit(limit, epochs)
    try:
        result = run(callbacks=[full])
    finally:
        full.lift()
    console = result.stream.getvalue()
    assert int(result.trainer.state.timestamp.epoch) == 4
    assert "Traceback" not in console
    assert console.count("MetricsFile cannot be written") == 1
    if epochs == 3:
        assert result.error is None
        assert lines(result.folder)[-1]["batch"] == 12, "every line is whole"
        assert [step for step, _ in points(result.folder)["train/loss"]][-2:] == [10, 12]
    else:
        assert console.count("TensorBoard cannot be written") == 1


@pytest.mark.parametrize(
    "line", ['{"batch": "x"}', '{"batch": null}', '{"batch": [1]}', "[" * 100_000, "9" * 5000, "3"]
)
def test_a_line_that_is_none_of_ours_is_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"batch": 1}}\n{line}\n{{"batch": 2}}\n')
    assert list(kept_lines(path, 2, set())) == ['{"batch": 1}\n', '{"batch": 2}\n']
