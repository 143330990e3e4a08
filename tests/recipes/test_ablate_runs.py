"""An ablation as it is started: real runs, one of which fails, an interruption, and the same command again."""

import signal

import pytest

from data.errors import InputError
from recipes.ablate import __main__ as ablate
from recipes.ablate import make_plan, preflight
from recipes.ablate.__main__ import locked
from tests.support import ROOT, end, start, wait_for
from tests.support import summary_of as summary

RECIPE = """
run_name: tiny
device: cpu
max_duration: 3ep
device_batch_size: 8
model: {name: timm/resnet10t}
optimizer: {lr: 0.05}
data: {path: IMAGES, train_size: 32, workers: 0}
eval: {sizes: [24, 32]}
checkpoints: {interval: 1ba}
loggers: {tensorboard: false, interval: 1}
algorithms:
  label_smoothing: {}
"""


@pytest.fixture
def recipe(tmp_path, images):
    """A YAML of one technique."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("IMAGES", str(images)))
    return path


def test_interrupted_then_failed_then_finished_by_the_same_command(command, recipe, tmp_path, monkeypatch):
    words = [str(recipe), f"runs_folder={tmp_path}", "--seeds", "3"]
    folder = tmp_path / "tiny-ablate"
    first, second = "tiny-recipe-seed3", "tiny-baseline-seed3"
    process = start(["-m", "recipes.ablate", *words])
    try:
        wait_for((folder / first / "checkpoints" / "ep000-ba000001.json").exists, process)
        with pytest.raises(InputError, match="another ablation"), locked(folder):
            pass
        process.send_signal(signal.SIGTERM)
    finally:
        _, output = end(process)
    assert process.returncode == 75, output
    assert "run the same command again to resume" in output.splitlines()[-1]
    assert not summary(folder, first)["finished"]
    assert not (folder / second).exists()
    assert "2 of 2 runs are not finished" in output
    assert not (folder / "table.md").exists()  # nothing to show yet

    monkeypatch.setattr(ablate, "preflight", lambda *_: None)  # has said that these runs can start
    failing = tmp_path / "entrypoint.py"
    failing.write_text(
        "import runpy, sys\n"
        "if 'baseline' in sys.argv[1]: sys.exit('no [b]memory[/b] today')\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ablate.ENTRYPOINT)!r}, run_name='__main__')\n"
    )
    entrypoint = ablate.ENTRYPOINT
    monkeypatch.setattr(ablate, "ENTRYPOINT", failing)
    status, out, err = command("ablate", *words)
    assert status == 1
    assert "[1/2] recipe seed 3: top-1" in err
    assert "[2/2] baseline seed 3: failed: exit status 1: no [b]memory[/b] today; see " in err
    assert str(folder / second / "console.txt") in out.replace("\n", "")
    done = summary(folder, first)
    assert done["finished"]
    assert len(done["resumed_from"]) == 1
    assert "1 failed" in (folder / "table.md").read_text()

    monkeypatch.setattr(ablate, "ENTRYPOINT", entrypoint)
    before = (folder / first / "console.txt").read_text()
    status, _, err = command("ablate", *words)
    assert (status, "1 of 2 runs to do" in err) == (0, True)
    assert (folder / first / "console.txt").read_text() == before
    assert summary(folder, second)["finished"]
    assert summary(folder, second)["weights_sha256"] != done["weights_sha256"]
    assert "1 failed" not in (folder / "table.md").read_text()
    assert {path.name for path in folder.iterdir()} == {
        *(first, second, ".lock", "table.md", "table.csv", "accuracy.png", "ablation.html")
    }

    # Nothing is left to do: nothing is started, and the table is there again at another target.
    status, out, _ = command("ablate", *words, "--target", "0.9", "--size", "24")
    assert (status, "at 24 px" in out) == (0, True)
    assert summary(folder, second)["resumed_from"] == []


def test_what_a_variant_cannot_do_is_found_before_any_run(recipe, tmp_path):
    """At 32 px AlexNet's last pooling has nothing left: only FixRes from the first epoch on makes its images larger."""
    overrides = [f"runs_folder={tmp_path}", "data.path=/nowhere", "model.name=alexnet", "eval.sizes=96"]
    overrides += ["algorithms.fixres={start: 0.0, size: 96}", "algorithms.composer.CutOut={length: 0.5}"]
    plan = make_plan(recipe, overrides, seeds=(0, 1), only=(), processes=1)
    with pytest.raises(InputError) as caught:
        preflight(plan.runs, 1)
    small, data = sorted(caught.value.lines, key=lambda line: "nowhere" in line)
    variants = "without-fixres, baseline, with-composer.CutOut, with-label_smoothing"
    assert small.startswith(f"{variants}: model.name: alexnet ")
    assert "does not accept images of 32 px" in small
    assert data.startswith(("data.path: /nowhere", "/nowhere"))
    assert not (tmp_path / "tiny-ablate").exists()
