"""How a run begins decides what is its own: the same command goes on, another one that begins anew replaces."""

import shutil

import pytest

from recipes.checkpoints.begin import RECORD
from recipes.checkpoints.find import survey
from recipes.checkpoints.s3 import S3Store
from recipes.checkpoints.store import LocalStore
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Tiny, identity, same, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("saved"))
    tiny.go(tiny.interrupt_at(7))
    return tiny


@pytest.fixture(params=["disk", "bucket alone"])
def place(request, tmp_path):
    """A run, and what happens to its machine between two starts."""
    if request.param == "disk":
        return Tiny(tmp_path / "run"), lambda: None
    tiny = Tiny(tmp_path / "run", request.getfixturevalue("url"), patience=30.0)
    return tiny, lambda: shutil.rmtree(tiny.places.run_folder)


@pytest.mark.parametrize("how", ["autoresume=false", "resume"])
def test_interrupted_it_goes_on_from_its_own_state(place, saved, untouched, how):
    tiny, lose = place
    how = {"autoresume": False} if how == "autoresume=false" else {"resume": str(saved.places.local)}
    stop = tiny.go(tiny.interrupt_at(9), **how)
    assert stop.status == 75
    assert "the same command goes on" in str(stop)
    lose()
    assert same(tiny.go(**how), untouched)
    assert tiny.resume.manifest.batch == 9
    lose()
    assert tiny.find(**how).finished
    assert tiny.find().finished


def test_begun_anew_it_replaces_the_older_run_on_disk_and_in_the_bucket(tmp_path, url, untouched):
    old = Tiny(tmp_path / "old", url, patience=30.0)
    old.go()
    S3Store(url).put("logs/log.txt", b"of the older run" * 1000)
    new = Tiny(tmp_path / "new", url, patience=30.0)
    new.go(new.interrupt_at(3), autoresume=False)
    assert survey(S3Store(url)).complete[-1] == "ep000-ba000003"
    assert "logs/log.txt" not in {entry.name for entry in S3Store(url).tree()}
    with pytest.raises(InputError, match="two runs named tiny, begun"):
        old.find()
    assert old.find(restart=True).manifest.batch == 3
    assert survey(LocalStore(old.places.local)).complete == ("ep000-ba000003",)


def test_what_cannot_go_on_begins_anew_each_time_until_it_has_finished(tmp_path, untouched):
    tiny = Tiny(tmp_path)
    how = {"autoresume": False, "resumable": False}
    assert "the same command begins anew" in str(tiny.go(tiny.interrupt_at(7), **how))
    assert same(tiny.go(**how), untouched)
    assert tiny.resume.load_path is None
    assert tiny.find(**how).finished


def test_back_to_an_own_older_checkpoint_removes_the_newer_only(saved, tmp_path):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    tiny = Tiny(tmp_path)
    assert tiny.find(resume=str(tiny.places.local / "ep001-ba000006.safetensors")).manifest.batch == 6
    assert tiny.stems() == [stem for stem in saved.stems() if stem <= "ep001-ba000006"]


def test_another_recipes_or_runs_checkpoints_are_not_replaced(saved, tmp_path):
    for who in (identity(lr=0.2), identity("another")):
        tiny = Tiny(tmp_path / who.run_name)
        kept = save(LocalStore(tiny.places.local), 9, who)
        for how in ({"autoresume": False}, {"resume": str(saved.places.local)}):
            with pytest.raises(InputError, match=r"made by another recipe|holds checkpoints of run"):
                tiny.find(**how)
            assert tiny.stems() == [kept]


def test_killed_while_the_older_is_removed_it_begins_anew_again(saved, tmp_path, monkeypatch):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    tiny = Tiny(tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.checkpoints.begin.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.find(autoresume=False)
    assert tiny.find(autoresume=False).load_path is None
    assert tiny.stems() == []


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"at": 1, "how": 2}', b"\xff"])
def test_a_damaged_record_costs_nothing(saved, tmp_path, text):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / RECORD).write_bytes(text)
    assert Tiny(tmp_path).find().manifest.batch == 7
