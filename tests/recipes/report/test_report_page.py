"""The page and the command: whole runs, damaged ones, hostile ones."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np

from recipes.report import read_run
from recipes.report.page import render
from tests.recipes.report.folder import write_predictions, write_run

EVIL = "<script>alert(1)<&$x$"
"""A class of the fixture `photos`."""


class Seen(HTMLParser):
    """What a reader of a page sees, and what a browser would do."""

    def __init__(self, html):
        super().__init__()
        self.words, self.tags, self.attributes = [], set(), []
        self.handle_data = self.words.append
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def text_of(html):
    """The text of a page, in one line."""
    return " ".join(" ".join(Seen(html).words).split())


def report(*folders):
    return render([read_run(folder) for folder in folders])


def test_one_run(run_folder):
    html = report(run_folder)
    text = text_of(html)
    assert "one finished, 4 epochs 77.78 100.00 1:02:05 64.0 1" in text
    assert "resnet50 on" in text
    assert "label_smoothing smoothing: 0.1" in text
    assert "eval.interval 3" in text, "a key that is not at its default"
    assert "scheduler.warmup" not in text, "a key that is"
    assert "commit 012345678901-dirty" in text
    assert "device 1 x CPU x86_64" in text
    assert "1.50 15 s3://bucket/one/ep001-ba000015.safetensors" in text
    assert "one 32 50.00 100.00 1.2500" in text
    assert "9 evaluation images, so the standard error of its top-1 at 36 px is 13.86 points" in text
    assert "one 0 to 2 24 32 64.0 10.0" in text
    assert "0:50:00 (80.5 %) 0:08:20 (13.4 %) 0:03:20 (5.4 %) 0:00:25 (0.7 %) 1:02:05" in text
    assert "24 px, from epoch 0 on" in text
    assert "2 of 9 images at 36 px were predicted as another class" in text
    assert f"class2 {EVIL} 2 3 66.7" in text
    assert text.count(f"class2, predicted as {EVIL} 60 % against 30 %") == 2
    pictures = re.findall(r'<img alt="[^"]*"[^>]* src="data:image/(\w+);base64,', html)
    assert len(pictures) == 4, "two grids, two errors"
    assert html.count("<svg role") == 4
    assert "Top-1 accuracy over time" in html
    for value in re.findall(r'(?:src|href|xlink:href|action|data)="([^"]*)"', html):
        assert value.startswith(("data:", "#")), value
    assert not re.search(r"url\((?!#)|@import|<script", html)


def test_several_runs_side_by_side(run_folder, photos):
    other = write_run(run_folder.parent / "two", photos, epochs=6, seconds=0.25)
    text = text_of(report(run_folder, other))
    assert text.startswith("2 runs")
    assert "two 0 to 3 24 32 128.0 10.0" in text
    assert "The configs are the same except for the run names." in text
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"  mixup:\n( {4}.*\n)+", "  mixup: off\n", config))
    text = text_of(report(run_folder, other))
    assert "algorithms.mixup alpha: 0.2, interpolate_loss: false off" in text
    namesake = shutil.copytree(run_folder, run_folder.parent / "elsewhere" / "one")
    assert f"{run_folder} finished" in text_of(report(run_folder, namesake)), "distinguished by their folders"


def test_an_unfinished_run(run_folder):
    (run_folder / "predictions.npz").unlink()
    summary = json.loads((run_folder / "summary.json").read_text())
    early = {"finished": False, "epochs": 0, "top1": None, "top5": None, "eval_by_size": {}, "seconds": {}}
    (run_folder / "summary.json").write_text(json.dumps(summary | early | {"images_per_second": None}))
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "metrics.jsonl").write_text("".join(lines[:5]))
    text = text_of(report(run_folder))
    assert "one not finished: 0.5 of 12 epochs" in text
    assert "No evaluation yet" in text
    assert text.count("Available when the run is finished") == 2
    (run_folder / "metrics.jsonl").unlink()
    shutil.rmtree(run_folder / "images")
    text = text_of(report(run_folder))
    assert "No training figures yet" in text
    assert "The run saved no pictures of its batches" in text


FILES = ("config.yaml", "summary.json", "metrics.jsonl", "predictions.npz")
DAMAGES = [
    *((FILES, damage) for damage in ("empty", "cut", "noise", "folder", "pipe")),
    *(([name], "missing") for name in FILES),
]


def test_damaged_files_are_named_in_place(run_folder):
    folders = []
    for number, (names, damage) in enumerate(DAMAGES):
        folders.append(shutil.copytree(run_folder, run_folder.parent / f"{number}-{damage}"))
        for name in names:
            path = folders[-1] / name
            data = path.read_bytes()
            path.unlink()
            if damage == "folder":
                path.mkdir()
            elif damage == "pipe":  # opening it would wait forever
                os.mkfifo(path)
            elif damage != "missing":
                noise = np.random.default_rng(0).bytes(2000)
                path.write_bytes({"empty": b"", "cut": data[: len(data) * 2 // 3 + 1], "noise": noise}[damage])
    text = text_of(report(*folders))
    silent = {("predictions.npz", "missing"), ("metrics.jsonl", "empty"), ("config.yaml", "cut")}
    for folder, (names, damage) in zip(folders, DAMAGES, strict=True):
        for name in names:
            assert f"{folder / name}:" in text or (name, damage) in silent
    alone = text_of(report(folders[2]))
    for heading in ("Result", "Curves", "Throughput", "Where the time went", "Confused", "Most confident errors"):
        assert heading in text
        assert heading in alone


def test_pictures_and_figures_that_cannot_be_drawn(run_folder):
    picture = min((run_folder / "images").iterdir())
    picture.unlink()
    os.mkfifo(picture)
    lines = [{"batch": 1, "epoch": -1}, {"batch": 2, "epoch": 0.2, "wall_seconds": 1e300, "eval/36/top1": 1e300}]
    lines += [{"batch": 1e400, "epoch": 1}, {"batch": 3, "epoch": 1e308, "train/image_size": 1e300, "train/lr": 1e308}]
    (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = text_of(report(run_folder))
    assert f"{picture.name} cannot be shown" in text
    assert "metrics.jsonl: 2 damaged lines skipped" in text


def test_predictions_that_do_not_fit_each_other(run_folder):
    write_predictions(run_folder, [0, 1, 9], [0, 1, 2], ["a", "b", "c"])
    assert read_run(run_folder).problems[0].endswith("predictions.npz: damaged: its parts do not fit each other")
    np.savez(run_folder / "predictions.npz", label=np.array([{"a": 1}], object))
    assert "predictions.npz: damaged" in read_run(run_folder).problems[0], "no pickle is loaded"


def test_summaries_with_odd_values(run_folder):
    summary, folders = json.loads((run_folder / "summary.json").read_text()), []
    for number, value in enumerate((None, "x", -1, float("nan"), float("inf"), [], {}, {"train": "x"}, 10**400)):
        odd = dict.fromkeys(summary, value)
        within = {"seconds": {"train": value}, "eval_by_size": {"36": {"top1": value}}, "versions": {"torch": value}}
        for name, content in (("odd", odd), ("within", odd | within)):
            folders.append(shutil.copytree(run_folder, run_folder.parent / f"{name}{number}"))
            (folders[-1] / "summary.json").write_text(json.dumps(content))
    assert "Where the time went" in report(*folders)
    for folder in folders[3], folders[-1]:
        assert "Where the time went" in report(folder)


def test_hostile_names(run_folder, photos):
    evil = "</title><img src=x onerror=alert(1)> $\\frac{ ${{7*7}} {0} {x!r} %s"
    summary = json.loads((run_folder / "summary.json").read_text())
    evil_resume = {"run_name": evil, "resumed_from": [f"{evil}/ep001-ba000015.safetensors"], "versions": {evil: evil}}
    (run_folder / "summary.json").write_text(json.dumps(summary | evil_resume))
    write_predictions(run_folder, [0, 1, 2], [1, 2, 0], ["a", "b", "c"], [evil, EVIL, "-->"])
    other = write_run(run_folder.parent / "two", photos)
    for html in (report(run_folder), report(run_folder, other)):
        assert evil in text_of(html)
        seen = Seen(html)
        assert not {"script", "iframe", "object"} & seen.tags
        assert not [name for name, _ in seen.attributes if name.startswith("on")]


def test_images_that_are_gone_or_others(run_folder, tmp_path):
    config = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(re.sub(r"  path: .*", f"  path: {tmp_path / 'gone'}", config))
    text = text_of(report(run_folder))
    assert f"The images cannot be shown: {tmp_path / 'gone'}: no such folder" in text
    assert "60 % against 30 %" in text
    (run_folder / "config.yaml").write_text(config)
    write_predictions(run_folder, [0, 0, 1], [1, 0, 1], [EVIL, "class1", "class2"])
    assert "holds other images now than those that were evaluated" in text_of(report(run_folder))


def test_the_command(command, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("report", run_folder) == (0, f"report: {run_folder / 'report.html'}\n", "")
    assert (run_folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    other = shutil.copytree(run_folder, tmp_path / "other")
    assert command("report", run_folder, other, run_folder, "--output", tmp_path / "deep" / "page.html")[0] == 0
    assert "<h1>2 runs</h1>" in (tmp_path / "deep" / "page.html").read_text()


def test_bad_arguments(refused, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, words in {
        (): "the following arguments are required: RUN",
        ("nowhere",): "nowhere: no such folder",
        ("long" * 1000,): "long: no such folder",
        (".",): "not a run's folder, it has no config.yaml, summary.json or metrics.jsonl",
        ("runs",): "did you mean runs/one?",
        ("runs/one", "--out", "x"): "unrecognized arguments: --out x",
        ("runs/one", "--output", "."): ".: cannot be written",
        ("runs/one", "nowhere"): "nowhere: no such folder",
    }.items():
        assert words in refused("report", *arguments)
        assert not (tmp_path / "report.html").exists()
