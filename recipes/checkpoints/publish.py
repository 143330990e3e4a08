"""Putting checkpoints into a store, and taking them out, so that a death leaves each whole or plainly unfinished."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from recipes.checkpoints.find import load_manifest, position_of, survey
from recipes.checkpoints.manifest import SUFFIX, DamagedError, Manifest
from recipes.checkpoints.store import Store, StoreError


def publish(store: Store, manifest: Manifest, source: Sequence[memoryview] | Path) -> None:
    """Put a checkpoint into a store: a note that it is begun, its data, its manifest, the note away.

    Without the note, data without a manifest could not be told from a checkpoint whose manifest was lost.

    Args:
        store: Where to.
        manifest: What describes it.
        source: Its bytes in pieces, or the file that holds them.

    Raises:
        StoreError: The store failed; what is left behind does not count as a checkpoint.
    """
    stem, text = manifest.stem, manifest.to_json()
    store.put(f"{stem}.json.tmp", text)
    store.delete([f"{stem}.json"])
    store.put(manifest.files[0].name, source)
    store.put(f"{stem}.json", text)
    store.delete([f"{stem}.json.tmp"])


def prune(store: Store, keep: int, *, protect: Collection[str], ignore: Collection[str]) -> list[str]:
    """Remove all but the newest `keep` complete checkpoints and the best by top-1, and leavings older than the newest.

    Args:
        store: Where.
        keep: How many of the newest stay, at least one.
        protect: Stems that stay whatever their age: the newest verified one, one being uploaded.
        ignore: Stems known to be damaged: they neither count nor go.

    Returns:
        The stems that were removed.

    Raises:
        StoreError: The store failed; what was not removed is removed next time.
    """
    listing = survey(store)
    manifests = []
    for stem in listing.complete:
        try:
            if stem not in ignore:
                manifests.append(load_manifest(store, stem))
        except DamagedError:
            continue
    manifests.sort(key=lambda manifest: manifest.order)
    if not manifests:
        return []
    best = max(manifests, key=lambda manifest: (-1.0 if manifest.top1 is None else manifest.top1, manifest.order))
    stay = {manifest.stem for manifest in manifests[-keep:]} | {best.stem, *protect, *ignore}
    dead = [manifest.stem for manifest in manifests if manifest.stem not in stay]
    known = [manifest.stem for manifest in manifests]
    newest = position_of(manifests[-1].stem)
    left = (stem for stem in (*listing.begun, *listing.torn) if position_of(stem) < newest)
    dead += [stem for stem in left if stem not in {*stay, *known}]
    remove(store, dead)
    return dead


def remove(store: Store, stems: Iterable[str]) -> None:
    """Remove checkpoints.

    Raises:
        StoreError: The store failed.
    """
    for stem in stems:
        # The note first and the manifest before the data: a death in between leaves one plainly unfinished.
        with suppress(StoreError):  # There may be no room even for the note; then the order alone must do.
            store.put(f"{stem}.json.tmp", b"{}")
        store.delete([f"{stem}.json", f"{stem}{SUFFIX}", f"{stem}.json.tmp"])
