import multiprocessing

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data import demo
from data.demo import write_digits
from data.errors import DataError
from data.imagefolder import open_folders
from tests.support import decode


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("demo") / "digits", 24)


def test_the_digits_are_a_stratified_image_folder(digits):
    train, val = open_folders(digits)
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    assert (len(train), len(val)) == (1500, 297)
    share = np.bincount(train.labels) / np.bincount(load_digits().target)
    assert np.abs(share - 1500 / 1797).max() < 0.01
    picture = decode(val.read(0))
    assert picture.shape == (24, 24, 3)
    assert picture.max() > 200 > 30 > picture.min()


def test_each_scan_is_in_one_split_and_looks_like_itself(digits):
    scans, seen = load_digits(), set()
    for split in open_folders(digits):
        for index in range(0, len(split), 37):
            number = int(split.name(index).rsplit("/", 1)[1].removesuffix(".jpg"))
            assert split.labels[index] == scans.target[number]
            small = decode(split.read(index))[..., 0].reshape(8, 3, 8, 3).mean(axis=(1, 3))
            assert np.corrcoef(small.ravel(), scans.images[number].ravel())[0, 1] > 0.95
    for split in open_folders(digits):
        names = {split.name(index).rsplit("/", 1)[1] for index in range(len(split))}
        assert not seen & names
        seen |= names
    assert len(seen) == 1797


def test_two_writers_at_once_leave_one_whole_folder(tmp_path, digits):
    folder = tmp_path / "deep" / "digits"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_digits, args=(folder, 24)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert {path.name for path in folder.parent.iterdir()} == {"digits"}
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == sorted(
        p.relative_to(digits) for p in digits.rglob("*")
    )


def test_a_write_that_breaks_off_leaves_no_folder(tmp_path, monkeypatch):
    written = []

    def full(path, data):
        written.append(path)
        if len(written) > 100:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DataError, match="cannot write the digits: No space left on device"):
        write_digits(tmp_path / "digits", 24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4"], "allowed: 8 to 1024"),
        (["--size", "32"], "at 24 px, not 32 px"),
        ([], "at 24 px, not 32 px"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(digits, capsys, arguments, message):
    try:
        status = demo.main([str(digits), *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error.strip().splitlines()[-1]


def test_somebody_elses_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert demo.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert demo.main([str(tmp_path / "thesis.tex")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
