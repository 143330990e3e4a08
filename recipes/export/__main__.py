"""`python -m recipes.export YAML --output DIR`: write a trained network as files that do not need this project."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.imagefolder import class_names
from data.text import clean, escape
from recipes.cli import add_checkpoint_arguments, command_parser, pixels, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.export import CARD, CLASSES, FILES, OURS, PREPROCESSING
from recipes.load import load_config
from recipes.results import to_json

EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml --output exported
  %(prog)s yamls/p3.yaml --output exported --size 288 \\
      --checkpoint s3://bucket/runs/p3 --formats safetensors onnx
  python -m recipes.evaluate yamls/p3.yaml --sizes 288 320 --save figures.json
  %(prog)s yamls/p3.yaml --output exported \\
      --evaluation figures.json

DIR gets model.safetensors, model.pth, model.pt2 (torch.export), model.onnx,
preprocessing.json, classes.json and a model card, README.md. Both programs are
run and must reproduce the network's logits to 1e-4. If a technique changed the
architecture (BlurPool, squeeze-and-excite), the card shows how to load it."""


def main() -> int:
    """Read the command line and export; returns the exit status."""
    command = _parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    path, overrides = yaml_and_overrides(command, given.words)
    config = load_config(path, overrides)
    _require_free(given.output, given.force)
    _export(given, config, _read_evaluation(given.evaluation))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Write a trained network as weights and programs, with its preprocessing and a\nmodel card."
    command = command_parser("export", about, EXAMPLES)
    add_checkpoint_arguments(command)
    command.add_argument(
        "--output", type=Path, metavar="DIR", required=True, help="where to write; must be empty or not exist"
    )
    command.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    formats = f"files to write: {', '.join(FILES)} (default: all)"
    command.add_argument(
        "--formats", nargs="+", choices=tuple(FILES), default=tuple(FILES), metavar="FORMAT", help=formats
    )
    command.add_argument("--size", type=pixels, metavar="PX", help="image size (default: the last of eval.sizes)")
    command.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="a file from recipes.evaluate --save, for the model card"
    )
    return command


def _read_evaluation(path: Path | None) -> dict[str, Any] | None:
    """Read a file that `recipes.evaluate --save` wrote."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--evaluation: {path}: {error.strerror or error}") from None
    except ValueError:  # not JSON, or not UTF-8
        found = None
    if not isinstance(found, dict) or not {"weights_sha256", "results", "data", "flip"} <= found.keys():
        raise InputError(f"--evaluation: {path} was not written by recipes.evaluate --save")
    return found


def _export(given: argparse.Namespace, config: RunConfig, evaluation: dict[str, Any] | None) -> None:
    # Only now: importing torch and Composer takes seconds, and a wrong command line is refused before.
    from recipes.export import programs
    from recipes.export.card import card
    from recipes.trained import labels, load_trained

    trained = load_trained(config, given.checkpoint, given.weights)
    run, network = trained.config, trained.network
    if evaluation is not None and evaluation["weights_sha256"] != trained.weights_sha256:
        raise InputError(f"--evaluation: {given.evaluation} is about other weights than those of {trained.location}")
    prepared = preprocessing(run, given.size or config.eval.sizes[-1], config.eval.crop_ratio)
    probe = programs.examples(prepared["size"], 4, run.data.mean, run.data.std)
    shape = programs.architecture(trained, probe)
    about = {"model": run.model.name, "run_name": run.run_name, "weights_sha256": trained.weights_sha256}
    program, differences = programs.fixed_blurs(network, probe), {}
    with _filled(given.output) as folder:
        for name in dict.fromkeys(given.formats):
            path = folder / FILES[name]
            if name == "safetensors":
                programs.write_safetensors(network, path, about)
            elif name == "pth":
                programs.write_pth(network, path)
            else:
                write = programs.write_onnx if name == "onnx" else programs.write_torch_export
                differences[path.name] = write(program, path, probe)
        (folder / PREPROCESSING).write_bytes(_json(prepared))
        folders = labels(trained, config.data.path)
        named = enumerate(zip(folders, class_names(folders), strict=True))
        classes = [{"index": index, "class": one, "name": name} for index, (one, name) in named]
        (folder / CLASSES).write_bytes(_json(classes))
        files = [FILES[name] for name in FILES if name in given.formats] + [PREPROCESSING, CLASSES]
        text = card(trained, shape, prepared, differences, evaluation, files)
        (folder / CARD).write_text(clean(text), encoding="utf-8")
    weights = "EMA's average" if trained.weights == "ema" else "the trained weights"
    print(f"{escape(trained.location)}: {weights}, exported to {escape(given.output)}: {', '.join([*files, CARD])}")
    if shape.plain:
        print(f"The weights load strictly into a plain {run.model.name}.")
    else:
        changed = " and ".join(shape.techniques) or "Something"
        print(f"{changed} changed the architecture: the weights do not load into a plain {run.model.name}; see {CARD}.")


def preprocessing(run: RunConfig, size: int, crop_ratio: float) -> dict[str, Any]:
    """The content of preprocessing.json: how to make the input of `size` px, and probabilities from logits."""
    return {
        "size": size,
        "crop_ratio": crop_ratio,
        "resize_short_side": max(size, math.floor(size / crop_ratio + 1e-9)),
        "interpolation": "bilinear",
        "antialias": True,
        "crop": "center",
        "color": "RGB",
        "exif_orientation": "applied",
        "range": [0.0, 1.0],
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "layout": "NCHW",
        "dtype": "float32",
        "probabilities": "sigmoid" if run.loss.name == "binary_cross_entropy" else "softmax",
    }


def _json(content: object) -> bytes:
    # A byte of a folder name that is not UTF-8 becomes \\udcNN in JSON, which Python reads back as that byte.
    return (to_json(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _require_free(folder: Path, force: bool) -> None:
    """Refuse a folder that cannot be written, or is not empty and may not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; allowed: a folder that is empty or does not exist")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise InputError(f"--output: {folder} is not empty; choose another, or replace an earlier export with --force")
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--output: {folder} cannot be created in {nearest}")


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` at the end unless there is an exception.

    A new folder appears complete. In an existing one, files of an earlier export are replaced or removed; others stay.
    """
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    beside = folder.absolute().parent / f".{folder.absolute().name}.{os.getpid()}"
    try:
        beside.mkdir()
        yield beside
        if not folder.exists():
            beside.replace(folder)
            return
        new = {path.name for path in beside.iterdir()}
        for name in OURS:
            if name not in new:
                (folder / name).unlink(missing_ok=True)
        for name in sorted(new):
            (beside / name).replace(folder / name)
    except OSError as error:
        raise InputError(f"--output: {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
