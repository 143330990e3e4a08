"""What `find_resume` decides."""

import shutil

import pytest

from recipes.checkpoints.places import Places
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Tiny, damage, identity, same


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("saved"))
    tiny.go(tiny.interrupt_at(7))
    return tiny


def test_autoresume_off_starts_from_zero(saved, tmp_path, untouched):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    tiny = Tiny(tmp_path)
    weights = tiny.go(autoresume=False)
    assert tiny.resume.load_path is None
    assert same(weights, untouched)


def test_autoresume_off_does_not_mix_two_recipes_in_a_folder(saved):
    other = Tiny(saved.places.run_folder)
    other.identity = identity(lr=0.2)
    with pytest.raises(InputError, match="another recipe"):
        other.find(autoresume=False)


@pytest.mark.parametrize(
    "form", ["{0}", "{0}/checkpoints", "{0}/checkpoints/{1}.safetensors", "{0}/checkpoints/{1}.json"]
)
def test_a_named_checkpoint_of_another_run_is_taken(saved, tmp_path, untouched, form):
    tiny = Tiny(tmp_path)
    tiny.identity = identity("branch")
    weights = tiny.go(resume=form.format(saved.places.run_folder, "ep001-ba000006"))
    assert tiny.resume.manifest.batch == (6 if form.endswith(("safetensors", "json")) else 7)
    assert same(weights, untouched)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{0}/checkpoints/ep009-ba000099.safetensors", "does not exist"),
        ("{0}/none", "does not exist"),
        ("{0}/checkpoints/notes.txt", "is not a checkpoint"),
        ("{0}/empty", "holds no complete checkpoint"),
        ("{0}/checkpoints/ep001-ba000006.safetensors", "instead of"),
    ],
)
def test_a_named_checkpoint_that_cannot_be_used_is_refused(saved, tmp_path, path, message):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    damage(tmp_path / "checkpoints" / "ep001-ba000006.safetensors", "0.5")
    with pytest.raises(InputError, match=message):
        Tiny(tmp_path / "run").find(resume=path.format(tmp_path))


def test_a_named_checkpoint_of_another_recipe_is_refused(saved, tmp_path):
    tiny = Tiny(tmp_path)
    tiny.identity = identity(lr=0.3)
    with pytest.raises(InputError, match=r"optimizer.lr: now 0.3, in the checkpoint 0.1"):
        tiny.find(resume=str(saved.places.local))


def test_places(tmp_path):
    assert Places.of("elsewhere/x", str(tmp_path.parent), tmp_path.name).remote is None
    remote = Places.of("s3://bucket/x/", str(tmp_path.parent), tmp_path.name)
    assert (remote.local, remote.remote) == (tmp_path / "checkpoints", "s3://bucket/x")
