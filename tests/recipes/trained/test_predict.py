"""`python -m recipes.predict`: files, folders and stdin, with the same answers as evaluate and an export give."""

import json
import os
import shutil

import pytest


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_a_folders_images_and_what_evaluate_counts(command, tiny, val):
    status, out, err = command("predict", tiny.yaml, val, "--json")
    assert status == 0, err
    found = lines(out)
    assert [one["image"] for one in found] == sorted(str(path) for path in val.rglob("*.jpg"))
    for one in found:
        probabilities = [entry["probability"] for entry in one["predictions"]]
        assert len(probabilities) == 3  # as many classes as there are
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
    right = sum(one["predictions"][0]["class"] in one["image"].split("/") for one in found)
    assert right / 9 == pytest.approx(tiny.summary["eval_by_size"]["32"]["top1"], abs=1e-6)


def test_an_export_gives_the_same_by_onnxruntime(command, tiny, exported, val):
    ours, theirs = (lines(command("predict", model, val, "--json")[1]) for model in (tiny.yaml, exported))
    assert [one["image"] for one in ours] == [one["image"] for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        left, right = ({e["class"]: e["probability"] for e in x["predictions"]} for x in (one, other))
        assert left == pytest.approx(right, abs=1e-5)
        assert one["predictions"][0]["name"] == other["predictions"][0]["name"]


def test_standard_input_as_a_list_and_as_an_image(command, exported, val, tmp_path):
    names = [str(val / "class0" / "0.jpg"), str(val / "class2")]
    listed = lines(command("predict", exported, "-", "--json", stdin="\r\n".join(names).encode() + b"\n\n")[1])
    assert [one["image"] for one in listed] == [names[0], *(f"{names[1]}/{number}.jpg" for number in range(3))]
    data = (val / "class0" / "0.jpg").read_bytes()
    alone = lines(command("predict", exported, "--stdin-image", "--json", stdin=data)[1])
    assert alone[0]["image"] == "stdin"
    assert alone[0]["predictions"] == listed[0]["predictions"]


def test_a_closed_standard_input_is_empty(command, exported):
    assert command("predict", exported, "-", stdin=None) == (0, "", "")
    assert command("predict", exported, "--stdin-image", stdin=None) == (2, "", "stdin: the file is empty\n")


def test_names_that_no_file_can_have(command, exported):
    long = "long" * 2000
    status, out, err = command("predict", exported, "-", stdin=f"{long}\na\0b\n".encode())
    assert (status, out, len(err.splitlines())) == (2, "", 2)
    assert command("predict", long, "x.jpg")[0] == 2


def test_bad_images_are_named_and_the_others_go_on(command, exported, val, tmp_path):
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty"
    broken.write_bytes((val / "class0" / "0.jpg").read_bytes()[:200])
    empty.mkdir()
    good = [str(val / "class1" / f"{number}.jpg") for number in range(2)]
    status, out, err = command("predict", exported, good[0], broken, tmp_path / "no.jpg", empty, good[1], "--json")
    assert status == 2
    assert [one["image"] for one in lines(out)] == good
    complaints = err.splitlines()
    assert len(complaints) == 3
    assert complaints[0].startswith(f"{broken}: ")
    assert complaints[1] == f"{tmp_path}/no.jpg: no such file or folder"
    assert complaints[2].startswith(f"{empty}: holds no images")


def test_a_damaged_export_is_refused(refused, exported, val, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"nothing")
    assert refused("predict", copy, val).startswith(f"{copy}/model.onnx: ")
    (copy / "model.onnx").unlink()
    assert "holds no model.onnx" in refused("predict", copy, val)
    (copy / "preprocessing.json").write_text("{}")
    assert "is not what recipes.export writes" in refused("predict", copy, val)


def test_what_is_no_file_is_named_and_a_folder_that_links_to_itself_ends(command, exported, val, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(val, folder)
    os.mkfifo(folder / "class0/pipe.jpg")
    (folder / "class0/zero.jpg").symlink_to("/dev/zero")
    (folder / "class1/gone.jpg").symlink_to("nowhere")
    (folder / "class1/folder.jpg").mkdir()
    (folder / "class2/up").symlink_to("..")
    (folder / "class2/.hidden").mkdir()
    shutil.copy(val / "class0/0.jpg", folder / "class2/.hidden/0.jpg")
    os.rename(folder / "class2/0.jpg", os.fsencode(folder) + b"/class2/caf\xe9\n.jpg")  # noqa: PTH104 (bytes)
    status, out, err = command("predict", exported, folder, "--json")
    assert status == 2
    assert [one["image"] for one in lines(out)] == [
        *(f"{folder}/class0/{number}.jpg" for number in range(3)),
        *(f"{folder}/class1/{number}.jpg" for number in range(3)),
        *(f"{folder}/class2/{name}.jpg" for name in ("1", "2", "caf\\xe9\\n")),
    ]
    assert err.splitlines() == [
        f"{folder}/class2/up: not followed: it is a link to {folder}, a folder that contains it",
        f"{folder}/class0/pipe.jpg: not a regular file",
        f"{folder}/class0/zero.jpg: not a regular file",
        f"{folder}/class1/folder.jpg: not a regular file",
        f"{folder}/class1/gone.jpg: a broken link",
    ]
    status, out, err = command("predict", exported, folder / "class0/pipe.jpg", "/dev/zero", "/dev/stdin")
    assert (status, out, err.count("not a regular file\n")) == (2, "", 3)


def test_standard_input_without_end_is_refused(command, exported, monkeypatch):
    monkeypatch.setattr("recipes.predict.MAX_BYTES", 1000)
    monkeypatch.setattr("data.decode.MAX_BYTES", 1000)
    status, out, err = command("predict", exported, "--stdin-image", stdin=bytes(5000))
    assert (status, out) == (2, "")
    assert err.startswith("stdin: more than ")
