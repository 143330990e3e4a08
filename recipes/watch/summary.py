"""summary.json: a run's results and the versions it was made with, for people, scripts and CI."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from algorithms import bare_name
from data.files import replace_text
from recipes.config import RunConfig
from recipes.resolved import config_digest
from recipes.results import to_json
from recipes.watch.figures import Figures
from recipes.watch.pictures import BadImages
from recipes.watch.sinks import or_warn

PACKAGES = {"torch": "torch", "torchvision": "torchvision", "composer": "mosaicml", "timm": "timm", "numpy": "numpy"}
DEVICES = {"cpu": "CPU", "mps": "Apple"}


class Summary(Callback):
    """Writes summary.json at the start, at each checkpoint, after each epoch and, by `finish`, at the end; rank 0 only.

    `top1` and `top5` are those of the last evaluation at the last size, in [0, 1], null before the first.
    `wall_seconds` covers all resumes of the run: training, waiting, evaluation, checkpoints. `images_per_second`
    excludes the last two. `weights_sha256` is null until the run is finished. `resumed_from` names the checkpoint that
    this process resumes from.
    """

    def __init__(
        self, path: Path, config: RunConfig, figures: Figures, bad_images: BadImages, resumed_from: str | None
    ) -> None:
        self.path = path
        self.config = config
        self.figures = figures
        self.bad_images = bad_images
        self.resumed_from = [] if resumed_from is None else [resumed_from]
        self._state: State | None = None
        self._versions: dict[str, str | None] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Position and device are known."""
        self._state = state
        if dist.get_global_rank() == 0:
            self._versions = self._versions or versions(state.device.name)
        self.write()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """An epoch and its evaluation are over."""
        self.write()

    def finish(self, weights: Mapping[str, object]) -> str:
        """Mark the run as finished; returns the `weights_sha256` of the final model's state dict."""
        digest = weights_sha256(weights)
        self.write(digest)
        return digest

    def write(self, weights_digest: str | None = None) -> None:
        """Write the file; a full disk is only a warning, except at the end, when there is a digest of the weights."""
        if self._state is None or dist.get_global_rank() != 0:
            return
        stamp, seconds, working = self._state.timestamp, self.figures.clock.read(), self.figures.clock.working
        model, sizes, evaluations = self.config.model, map(str, self.config.eval.sizes), self.figures.evaluations
        by_size = {size: evaluations[size] for size in sizes if size in evaluations}
        main = evaluations.get(str(self.config.eval.sizes[-1]), {})
        content = {
            "run_name": self.config.run_name,
            "finished": weights_digest is not None,
            "epochs": int(stamp.epoch),
            "batches": int(stamp.batch),
            "samples": int(stamp.sample),
            "wall_seconds": round(sum(seconds.values()), 3),
            "images_per_second": round(int(stamp.sample) / working, 3) if int(stamp.sample) and working else None,
            "top1": main.get("top1"),
            "top5": main.get("top5"),
            "eval_by_size": by_size,
            "weights_sha256": weights_digest,
            "resumed_from": self.resumed_from,
            "config_digest": config_digest(self.config, dist.get_world_size()),
            "versions": self._versions,
            "started_from": {"source": model.weights, "sha256": model.weights_sha256} if model.weights else None,
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
            "bad_images": self.bad_images.count,
        }
        with or_warn(self.path) if weights_digest is None else nullcontext():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, to_json(content, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The names of the checkpoints that the run was resumed from; each save also updates the file."""
        self.write()
        return {"resumed_from": list(self.resumed_from)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the run's earlier resumes, before this process's."""
        self.resumed_from = [*map(str, state["resumed_from"]), *self.resumed_from]


def weights_sha256(state_dict: Mapping[str, object]) -> str:
    """SHA-256, in hex, of a model's parameters and buffers, so that two runs can be compared.

    Over the tensors in the order of their bare names (Unicode code points), for each: the bare name in UTF-8, a zero
    byte, the dtype (`float32`), a zero byte, the shape (`64,3,7,7`; nothing for a scalar), a zero byte, and the
    elements in row-major order of the logical shape, little-endian. So the hash depends neither on the memory format
    (channels last) nor on the device, DDP or torch.compile, nor on the order of insertion. Entries that are not tensors
    are left out. ValueError: two entries have the same bare name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        if isinstance(value, torch.Tensor):
            if bare_name(name) in tensors:
                raise ValueError(f"two tensors are named {bare_name(name)!r} once their wrappers are removed")
            tensors[bare_name(name)] = value
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions(device: str) -> dict[str, str | None]:
    """Python, packages, our commit, the device and the machine; `device` is Composer's name: `gpu`, `mps` or `cpu`."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for key, package in PACKAGES.items():
        with suppress(metadata.PackageNotFoundError):
            found[key] = metadata.version(package)
    name = torch.cuda.get_device_name() if device == "gpu" else f"{DEVICES[device]} {platform.machine()}"
    return {
        **found,
        "commit": commit(Path(__file__).resolve().parents[2]),
        "device": f"{dist.get_world_size()} x {name}",
        "cpu": f"{os.cpu_count()} x {_cpu_name()}",  # all cores of the system, since the loader uses them
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, with `-dirty` if tracked files differ; None if it is not a checkout."""
    git = ("git", "-C", str(root))
    with suppress(OSError, subprocess.SubprocessError):
        # A folder installed inside another project's checkout does not have that project's commit.
        if Path(_output(*git, "rev-parse", "--show-toplevel")).resolve() == root.resolve():
            head = _output(*git, "rev-parse", "HEAD")
            return head + ("-dirty" if _output(*git, "diff", "HEAD", "--name-only") else "")
    return None


def _cpu_name() -> str:
    """The processor, such as `Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz`."""
    with suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            return _output("sysctl", "-n", "machdep.cpu.brand_string")
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()  # Linux on ARM does not name it
