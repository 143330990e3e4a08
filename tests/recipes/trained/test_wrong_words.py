"""What is wrong on the command line of evaluate, predict and export is said in a line, and early."""

import subprocess
import sys

import pytest

from tests.support import ROOT

BOTH = [
    (["RUN", "--checkpoint", "nowhere"], "--checkpoint: nowhere does not exist"),
    (["RUN", "modle.name=x"], "did you mean"),
    (["other.yaml"], "other.yaml"),
]
WRONG = {
    "evaluate": [
        *BOTH,
        (["RUN", "--data", "nowhere"], "nowhere: no such folder; expected CLASS/IMAGE or val/CLASS/IMAGE in it"),
        (["RUN", "--data", "EMPTY"], "no class folders"),
        (["RUN", "--sizes", "4"], "--sizes: got 4; allowed: 8 to 4096"),
        (["RUN", "--sizes", "big"], "--sizes: got big; allowed: 8 to 4096"),
        (["RUN", "--crop-ratios", "1.5"], "--crop-ratios: got 1.5"),
        (["RUN", "--csv", "no/such/file.csv"], "no/such is not a directory"),
        (["RUN", "--save", "no/such/file.json"], "no/such is not a directory"),
        (["RUN", "--weights", "best"], "invalid choice: 'best'"),
        (["RUN", "checkpoints.folder={runs_folder}/{run_name}/checkpoints", "run_name=x"], "no checkpoint of run 'x'"),
        (["RUN", "device=gpu"], "device: gpu is not available"),
        (["RUN", "other.yaml"], "one YAML file at a time"),
    ],
    "predict": [
        ([], "no YAML file or exported folder given"),
        *(([*words, "x.jpg"], error) for words, error in BOTH),
        (["RUN"], "no images given"),
        (["RUN", "data.workers=0"], "no images given"),
        (["EXPORTED"], "no images given"),
        (["RUN", "x.jpg", "--top", "0"], "--top: got 0"),
        (["RUN", "x.jpg", "--crop-ratio", "0"], "--crop-ratio: got 0"),
        (["RUN", "-", "--stdin-image"], "not both"),
        (["EXPORTED", "x.jpg", "--size", "32"], "--size: is fixed in the export"),
        (["EMPTY", "x.jpg"], "is neither a YAML file nor a folder that recipes.export wrote"),
    ],
    "export": [
        *(([*words, "--output", "OUT"], error) for words, error in BOTH),
        (["RUN"], "the following arguments are required: --output"),
        (["RUN", "--output", "OUT", "--formats", "tflite"], "argument --formats: invalid choice: 'tflite'"),
        (["RUN", "--output", "OUT", "--size", "4"], "--size: got 4"),
        (["RUN", "--output", "FILE"], "is a file"),
        (["RUN", "--output", "OUT", "--evaluation", "FILE"], "file was not written by recipes.evaluate --save"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(refused, tiny, exported, tmp_path, name):
    places = {"RUN": tiny.yaml, "EXPORTED": exported}
    places |= {"EMPTY": tmp_path / "empty", "OUT": tmp_path / "out", "FILE": tmp_path / "file"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for words, error in WRONG[name]:
        assert error in refused(name, *(places.get(word, word) for word in words))
        assert not (tmp_path / "out").exists()


def test_a_wrong_command_line_is_refused_before_torch_is_imported():
    code = """
import runpy, sys
for words in (["evaluate"], ["predict", "image.jpg"], ["export", "--output", "exported"]):
    sys.argv = ["x", "yamls/demo.yaml", "modle=1", *words[1:]]
    try:
        runpy.run_module(f"recipes.{words[0]}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 2
assert "torch" not in sys.modules and "composer" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("modle: unknown key") == 3
