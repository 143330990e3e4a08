import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.loader import IGNORED_LABEL
from data.sampler import EvalSampler
from recipes.watch.predictions import UNSEEN, answers, in_order
from tests.recipes.watch.tiny import CLASSES, SAMPLES
from tests.support import ROOT


def load(folder):
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        return dict(file)


def test_the_last_evaluation_image_by_image(run):
    result = run(tensorboard=False)
    found = load(result.folder)
    model, images = result.trainer.state.model.eval(), [result.val[index] for index in range(SAMPLES)]
    with torch.no_grad():
        chances = torch.softmax(model.module(torch.stack([image for image, _ in images])), 1)
    top, predicted = chances.max(1)
    labels = [label for _, label in images]
    assert found["label"].tolist() == labels
    np.testing.assert_array_equal(found["predicted"], predicted)
    np.testing.assert_allclose(found["probability"], top, rtol=1e-5)
    np.testing.assert_allclose(found["label_probability"], chances[range(SAMPLES), labels], rtol=1e-5)
    assert found["classes"].tolist() == [f"n{label:02d}" for label in range(CLASSES)]
    assert found["names"].tolist() == [f"class {label}" for label in range(CLASSES)]
    assert (found["size"], found["batch"]) == (16, 12)


def test_not_before_the_run_is_over(run):
    assert not (run(die_at=8, tensorboard=False).folder / "predictions.npz").exists()


def test_a_disk_that_fails_does_not_spoil_the_run(run):
    def prepare(result):
        (result.folder / "predictions.npz").mkdir(parents=True)

    result = run(prepare=prepare, tensorboard=False)
    assert result.error is None
    assert "predictions.npz cannot be written" in result.stream.getvalue()


@given(samples=st.integers(1, 60), batch=st.integers(1, 9), ranks=st.integers(1, 5))
def test_all_ranks_together_cover_each_image_once(samples, batch, ranks):
    if samples < ranks:
        return
    parts = []
    for rank in range(ranks):
        indices = np.concatenate([one.indices for one in EvalSampler(samples, 32, batch, rank, ranks)])
        parts.append((indices, np.stack([indices, indices + 1, indices / 100, indices / 200], 1)))
    assert sum(len(indices) for indices, _ in parts) == samples
    columns = in_order(parts, samples)
    assert columns["label"].tolist() == list(range(samples))
    assert columns["predicted"].tolist() == list(range(1, samples + 1))
    assert columns["probability"].tolist() == [np.float32(one / 100) for one in range(samples)]


def test_what_was_not_evaluated_is_told_apart():
    columns = in_order([(np.array([2]), np.ones((1, 4)))], 3)
    assert columns["predicted"].tolist() == [UNSEEN, UNSEEN, 1]
    assert np.isnan(columns["probability"][:2]).all()


def test_half_precision_and_images_without_a_label():
    logits = torch.tensor([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]]).half()
    rows = answers(logits, torch.tensor([0, IGNORED_LABEL]))
    chances = torch.softmax(logits.float(), 1)
    assert rows[0].tolist() == [0, 1, chances[0, 1], chances[0, 0]]
    assert rows[1, :3].tolist() == [IGNORED_LABEL, 0, chances[1, 0]]
    assert torch.isnan(rows[1, 3])
    assert logits.tolist() == [[0, 2, 0], [5, 0, 0]]


@pytest.fixture
def overrides():
    return [
        "model.name=timm/test_resnet",
        "max_duration=2ep",
        "data.workers=0",
        "run_name=told",
        "loggers.tensorboard=off",
    ]


def test_a_whole_run_leaves_its_answers_and_names_its_report(train, tmp_path, images, overrides, capsys):
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "val" / "class1" / "1.jpg").write_bytes(b"no image")
    more = [f"data.path={damaged}", "data.max_bad_fraction=0.5"]
    status, summary = train(ROOT / "yamls" / "demo.yaml", *overrides, *more)
    folder = tmp_path / "told"
    found = load(folder)
    kept = found["label"] >= 0
    assert (status, kept.sum()) == (0, 8)
    # The figures of the summary are EMA's, so the answers are, too.
    assert np.mean(found["label"][kept] == found["predicted"][kept]) == pytest.approx(summary["top1"], abs=1e-6)
    loss = -np.log(found["label_probability"][kept]).mean()
    assert loss == pytest.approx(summary["eval_by_size"]["36"]["loss"], rel=1e-4)
    page = folder / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {page}"
    assert "of 8 images at 36 px were predicted as another class" in page.read_text()


def test_a_report_that_cannot_be_written_does_not_spoil_the_run(train, tmp_path, overrides, capsys):
    (tmp_path / "told" / "report.html").mkdir(parents=True)
    status, summary = train(ROOT / "yamls" / "demo.yaml", *overrides)
    assert (status, summary["finished"]) == (0, True)
    said = capsys.readouterr().out
    assert "the report cannot be written" in said
    assert "report:" not in said.splitlines()[-1]
    assert json.loads((tmp_path / "told" / "summary.json").read_text())["weights_sha256"]
