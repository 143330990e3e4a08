"""`python -m recipes.evaluate`: equal to the run's own figures, exact, on any folder, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torchvision.models import ResNet50_Weights

from recipes.trained import load_trained
from tests.support import ROOT, launcher, write_images

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
"""As in the run's recipe."""


@pytest.fixture
def figures(command, tiny):
    """`figures(*words)` -> what `evaluate --json` prints for the run."""

    def figures(*words):
        status, out, err = command("evaluate", tiny.yaml, *words, "--json")
        assert status == 0, err
        return json.loads(out)

    return figures


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Class folders with more images than the run's own: 3 x 11, an uneven number for batches and processes."""
    return write_images(tmp_path_factory.mktemp("more") / "dataset", train=1, val=11, seed=5)


def counts(found):
    """By setting and class, what was counted."""
    return {
        (one["size"], one["crop_ratio"], row["class"]): (row["images"], row["top1_correct"], row["top5_correct"])
        for one in found["results"]
        for row in one["classes"]
    }


def test_it_finds_what_the_run_logged_at_its_end(tiny, figures):
    found = figures()
    assert found["weights_sha256"] == tiny.summary["weights_sha256"]
    assert [one["size"] for one in found["results"]] == [40, 32]
    for one in found["results"]:
        logged = tiny.summary["eval_by_size"][str(one["size"])]
        assert one["images"] == 9
        assert (one["top1"], one["top5"]) == pytest.approx((logged["top1"], logged["top5"]), abs=1e-6)
        assert one["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert figures("--checkpoint", "s3://bucket/runs/tiny")["results"] == found["results"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of JPEGs of many shapes, whose colours tell the class now and then."""
    place, rng = tmp_path_factory.mktemp("photos") / "dataset", np.random.default_rng(2)
    write_images(place, train=1, val=1)
    for label, folder in enumerate(sorted((place / "val").iterdir())):
        for number in range(40):
            height, width = rng.integers(30, 180, 2)
            small = rng.integers(0, 200, (8, 8, 3)) + np.eye(3)[label] * rng.integers(0, 56)
            picture = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"photo{number}.jpg", quality=85)
    return place


def timms_transform(size):
    return timm.data.create_transform(size, is_training=False, interpolation="bilinear", mean=MEAN, std=STD)


def torchvisions_transform(size):
    usual = ResNet50_Weights.IMAGENET1K_V1.transforms
    return usual(crop_size=size, resize_size=int(size / 0.875), mean=MEAN, std=STD)


@pytest.mark.parametrize(("transform", "size"), [(timms_transform, 64), (torchvisions_transform, 32)])
def test_top1_is_that_of_a_plain_loop_with_the_usual_transforms(tiny, figures, photos, transform, size):
    """torchvision's ImageFolder, another's preprocessing at its default crop ratio, the same weights."""
    network = load_trained(tiny.config).network
    hits = {name: [0, 0] for name in ("class0", "class1", "class2")}
    with torch.no_grad():
        for image, label in torchvision.datasets.ImageFolder(photos / "val", transform(size)):
            counted = hits[f"class{label}"]
            counted[0] += 1
            counted[1] += int(network(image[None]).argmax()) == label
    (found,) = figures("--data", photos, "--sizes", str(size), "--per-class")["results"]
    assert {row["class"]: [row["images"], row["top1_correct"]] for row in found["classes"]} == hits
    right = sum(correct for _, correct in hits.values())
    assert found["top1"] == pytest.approx(right / 123)
    assert 0.4 < found["top1"] < 0.95  # neither chance nor too easy to tell


def test_two_processes_count_as_one_does(tiny, figures, more, tmp_path):
    words = ["--data", str(more), "--flip", "--per-class"]
    command = [*launcher(2), "-m", "recipes.evaluate", tiny.yaml, *words]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "two.json")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1, %") == 1
    two, one = json.loads((tmp_path / "two.json").read_text()), figures(*words)
    assert counts(two) == counts(one)
    assert two["results"][0]["loss"] == pytest.approx(one["results"][0]["loss"])


def test_flip_is_the_mean_of_the_logits(tiny, figures, more):
    from data.augment import Normalise, eval_picture
    from data.imagefolder import ImageFolder

    trained = load_trained(tiny.config, None, "raw")
    source = ImageFolder(more / "val", trained.classes)
    pictures = torch.stack([torch.from_numpy(eval_picture(source.read(i), 32, 0.875)) for i in range(len(source))])
    images, labels = Normalise((0.4,) * 3, (0.25,) * 3)((pictures.permute(0, 3, 1, 2), torch.tensor(source.labels)))
    with torch.no_grad():
        logits = (trained.network(images) + trained.network(images.flip(3))) / 2
    found = figures("--data", more, "--sizes", "32", "--flip", "--weights", "raw")
    assert "logits" in found["flip"]
    assert found["weights"] == "raw"
    result = found["results"][0]
    assert result["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert result["top1_correct"] == int((logits.argmax(1) == labels).sum())
    plain = figures("--data", more, "--sizes", "32", "--weights", "raw")["results"][0]
    assert plain["loss"] != pytest.approx(result["loss"], rel=1e-5)


def test_some_of_the_classes_will_do_and_strange_ones_are_named(command, figures, tiny, tmp_path):
    write_images(tmp_path / "part", classes=2, train=1, val=4)
    shutil.rmtree(tmp_path / "part" / "train")
    (tmp_path / "part" / "val" / "class0").rename(tmp_path / "part" / "val" / "class2")
    whole, inside = figures("--data", tmp_path / "part"), figures("--data", tmp_path / "part" / "val", "--per-class")
    assert [one["images"] for one in whole["results"]] == [8, 8]
    assert {row["class"] for row in inside["results"][0]["classes"]} == {"class1", "class2"}
    (tmp_path / "part" / "val").rename(tmp_path / "part" / "test")
    (tmp_path / "part" / "train").mkdir()
    status, _, err = command("evaluate", tiny.yaml, "--data", tmp_path / "part")
    assert status == 2
    assert err.endswith(f"if {tmp_path}/part/test is meant: ln -s test {tmp_path}/part/val\n")
    (tmp_path / "part" / "test").rename(tmp_path / "part" / "val")
    (tmp_path / "part" / "val" / "class1").rename(tmp_path / "part" / "val" / "zebra")
    status, out, err = command("evaluate", tiny.yaml, "--data", tmp_path / "part")
    assert (status, out) == (2, "")
    assert err == f"{tmp_path}/part/val: class folder zebra is not among the 3 classes known\n"


def test_a_prepared_dataset_in_another_order_counts_the_same(figures, more, tmp_path):
    from data.prepare import main as prepare
    from data.source import open_evaluation

    prepared = tmp_path / "prepared"
    assert prepare([str(more), str(prepared)]) == 0
    found = figures("--data", prepared, "--sizes", "24", "--per-class")
    assert sum(one["images"] for one in found["results"]) == 33
    source = open_evaluation(str(prepared), "cache", ["other", "class2", "class1", "class0"])
    assert [source.classes[label] for label in source.labels] == [
        f"class{index}" for index in range(3) for _ in range(11)
    ]
    with pytest.raises(Exception, match="1 of their classes are not among the 2 classes known: class1"):
        open_evaluation(str(prepared), "cache", ["class2", "class0"])


def test_images_that_cannot_be_decoded_do_not_count_and_are_named(command, figures, tiny, more, tmp_path):
    damaged = shutil.copytree(more / "val", tmp_path / "damaged")
    (damaged / "class1" / "3.jpg").write_bytes(b"no image")
    found = figures("--data", damaged)
    assert [one["images"] for one in found["results"]] == [32, 32]
    assert found["bad_images"] == [f"{damaged}/class1/3.jpg: not an image, or of an unknown format"]
    status, out, _ = command("evaluate", tiny.yaml, "--data", damaged)
    assert status == 0
    assert "not counted, because they cannot be decoded: 1 images" in out
    for path in damaged.rglob("*.jpg"):
        path.write_bytes(b"")
    assert command("evaluate", tiny.yaml, "--data", damaged)[0] == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data", "nowhere"], "nowhere: no such folder; expected CLASS/IMAGE or val/CLASS/IMAGE in it"),
        (["--data", "EMPTY"], "no class folders"),
        (["--sizes", "4"], "--sizes: got 4; allowed: 8 to 4096"),
        (["--sizes", "big"], "--sizes: got big; allowed: 8 to 4096"),
        (["--crop-ratios", "1.5"], "--crop-ratios: got 1.5"),
        (["--csv", "no/such/file.csv"], "no/such is not a directory"),
        (["--save", "no/such/file.json"], "no/such is not a directory"),
        (["--weights", "best"], "invalid choice: 'best'"),
        (["--checkpoint", "nowhere"], "--checkpoint: nowhere does not exist"),
        (["modle.name=x"], "did you mean"),
        (["run_name=never"], "no checkpoint of run 'never'"),
        (["device=gpu"], "device: gpu is not available"),
        (["other.yaml"], "one YAML file at a time"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(command, tiny, tmp_path, words, error):
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "EMPTY" else word for word in words]
    extra = ["checkpoints.folder={runs_folder}/{run_name}/checkpoints"] if "run_name=never" in words else []
    status, out, err = command("evaluate", tiny.yaml, *extra, *words)
    assert (status, out) == (2, "")
    assert error in err
    assert err.count("\n") == 1


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
