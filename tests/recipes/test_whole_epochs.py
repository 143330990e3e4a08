"""Every image once in every epoch, also where the stages' batches differ in size."""

import json
import shutil
from pathlib import Path

from tests.support import ROOT

OVERRIDES = (
    "run_name=stages",
    "model.name=timm/test_resnet",
    "max_duration=6ep",
    "data.workers=0",
    "loggers.tensorboard=false",
    "checkpoints.interval=1ba",
    "checkpoints.keep=100",
    "device_batch_size={24: 12, 32: 4, 36: 6}",
)
BATCHES = 24 // 12 + 4 * (24 // 4) + 24 // 6
"""One epoch at 24 px, four at 32, one at 36, of 24 images each."""


def test_stages_with_smaller_batches_see_all_images_and_resume_anywhere(train, tmp_path):
    status, whole = train(ROOT / "yamls" / "demo.yaml", *OVERRIDES)
    assert (status, whole["epochs"], whole["batches"], whole["samples"]) == (0, 6, BATCHES, 6 * 24)
    saved = tmp_path / "stages" / "checkpoints"
    every = sorted(saved.glob("ep*.json"))
    for position in (5, BATCHES - 2):  # in the middle of the second epoch, and of the last
        [last] = [path for path in every if path.stem.endswith(f"-ba{position:06d}")]
        later = tmp_path / f"from{position}"
        shutil.copytree(tmp_path / "stages", later / "stages")
        for path in [path for path in every if path.stem > last.stem]:
            for suffix in (".json", ".safetensors"):
                (later / "stages" / "checkpoints" / path.with_suffix(suffix).name).unlink()
        status, _ = train(ROOT / "yamls" / "demo.yaml", *OVERRIDES, f"runs_folder={later}")
        resumed = json.loads((later / "stages" / "summary.json").read_text())
        assert [Path(one).stem for one in resumed["resumed_from"]] == [last.stem]
        compared = ("batches", "samples", "weights_sha256", "top1")
        assert (status, [resumed[name] for name in compared]) == (0, [whole[name] for name in compared])
