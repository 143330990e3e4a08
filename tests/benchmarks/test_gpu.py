"""The command on a CPU, at small size, with a GPU's alternation and tables; torch.compile without a compiler."""

import functools
import json
import re
import time

import pytest
import torch

from benchmarks import gpu
from recipes.cli import run_command
from tests.support import ROOT, one_thread

SMALL = [
    "model.name=timm/test_resnet",
    "device=cpu",
    "device_batch_size=6",
    "device_microbatch_size=3",
    "data.workers=1",
]
OPTIONS = ["--sizes", "32", "--rounds", "2", "--steps", "2", "--warmup", "1", "--output"]


def test_all_sides_are_measured(images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    words = [str(ROOT / "yamls" / "gpu.yaml"), f"data.path={images}", "data.workers=1", *SMALL]
    with one_thread():
        assert gpu.main([*words, *OPTIONS, str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    order = re.findall(r"^32 px  ([\w-]+)  ", printed, re.MULTILINE)
    assert order == [*reversed(gpu.SIDES), *gpu.SIDES, *reversed(gpu.SIDES)], "they take turns, after a first round"
    assert "these figures only show that the command works" in printed
    found = json.loads((tmp_path / "results.json").read_text())
    at = found["sizes"]["32"]
    assert (found["n"], at["images_per_step"], at["images_per_microbatch"], at["precision"]) == (2, 6, 3, "fp32")
    assert all(len(rates) == 2 and min(rates) > 0 for rates in at["images_per_second"].values())
    assert at["estimated_bytes"] > 1e6
    table = (tmp_path / "table.md").read_text()
    assert all(re.search(rf"^\| {side} \| [\d,]+ \([\d.]+\) \|$", table, re.MULTILINE) for side in gpu.SIDES)
    assert "| memory / bare | 0.97 | " in table


class Loader(list):
    """Batches that take some time to load, two of which a worker could have prepared."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.02)
            yield batch


def test_a_window_counts_steps_and_the_wait_for_the_loader_and_nothing_before():
    taken = []

    def train(side):
        time.sleep(0.3)  # building
        side.loader = Loader(range(20))
        for batch in side:
            taken.append(batch)

    side = gpu.Side(train, torch.device("cpu"), images=10, steps=4, warmup=2)
    assert taken == []
    rates = [side.rate(), side.rate()]
    assert taken == list(range(12)), "two of the warm-up and four measured, twice"
    assert all(300 < rate <= 500 for rate in rates), "10 images in at least 0.02 s"
    side.close()


def test_each_side_keeps_its_own_setting_of_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as another size's sides have left it
    seen = []

    def train(chosen, side):
        if chosen:
            torch.backends.cudnn.benchmark = True
        side.loader = range(10)
        for _ in side:
            seen.append((chosen, torch.backends.cudnn.benchmark))

    sides = [gpu.Side(functools.partial(train, chosen), torch.device("cpu"), 1, 1, 1) for chosen in (True, False)]
    for side in (*sides, *sides):
        side.rate()
    for side in sides:
        side.close()
    assert seen == 2 * [(True, True), (True, True), (False, False), (False, False)]


def test_a_side_that_fails_leaves_the_others_their_figures(capfd):
    def train(side):
        raise RuntimeError("out of memory")

    side = gpu.Side(train, torch.device("cpu"), 1, 1, 1)
    rates = {"bare": [100.0, 110.0], "memory": [99.0, 99.0], "photos": [side.rate(), side.rate()]}
    side.close()
    assert capfd.readouterr().err.count("RuntimeError: out of memory") == 1
    compiled = {"memory-compiled": [110.0, 120.0], "photos-compiled": [115.0, 115.0], "torchvision": [50.0, 50.0]}
    found = {
        224: {"images_per_second": rates | compiled, "peak_bytes": dict.fromkeys(gpu.SIDES, 0), "estimated_bytes": 2e9}
    }
    assert [line.split(" is ")[0] for line in gpu.missed(found)] == [
        "224 px: memory / bare",
        "224 px: memory-compiled / bare",
        "224 px: photos / memory",
    ]
    speed, asked, peak = (table.rows for (table,) in gpu.tables(found).values())
    assert speed[:3] == [["bare", "105 (1.000)"], ["memory", "99 (0.945)"], ["photos", "- (-)"]]
    assert asked[0] == ["memory / bare", "0.97", "0.945"]
    assert peak[-1] == ["memory estimate", "2.0"]


@pytest.mark.parametrize(
    ("wrong", "named"), [("data.path=nowhere", "nowhere: "), ("device_microbatch_size=4", "device_microbatch_size: ")]
)
def test_wrong_input_is_one_line(wrong, named, images, tmp_path, capfd):
    words = [str(ROOT / "yamls" / "gpu.yaml"), f"data.path={images}", *SMALL, wrong]
    assert run_command(lambda: gpu.main([*words, *OPTIONS, str(tmp_path)])) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(named)
