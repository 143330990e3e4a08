"""Which checkpoint is taken where a disk and a bucket hold some; a second folder plays the bucket."""

import pytest

from recipes.checkpoints.find import newest, survey
from recipes.checkpoints.store import LocalStore, StoreError
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Dying, algorithms, damage, identity, save, snapshot

OLDER, NEWER = "ep000-ba000001", "ep000-ba000002"


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

    def fetch(self, name, path):
        if name in self.faults:
            raise self.faults[name]
        super().fetch(name, path)


@pytest.fixture
def bucket(tmp_path):
    """Two checkpoints."""
    bucket = Place(tmp_path / "bucket", "s3://bucket/X/")
    for batch in (1, 2):
        save(bucket, batch)
    return bucket


@pytest.fixture
def disk(tmp_path):
    return Place(tmp_path / "disk")


def look(disk, bucket, restart=False):
    return newest(disk, bucket, identity(), restart=restart, algorithms=algorithms())


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def is_whole(disk, stem):
    """The disk has this checkpoint, and nothing else."""
    batch = int(stem[-6:])
    assert (disk.folder / f"{stem}.safetensors").read_bytes() == b"".join(snapshot(batch).payload)
    return names(disk) == [f"{stem}.json", f"{stem}.safetensors"]


def test_the_newest_of_the_bucket_is_brought_to_the_disk_and_is_then_the_disks(disk, bucket):
    found = look(disk, bucket).found
    assert found.location == f"s3://bucket/X/{NEWER}.safetensors"
    assert found.path == disk.folder / f"{NEWER}.safetensors"
    assert is_whole(disk, NEWER)
    assert look(disk, bucket).found.location == f"{disk.folder}/{NEWER}.safetensors"
    assert look(disk, None).found.manifest == found.manifest


def test_a_damaged_one_on_the_disk_is_mended_from_the_bucket(disk, bucket):
    save(disk, 2)
    damage(disk.folder / f"{NEWER}.safetensors", "bit")
    search = look(disk, bucket)
    assert search.found.location == f"s3://bucket/X/{NEWER}.safetensors"
    assert search.skipped == {}
    assert is_whole(disk, NEWER)


@pytest.mark.parametrize("half", ["json", "safetensors"])
def test_one_that_is_torn_on_the_disk_is_mended_from_the_bucket(disk, bucket, half):
    save(disk, 2)
    (disk.folder / f"{NEWER}.{half}").unlink()
    search = look(disk, bucket)
    assert search.found.manifest.stem == NEWER
    assert search.skipped == {}
    assert is_whole(disk, NEWER)


def test_a_death_at_any_step_of_mending_is_mended_by_the_next_try(tmp_path, bucket):
    for steps in range(10):
        disk, dying = Place(tmp_path / str(steps)), Dying(tmp_path / str(steps), steps)
        save(disk, 2)
        damage(disk.folder / f"{NEWER}.safetensors", "bit")
        survived = True
        try:
            look(dying, bucket)
        except KeyboardInterrupt:
            survived = False
        assert survey(disk).torn == ()  # else it would count as damage where the bucket is out of reach
        assert look(disk, bucket).found.manifest.stem == NEWER
        (disk.folder / f"{NEWER}.json.tmp").unlink(missing_ok=True)  # the note of the very last step goes with the rest
        assert is_whole(disk, NEWER)
        if survived:
            break
    assert survived
    assert steps == 4


@pytest.mark.parametrize(
    ("lost", "reason"), [("json", "its manifest is missing"), ("safetensors", "its data is missing")]
)
def test_what_was_deleted_since_the_bucket_was_listed_is_passed_over(disk, bucket, lost, reason):
    bucket.faults[f"{NEWER}.{lost}"] = FileNotFoundError()
    search = look(disk, bucket)
    assert search.found.manifest.stem == OLDER
    assert search.skipped == {NEWER: f"s3://bucket/X/: {reason}"}
    assert is_whole(disk, OLDER)


def test_a_damaged_one_of_the_bucket_leaves_nothing_on_the_disk(disk, bucket):
    damage(bucket.folder / f"{NEWER}.safetensors", "bit")
    assert look(disk, bucket).found.manifest.stem == OLDER
    assert is_whole(disk, OLDER)


@pytest.mark.parametrize("name", [f"{NEWER}.json", f"{NEWER}.safetensors"])
def test_a_bucket_that_fails_is_no_reason_to_take_an_older_one(disk, bucket, name):
    save(disk, 1)
    bucket.faults[name] = StoreError("s3://bucket/X: out of reach")
    with pytest.raises(StoreError, match="out of reach"):
        look(disk, bucket)


def test_a_disk_that_fails_is_passed_over_where_the_bucket_has_it(disk, bucket):
    save(disk, 2)
    disk.faults[f"{NEWER}.json"] = StoreError("disk: Input/output error")
    assert look(disk, bucket).found.location == f"s3://bucket/X/{NEWER}.safetensors"
    search = look(disk, None, restart=True)
    assert search.found is None
    assert search.skipped == {NEWER: "disk: Input/output error"}


def test_each_place_says_why_its_copy_was_not_taken(disk, bucket):
    save(disk, 2)
    for place in (disk, bucket):
        for entry in place.entries():
            if entry.name.endswith(".safetensors"):
                damage(place.folder / entry.name, "longer")
    with pytest.raises(InputError) as refused:
        look(disk, bucket)
    new, old = (sum(map(len, snapshot(batch).payload)) for batch in (2, 1))
    assert refused.value.lines == (
        f"checkpoint {NEWER}: {disk.folder}: {new + 1} bytes instead of {new}; "
        f"s3://bucket/X/: {new + 1} bytes instead of {new}",
        f"checkpoint {OLDER}: s3://bucket/X/: {old + 1} bytes instead of {old}",
        f"{disk.folder} and s3://bucket/X/: checkpoints of tiny are there, but none can be used; mend them, choose "
        "another run_name, or start from zero with checkpoints.restart=true",
    )


def test_another_run_in_the_bucket_is_refused(disk, bucket):
    with pytest.raises(InputError, match=r"^s3://bucket/X/: holds checkpoints of run 'tiny', not of 'other'"):
        newest(disk, bucket, identity("other"), restart=False, algorithms=algorithms())


def test_a_disk_on_which_the_bucket_s_cannot_be_kept_is_named(disk, bucket):
    (disk.folder / f"{NEWER}.safetensors").mkdir(parents=True)
    with pytest.raises(StoreError) as failed:
        look(disk, bucket)
    assert str(failed.value) == f"{disk.folder / NEWER}.safetensors: Is a directory"


def test_an_object_of_another_size_is_refused_before_it_fills_the_disk(disk, bucket):
    path = bucket.folder / f"{NEWER}.safetensors"
    with path.open("ab") as file:
        file.truncate(2**40)  # a hole: only its size is large
    search = look(disk, bucket)
    assert search.found.manifest.stem == OLDER
    assert f"{2**40} bytes instead of" in search.skipped[NEWER]
