"""Download Imagenette: ten easy classes of ImageNet, 9,469 training and 3,925 validation photos.

    python -m data.imagenette DIR [--size 320]

It becomes DIR/train and DIR/val with WordNet ids as class folders (https://github.com/fastai/imagenette, Apache-2.0).
The archives' SHA-256 are those that FastAI.jl pins in its list of datasets.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from pathlib import Path

import torch

from data.errors import DataError, Parser, run_main

_MIRROR = "https://s3.amazonaws.com/fast-ai-imageclas"
_ARCHIVES = {
    "160": ("imagenette2-160", "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5"),
    "320": ("imagenette2-320", "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c"),
    "full": ("imagenette2", "6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd"),
}
"""Short side in pixels: (name of the archive and of the folder in it, SHA-256)."""


def download(folder: Path, size: str) -> Path:
    """Download, verify and unpack; the folder gets its name when complete, and is not changed afterwards.

    Raises DataError if the folder holds something else, the download fails, or its SHA-256 is wrong.
    """
    name, sha256 = _ARCHIVES[size]
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: holds something else; expected a new or empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            archive = f"{scratch}/{name}.tgz"
            torch.hub.download_url_to_file(f"{_MIRROR}/{name}.tgz", archive, hash_prefix=sha256)
            shutil.unpack_archive(archive, scratch)
            Path(scratch, name).replace(folder)
    except (OSError, RuntimeError, shutil.ReadError) as error:  # RuntimeError: wrong SHA-256
        raise DataError(f"{folder}: cannot download Imagenette: {error}") from error
    return folder


def main(arguments: list[str] | None = None) -> None:
    """The command line; raises InputError."""
    parser = Parser("python -m data.imagenette", "Download Imagenette (320 px: 342 MB).")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; left alone if already complete")
    parser.add_argument("--size", choices=list(_ARCHIVES), default="320", help="short side (default: %(default)s px)")
    options = parser.parse_args(arguments)
    print(f"Imagenette in {download(options.folder, options.size)}")


if __name__ == "__main__":
    socket.setdefaulttimeout(60)  # torch.hub sets none
    raise SystemExit(run_main(main))
