"""The loader on shards in a bucket: a cold first epoch over a link with a known rate, then more, against local shards.

    python -m benchmarks.loader_s3 PHOTOS [--images 4000] [--link-mb 0 20 5] [--workers 2] [--size 224]

PHOTOS: a folder of photos, repeated up to --images and prepared at 256 px. The bucket is a real S3 server's on this
machine (tests/s3.py) behind a relay process that limits the total rate to --link-mb MB/s (0: no limit) and counts the
bytes. The first epoch and the staging process start together, as in training; local and remote epochs alternate
afterwards.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.laboratory import credentials
from benchmarks.loader import measure, median, ours
from benchmarks.measure import link_photos, options, prepare_all
from data import stage
from data.open import open_split_pair
from tests.s3 import Proxy, running
from tests.support import upload


class Link(Proxy):
    """A relay whose connections share a rate."""

    def __init__(self, port: int, rate: float, passed: Any) -> None:
        self._limit, self._counter, self._lock, self._free_at = rate, passed, threading.Lock(), 0.0
        super().__init__(port)

    def _pump(self, source: socket.socket, sink: socket.socket, breaks: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self._counter.value += len(data)
                    if self._limit:
                        self._free_at = max(self._free_at, time.monotonic()) + len(data) / self._limit
                if self._limit:
                    time.sleep(max(0.0, self._free_at - time.monotonic()))
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def serve(port: int, rate: float, passed: Any, answer: Any) -> None:
    """Run a link until the process is ended."""
    answer.put(Link(port, rate, passed).port)
    threading.Event().wait()


def one(local: Path, cache: Path, size: int, workers: int, rounds: int, passed: Any) -> dict[str, Any]:
    """A cold first epoch, then epochs alternating with local shards."""
    near, far = open_split_pair(str(local), "")[0], open_split_pair("s3://bucket/set", str(cache))[0]
    images = len(near)
    loaders = {name: ours(source, size, images, workers) for name, source in (("local", near), ("s3", far))}
    measure(loaders["local"], 0)
    follower = stage.start_following("s3://bucket/set", str(cache), float("inf"))
    try:
        before = passed.value
        first = measure(loaders["s3"], 0)
        moved = passed.value - before
        rates: dict[str, list] = {"s3": [], "local": []}
        for epoch in range(1, rounds + 1):
            for name in rates:
                rates[name].append(measure(loaders[name], epoch))
    finally:
        follower.kill()
        follower.wait()
    row = {
        "images": images,
        "dataset_mb": round(sum(path.stat().st_size for path in local.glob("*/*/*/*.mds")) / 1e6, 1),
        "first_epoch_seconds": round(first.wall_seconds, 2),
        "first_epoch_mb": round(moved / 1e6, 1),
        "first_epoch_mb_per_second": round(moved / 1e6 / first.wall_seconds, 1),
        "second_epoch_seconds": round(rates["s3"][0].wall_seconds, 2),
    }
    for name, found in rates.items():
        row[f"{name}_seconds"] = round(median(found, "wall_seconds"), 2)
        row[f"{name}_cpu_seconds"] = round(median(found, "cpu_seconds"), 2)
    return row


def main() -> None:
    given = options(__doc__, "PHOTOS", images=4000, link_mb=[0.0, 20.0, 5.0], workers=2, size=224, rounds=3)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, running(Path(name) / "s3") as server:
        scratch = Path(name)
        link_photos(given.photos, scratch / "originals", given.images)
        prepare_all(scratch / "originals", scratch / "set", ["256"], ["256"])
        upload(server, scratch / "set")
        for rate in given.link_mb:
            passed, answer = context.Value("d", 0.0), context.Queue()
            relay = context.Process(target=serve, args=(server.port, rate * 1e6, passed, answer), daemon=True)
            relay.start()
            os.environ |= credentials(f"http://127.0.0.1:{answer.get()}")
            cache = scratch / f"cache-{rate}"
            row = one(scratch / "set", cache, given.size, given.workers, given.rounds, passed)
            print(json.dumps({"link_mb_per_second": rate or "unlimited"} | row), flush=True)
            relay.kill()
            relay.join()


if __name__ == "__main__":
    main()
