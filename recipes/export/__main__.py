"""`python -m recipes.export YAML --output DIR`: write a trained network as files that do not need this project."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.errors import InputError
from data.files import writing
from data.text import clean, escape
from recipes.cli import add_checkpoint_arguments, command_parser, pixels, quick_imports, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.export import CARD, CLASSES, CONFIG, FILES, OURS, PREPROCESSING, SavedEvaluation
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
run and must reproduce the network's logits to 1e-4. A config.json, beside
model.safetensors, lets timm load DIR: timm.create_model("local-dir:DIR",
pretrained=True). If a technique changed the architecture (BlurPool,
squeeze-and-excite), timm cannot, and the card shows how to load it.
--push-to-hub needs a token: HF_TOKEN, or `hf auth login`."""


def main() -> int:
    """Read the command line and export; returns the exit status."""
    command = _parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    config = load_config(*yaml_and_overrides(command, given.words))
    folder = given.output
    with writing(folder):  # the name may be too long
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output: {folder} is a file; allowed: a folder that is empty or does not exist")
        if folder.is_dir() and any(folder.iterdir()) and not given.force:
            instead = "choose another, or replace an earlier export with --force"
            raise InputError(f"--output: {folder} is not empty; {instead}")
    _export(given, config, None if given.evaluation is None else _read_evaluation(given.evaluation))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Write a trained network as weights and programs, with its preprocessing and a\nmodel card."
    command = command_parser("export", about, EXAMPLES)
    add_checkpoint_arguments(command)
    output = "where to write; must be empty or not exist"
    command.add_argument("--output", type=Path, metavar="DIR", required=True, help=output)
    command.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    formats = f"files to write: {', '.join(FILES)} (default: all)"
    every = tuple(FILES)
    command.add_argument("--formats", nargs="+", choices=every, default=every, metavar="FORMAT", help=formats)
    command.add_argument("--size", type=pixels, metavar="PX", help="image size (default: the last of eval.sizes)")
    evaluation = "a file from recipes.evaluate --save, for the model card"
    command.add_argument("--evaluation", type=Path, metavar="FILE", help=evaluation)
    hub = "upload DIR to this repository of the Hugging Face hub, created if needed"
    command.add_argument("--push-to-hub", metavar="USER/NAME", help=hub)
    return command


def _read_evaluation(path: Path) -> SavedEvaluation:
    try:
        return SavedEvaluation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"--evaluation: {path}: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"--evaluation: {path} was not written by recipes.evaluate --save") from None


def _export(given: argparse.Namespace, config: RunConfig, evaluation: SavedEvaluation | None) -> None:
    with quick_imports():  # only now: it takes seconds, and a wrong command line is refused before
        from recipes.export import hub, programs
        from recipes.trained import labels, load_trained

    if given.push_to_hub is not None:
        hub.require_repository(given.push_to_hub)
    trained = load_trained(config, given.checkpoint, given.weights)
    run, network, digest = trained.config, trained.network, trained.weights_sha256
    if evaluation is not None and evaluation.weights_sha256 != digest:
        raise InputError(f"--evaluation: {given.evaluation} is about other weights than those of {trained.location}")
    prepared = preprocessing(run, given.size or config.eval.sizes[-1], config.eval.crop_ratio)
    classes = labels(trained, config.data.path)
    probe = programs.examples(prepared["size"], 4, run.data.mean, run.data.std)
    shape = programs.architecture(trained, probe)
    program, differences = programs.fixed_blurs(network, probe), {}
    files = [file for name, file in FILES.items() if name in given.formats]
    with _filled(given.output) as folder:
        for file in files:
            if file in (FILES["torch_export"], FILES["onnx"]):
                differences[file] = programs.write_program(program, folder / file, probe)
            else:
                about = {"model": run.model.name, "run_name": run.run_name, "weights_sha256": digest}
                programs.write_weights(network, folder / file, about)
        indexed = [{"index": index} | label for index, label in enumerate(classes)]
        for name, content in ((PREPROCESSING, prepared), (CLASSES, indexed)):
            (folder / name).write_text(to_json(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files += [PREPROCESSING, CLASSES]
        if FILES["safetensors"] in files and hub.write_timm_config(trained, folder, prepared, classes, probe):
            files.append(CONFIG)
        text = hub.card(trained, shape, prepared, differences, evaluation, files)
        (folder / CARD).write_text(clean(text), encoding="utf-8")
    words = f"{trained.weights_name}, exported to {escape(given.output)}: {', '.join([*files, CARD])}"
    print(f"{escape(trained.location)}: {words}")
    if shape.plain:
        print(f"The weights load strictly into a plain {run.model.name}.")
    else:
        changed = " and ".join(shape.techniques) or "Something"
        print(f"{changed} changed the architecture: the weights do not load into a plain {run.model.name}; see {CARD}.")
    if given.push_to_hub is not None:
        print(f"uploaded to {hub.push(given.output, given.push_to_hub, files)}")


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


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` at the end unless there is an exception.

    A new folder appears complete. In an existing one, files of an earlier export are replaced or removed; others stay.
    """
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=parent, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary) / "new"  # with the usual permissions, unlike the temporary folder
            new.mkdir()
            yield new
            if not folder.exists():
                new.replace(folder)
                return
            for name in OURS:
                if (new / name).exists():
                    (new / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
