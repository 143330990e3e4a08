import json

import pytest

from data.source import open_split_pair
from data.verify import main
from tests.support import decode


@pytest.fixture
def dataset(tmp_path, write_folder):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 5, "bee": 4})
    return tmp_path / "set"


def test_broken_images_are_named_counted_and_moved_aside(dataset, tmp_path, capsys):
    whole = (dataset / "train/ant/0001.jpg").read_bytes()
    (dataset / "train/ant/0001.jpg").write_bytes(whole[: len(whole) // 2])
    (dataset / "val/bee/0002.jpg").write_bytes(b"")
    assert main([str(dataset), "--workers", "1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 18
    assert [(one["split"], one["index"], one["reason"]) for one in report["broken"]] == [
        ("train", 1, "truncated"),
        ("val", 7, "the file is empty"),
    ]
    assert main([str(dataset), "--workers", "1", "--quarantine", str(tmp_path / "aside")]) == 1
    text = capsys.readouterr().out
    assert f"{dataset}/train/ant/0001.jpg: truncated" in text
    assert f"18 images, 2 broken; 1 truncated; 1 the file is empty; moved to {tmp_path / 'aside'}" in text
    assert (tmp_path / "aside/train/ant/0001.jpg").read_bytes() == whole[: len(whole) // 2]
    assert main([str(dataset), "--workers", "1"]) == 0
    assert len(open_split_pair(str(dataset), "")[0]) == 8


def test_a_jpeg_whose_middle_is_overwritten_is_corrupt_though_it_decodes(dataset, encode, photo, capsys):
    data = bytearray(encode(photo(200, 200)))
    middle = len(data) // 2
    data[middle : middle + 1000] = bytes(1000)
    (dataset / "train/ant/0003.jpg").write_bytes(data)
    decode(bytes(data))  # as Pillow does
    assert main([str(dataset), "--workers", "1"]) == 1
    assert capsys.readouterr().out == f"{dataset}/train/ant/0003.jpg: corrupt\n18 images, 1 broken; 1 corrupt\n"
