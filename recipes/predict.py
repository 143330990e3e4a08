"""`python -m recipes.predict YAML|EXPORTED IMAGE ...`: the most probable classes of images."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from data.decode import MAX_BYTES, BadImage, Fault
from data.errors import InputError
from data.imagefolder import EXTENSIONS, read_image, walk
from data.text import escape, first_line
from recipes.cli import (
    add_checkpoint_arguments,
    command_parser,
    pixels,
    quick_imports,
    ratio,
    run_command,
    yaml_and_overrides,
)
from recipes.config import RunConfig
from recipes.export import CLASSES, FILES, PREPROCESSING, open_onnx
from recipes.load import load_config
from recipes.results import to_json

BATCH = 16  # images that are decoded and predicted together
STDIN = "-"
EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml photo.jpg holiday/
      files, and all images in folders
  %(prog)s yamls/p3.yaml --checkpoint s3://bucket/runs/p3 \\
      --top 1 --json photos/ > photos.jsonl
  find photos -name '*.jpg' | %(prog)s exported -
      the ONNX program that recipes.export wrote, and a list of paths
  curl -s https://example.com/cat.jpg | \\
      %(prog)s exported --stdin-image

The first argument is the run's YAML, or a folder that recipes.export wrote. An
image that cannot be decoded is named on stderr, the others are still predicted,
and the exit status is 2."""


class Classifier(NamedTuple):
    """A network, and how to use it."""

    logits: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """Maps images, uint8 (N, size, size, 3), to logits (N, num_classes)."""
    independent: bool  # whether each class has a probability of its own: the loss was binary cross-entropy
    labels: list[dict[str, str]]  # the `class` folder and its English `name` of each output
    size: int  # side of an image in pixels
    crop_ratio: float

    def best(self, images: list[NDArray[np.uint8]], top: int) -> list[list[dict[str, Any]]]:
        """The most probable classes of each image."""
        if not images:
            return []
        logits = self.logits(np.stack(images)).astype(np.float64)
        probabilities = expit(logits) if self.independent else softmax(logits, axis=1)
        return [
            [
                self.labels[index] | {"index": index, "probability": round(float(row[index]), 6)}
                for index in np.argsort(-row, kind="stable")[:top].tolist()
            ]
            for row in probabilities
        ]


def main() -> int:
    """Read the command line and predict; returns the exit status."""
    command = _parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    if not given.words:
        command.error("no YAML file or exported folder given, such as yamls/demo.yaml")
    if given.top < 1:
        command.error(f"--top: got {given.top}; allowed: at least 1")
    if given.stdin_image and STDIN in given.words:
        command.error("standard input is a list of paths (-) or an image (--stdin-image), not both")
    classifier, words = _open(command, given)
    stdin: BinaryIO = sys.stdin.buffer if sys.stdin else io.BytesIO()  # it may be closed
    alone = [stdin.read(MAX_BYTES + 1)] if given.stdin_image else []
    return _predict(classifier, chain(alone, _paths(words, stdin)), given.top, given.json)


def _predict(classifier: Classifier, images: Iterator[str | bytes], top: int, as_json: bool) -> int:
    """Print the most probable classes of each image, given as its path or its encoded bytes; returns the exit status.

    What is wrong with an image is printed on stderr.
    """
    status = 0
    with ThreadPoolExecutor(4) as pool:
        while batch := list(islice(images, BATCH)):
            pictures = list(pool.map(partial(_picture, classifier), batch))
            found = iter(classifier.best([one for one in pictures if not isinstance(one, str)], top))
            for image, picture in zip(batch, pictures, strict=True):
                name = "stdin" if isinstance(image, bytes) else escape(image)
                if getattr(sys.stdout, "reader_left", False):  # as in `| head`
                    return status
                if isinstance(picture, str):
                    status = 2
                    print(f"{name}: {picture}", file=sys.stderr, flush=True)
                elif as_json:
                    print(to_json({"image": name, "predictions": next(found)}), flush=True)
                else:
                    print(name)
                    for one in next(found):
                        print(f"  {100 * one['probability']:6.2f} %  {one['name']}", flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    command = command_parser("predict", "Print the most probable classes of images.", EXAMPLES, words=False)
    command.add_argument(
        "words",
        nargs="*",
        metavar="YAML|EXPORTED IMAGE ... [key=value ...]",
        help="the run's config or an exported folder; then files and folders, or - for a list of paths on stdin",
    )
    add_checkpoint_arguments(command)
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes to print (default: 5)")
    command.add_argument("--json", action="store_true", help="print one JSON object per line")
    command.add_argument("--stdin-image", action="store_true", help="read one image's bytes from stdin")
    command.add_argument("--size", type=pixels, metavar="PX", help="image size (default: the last of eval.sizes)")
    ratios = "kept share of the side (default: eval.crop_ratio)"
    command.add_argument("--crop-ratio", type=ratio, metavar="X", help=ratios)
    return command


def _open(command: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[Classifier, list[str]]:
    """The classifier that the words name, and the images among them."""
    # A word with `=` is an override, unless there is such a file.
    plain = [word for word in given.words if "=" not in word or os.path.exists(word)]  # noqa: PTH110 - as below
    model, *images = plain or given.words
    exported = os.path.isfile(f"{model}/{PREPROCESSING}")  # noqa: PTH113 - Path's raises for a name that is too long
    if exported:
        for flag in ("checkpoint", "weights", "size", "crop_ratio"):
            if getattr(given, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')}: is fixed in the export {model}; pass the run's YAML")
    elif os.path.isdir(model):  # noqa: PTH112
        raise InputError(f"{model}: is neither a YAML file nor a folder that recipes.export wrote ({PREPROCESSING})")
    else:
        overrides = [word for word in given.words if word not in plain]
        config = load_config(*yaml_and_overrides(command, [model, *overrides]))
    if not images and not given.stdin_image:
        command.error("no images given; allowed: files, folders, - for a list of paths on stdin, or --stdin-image")
    return (_from_export(Path(model)) if exported else _from_run(config, given)), images


def _from_export(folder: Path) -> Classifier:
    """The ONNX program of an exported folder, run on the CPU without torch."""
    try:
        prepared = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
        listed = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        mean, std = (np.array(prepared[key], dtype=np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
        labels = [{key: escape(one[key]) for key in ("class", "name")} for one in listed]
        settings = (prepared["probabilities"] == "sigmoid", labels, int(prepared["size"]))
        crop_ratio = float(prepared["crop_ratio"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: is not what recipes.export writes: {error}") from None
    onnx = folder / FILES["onnx"]
    if not onnx.is_file():
        raise InputError(f"{folder}: holds no {onnx.name}; export with --formats onnx, or pass the run's YAML")
    try:
        run = open_onnx(onnx)
    except Exception as error:  # onnxruntime has its own exceptions
        raise InputError(f"{onnx}: {first_line(error)[:200]}") from None

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        floats = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        return run(np.ascontiguousarray((floats - mean) / std))

    return Classifier(logits, *settings, crop_ratio)


def _from_run(config: RunConfig, given: argparse.Namespace) -> Classifier:
    """The classifier of a run's checkpoint, on the config's device."""
    with quick_imports():
        import torch

        from recipes.trained import Logits, labels, load_trained, with_usable_precision

    config = with_usable_precision(config)
    trained = load_trained(config, given.checkpoint, given.weights)
    size, crop_ratio = given.size or config.eval.sizes[-1], given.crop_ratio or config.eval.crop_ratio
    run = Logits(trained, config, [size])

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = run(torch.from_numpy(images).permute(0, 3, 1, 2)).cpu().numpy()
        return found

    independent = trained.config.loss.name == "binary_cross_entropy"
    return Classifier(logits, independent, labels(trained, config.data.path), size, crop_ratio)


def _paths(words: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    """The paths of the images, in order; a folder stands for all images below it, sorted by path."""
    for word in words:
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in stdin) if word == STDIN else [word]
        for path in filter(None, lines):
            if not os.path.isdir(path):  # noqa: PTH112 - Path's raises for a name that is too long
                yield path
                continue
            inside, notes = walk(path)
            for note in notes:
                print(note, file=sys.stderr)
            found = [str(Path(parent) / name) for parent in sorted(inside) for name in sorted(inside[parent])]
            yield from found or [path]  # `_picture` reports that it holds no images


def _picture(classifier: Classifier, image: str | bytes) -> NDArray[np.uint8] | str:
    """The pixels of an image, given as its path or its encoded bytes, or why there are none."""
    from data.augment import eval_picture  # only now: it imports torch

    try:
        if isinstance(image, str):
            if "\0" in image:
                return "is not a path"
            if Path(image).is_dir() and not image.lower().endswith(EXTENSIONS):
                return f"holds no images ({', '.join(EXTENSIONS)})"
            image = read_image(image)
        return eval_picture(image, classifier.size, classifier.crop_ratio)
    except BadImage as error:
        return error.fault.reason
    except FileNotFoundError:
        return "no such file or folder"
    except OSError as error:
        return f"{Fault.UNREADABLE.reason}: {error.strerror or error}"


if __name__ == "__main__":
    sys.exit(run_command(main))
