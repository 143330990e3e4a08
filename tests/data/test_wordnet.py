import subprocess
import sys

from data.wordnet import class_names


def test_wordnet_ids_get_names_and_nothing_else_does():
    folders = ["n01440764", "n02979186", "7", "cat", "n99999999", "n0144076", "N01440764"]
    assert class_names(folders) == ["tench", "cassette player", *folders[2:]]


def test_two_folders_with_one_name_stay_apart():
    assert class_names(["n02012849", "n03126707", "n01440764"]) == ["crane (n02012849)", "crane (n03126707)", "tench"]


def test_timm_is_left_alone_where_no_folder_needs_it():
    code = "import sys, data.wordnet as w; w.class_names(['0', 'cat']); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
