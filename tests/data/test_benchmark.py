"""The command that measures a dataset's loading."""

import json

import pytest

from benchmarks.loader import LABELS, main, table


@pytest.fixture
def dataset(tmp_path, write_folder):
    for split in ("train", "val"):
        write_folder(tmp_path / "set" / split, {"ant": 5, "bee": 4})
    return tmp_path / "set"


def test_rates_and_where_the_time_goes_as_json(dataset, capsys):
    words = ["--size", "16", "24", "--workers", "1", "--images", "400", "--against", "torchvision", "--json"]
    assert main([str(dataset), *words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["size"], row["workers"]) for row in rows] == [(16, 1), (24, 1)]
    mean = sum(file.stat().st_size for file in (dataset / "train").rglob("*.jpg")) / 9
    for row in rows:
        for loader in ("ours", "torchvision"):
            for rate in ("images_per_second", "images_per_cpu_second"):
                assert 10 < row[f"{loader}_{rate}"] < 1e6
        steps = [row[f"ms_{step}"] for step in ("read", "decode", "resize", "batch", "floor")]
        assert all(0 <= step < 100 for step in steps)
        assert row["ms_decode"] > 0
        assert row["bytes_per_image"] == pytest.approx(mean, rel=0.1)


def test_photos_are_compared_in_a_table_as_they_are_prepared_and_by_torchvision(dataset, capsys):
    words = ["--photos", "--size", "24", "--workers", "0", "--images", "50", "--rounds", "1"]
    assert main([str(dataset), *words]) == 0
    head, *lines, machine = capsys.readouterr().out.splitlines()
    assert head.split() == ["workers:", "0", "24", "px"]
    values = {label.strip(): float(value.replace(",", "")) for label, value in (line.rsplit("  ", 1) for line in lines)}
    for name in ("originals", "prepared", "torchvision"):
        assert values[f"images/s, {name}"] > 10
        assert values[f"images per CPU-second, {name}"] > 10
    for name in ("originals", "prepared"):
        assert 0 < values[f"... to decode the crop, {name}"] < 100
    assert len(values) == 3 * 2 + 2 * 6
    assert "50 images per epoch, median of 1 rounds" in machine


def test_the_table_of_four_sizes_fits_80_columns():
    keys = [f"{of}_{key}" for of in ("ours", "torchvision") for key in LABELS if key.startswith("images")]
    figures = {key: 99.999 if "ms_" in key else 123456.7 for key in (*keys, *list(LABELS)[2:])}
    text = table([{"size": size, "workers": 16} | figures for size in (128, 176, 224, 288)])
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) == 1 + len(figures)


def test_what_is_not_there_is_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "absent"), "--json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
