"""`python -m recipes.checkpoints list|verify|pull|prune YAML [key=value ...]`: manage a run's checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain

from data.errors import InputError, StoreError
from data.text import escape
from recipes.checkpoints.find import newest_good, read_checkpoint
from recipes.checkpoints.manifest import Listing, Manifest, load_manifest, prune, survey
from recipes.checkpoints.store import DamagedError, LocalStore, Places, Store
from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.config import CheckpointsConfig
from recipes.load import load_config

_COMMANDS = {
    "list": "show the run's checkpoints, on disk and in the bucket",
    "verify": "compare sizes and SHA-256 with manifests; status 1 if one is damaged",
    "pull": "download the newest good checkpoint from the bucket to the run folder",
    "prune": "remove all but the best and the newest (checkpoints.keep, keep_remote)",
}
_USAGE = "\n".join(
    ["usage: python -m recipes.checkpoints COMMAND YAML [key=value ...]", ""]
    + [f"  {name:7} {what}" for name, what in _COMMANDS.items()]
)


def _states(store: Store, listing: Listing, *, verify: bool) -> Iterator[tuple[str, str]]:
    """Each checkpoint's stem and state, as far as visible without reading the data; with `verify`, it is read."""
    for stem in sorted(chain(*listing)):
        if stem in listing.incomplete:
            yield stem, "never completed"
        elif stem in listing.torn:
            yield stem, "torn: data or manifest missing"
        else:
            try:
                manifest = load_manifest(store, stem)
                if verify:
                    read_checkpoint(store, manifest, None)
                yield stem, "good" if verify else _described(manifest)
            except DamagedError as error:
                yield stem, f"damaged: {error}"


def _described(manifest: Manifest) -> str:
    top1 = "" if manifest.top1 is None else f"  top-1 {100 * manifest.top1:.2f} %"
    size = f"{manifest.file.size / 1e6:9.1f} MB"
    return f"{size}  {manifest.created_at}  {manifest.samples} images{top1}{'  finished' * manifest.finished}"


def _show(stores: list[Store], *, verify: bool) -> int:
    """Print a table of all checkpoints; returns 1 if `verify` found one that is damaged."""
    bad = False
    for store in stores:
        listing = survey(store)
        print(store.location if any(listing) else f"{store.location}\n  no checkpoints")
        for stem, state in _states(store, listing, verify=verify):
            bad = bad or state.startswith(("damaged", "torn"))
            print(f"  {stem}  {escape(state)}", flush=True)
    return int(bad and verify)


def _pull(local: LocalStore, remote: Store | None) -> int:
    if remote is None:
        raise InputError("checkpoints.folder: is not a bucket (s3://BUCKET/PREFIX), so there is nothing to pull")
    found, skipped = newest_good({remote: survey(remote)}, lambda manifest, location: None, into=local)
    for stem, reason in skipped.items():
        print(f"{stem}  damaged: {escape(reason)}", file=sys.stderr)
    if found is None:
        raise InputError(f"{remote.location}: holds no good checkpoint")
    print(local.path(found.manifest.file.name))
    return 0


def _prune(saving: CheckpointsConfig, stores: list[Store]) -> int:
    removed = 0
    for store, keep in zip(stores, (saving.keep, saving.keep_remote), strict=False):
        listing = survey(store)
        for stem in prune(store, keep, ignore=(*listing.incomplete, *listing.torn)):
            print(f"removed {store.location}/{stem}")
            removed += 1
    if not removed:
        print("nothing to remove")
    return 0


def main() -> int:
    """Read the command line and run the command; returns the exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    command = words[0]
    if command not in _COMMANDS:
        raise InputError(f"{command}: no such command; allowed: {', '.join(_COMMANDS)}")
    parser = command_parser(f"checkpoints {command}", _COMMANDS[command].capitalize())
    config = load_config(*yaml_and_overrides(parser, parser.parse_intermixed_args(words[1:]).words))
    places = Places.of(config.checkpoints.folder, config.runs_folder, config.run_name)
    try:
        stores = places.stores()
        if command == "pull":
            return _pull(LocalStore(places.local), stores[1] if places.remote else None)
        return _prune(config.checkpoints, stores) if command == "prune" else _show(stores, verify=command == "verify")
    except StoreError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    sys.exit(run_command(main))
