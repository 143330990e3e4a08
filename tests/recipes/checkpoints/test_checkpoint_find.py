"""Which checkpoint a run resumes from, of files spoilt in every way, on a disk and in a bucket (a second folder)."""

import json
import os

import pytest

from data.errors import InputError, StoreError
from recipes.checkpoints.manifest import Identity, load_manifest, survey
from recipes.checkpoints.store import LocalStore
from recipes.config import RunConfig
from tests.recipes.checkpoints.tiny import Dying, damage, identity, look, same, save, search, snapshot

OLDER, NEWER = "ep000-ba000001", "ep000-ba000002"
TORN = "its data or its manifest is missing"
FROM_ZERO = "choose another run_name, or start from scratch with checkpoints.restart=true"


class Place(LocalStore):
    """A folder that can be called otherwise, and in which reading some names fails."""

    def __init__(self, folder, location=None):
        super().__init__(folder)
        self.location = location or self.location
        self.faults = {}

    def read(self, name):
        if name in self.faults:
            raise self.faults[name]
        return super().read(name)

    def load(self, name, size):
        if name in self.faults:
            raise self.faults[name]
        return super().load(name, size)


@pytest.fixture
def disk(tmp_path):
    """An empty one."""
    return Place(tmp_path / "disk")


@pytest.fixture
def two(disk):
    """A disk with two checkpoints."""
    for batch in (1, 2):
        save(disk, batch)
    return disk


@pytest.fixture
def bucket(tmp_path):
    """With two checkpoints."""
    bucket = Place(tmp_path / "bucket", "s3://bucket/X/")
    for batch in (1, 2):
        save(bucket, batch)
    return bucket


def refusal(*places, **settings):
    with pytest.raises(InputError) as refused:
        search(*places, **settings)
    return refused.value.lines


def test_the_newest_is_taken_and_a_longer_number_is_newer_than_a_shorter_one(disk):
    assert look(disk) is None  # no folder
    disk.folder.mkdir()
    assert look(disk) is None
    for epoch, batch in ((9, 999_999), (9, 1_000_000), (10, 1_000_000), (8, 1_000_001)):
        save(disk, batch, epoch=epoch)
    found, skipped = search(disk)
    assert found.manifest.stem == "ep008-ba1000001"
    assert found.location == f"{disk.folder}/ep008-ba1000001.safetensors"
    assert skipped == {}
    damage(disk.path("ep008-ba1000001.safetensors"), "bit")
    assert look(disk).manifest.stem == "ep010-ba1000000"


@pytest.mark.parametrize("kind", ["bit", "empty", "longer", "0.1", "0.98"])
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_damaged_file_is_named_and_the_next_older_taken(two, kind, ending, caplog):
    damage(two.path(f"{NEWER}.{ending}"), kind)
    found, skipped = search(two)
    assert found.manifest.stem == OLDER
    assert list(skipped) == [NEWER]
    assert f"{NEWER} skipped: {two.location}: " in caplog.text
    assert f"resuming from {OLDER}" in caplog.text


def test_half_a_checkpoint_and_what_is_no_regular_file_is_named_and_skipped(two, caplog):
    manifest, data = two.path(f"{NEWER}.json"), two.path(f"{NEWER}.safetensors")
    text = manifest.read_bytes()
    for spoil in (
        manifest.unlink,
        lambda: (manifest.write_bytes(text), data.unlink()),
        lambda: os.mkfifo(data),
        lambda: (data.unlink(), data.symlink_to("/dev/zero")),
    ):
        spoil()
        caplog.clear()
        found, skipped = search(two)
        assert (found.manifest.stem, skipped) == (OLDER, {NEWER: TORN})
        assert caplog.messages == [f"checkpoint {NEWER} skipped: {TORN}; resuming from {found.manifest.describe()}"]


def test_where_none_can_be_used_starting_from_zero_is_refused_unless_restart_says_so(two, caplog):
    for stem in (NEWER, OLDER):
        damage(two.path(f"{stem}.safetensors"), "0.5")
    lines = refusal(two)
    assert [line.split(":")[0] for line in lines[:2]] == [f"checkpoint {NEWER}", f"checkpoint {OLDER}"]
    assert lines[2] == f"{two.folder}: checkpoints of tiny exist, but none can be used; repair them, {FROM_ZERO}"
    caplog.clear()
    found, skipped = search(two, restart=True)
    assert found is None
    assert set(caplog.messages) == {f"checkpoint {stem} skipped: {skipped[stem]}" for stem in (NEWER, OLDER)}
    for stem in (NEWER, OLDER):
        two.path(f"{stem}.json").unlink()  # a lost manifest is no reason to start from zero either
    assert "none can be used" in refusal(two)[-1]


def test_a_first_checkpoint_that_was_never_completed_is_one(disk, caplog):
    disk.put(f"{NEWER}.json.tmp", b"{}")
    disk.put(f"{NEWER}.safetensors", b"half")
    assert look(disk) is None
    assert caplog.messages == [f"checkpoint {NEWER} was started but never completed"]


def test_a_manifest_of_great_depth_or_size_or_that_points_elsewhere_is_refused(two):
    manifest = load_manifest(two, NEWER)
    elsewhere = manifest.file.model_copy(update={"name": f"../disk/{NEWER}.safetensors"})
    pointing = manifest.model_copy(update={"files": (elsewhere,)}).to_json()
    many = json.dumps({"files": [{}] * 99}).encode()
    for text in (b"[" * 100_000, b'{"config":' * 100_000, many, b"x" * 10**7, pointing):
        two.put(f"{NEWER}.json", text)
        found, skipped = search(two)
        assert (found.manifest.stem, list(skipped)) == (OLDER, [NEWER])


def test_a_file_larger_than_the_memory_is_skipped(two):
    """A sparse one takes no room on the disk."""
    try:
        os.truncate(two.path(f"{NEWER}.safetensors"), 7 * 2**40)
    except OSError:
        pytest.skip("no such files on this disk")
    manifest = load_manifest(two, NEWER)
    entry = manifest.file.model_copy(update={"size": 7 * 2**40})
    two.put(f"{NEWER}.json", manifest.model_copy(update={"files": (entry,)}).to_json())
    assert look(two).manifest.stem == OLDER


def test_a_run_resumes_past_a_damaged_checkpoint_and_restarts_past_all_to_the_same_weights(tiny, untouched):
    tiny.go(tiny.interrupt_at(7))
    older, newer = tiny.stems()[-2:]
    damage(tiny.places.local / f"{newer}.safetensors", "bit")
    stop = tiny.go(tiny.interrupt_at(9))
    assert tiny.resume.manifest.stem == older
    assert tiny.resume.damaged == (newer,)
    for stem in tiny.stems():
        damage(tiny.places.local / f"{stem}.safetensors", "0.5")
    stop = tiny.go(tiny.interrupt_at(3), restart=True)
    assert stop.saved
    assert same(tiny.go(), untouched)
    assert tiny.resume.manifest.batch == 3
    assert tiny.find().finished


def test_another_run_or_recipe_is_refused_with_the_keys_that_differ(two, bucket, tmp_path):
    other = "holds checkpoints of run 'tiny', not of 'other'; choose another checkpoints.folder, or "
    other += "the run_name of that run"
    assert refusal(two, who=identity("other")) == (f"{two.folder}: {other}",)
    assert refusal(Place(tmp_path / "empty"), bucket, who=identity("other")) == (f"s3://bucket/X/: {other}",)
    assert refusal(two, who=identity(lr=0.2)) == (
        f"{two.folder}: {NEWER} was made by another recipe; to resume from it, change these keys back; to start again, "
        "choose another run_name:",
        "  optimizer.lr: now 0.2, in the checkpoint 0.1",
    )


@pytest.mark.parametrize("batch_size", ["x" * 1000, [1] * 1000, {}, {"a": {"b": None}}, None, True, 10**39])
def test_another_recipe_whose_batch_size_is_anything_is_refused_in_lines(two, batch_size):
    changes = {"config": {"device_batch_size": batch_size}, "config_digest": "x", "world_size": 10**12}
    two.put(f"{NEWER}.json", load_manifest(two, NEWER).model_copy(update=changes).to_json())
    assert "made by another recipe" in refusal(two)[0]


def test_other_data_are_refused_where_both_sides_know_them(disk):
    known = identity().model_copy(update={"train_images": 24, "classes": ("cat", "dog")})
    save(disk, 1, who=known)
    for other in ({}, {"train_images": None}, {"classes": ()}, {"train_images": None, "classes": ()}):
        assert look(disk, who=known.model_copy(update=other))
    rest = "; to resume from it, use the same data; to start again, choose another run_name"
    assert refusal(disk, who=known.model_copy(update={"train_images": 23})) == (
        f"data.path: holds 23 training images, {OLDER} at {disk.folder} was trained on 24{rest}",
    )
    assert refusal(disk, who=known.model_copy(update={"classes": ("cat", "cow", "dog")})) == (
        f"data.path: holds 3 classes, and not the 2 that {OLDER} at {disk.folder} was trained on{rest}",
    )
    save(disk, 2)  # of an older version, which noted neither
    assert look(disk, who=known).manifest.batch == 2


def real(**more):
    return RunConfig(**{"run_name": "r", "data": {"path": "x"}, "device_batch_size": 8, **more})


def test_a_run_knows_its_own_checkpoint_on_any_number_of_devices_with_the_same_global_batch(disk):
    secret = Identity.of(real(loggers={"wandb": {"api_key": "very-secret"}}), 1)
    assert "very-secret" not in secret.model_dump_json()
    assert secret.config["optimizer"]["lr"] == real().optimizer.lr
    save(disk, 1, who=Identity.of(real(), 4, 24, ["cat", "dog"]))
    again = Identity.of(real(device_batch_size=16), 2, 24, ["cat", "dog"])
    found = look(disk, who=again)
    again.require_same(found.manifest, "here")
    assert (found.manifest.run_name, found.manifest.train_images, found.manifest.classes) == ("r", 24, ("cat", "dog"))
    assert refusal(disk, who=Identity.of(real(), 2))[-1] == "  global_batch_size: now 16, in the checkpoint 32"


def is_whole(disk, stem):
    """The disk has this checkpoint, and nothing else."""
    assert disk.path(f"{stem}.safetensors").read_bytes() == b"".join(snapshot(int(stem[-6:])).payload)
    return sorted(path.name for path in disk.folder.iterdir()) == [f"{stem}.json", f"{stem}.safetensors"]


def test_the_newest_of_the_bucket_is_fetched_and_is_then_the_disks(disk, bucket):
    found = look(disk, bucket)
    assert found.location == f"s3://bucket/X/{NEWER}.safetensors"
    assert is_whole(disk, NEWER)
    assert look(disk, bucket).location == f"{disk.folder}/{NEWER}.safetensors"
    assert look(disk).manifest == found.manifest


@pytest.mark.parametrize("fault", ["damaged", "json", "safetensors"])
def test_one_that_is_damaged_or_torn_on_the_disk_is_mended_from_the_bucket(disk, bucket, fault):
    save(disk, 2)
    if fault == "damaged":
        damage(disk.path(f"{NEWER}.safetensors"), "bit")
    else:
        disk.path(f"{NEWER}.{fault}").unlink()
    found, skipped = search(disk, bucket)
    assert found.location == f"s3://bucket/X/{NEWER}.safetensors"
    assert skipped == {}
    assert is_whole(disk, NEWER)


def test_a_death_at_any_step_of_mending_is_mended_by_the_next_try(tmp_path, bucket):
    for steps in range(10):
        disk, dying = Place(tmp_path / str(steps)), Dying(tmp_path / str(steps), steps)
        save(disk, 2)
        damage(disk.path(f"{NEWER}.safetensors"), "bit")
        survived = True
        try:
            look(dying, bucket)
        except KeyboardInterrupt:
            survived = False
        assert survey(disk).torn == ()  # else it would count as damage where the bucket cannot be reached
        assert look(disk, bucket).manifest.stem == NEWER
        disk.path(f"{NEWER}.json.tmp").unlink(missing_ok=True)  # the mark of the very last step goes with the rest
        assert is_whole(disk, NEWER)
        if survived:
            break
    assert survived
    assert steps == 5


@pytest.mark.parametrize(("lost", "reason"), [("json", "manifest"), ("safetensors", "data")])
def test_what_was_deleted_since_the_bucket_was_listed_is_skipped(disk, bucket, lost, reason):
    bucket.faults[f"{NEWER}.{lost}"] = FileNotFoundError()
    found, skipped = search(disk, bucket)
    assert found.manifest.stem == OLDER
    assert skipped == {NEWER: f"s3://bucket/X/: its {reason} is missing"}
    assert is_whole(disk, OLDER)


def test_a_damaged_one_of_the_bucket_leaves_nothing_on_the_disk_and_one_of_another_size_does_not_fill_it(disk, bucket):
    damage(bucket.path(f"{NEWER}.safetensors"), "bit")
    assert look(disk, bucket).manifest.stem == OLDER
    assert is_whole(disk, OLDER)
    with bucket.path(f"{NEWER}.safetensors").open("ab") as file:
        file.truncate(2**40)  # a hole: only its size is large
    assert f"{2**40} bytes instead of" in search(disk, bucket)[1][NEWER]


@pytest.mark.parametrize("name", [f"{NEWER}.json", f"{NEWER}.safetensors"])
def test_a_bucket_that_fails_is_no_reason_to_take_an_older_one(disk, bucket, name):
    save(disk, 1)
    bucket.faults[name] = StoreError("s3://bucket/X: cannot be reached")
    with pytest.raises(StoreError, match="cannot be reached"):
        look(disk, bucket)


def test_a_disk_that_fails_is_skipped_where_the_bucket_has_it(disk, bucket):
    save(disk, 2)
    disk.faults[f"{NEWER}.json"] = StoreError("disk: Input/output error")
    assert look(disk, bucket).location == f"s3://bucket/X/{NEWER}.safetensors"
    found, skipped = search(disk, restart=True)
    assert found is None
    assert skipped == {NEWER: "disk: Input/output error"}
    disk.path(f"{NEWER}.safetensors").unlink()
    disk.path(f"{NEWER}.safetensors").mkdir()
    reason = "not a regular file; needed for the checkpoint in s3://bucket/X/"
    with pytest.raises(InputError, match=f"^{disk.folder / NEWER}.safetensors: {reason}$"):  # which no waiting mends
        look(disk, bucket)


def test_each_place_says_why_its_copy_was_not_taken(disk, bucket):
    save(disk, 2)
    for place in (disk, bucket):
        for name in place.entries():
            if name.endswith(".safetensors"):
                damage(place.path(name), "longer")
    new, old = (sum(map(len, snapshot(batch).payload)) for batch in (2, 1))
    assert refusal(disk, bucket) == (
        f"checkpoint {NEWER}: {disk.folder}: {new + 1} bytes instead of {new}; "
        f"s3://bucket/X/: {new + 1} bytes instead of {new}",
        f"checkpoint {OLDER}: s3://bucket/X/: {old + 1} bytes instead of {old}",
        f"{disk.folder} and s3://bucket/X/: checkpoints of tiny exist, but none can be used; repair them, {FROM_ZERO}",
    )
