"""The loader on shards in a bucket: a cold first epoch over a link with a known rate, then more, against local shards.

    python -m benchmarks.loader_s3 IMAGES [--images 4000] [--link-mb 0 20 5] [--workers 2] [--size 224]

IMAGES: a folder of photos, repeated up to --images and prepared at 256 px. The bucket is a real S3 server's on this
machine (tests/s3.py) behind a relay process that limits the total rate to --link-mb MB/s (0: no limit) and counts the
bytes. The first epoch and the staging process start together, as in training; local and remote epochs alternate
afterwards.
"""

from __future__ import annotations

import argparse
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

from benchmarks.loader import measure, median, ours
from data import stage
from data.imagefolder import EXTENSIONS
from data.prepare import Settings, prepare
from data.source import open_split_pair
from tests.s3 import ADMIN, Proxy, Server, running


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


def repeat(photos: Path, folder: Path, images: int) -> None:
    """An ImageFolder of that many links to the photos."""
    files = sorted(path for path in photos.rglob("*") if path.name.lower().endswith(EXTENSIONS))
    for split, count in (("train", images), ("val", 4)):
        for number in range(count):
            place = folder / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:06}.jpg").symlink_to(files[number % len(files)].resolve())


def upload(server: Server, folder: Path) -> None:
    client = server.client()
    client.create_bucket(Bucket="bucket")
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="bucket", Key=f"set/{file.relative_to(folder)}", Body=file.read_bytes())


def one(local: Path, cache: Path, size: int, workers: int, rounds: int, passed: Any) -> dict[str, Any]:
    """A cold first epoch, then epochs alternating with local shards."""
    near, far = open_split_pair(str(local), "")[0], open_split_pair("s3://bucket/set", str(cache))[0]
    images = len(near)
    loaders = {"local": ours(near, size, images, workers, 128), "s3": ours(far, size, images, workers, 128)}
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("photos", type=Path, metavar="IMAGES")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--link-mb", type=float, nargs="+", default=[0, 20, 5], help="1e6 bytes per second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, running(Path(name) / "s3") as server:
        scratch = Path(name)
        repeat(options.photos, scratch / "originals", options.images)
        settings = Settings("mds", ("256",), ("256",), 90)
        if not prepare(str(scratch / "originals"), str(scratch / "set"), settings, os.cpu_count() or 1, lambda _: None):
            raise SystemExit("the prepared images do not read back correctly")
        upload(server, scratch / "set")
        for variable, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ADMIN, strict=True):
            os.environ[variable] = value
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        for rate in options.link_mb:
            passed, answer = context.Value("d", 0.0), context.Queue()
            relay = context.Process(target=serve, args=(server.port, rate * 1e6, passed, answer), daemon=True)
            relay.start()
            os.environ["S3_ENDPOINT_URL"] = f"http://127.0.0.1:{answer.get()}"
            cache = scratch / f"cache-{rate}"
            row = one(scratch / "set", cache, options.size, options.workers, options.rounds, passed)
            print(json.dumps({"link_mb_per_second": rate or "unlimited"} | row), flush=True)
            relay.kill()
            relay.join()


if __name__ == "__main__":
    main()
