"""A run that died between its last checkpoint and what it writes last: the same command writes it."""

import json
import shutil

import pytest

from recipes.checkpoints.manifest import survey
from recipes.checkpoints.store import LocalStore
from tests.test_techniques import TINY


@pytest.mark.parametrize("lost", ["unfinished", "absent"])
def test_the_same_command_finishes_it_with_the_same_weights(train, tmp_path, capfd, lost):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.rstrip("\n") + " {ema: {half_life: 3ba}}\n")
    status, whole = train(path, "run_name=run")
    assert (status, whole["finished"]) == (0, True)
    summary = tmp_path / "run" / "summary.json"
    shutil.rmtree(tmp_path / "run" / "images")
    (tmp_path / "run" / "report.html").unlink()
    if lost == "absent":
        summary.unlink()
    else:
        summary.write_text(json.dumps(whole | {"finished": False, "weights_sha256": None}))
    stems = survey(LocalStore(tmp_path / "run" / "checkpoints")).complete
    status, again = train(path, "run_name=run")
    changing = {"resumed_from", "wall_seconds", "seconds", "versions", "images_per_second"}
    assert (status, again["resumed_from"][0].endswith(f"{stems[-1]}.safetensors")) == (0, True)
    assert {key: again[key] for key in again if key not in changing} == {
        key: whole[key] for key in whole if key not in changing
    }
    assert survey(LocalStore(tmp_path / "run" / "checkpoints")).complete == stems
    assert (tmp_path / "run" / "report.html").exists()
    capfd.readouterr()
    status, _ = train(path, "run_name=run")
    assert status == 0
    assert "run is finished" in capfd.readouterr().out
