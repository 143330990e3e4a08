"""Curves after a death and a resume are those of the run that nobody touched; the log; W&B and MLflow."""

import logging
import math
import re
import resource
import sys
import warnings
from types import SimpleNamespace

import pytest
from composer import Callback
from composer.algorithms import SWA, StochasticDepth
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.errors import InputError
from recipes.config import LoggersConfig
from recipes.watch.sinks import kept_lines
from recipes.watch.trackers import external_loggers, logger_problems

STAMP = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} "
TIMED = ("time/", "train/images_per_second", "train/loader_wait_fraction")

# Saved in the middle of an epoch; at its last batch, before the evaluation; after the evaluation. Death just after the
# save, one evaluation later, or in another stage.
DEATHS = [("ba5", 5), ("ba5", 7), ("ba6", 6), ("ba6", 8), ("ep2", 7), ("ep2", 11), ("ba4", 12)]


def curves(entries):
    """All points of metrics.jsonl that do not depend on the time of day, in order."""
    return [
        (entry["batch"], entry["epoch"], entry["samples"], name, value)
        for entry in entries
        for name, value in entry.items()
        if "/" in name and not name.startswith(TIMED)
    ]


def died(result):
    """A resumed process starts later than the one that died: a second at least, which is what file names show."""
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
    expected, expected_points = curves(whole.lines()), untimed(points(whole.folder))
    assert len(expected) == len(set(expected)) > 50
    for save, die_at in DEATHS:
        folder = f"{save}-{die_at}"
        dead = died(run(folder=folder, save_at=[save], die_at=die_at))
        with (dead.folder / "metrics.jsonl").open("a") as file:
            file.write('{"batch": 9, "epo')
        resumed = run(folder=folder, load=save)
        assert resumed.error is None
        assert curves(resumed.lines()) == expected, folder
        assert untimed(points(resumed.folder)) == expected_points, folder
        assert resumed.finished == whole.finished, "the position is the same, so the weights are"
        wall = [entry["wall_seconds"] for entry in resumed.lines()]
        assert wall == sorted(wall)


def test_torn_event_file(run):
    dead = died(run(save_at=["ba5"], die_at=8))
    [events_file] = (dead.folder / "tensorboard").iterdir()
    with events_file.open("rb+") as file:
        file.truncate(events_file.stat().st_size - 7)
    result = run(load="ba5")
    steps = [step for step, _ in points(result.folder)["train/loss"]]
    assert steps == [1, 2, 3, 4, 6, 8, 9, 10, 12]


def test_a_figure_that_is_not_finite_is_null(run):
    def spoil(result):
        result.trainer.state.model.module[3].weight.data.fill_(math.inf)

    result = run(prepare=spoil, tensorboard=False)

    assert result.lines()[0]["train/loss"] is None
    assert not re.search("NaN|Infinity", (result.folder / "metrics.jsonl").read_text())


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


@pytest.mark.parametrize(("limit", "epochs"), [(0, 3), (1500, 3), (1500, 5)])
def test_a_full_disk_does_not_stop_the_training(run, limit, epochs):
    full = FileSizeLimit(limit, epochs)
    try:
        result = run(callbacks=[full])
    finally:
        full.lift()
    console = result.stream.getvalue()
    assert int(result.trainer.state.timestamp.epoch) == 4
    assert "Traceback" not in console
    assert console.count("metrics.jsonl cannot be written") == 1
    if epochs == 3:
        assert result.error is None
        assert result.lines()[-1]["batch"] == 12, "every line is whole"
        assert [step for step, _ in points(result.folder)["train/loss"]][-2:] == [10, 12]
    else:
        assert console.count("tensorboard cannot be written") == 1


@pytest.mark.parametrize(
    "line", [b'{"batch": "x"}', b'{"batch": null}', b'{"batch": [1]}', b"[" * 100_000, b"9" * 5000, b"3", b"\xff\xfe{]"]
)
def test_a_line_that_is_none_of_ours_is_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"batch": 1}\n' + line + b'\n{"batch": 2}\n{"batch": 3}\n{"batch": 1}')
    assert list(kept_lines(path, 2, set())) == ['{"batch": 1}\n', '{"batch": 2}\n']


class Speak(Callback):
    """Says something in the middle of training."""

    def epoch_start(self, state, logger):
        if int(state.timestamp.epoch) == 1:
            logging.getLogger("recipes.somewhere").info("ours")
            logging.getLogger("data").debug("ours, in detail")
            logging.getLogger("recipes.somewhere").warning("only for the file", extra={"file_only": True})
            logging.getLogger("composer.somewhere").info("theirs")
            logging.getLogger("composer.somewhere").warning("their warning")
            warnings.warn("Python's warning", UserWarning, stacklevel=1)
            SWA()  # Composer's says that it does not resume
            StochasticDepth("ResNetBottleneck")


def logging_settings():
    levels = [logging.getLogger(name).level for name in ("recipes", "data", "algorithms", "composer")]
    return logging.getLogger().handlers[:], levels, warnings.showwarning


def test_the_log_and_the_console(run):
    before = logging_settings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(callbacks=[Speak()], prepare=lambda result: logging.getLogger("recipes").info("between"))
    assert logging_settings()[:2] == before[:2], "Python's logging is left as it was"
    assert warnings.showwarning is before[2]

    found = (result.folder / "log.txt").read_text().splitlines()
    text = "\n".join(found)
    first = next(number for number, line in enumerate(found) if line.endswith("between"))
    assert re.match(STAMP + r"INFO recipes: between$", found[first]), "what was logged before the training"
    assert re.match(STAMP + r"INFO recipes\.watch\.sinks: tiny: training starts$", found[first + 1])
    for expected in ("recipes.somewhere: ours", "only for the file", "their warning", "UserWarning: Python's warning"):
        assert text.count(expected) == 1
    for unwanted in ("theirs", "in detail", "known issues"):
        assert unwanted not in text
    epoch = r": epoch \d done, batch \d+: \d+ px, loss \d\.\d{4}, lr "
    assert sum(re.search(epoch, line) is not None for line in found) == 4
    assert len(re.findall(r"evaluation at (?:8|16) px: top-1 10\.00 %, top-5 50\.00 %", text)) == 4

    console = result.stream.getvalue().splitlines()
    assert console.index("between") + 1 == console.index("tiny: training starts")
    for expected in ("ours", "their warning"):
        assert console.count(expected) == 1
    assert sum(line.endswith("UserWarning: Python's warning") for line in console) == 1
    assert "warnings.warn(" not in result.stream.getvalue()
    assert "only for the file" not in console


def test_a_resume_appends_and_says_so(run):
    dead = run(save_at=["ba5"], die_at=7)
    path = dead.folder / "log.txt"
    before = path.read_text()
    after = run(load="ba5").folder.joinpath("log.txt").read_text()
    assert after.startswith(before)
    rest = after[len(before) :].splitlines()
    assert re.match(STAMP + r".*: tiny resumes from ba5\.pt: 1 epoch and [0-9]+ batch(es)? are done$", rest[0])
    assert sum("done, batch" in line for line in rest) == 3


def problems(**loggers):
    return list(logger_problems(LoggersConfig.model_validate(loggers)))


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_must_be_installed_and_arguments_known(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    first, second, third = problems(**{package: {"projet": "a", "tags": [], "nme": "b"}})
    for name, line in (("projet", first), ("nme", second)):
        assert line.startswith(f"loggers.{package}.{name}: unknown; allowed: ")
        assert "tags" in line
    assert third.startswith(f'loggers.{package}: {package} is not installed; run: pip install "{package}>=')


def test_a_version_must_go_with_composer(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").touch()
    (tmp_path / "wandb-0.31.0.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: wandb\nVersion: 0.31.0\n"
    (tmp_path / "wandb-0.31.0.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(str(tmp_path))
    [line] = problems(wandb={})
    assert "wandb 0.31.0 does not work with Composer; run: pip install" in line


def test_wandb_needs_a_key_unless_it_is_offline(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(api=SimpleNamespace(api_key=None)))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(InputError, match="no API key; run: wandb login"):
        external_loggers(LoggersConfig(wandb={}), "run", tmp_path)
