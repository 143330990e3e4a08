import json
import re

import pytest
from PIL import Image

from recipes.cli import YAMLS
from tests.support import ROOT

P3 = str(ROOT / "yamls" / "p3.yaml")
MOSAIC = str(ROOT / "yamls" / "mosaic-medium.yaml")
DATA = "data.path=TMP"


@pytest.fixture
def plan(command):
    """What `plan --json` prints."""

    def plan(*words):
        status, out, err = command("plan", *words, "--json")
        assert status == 0, err
        return json.loads(out)

    return plan


@pytest.mark.parametrize("path", sorted(YAMLS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_has_a_plan(path, plan):
    found = plan(str(path), "data.path=/nowhere")
    assert sum(stage["epochs"] for stage in found["stages"]) == found["epochs"]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("demo", ["no throughput"]),
        ("g5", ["no throughput", "on demand: 5.672 $/h"]),
        ("a100", ["DGX A100 80 GB", "27.4471 $/h"]),
        ("h100", ["for 8 devices instead of 1: NVIDIA", "55.04 $/h"]),
        # Its schedule leaves the optimizer's own momentum.
        ("mosaic-medium", ["2.05, in epoch 9, at momentum 0.875", "0 to 1.48 0.875", "p3.16xlarge, g5.12xlarge"]),
    ],
)
def test_the_plan_is_shown_in_80_columns_and_on_a_page(name, lines, tmp_path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command("plan", YAMLS / f"{name}.yaml", f"runs_folder={tmp_path}", "data.path=/nowhere")
    body, *last = out.rstrip().rsplit("\n", 2)
    assert (status, err, max(map(len, body.splitlines())) <= 80) == (0, "", True)
    assert not set("…\x1b") & set(body)
    folder = tmp_path / name / "plan"
    assert last == [f"picture: {folder / 'schedule.png'}", f"page: {folder / 'plan.html'}"]
    assert Image.open(folder / "schedule.png").size == (1350, 1200)
    assert "<svg" in (folder / "plan.html").read_text()
    assert all(line in " ".join(body.split()) for line in lines)


def test_the_recipe_on_p3(plan):
    found = plan(P3, "data.path=/nowhere")
    assert (found["machine"], found["devices"]) == ("p3.16xlarge", 8)
    assert found["images"]["train"] == 1_281_167
    assert found["saving_against_224px"] == pytest.approx(0.0386, abs=1e-4)
    assert [stage["size"] for stage in found["stages"]] == [128, 224, 288]
    rates = [stage["images_per_second"] for stage in found["stages"]]
    assert rates == [pytest.approx(8322 * 0.749 * (224 / size) ** 2) for size in (128, 224, 288)]
    trained = sum(epochs * 1_281_167 / rate for epochs, rate in zip((10, 75, 5), rates, strict=True))
    evaluated = 90 * 50_000 * sum((size / 224) ** 2 for size in (224, 288)) / (3 * 8322 * 0.749)
    assert found["hours"] == pytest.approx((trained + evaluated) / 3600)
    on_demand, spot = found["costs"]
    assert on_demand["dollars"] == pytest.approx(found["hours"] * 24.48)
    assert spot["dollars"] == pytest.approx(found["hours"] * 7.344)
    assert "P3" in found["machine_note"]
    # Within a stage, whose first and last rates do not show it.
    assert (found["peak_lr"], found["peak_epoch"], found["peak_momentum"]) == (2.0, 27, pytest.approx(0.85))


def test_several_recipes_are_compared(command, plan):
    words = [P3, MOSAIC, "data.path=/nowhere", "--machine", "p4d.24xlarge"]
    found = plan(*words)
    assert [one["run_name"] for one in found] == ["p3", "mosaic-medium"]
    assert (found[0]["published"], found[1]["published"][:14]) == ("", "78.1 to 79.5 %")
    status, shown, _ = command("plan", *words)
    assert status == 0
    for one in found:
        assert re.search(
            rf"{one['run_name']} +90 +{one['epochs_at_224px']:.4g} p4d.24xlarge .* [0-9.]+ (-|78.1)", shown
        )
    assert "mosaic-medium: 78.1 to 79.5 % top-1 at 224 px" in shown


def test_what_auto_is_on_a_machine(command, plan, tmp_path):
    gpu = [str(ROOT / "yamls" / "gpu.yaml"), "data.path=/nowhere"]
    found = plan(*gpu, "--memory", "--machine", "runpod-h100")
    assert found["device_microbatch_size"] == {"128": 768, "224": 256, "288": 256}
    assert found["costs"][0]["dollars"] == pytest.approx(found["hours"] * 3.99)
    assert plan(*gpu)["device_microbatch_size"] == "auto"
    for key, line in (
        ("device_memory_gb=8", "auto is {128: 256, 224: 64, 288: 32}"),
        ("seed=1", "depends on the memory"),
    ):
        status, out, _ = command("plan", *gpu, key, "--memory", f"--out={tmp_path}")
        assert (status, line in " ".join(out.split())) == (0, True)


def test_a_price_list_of_the_users_own_and_a_folder_that_cannot_be_written(command, plan, tmp_path):
    prices = tmp_path / "mine.yaml"
    prices.write_text(
        "machines: {shed: {device: V100-16GB, devices: 8, "
        "on_demand: {usd_per_hour: 2, region: home, date: 2026-11, source: the meter}}}\n"
    )
    argv = [P3, "data.path=/nowhere", "--prices", str(prices), "--machine", "shed"]
    found = plan(*argv)
    (bill,) = found["costs"]
    assert bill["dollars"] == pytest.approx(2 * found["hours"])
    status, out, err = command("plan", *argv, f"--out={prices / 'x'}")
    assert (status, "cannot be written: Not a directory; see --out" in err) == (2, True)
    assert all(line in out for line in ("spot: no price", "the meter")), "the plan itself is shown"


def test_without_a_published_figure_nothing_is_made_up(plan):
    g5 = str(ROOT / "yamls" / "g5.yaml")
    found = plan(g5, "data.path=/nowhere")
    assert (found["throughput"], found["hours"], found["costs"]) == (None, None, [])
    found = plan(g5, "data.path=/nowhere", "--images-per-second", "3000")
    assert found["throughput"]["source"].startswith("given")
    assert found["costs"][0]["dollars"] == pytest.approx(found["hours"] * 5.672)


def test_the_hours_and_sizes_of_a_real_run(train, images, tmp_path, plan):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "run_name: tiny\nmax_duration: 5ep\ndevice: cpu\ndevice_batch_size: 4\nmodel: {name: timm/test_resnet}\n"
        "data: {path: x, workers: 0, train_size: 64}\neval: {sizes: [32], device_batch_size: 8, interval: 2}\n"
        "loggers: {interval: 1, tensorboard: false}\nalgorithms: {progressive_resizing: {where: batch, "
        "initial_scale: 0.5, delay_fraction: 0.3, finetune_fraction: 0.3, size_increment: 8}}\n"
    )
    keys = (str(recipe), f"runs_folder={tmp_path}", f"data.path={images}")
    before = plan(*keys)
    assert before["throughput"] is None
    assert (before["images"]["train"], before["images"]["val"]) == (24, 9)
    train(recipe)
    entries = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "train/lr" in entry]
    evaluations = [entry for entry in entries if "eval/32/top1" in entry]
    assert len(evaluations) == before["evaluation"]["times"] == 3
    assert len(steps) == sum(stage["steps"] for stage in before["stages"]) == 30
    for stage in before["stages"]:
        begin = stage["first_epoch"]
        own = [entry for entry in steps if begin < entry["epoch"] <= begin + stage["epochs"]]
        assert {entry["train/image_size"] for entry in own} == {stage["size"]}
        for line, rate in ((own[0], stage["first"]), (own[-1], stage["last"])):
            assert (line["train/lr"], line["train/momentum"]) == (rate["lr"], rate["momentum"])
    # Measured figures replace others, unless the user knows better; a run that is named goes before this one's own.
    found = plan(*keys)
    assert found["throughput"]["source"].startswith(f"measured: {tmp_path / 'tiny' / 'metrics.jsonl'} on 1 x CPU")
    assert found["stages"][0]["images_per_second"] == pytest.approx(
        found["throughput"]["images_per_second_by_size"]["32"]
    )
    assert plan(P3, "--measured", str(tmp_path / "tiny"))["throughput"]["source"].startswith("measured")
    assert plan(*keys, "--images-per-second=9")["throughput"]["source"].startswith("given")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no YAML file given"),
        ([P3, "--machine", "p9"], "--machine: 'p9' is not in"),
        ([P3, "--measured", "/nowhere"], "/nowhere/metrics.jsonl: cannot be read: no such file; allowed: the"),
        ([P3, "--devices", "0"], "argument --devices: got 0; allowed: above 0"),
        ([P3, "--images-per-second", "nan"], "argument --images-per-second: got nan; allowed: above 0"),
        ([P3, "--images-per-second", "fast"], "argument --images-per-second: invalid float value: 'fast'"),
        ([P3, "--images-per-second", "1e308"], "argument --images-per-second: got 1e+308; allowed: above 0, at most"),
        ([P3, "--devices", "9" * 400], "argument --devices: got 99"),
        ([P3, "--images", "5", "0"], "argument --images: got 5 0; allowed: 1 to 1,000,000,000 each"),
        ([P3, "--images", "5", "9" * 400], "argument --images: got 5 99"),
        ([P3, "--images-per-second", "9", "--measured", "x"], "--measured both set the throughput"),
        ([P3, "--prices", "/nowhere.yaml"], "/nowhere.yaml: no such file"),
        ([P3, "seed=x"], "seed: got 'x'"),
        ([MOSAIC, "--devices", "3"], "global_batch_size: 2048 images at 176 px are not divisible by 3 processes"),
        ([P3, "--memory", "model.name=resnet5o"], "model.name: 'resnet5o' is not a classifier"),
        ([P3, DATA], "/train: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, refused, tmp_path):
    data = [] if not argv or argv[-1] == DATA else ["data.path=/nowhere"]
    assert message in refused("plan", *(word.replace("TMP", str(tmp_path)) for word in argv), *data)
