"""How a run begins decides what is its own: the same command resumes, another one that starts again replaces."""

import shutil

import pytest

from data.errors import InputError
from recipes.checkpoints.manifest import survey
from recipes.checkpoints.store import RECORD, LocalStore, S3Store
from tests.recipes.checkpoints.tiny import Tiny, damage, identity, same, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("saved"))
    tiny.go(tiny.interrupt_at(7))
    return tiny


@pytest.fixture
def copy(saved, tmp_path):
    """The run that was interrupted, to change."""
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    return Tiny(tmp_path)


def test_a_named_checkpoint_of_another_run_is_taken(saved, tmp_path, untouched):
    folder = saved.places.run_folder
    six = f"{folder}/checkpoints/ep001-ba000006"
    for resume, batch in ((f"{folder}/checkpoints", 7), (f"{six}.safetensors", 6), (f"{six}.json", 6), (folder, 7)):
        tiny = Tiny(tmp_path / f"{batch}{len(str(resume))}")
        tiny.identity = identity("branch")
        assert tiny.find(resume=str(resume)).manifest.batch == batch
    assert same(tiny.go(resume=str(folder)), untouched)


def test_a_named_checkpoint_that_cannot_be_used_is_refused(copy, tmp_path):
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    damage(tmp_path / "checkpoints" / "ep001-ba000006.safetensors", "0.5")
    for path, message in (
        ("checkpoints/ep009-ba000099.safetensors", "does not exist"),
        ("none", "does not exist"),
        ("checkpoints/notes.txt", "is not a checkpoint"),
        ("empty", "holds no complete checkpoint"),
        ("checkpoints/ep001-ba000006.safetensors", "instead of"),
    ):
        with pytest.raises(InputError, match=message):
            Tiny(tmp_path / "run").find(resume=str(tmp_path / path))
        assert not list((tmp_path / "run").rglob("ep*"))


def test_back_to_an_own_older_checkpoint_removes_the_newer_only(copy, saved):
    assert copy.find(resume=str(copy.places.local / "ep001-ba000006.safetensors")).manifest.batch == 6
    assert copy.stems() == [stem for stem in saved.stems() if stem <= "ep001-ba000006"]


@pytest.fixture(params=["disk", "bucket alone"])
def place(request, tmp_path):
    """A run, and what happens to its machine between two starts."""
    if request.param == "disk":
        return Tiny(tmp_path / "run"), lambda: None
    tiny = Tiny(tmp_path / "run", request.getfixturevalue("url"), patience="30s")
    return tiny, lambda: shutil.rmtree(tiny.places.run_folder)


@pytest.mark.parametrize("how", ["autoresume=false", "resume"])
def test_interrupted_it_resumes_from_its_own_state(place, saved, untouched, how):
    tiny, lose = place
    how = {"autoresume": False} if how == "autoresume=false" else {"resume": str(saved.places.local)}
    stop = tiny.go(tiny.interrupt_at(9), **how)
    assert stop.status == 75
    assert "run the same command to resume" in str(stop)
    lose()
    assert same(tiny.go(**how), untouched)
    assert tiny.resume.manifest.batch == 9
    lose()
    assert tiny.find(**how).finished
    assert tiny.find().finished


def test_started_again_it_replaces_the_older_run_on_disk_and_in_the_bucket(tmp_path, url):
    old = Tiny(tmp_path / "old", url, patience="30s")
    old.go()
    S3Store(url).put("logs/log.txt", b"of the older run" * 1000)
    new = Tiny(tmp_path / "new", url, patience="30s")
    new.go(new.interrupt_at(3), autoresume=False)
    assert survey(S3Store(url)).complete[-1] == "ep000-ba000003"
    assert "logs/log.txt" not in S3Store(url).tree()
    with pytest.raises(InputError, match="two runs named tiny, started"):
        old.find()
    assert old.find(restart=True).manifest.batch == 3
    assert survey(LocalStore(old.places.local)).complete == ("ep000-ba000003",)


def test_what_cannot_be_resumed_starts_again_each_time_until_it_has_finished(tmp_path, untouched):
    tiny = Tiny(tmp_path)
    how = {"autoresume": False, "algorithms": {"composer": {"GyroDropout": {}}}}
    assert "run the same command to start again" in str(tiny.go(tiny.interrupt_at(7), **how))
    assert same(tiny.go(**how), untouched)
    assert tiny.resume.manifest is None
    assert tiny.find(**how).finished


def test_killed_while_the_older_is_removed_it_starts_again(copy, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.checkpoints.resume.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            copy.find(autoresume=False)
    assert copy.find(autoresume=False).manifest is None
    assert copy.stems() == []


def test_another_recipes_or_runs_checkpoints_are_not_taken_and_not_replaced(saved, tmp_path):
    for who in (identity(lr=0.2), identity("another")):
        tiny = Tiny(tmp_path / who.run_name)
        kept = save(LocalStore(tiny.places.local), 9, who=who)
        for how in ({"autoresume": False}, {"resume": str(saved.places.local)}):
            with pytest.raises(InputError, match=r"made by another recipe|holds checkpoints of run"):
                tiny.find(**how)
            assert tiny.stems() == [kept]
    tiny = Tiny(tmp_path)
    tiny.identity = identity(lr=0.3)
    with pytest.raises(InputError, match=r"optimizer.lr: now 0.3, in the checkpoint 0.1"):
        tiny.find(resume=str(saved.places.local))


def test_a_damaged_record_costs_nothing(copy):
    for text in (b"", b"[]", b"{}", b'{"at": 1, "how": 2}', b"\xff"):
        (copy.places.local / RECORD).write_bytes(text)
        assert copy.find().manifest.batch == 7
