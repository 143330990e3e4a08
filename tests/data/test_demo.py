import multiprocessing

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data import demo
from data.demo import write_digits
from data.errors import DataError, run_main
from data.imagefolder import open_folders
from tests.support import decode


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("demo") / "digits", 24)


def test_the_digits_are_a_stratified_image_folder_with_each_scan_in_one_split(digits):
    splits, scans, seen = open_folders(digits), load_digits(), []
    assert [source.classes for source in splits] == [[str(digit) for digit in range(10)]] * 2
    assert [len(source) for source in splits] == [1500, 297]
    share = np.bincount(splits[0].labels) / np.bincount(scans.target)
    assert np.abs(share - 1500 / 1797).max() < 0.01
    for split in splits:
        numbers = [int(split.name(index).rsplit("/", 1)[1].removesuffix(".jpg")) for index in range(len(split))]
        seen += numbers
        for index in range(0, len(split), 37):
            picture, number = decode(split.read(index)), numbers[index]
            assert picture.shape == (24, 24, 3)
            assert split.labels[index] == scans.target[number]
            small = picture[..., 0].reshape(8, 3, 8, 3).mean(axis=(1, 3))
            assert np.corrcoef(small.ravel(), scans.images[number].ravel())[0, 1] > 0.95
            assert picture.max() > 200 > 30 > picture.min()
    assert sorted(seen) == list(range(1797))


def test_two_writers_at_once_leave_one_whole_folder(tmp_path, digits):
    folder = tmp_path / "deep" / "digits"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_digits, args=(folder, 24)) for _ in range(2)]
    for act in (lambda writer: writer.start(), lambda writer: writer.join(60)):
        list(map(act, writers))
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


def test_a_mistake_gets_one_line_and_status_2_and_changes_nothing(digits, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    for folder, message in ((digits, "at 24 px, not 32 px"), (tmp_path, "else"), (tmp_path / "thesis.tex", "else")):
        assert run_main(lambda words=[str(folder)]: demo.main(words)) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
