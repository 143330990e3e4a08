"""What a run was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from composer.utils import dist

PACKAGES = {"torch": "torch", "torchvision": "torchvision", "composer": "mosaicml", "timm": "timm", "numpy": "numpy"}


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False)


def commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, with `-dirty` where tracked files differ; None where it is no checkout."""
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        # A folder installed somewhere inside another project's checkout has not that one's commit.
        if top.returncode != 0 or Path(top.stdout.strip()).resolve() != root.resolve():
            return None
        head = _git(root, "rev-parse", "HEAD")
        if head.returncode != 0:
            return None
        dirty = _git(root, "diff", "--quiet", "HEAD").returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("-dirty" if dirty else "")


def device_name(device: str) -> str:
    """`NVIDIA A10G`, `Apple arm64` or the processor's architecture, times the number of processes."""
    if device == "gpu":
        name = torch.cuda.get_device_name()
    elif device == "mps":
        name = f"Apple {platform.machine()}"
    else:
        name = f"CPU {platform.machine()}"
    return f"{dist.get_world_size()} x {name}"


def versions(device: str) -> dict[str, str | None]:
    """Python, packages, our commit and the device, for summary.json.

    Args:
        device: Composer's name of it: `gpu`, `mps` or `cpu`.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"commit": commit(Path(__file__).resolve().parents[2]), "device": device_name(device)}
