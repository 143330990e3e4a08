"""`python -m recipes.predict YAML|EXPORTED IMAGE ...`: the most probable classes of images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decode import MAX_BYTES, BadImage, Fault
from data.imagefolder import EXTENSIONS, class_names, read_image, walk
from data.text import escape
from recipes.cli import add_checkpoint_arguments, command_parser, pixels, ratio, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.export import CLASSES, FILES, PREPROCESSING, open_onnx
from recipes.load import load_config
from recipes.results import to_json

if TYPE_CHECKING:
    from recipes.trained import Weights

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

    probabilities: Callable[[NDArray[np.uint8]], NDArray[np.float64]]
    """Maps images, uint8 (N, size, size, 3), to probabilities (N, num_classes) in [0, 1]."""
    classes: list[str]  # class folder names, in the order of the outputs
    names: list[str]  # their English names
    size: int  # side of an image in pixels
    crop_ratio: float


def main() -> int:
    """Read the command line and predict; returns the exit status."""
    command = _parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    _check(command, given)
    classifier, words = _open(command, given)
    paths = _paths(words, sys.stdin.buffer)
    images: Iterator[tuple[str, bytes | str]] = ((path, _read(path)) for path in paths)
    if given.stdin_image:
        images = chain([("stdin", sys.stdin.buffer.read(MAX_BYTES + 1))], images)
    wrong = False
    for name, found in _predict(classifier, images, given.top):
        if getattr(sys.stdout, "reader_left", False):  # as in `| head`
            break
        if isinstance(found, str):
            wrong = True
            print(f"{escape(name)}: {found}", file=sys.stderr, flush=True)
        elif given.json:
            print(to_json({"image": escape(name), "predictions": found}), flush=True)
        else:
            print(escape(name))
            for one in found:
                print(f"  {100 * one['probability']:6.2f} %  {one['name']}", flush=True)
    return 2 if wrong else 0


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
    command.add_argument(
        "--crop-ratio", type=ratio, metavar="X", help="kept share of the side (default: eval.crop_ratio)"
    )
    return command


def _check(command: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if not given.words:
        command.error("no YAML file or exported folder given, such as yamls/demo.yaml")
    if given.top < 1:
        command.error(f"--top: got {given.top}; allowed: at least 1")
    if given.stdin_image and STDIN in given.words:
        command.error("standard input is a list of paths (-) or an image (--stdin-image), not both")


def _open(command: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[Classifier, list[str]]:
    """The classifier that the words name, and the images among them."""

    def require_images(words: Sequence[str]) -> None:
        if not words and not given.stdin_image:
            command.error("no images given; allowed: files, folders, - for a list of paths on stdin, or --stdin-image")

    rest = list(given.words)
    model = next((word for word in rest if "=" not in word or Path(word).exists()), rest[0])
    rest.remove(model)
    if (Path(model) / PREPROCESSING).is_file():
        for flag in ("checkpoint", "weights", "size", "crop_ratio"):
            if getattr(given, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')}: is fixed in the export {model}; pass the run's YAML")
        require_images(rest)
        return _from_export(model), rest
    if Path(model).is_dir():
        raise InputError(f"{model}: is neither a YAML file nor a folder that recipes.export wrote ({PREPROCESSING})")
    images = [word for word in rest if "=" not in word or Path(word).exists()]
    path, overrides = yaml_and_overrides(command, [model, *(word for word in rest if word not in images)])
    config = load_config(path, overrides)
    require_images(images)
    return _from_run(config, given.checkpoint, given.weights, given.size, given.crop_ratio), images


def _from_export(path: str) -> Classifier:
    """The ONNX program of an exported folder, run on the CPU without torch."""
    folder = Path(path)
    try:
        prepared = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
        listed = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        size, crop_ratio = int(prepared["size"]), float(prepared["crop_ratio"])
        mean, std = (np.array(prepared[key], dtype=np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
        classes, names = [one["class"] for one in listed], [one["name"] for one in listed]
        independent = prepared["probabilities"] == "sigmoid"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not what recipes.export writes: {error}") from None
    onnx = folder / FILES["onnx"]
    if not onnx.is_file():
        raise InputError(f"{path}: holds no {onnx.name}; export with --formats onnx, or pass the run's YAML")
    try:
        run = open_onnx(onnx)
    except Exception as error:  # onnxruntime has its own exceptions
        raise InputError(f"{onnx}: {str(error).splitlines()[0][:200]}") from None

    def probabilities(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        floats = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        return normalised(run(np.ascontiguousarray((floats - mean) / std)), independent)

    return Classifier(probabilities, classes, names, size, crop_ratio)


def _from_run(
    config: RunConfig, checkpoint: str | None, weights: Weights | None, size: int | None, crop_ratio: float | None
) -> Classifier:
    """The classifier of a run's checkpoint, on the config's device."""
    import torch
    from composer.core import Precision, get_precision_context

    from data.augment import Normalise
    from recipes.trained import labels, load_trained, to_device, with_usable_precision

    config = with_usable_precision(config)
    trained = load_trained(config, checkpoint, weights)
    run, size = trained.config, size or config.eval.sizes[-1]
    network, device = to_device(trained, config.device, size)
    normalise, independent = Normalise(run.data.mean, run.data.std), run.loss.name == "binary_cross_entropy"

    @torch.no_grad()
    def probabilities(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        batch, _ = normalise((torch.from_numpy(images).permute(0, 3, 1, 2).to(device), None))
        with get_precision_context(Precision(config.precision)):
            logits = network(batch)
        return normalised(logits.float().cpu().numpy(), independent)

    classes, crop_ratio = labels(trained, config.data.path), crop_ratio or config.eval.crop_ratio
    return Classifier(probabilities, classes, class_names(classes), size, crop_ratio)


def normalised(logits: NDArray[np.floating[Any]], independent: bool) -> NDArray[np.float64]:
    """Probabilities in float64 of logits (N, num_classes): softmax, or sigmoid if each class is `independent`.

    The classes are independent if the network was trained with binary cross-entropy.
    """
    wide: NDArray[np.float64] = logits.astype(np.float64)
    if independent:
        return 0.5 * (1 + np.tanh(wide / 2))
    powers: NDArray[np.float64] = np.exp(wide - wide.max(1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return shares


def _paths(words: Sequence[str], stdin: BinaryIO) -> Iterator[str]:
    """The paths of the images, in order; a folder stands for all images below it, sorted by path."""
    for word in words:
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in stdin) if word == STDIN else [word]
        for path in filter(None, lines):
            if not Path(path).is_dir():
                yield path
                continue
            inside, notes = walk(path)
            for note in notes:
                print(note, file=sys.stderr)
            found = [str(Path(parent) / name) for parent in sorted(inside) for name in sorted(inside[parent])]
            yield from found or [path]  # `_read` reports that it holds no images


def _read(path: str) -> bytes | str:
    """An encoded image, or why there is none."""
    try:
        if Path(path).is_dir() and not path.lower().endswith(EXTENSIONS):
            return f"holds no images ({', '.join(EXTENSIONS)})"
        return read_image(path)
    except BadImage as error:
        return error.fault.reason
    except FileNotFoundError:
        return "no such file or folder"
    except OSError as error:
        return f"{Fault.UNREADABLE.reason}: {error.strerror or error}"
    except ValueError:  # it contains a zero byte
        return "is not a path"


def _predict(
    classifier: Classifier, images: Iterator[tuple[str, bytes | str]], top: int
) -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """Each image's name, and its most probable classes or, as text, what is wrong with it."""
    from data.augment import eval_picture

    def decoded(data: bytes | str) -> NDArray[np.uint8] | str:
        try:
            return data if isinstance(data, str) else eval_picture(data, classifier.size, classifier.crop_ratio)
        except BadImage as error:
            return error.fault.reason

    def best(probabilities: NDArray[np.float64]) -> list[dict[str, Any]]:
        order = np.argsort(-probabilities, kind="stable")[:top].tolist()
        return [
            {
                "class": escape(classifier.classes[index]),
                "name": escape(classifier.names[index]),
                "index": index,
                "probability": round(float(probabilities[index]), 6),
            }
            for index in order
        ]

    with ThreadPoolExecutor(4) as pool:
        while batch := list(islice(images, BATCH)):
            found = list(pool.map(decoded, (data for _, data in batch)))
            good = [one for one in found if not isinstance(one, str)]
            rows = iter(classifier.probabilities(np.stack(good)) if good else ())
            for (name, _), one in zip(batch, found, strict=True):
                yield name, one if isinstance(one, str) else best(next(rows))


if __name__ == "__main__":
    sys.exit(run_command(main))
