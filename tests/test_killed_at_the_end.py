"""A run that died, or whose disk was full, where it writes its first or last files: the same command writes them."""

import json
import shutil

import pytest

from data.errors import InputError
from recipes.checkpoints.manifest import survey
from recipes.checkpoints.store import LocalStore
from tests.support import run_here, summary_of
from tests.test_techniques import TINY


def test_the_same_command_finishes_it_with_the_same_weights(train, tmp_path, capfd):
    path, run = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(TINY.rstrip("\n") + " {ema: {half_life: 3ba}}\n")
    status, whole = train(path, "run_name=run")
    assert (status, whole["finished"]) == (0, True)
    stems = survey(LocalStore(run / "checkpoints")).complete
    changing = {"resumed_from", "wall_seconds", "seconds", "versions", "images_per_second"}
    for left in (None, whole | {"finished": False, "weights_sha256": None}):
        shutil.rmtree(run / "images", ignore_errors=True)  # the first time only
        (run / "report.html").unlink()
        (run / "summary.json").unlink()
        if left is not None:
            (run / "summary.json").write_text(json.dumps(left))
        status, again = train(path, "run_name=run")
        assert (status, again["resumed_from"][-1].endswith(f"{stems[-1]}.safetensors")) == (0, True)
        assert again.keys() == whole.keys()
        assert {key: again[key] for key in again if key not in changing} == {
            key: whole[key] for key in whole if key not in changing
        }
        assert survey(LocalStore(run / "checkpoints")).complete == stems
        assert (run / "report.html").exists()
    capfd.readouterr()
    assert train(path, "run_name=run")[0] == 0
    assert "run is finished" in capfd.readouterr().out


def test_a_disk_that_takes_no_summary_or_no_config_is_one_line(tmp_path, images, caplog):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.rstrip("\n") + " {}\n")
    words = path, f"runs_folder={tmp_path}", f"data.path={images}", "run_name=run"
    config, summary = (tmp_path / "run" / f".{name}.new" for name in ("config.yaml", "summary.json"))
    config.mkdir(parents=True)  # takes the place that the file is written to first
    with pytest.raises(InputError, match="run: cannot be written: Is a directory"):
        run_here(*words)
    config.rmdir()
    summary.mkdir()
    assert run_here(*words) == 1
    assert "summary.json cannot be written: Is a directory; training is over" in caplog.text
    summary.rmdir()
    assert run_here(*words) == 0
    assert summary_of(tmp_path, "run")["finished"]
