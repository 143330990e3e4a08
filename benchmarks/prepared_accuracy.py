"""Whether training on prepared images costs accuracy: digits at 64 px against the same prepared at 37 px, quality 90.

    python -m benchmarks.prepared_accuracy [--epochs 6] [--seeds 0 1 2] [--images DIR]

A resnet10t (timm) is trained from scratch at 32 px, for which the loader reads 37 px (32 / 0.875), and evaluated on the
unchanged validation images. Without --images the digits of data.demo are used. One thread; the seed determines
everything else: initial weights, order, crops.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, options, prepare_all, spread
from benchmarks.time_to_accuracy import without_techniques
from data.demo import write_digits
from tests.support import run_here, summary_of

YAML = ROOT / "yamls" / "demo.yaml"
RECIPE = ("model.name=timm/resnet10t", "optimizer={lr: 0.1, weight_decay: 0.0005}", "data.workers=0", "eval.sizes=[32]")


def main() -> None:
    given = options(__doc__, epochs=6, seeds=[0, 1, 2], images=Path)
    found: dict[str, list[tuple[float, float]]] = {"original": [], "prepared": []}
    with tempfile.TemporaryDirectory() as scratch:
        original = given.images or write_digits(Path(scratch) / "digits", 64)
        paths = {"original": original, "prepared": Path(scratch) / "prepared"}
        prepare_all(original, paths["prepared"], ["37"])
        plain = [*RECIPE, *without_techniques(YAML, RECIPE), "data.train_size=32"]
        plain += [f"max_duration={given.epochs}ep", f"runs_folder={scratch}"]
        for seed in given.seeds:
            for name, path in paths.items():
                run_name = f"{name}-seed{seed}"
                run_here(YAML, *plain, f"seed={seed}", f"data.path={path}", f"run_name={run_name}")
                end = summary_of(Path(scratch), run_name)["eval_by_size"]["32"]
                found[name].append((100 * end["top1"], end["loss"]))
                row = {"seed": seed, "images": name, "top1": round(100 * end["top1"], 2), "loss": round(end["loss"], 4)}
                print(json.dumps(row), flush=True)
    for name, values in found.items():
        top1, loss = zip(*values, strict=True)
        print(f"{name}: top-1 {spread(top1, '.2f')} %, loss {spread(loss, '.4f')}")


if __name__ == "__main__":
    main()
