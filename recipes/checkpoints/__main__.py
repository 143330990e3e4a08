"""`python -m recipes.checkpoints list|verify|pull|prune YAML [key=value ...]`: look after a run's checkpoints."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.text import escape
from recipes.checkpoints.find import bring, load_manifest, survey
from recipes.checkpoints.format import read_state
from recipes.checkpoints.manifest import DamagedError, Manifest
from recipes.checkpoints.places import Places
from recipes.checkpoints.publish import prune
from recipes.checkpoints.store import LocalStore, Store, StoreError
from recipes.cli import parse, run_command
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.load import load_config

_COMMANDS = {
    "list": "show the run's checkpoints, on disk and in the bucket",
    "verify": "compare sizes and SHA-256 with manifests; status 1 if one is damaged",
    "pull": "bring the newest good one of the bucket to the disk",
    "prune": "remove all but the best and the newest (checkpoints.keep, keep_remote)",
}
_USAGE = "\n".join(
    ["usage: python -m recipes.checkpoints COMMAND YAML [key=value ...]", ""]
    + [f"  {name:7} {what}" for name, what in _COMMANDS.items()]
)


def stores_of(config: RunConfig) -> tuple[LocalStore, Store | None]:
    """Where a run's checkpoints lie: its folder, and its bucket if it has one."""
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    return LocalStore(places.local), None if places.opener is None else places.opener()


def rows(store: Store) -> Iterator[tuple[str, Manifest | None, str]]:
    """Each checkpoint's stem, manifest (None: unreadable) and state as far as it shows without reading the data."""
    listing = survey(store)
    for stem in sorted({*listing.complete, *listing.begun, *listing.torn}):
        if stem in listing.begun:
            yield stem, None, "never completed"
        elif stem in listing.torn:
            yield stem, None, "torn: data or manifest missing"
        else:
            try:
                yield stem, load_manifest(store, stem), "complete"
            except DamagedError as error:
                yield stem, None, f"damaged: {error}"


def headed(store: Store) -> list[tuple[str, Manifest | None, str]]:
    """`rows`, after a line that names the store, and another where it is empty."""
    found = list(rows(store))
    print(store.location)
    if not found:
        print("  no checkpoints")
    return found


def show(stores: Sequence[Store]) -> int:
    """Print a table of all checkpoints."""
    for store in stores:
        for stem, manifest, state in headed(store):
            if manifest is None:
                print(f"  {stem}  {escape(state)}")
                continue
            top1 = "" if manifest.top1 is None else f"  top-1 {100 * manifest.top1:.2f} %"
            end = "  finished" if manifest.finished else ""
            size = manifest.files[0].size / 1e6
            print(f"  {stem}  {size:9.1f} MB  {escape(manifest.created_at)}  {manifest.samples} samples{top1}{end}")
    return 0


def verify_all(stores: Sequence[Store]) -> int:
    """Read every checkpoint and compare; those of a bucket pass through a temporary folder."""
    bad = 0
    for store in stores:
        for stem, manifest, state in headed(store):
            if manifest is not None:
                state = _verified(store, manifest)
            bad += state.startswith(("damaged", "torn"))
            print(f"  {stem}  {escape(state)}", flush=True)
    return 1 if bad else 0


def _verified(store: Store, manifest: Manifest) -> str:
    try:
        if isinstance(store, LocalStore):
            read_state(store.path(manifest.files[0].name), manifest)
        else:
            with tempfile.TemporaryDirectory() as folder:
                read_state(bring(store, manifest, LocalStore(Path(folder))), manifest)
    except DamagedError as error:
        return f"damaged: {error}"
    return "good"


def pull(local: LocalStore, remote: Store | None) -> int:
    """Bring the newest checkpoint whose bytes are good to the disk."""
    if remote is None:
        raise InputError("checkpoints.folder: names no bucket (s3://BUCKET/PREFIX), there is nothing to pull")
    for stem in survey(remote).complete[::-1]:
        try:
            manifest = load_manifest(remote, stem)
            path = bring(remote, manifest, local)
            read_state(path, manifest)
        except DamagedError as error:
            print(f"{stem}  damaged: {escape(error)}", file=sys.stderr)
            continue
        print(path)
        return 0
    raise InputError(f"{remote.location}: holds no good checkpoint")


def prune_all(config: RunConfig, local: LocalStore, remote: Store | None) -> int:
    """Remove what is past `keep`, and say what."""
    removed = 0
    for store, keep in ((local, config.checkpoints.keep), (remote, config.checkpoints.keep_remote)):
        if store is not None:
            damaged = [stem for stem, manifest, _ in rows(store) if manifest is None]
            for stem in prune(store, keep, protect=(), ignore=damaged):
                print(f"removed {store.location}/{stem}")
                removed += 1
    if not removed:
        print("nothing to remove")
    return 0


def main() -> int:
    """Read the command line and do it; the exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] not in _COMMANDS:
        raise InputError(f"{words[0]}: no such command; allowed: {', '.join(_COMMANDS)}")
    arguments = parse(words[1:], _COMMANDS[words[0]].capitalize(), f"python -m recipes.checkpoints {words[0]}")
    if arguments.path is None:
        raise InputError("no YAML file given")
    config = load_config(arguments.path, arguments.overrides)
    try:
        local, remote = stores_of(config)
        stores = [store for store in (local, remote) if store is not None]
        return {
            "list": lambda: show(stores),
            "verify": lambda: verify_all(stores),
            "pull": lambda: pull(local, remote),
            "prune": lambda: prune_all(config, local, remote),
        }[words[0]]()
    except StoreError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    sys.exit(run_command(main))
