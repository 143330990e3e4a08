"""A run that a trained network teaches: it resumes bit for bit, and what cannot teach is refused in a line."""

import shutil

import pytest
import torch

from data.errors import InputError
from recipes.load import load_config
from recipes.teacher import load_teacher
from tests.recipes.trained.test_weights import cache_for_timm, network_of, saved
from tests.support import run_here, summary_of

KEY = "algorithms.distillation.teacher"


def taught(tiny, teacher, **changes):
    """The run's config with a teacher."""
    return load_config(tiny.yaml, [f"{KEY}={teacher}", *(f"{key}={value}" for key, value in changes.items())])


def test_a_taught_run_ends_otherwise_and_resumes_bit_for_bit_with_the_same_teacher_only(tiny, tmp_path):
    teacher = saved(network_of("timm/test_resnet"), tmp_path / "teacher.pth")
    folder = "checkpoints.folder={runs_folder}/{run_name}/checkpoints"
    command = (tiny.yaml, f"{KEY}={teacher}", f"runs_folder={tmp_path}", folder, "max_duration=2ep")
    assert run_here(*command, "run_name=whole") == 0
    whole = summary_of(tmp_path, "whole")["weights_sha256"]
    assert run_here(*command, "run_name=plain", "algorithms.distillation=off") == 0
    assert summary_of(tmp_path, "plain")["weights_sha256"] != whole
    first = f"resume={tmp_path}/whole/checkpoints/ep001-ba000003.safetensors"
    assert run_here(*command, "run_name=part", first) == 0
    assert summary_of(tmp_path, "part")["weights_sha256"] == whole
    shutil.rmtree(tmp_path / "part")
    saved(network_of("timm/test_resnet", seed=2), teacher)
    with pytest.raises(InputError, match=f"{KEY}: its weights have SHA-256 .* to resume, use the same teacher"):
        run_here(*command, "run_name=part", first)


def test_a_run_teaches_with_its_own_normalisation(tiny):
    config = taught(tiny, tiny.folder, **{"data.mean": [0.5, 0.5, 0.5], "data.std": [0.5, 0.5, 0.5]})
    teacher = load_teacher(config, [path.name for path in sorted((tiny.images / "train").iterdir())], [32])
    pixels = torch.rand(2, 3, 32, 32)
    own = teacher.network((pixels - 0.4) / 0.25)  # as the run was trained
    torch.testing.assert_close(teacher((pixels - 0.5) / 0.5), own)
    assert teacher.sha256 == tiny.summary["weights_sha256"]


def test_timms_own_weights_teach(tiny, tmp_path, monkeypatch):
    source = network_of("timm/test_resnet", 1000)
    cache_for_timm(source, "test_resnet", tmp_path, monkeypatch)
    config = taught(tiny, "timm/test_resnet", **{"model.num_classes": 1000})
    teacher = load_teacher(config, "abc", [32])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.network(images), source(images))
    with pytest.raises(InputError, match=f"{KEY}: timm/test_resnet has 1000 outputs; allowed: 3, as the run"):
        load_teacher(taught(tiny, "timm/test_resnet"), "abc", [32])
    with pytest.raises(InputError, match=f"{KEY}: timm's weights of resnet10t cannot be loaded"):
        load_teacher(taught(tiny, "timm/resnet10t"), "abc", [32])


def test_what_cannot_teach_is_refused(tiny, tmp_path):
    assert load_teacher(tiny.config, "abc", [32]) is None
    with pytest.raises(InputError, match=f"{KEY}: {tiny.folder} was trained on other classes"):
        load_teacher(taught(tiny, tiny.folder), "abc", [32])
    with pytest.raises(InputError, match=f"{KEY}: {tmp_path}/no does not exist"):
        load_teacher(taught(tiny, tmp_path / "no"), "abc", [32])
    coarse = saved(network_of("squeezenet1_0"), tmp_path / "coarse.pth")
    with pytest.raises(InputError, match=f"{KEY}: {coarse} does not accept images of 8 px"):
        load_teacher(taught(tiny, coarse, **{"model.name": "squeezenet1_0", "model.num_classes": 3}), "abc", [32, 8])
