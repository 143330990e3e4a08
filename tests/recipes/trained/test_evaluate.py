"""`python -m recipes.evaluate`: equal to the run's own figures, exact, and on any folder."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torchvision.models import ResNet50_Weights

from data.augment import Normalise, eval_picture
from data.imagefolder import ImageFolder
from data.open import open_evaluation
from data.prepare import main as prepare
from recipes.trained import load_trained
from tests.support import run_two, write_images

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
    network, hits = load_trained(tiny.config).network, {f"class{label}": [0, 0] for label in range(3)}
    with torch.no_grad():
        for image, label in torchvision.datasets.ImageFolder(photos / "val", transform(size)):
            hits[f"class{label}"][0] += 1
            hits[f"class{label}"][1] += int(network(image[None]).argmax()) == label
    (found,) = figures("--data", photos, "--sizes", str(size), "--per-class")["results"]
    assert {row["class"]: [row["images"], row["top1_correct"]] for row in found["classes"]} == hits
    assert found["top1"] == pytest.approx(sum(correct for _, correct in hits.values()) / 123)
    assert 0.4 < found["top1"] < 0.95  # neither chance nor too easy to tell


def counts(found):
    """By setting and class, what was counted."""
    return {
        (one["size"], one["crop_ratio"], row["class"]): (row["images"], row["top1_correct"], row["top5_correct"])
        for one in found["results"]
        for row in one["classes"]
    }


def test_two_processes_count_as_one_does(tiny, figures, more, tmp_path):
    words = ["--data", str(more), "--flip", "--per-class"]
    command = ["-m", "recipes.evaluate", tiny.yaml, *words, "--save", tmp_path / "two.json"]
    assert run_two(command).count("top-1, %") == 1
    two, one = json.loads((tmp_path / "two.json").read_text()), figures(*words)
    assert counts(two) == counts(one)
    assert two["results"][0]["loss"] == pytest.approx(one["results"][0]["loss"])


def test_flip_is_the_mean_of_the_logits(tiny, figures, more):
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


def test_a_file_that_cannot_be_written_is_refused_before_or_does_not_lose_the_figures(command, refused, tiny, tmp_path):
    assert f"--csv: {tmp_path} is not a regular file" in refused("evaluate", tiny.yaml, "--csv", tmp_path)
    assert f"--save: {tmp_path}/no is not a directory" in refused(
        "evaluate", tiny.yaml, "--save", tmp_path / "no" / "x"
    )
    assert "cannot be written: File name too long" in refused("evaluate", tiny.yaml, "--save", tmp_path / ("n" * 300))
    path = tmp_path / ("n" * 253)  # the temporary file beside it would have a name that is too long
    status, out, err = command("evaluate", tiny.yaml, "--json", "--save", path)
    assert status == 2
    assert json.loads(out)["results"]
    assert err.endswith(f"{path}: cannot be written: File name too long\n")


def test_some_of_the_classes_will_do_and_strange_ones_are_named(refused, figures, tiny, tmp_path):
    part = write_images(tmp_path / "part", classes=2, train=1, val=4)
    shutil.rmtree(part / "train")
    (part / "val" / "class0").rename(part / "val" / "class2")
    assert [one["images"] for one in figures("--data", part)["results"]] == [8, 8]
    inside = figures("--data", part / "val", "--per-class")["results"][0]
    assert {row["class"] for row in inside["classes"]} == {"class1", "class2"}
    (part / "val").rename(part / "test")
    (part / "train").mkdir()
    err = refused("evaluate", tiny.yaml, "--data", part)
    assert err.endswith(f"if {part}/test is meant: ln -s test {part}/val\n")
    (part / "test").rename(part / "val")
    (part / "val" / "class1").rename(part / "val" / "zebra")
    err = refused("evaluate", tiny.yaml, "--data", part)
    assert err == f"{part}/val: class folders that are not among the 3 known classes: zebra\n"


def test_a_prepared_dataset_in_another_order_counts_the_same(figures, more, tmp_path):
    prepared = tmp_path / "prepared"
    assert prepare([str(more), str(prepared)]) == 0
    found = figures("--data", prepared, "--sizes", "24", "--per-class")
    assert sum(one["images"] for one in found["results"]) == 33
    source = open_evaluation(str(prepared), "cache", ["other", "class2", "class1", "class0"])
    expected = [f"class{index}" for index in range(3) for _ in range(11)]
    assert [source.classes[label] for label in source.labels] == expected
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
