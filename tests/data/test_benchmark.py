"""The command that measures a dataset's loading."""

import pytest

from benchmarks.loader import main
from tests.data.conftest import write_folder


@pytest.fixture
def dataset(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 5, "bee": 4})
    return tmp_path / "set"


def test_photos_are_compared_in_a_table_as_they_are_prepared_and_by_torchvision(dataset, capsys):
    words = ["--photos", "--size", "24", "--workers", "0", "--images", "50", "--rounds", "1"]
    assert main([str(dataset), *words]) == 0
    head, *lines, machine = capsys.readouterr().out.splitlines()
    assert head.split() == ["workers:", "0", "24", "px"]
    values = {label.strip(): float(value.replace(",", "")) for label, value in (line.rsplit("  ", 1) for line in lines)}
    for name in ("originals", "prepared", "raw", "torchvision"):
        assert values[f"images/s, {name}"] > 10
        assert values[f"images per CPU-second, {name}"] > 10
    for name in ("originals", "prepared", "raw"):
        assert 0 < values[f"... to decode the crop, {name}"] < 100
    assert len(values) == 4 * 2 + 3 * 6
    assert "50 images per epoch, median of 1 rounds" in machine


def test_what_is_not_there_is_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "absent"), "--json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
