"""`python -m recipes.predict YAML|EXPORTED IMAGES...`: class names and probabilities of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.decode import MAX_BYTES, BadImage
from data.text import escape
from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.errors import InputError
from recipes.evaluate.__main__ import add_checkpoint_arguments
from recipes.json_text import to_json
from recipes.load import load_config
from recipes.predict.inputs import STDIN, Image, in_batches, paths, read
from recipes.predict.networks import Classifier, from_export, from_run, is_exported

BATCH = 16
"""Images that are decoded and computed together."""
EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml photo.jpg holiday/
      files, and all images in folders
  %(prog)s yamls/p3.yaml --checkpoint s3://bucket/runs/p3 \\
      --top 1 --json photos/ > photos.jsonl
  find photos -name '*.jpg' | %(prog)s exported -
      what recipes.export wrote into exported/ (its ONNX), a list of paths
  curl -s https://example.com/cat.jpg | \\
      %(prog)s exported --stdin-image

The first of the words is the run's YAML, or a folder that recipes.export
wrote. An image that cannot be decoded is named on stderr, the others go on,
and the exit status is 2."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = command_parser("predict", "Name what is in images, with probabilities.", EXAMPLES)
    command.add_argument(
        "words",
        nargs="*",
        metavar="YAML|EXPORTED IMAGE ... [key=value ...]",
        help="the run's config or an exported folder; then files and folders, - for a list of paths on stdin",
    )
    add_checkpoint_arguments(command)
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes to show (default: 5)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--stdin-image", action="store_true", help="standard input is one image's bytes")
    command.add_argument("--size", type=int, metavar="PX", help="image size (default: the last of eval.sizes)")
    command.add_argument("--crop-ratio", type=float, metavar="X", help="in (0, 1] (default: eval.crop_ratio)")
    return command


def check(command: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse what makes no sense, before anything is loaded.

    Raises:
        InputError: Of all that is wrong the first.
    """
    if not given.words:
        command.error("which YAML file, or exported folder? such as yamls/demo.yaml")
    if given.top < 1:
        command.error(f"--top: got {given.top}; allowed: at least 1")
    if given.size is not None and not 8 <= given.size <= 4096:
        command.error(f"--size: got {given.size}; allowed: 8 to 4096")
    if given.crop_ratio is not None and not 0 < given.crop_ratio <= 1:
        command.error(f"--crop-ratio: got {given.crop_ratio}; allowed: above 0, at most 1")
    if given.stdin_image and STDIN in given.words:
        command.error("standard input is a list of paths (-) or an image (--stdin-image), not both")


def open_classifier(command: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[Classifier, list[str]]:
    """The network that the words name, and the other words: images."""
    rest = list(given.words)
    model = next((word for word in rest if "=" not in word or Path(word).exists()), rest[0])
    rest.remove(model)
    if is_exported(model):
        unused = ("checkpoint", "weights", "size", "crop_ratio")
        for name in unused:
            if getattr(given, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: settled by the export in {model}; name the run's YAML")
        require_images(command, given, rest)
        return from_export(model), rest
    if Path(model).is_dir():
        raise InputError(f"{model}: is no folder that recipes.export wrote (no preprocessing.json), and no YAML file")
    images = [word for word in rest if "=" not in word or Path(word).exists()]
    path, overrides = yaml_and_overrides(command, [model, *(word for word in rest if word not in images)])
    config = load_config(path, overrides)
    require_images(command, given, images)
    return from_run(config, given.checkpoint, given.weights, given.size, given.crop_ratio), images


def require_images(command: argparse.ArgumentParser, given: argparse.Namespace, images: Sequence[str]) -> None:
    """Refuse a command line without images."""
    if not images and not given.stdin_image:
        command.error("which images? files, folders, - for a list of paths on stdin, or --stdin-image")


def pictures(
    classifier: Classifier, images: Sequence[Image], pool: ThreadPoolExecutor
) -> list[NDArray[np.uint8] | str]:
    """Each image as the network takes it, uint8 (size, size, 3), or what is wrong with it."""
    from data.augment import eval_picture

    def one(image: Image) -> NDArray[np.uint8] | str:
        if image.fault is not None:
            return image.fault
        try:
            return eval_picture(image.data, classifier.size, classifier.crop_ratio)
        except BadImage as error:
            return error.fault.reason

    return list(pool.map(one, images))


def best(classifier: Classifier, probabilities: NDArray[np.float64], top: int) -> list[dict[str, Any]]:
    """The most probable classes, the first one first.

    Args:
        classifier: Whose outputs they are.
        probabilities: Of one image, (num_classes,).
        top: How many.
    """
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


def predict(classifier: Classifier, batches: Iterator[list[Image]], top: int) -> Iterator[tuple[str, Any]]:
    """Go through the images; gives each one's name, and its best classes or, as a text, what is wrong with it."""
    with ThreadPoolExecutor(4) as pool:
        for batch in batches:
            found = pictures(classifier, batch, pool)
            good = [one for one in found if not isinstance(one, str)]
            rows = iter(classifier.probabilities(np.stack(good)) if good else ())
            for image, one in zip(batch, found, strict=True):
                yield image.name, one if isinstance(one, str) else best(classifier, next(rows), top)


def main() -> int:
    """Read the command line and predict; the exit status."""
    command = parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    check(command, given)
    classifier, words = open_classifier(command, given)
    batches: Iterator[list[Image]] = (
        [read(path) for path in some] for some in in_batches(paths(words, sys.stdin.buffer), BATCH)
    )
    if given.stdin_image:
        batches = iter([[Image("stdin", sys.stdin.buffer.read(MAX_BYTES + 1), None)], *batches])
    wrong = False
    for name, found in predict(classifier, batches, given.top):
        if getattr(sys.stdout, "reader_left", False):  # as in `| head`
            break
        shown = escape(name)
        if isinstance(found, str):
            wrong = True
            print(f"{shown}: {found}", file=sys.stderr, flush=True)
        elif given.json:
            print(to_json({"image": shown, "predictions": found}), flush=True)
        else:
            print(shown)
            for one in found:
                print(f"  {100 * one['probability']:6.2f} %  {one['name']}", flush=True)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
