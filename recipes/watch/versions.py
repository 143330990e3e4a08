"""What a run was made with."""

from __future__ import annotations

import os
import platform
import re
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


def cpu() -> str:
    """`64 x Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz`: the cores that the system sees, for the loader runs on them."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        else:
            [name] = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:1]
    except (OSError, subprocess.SubprocessError, ValueError):
        name = platform.machine()  # a Linux on ARM does not tell
    return f"{os.cpu_count()} x {name}"


def memory() -> str | None:
    """Of the whole machine, such as `25 GB`; None where the system does not tell."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (OSError, ValueError):
        return None


def versions(device: str) -> dict[str, str | None]:
    """Python, packages, our commit, the device and the machine, for summary.json.

    Args:
        device: Composer's name of it: `gpu`, `mps` or `cpu`.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["commit"] = commit(Path(__file__).resolve().parents[2])
    return found | {"device": device_name(device), "cpu": cpu(), "memory": memory()}
