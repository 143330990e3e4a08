"""How many images per CPU-second the loader gives, against torchvision's ImageFolder on the same originals.

    python -m benchmarks.loader IMAGES [--workers 2] [--images 2000] [--rounds 3]

IMAGES: a folder of photos, flat or in folders. They become an ImageFolder of links and a prepared dataset of 160 and
256 px in a temporary folder; each loader repeats them up to --images, in turns, after an epoch that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import compare, median, ours, split, torchvisions
from data.imagefolder import EXTENSIONS
from data.prepare import Settings, prepare
from data.source import open_split_pair


def link(images: Path, folder: Path) -> None:
    files = sorted(path for path in images.rglob("*") if path.name.lower().endswith(EXTENSIONS))
    for number, file in enumerate(files):
        for part in ("train", "val") if number < 4 else ("train",):
            place = folder / part / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:05}{file.suffix}").symlink_to(file.resolve())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as columns of text."""
    columns = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=2000, dest="count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        originals, prepared = f"{scratch}/originals", f"{scratch}/prepared"
        link(options.images, Path(originals))
        settings = Settings("mds", ("160", "256"), ("original",), 90)
        if not prepare(originals, prepared, settings, os.cpu_count() or 1, lambda _: None):
            raise SystemExit("the prepared images do not read back")
        rows = []
        for size in (224, 176, 128):
            sources = {"originals": open_split_pair(originals, "")[0], "prepared": open_split_pair(prepared, "")[0]}
            loaders = {"torchvision": torchvisions(f"{originals}/train", size, options.count, options.workers, 128)}
            loaders |= {name: ours(one, size, options.count, options.workers, 128) for name, one in sources.items()}
            rates = compare(loaders, options.rounds)
            base = {what: median(rates["torchvision"], what) for what in ("per_second", "per_cpu_second")}
            for name, found in rates.items():
                row = {"size": size, "loader": name}
                for what in base:
                    row[f"images_{what}"] = round(median(found, what), 1)
                    row[f"ratio_{what}"] = round(median(found, what) / base[what], 2)
                steps = split(sources[name], size, 400) if name in sources else {}
                rows.append(
                    row
                    | {
                        f"{step}_ms": round(steps[step], 3) if steps else "-"
                        for step in ("read", "decode", "resize", "batch", "floor")
                    }
                )
            del loaders
        print(json.dumps(rows, indent=1) if options.json else table(rows))
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.workers} workers, "
            f"{options.count} images an epoch, median of {options.rounds} rounds"
        )


if __name__ == "__main__":
    main()
