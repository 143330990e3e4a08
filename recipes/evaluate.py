"""`python -m recipes.evaluate YAML [key=value ...]`: top-1 and top-5 accuracy of a checkpoint on a folder of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import replace_text, writing
from data.text import escape, spreadsheet
from recipes.cli import (
    add_checkpoint_arguments,
    command_parser,
    pixels,
    quick_imports,
    ratio,
    run_command,
    yaml_and_overrides,
)
from recipes.load import load_config
from recipes.output import ABSENT, Table, csv_text, show
from recipes.results import to_json

if TYPE_CHECKING:
    from recipes.trained import Trained

EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml
      the run's newest checkpoint on its own validation images
  %(prog)s yamls/p3.yaml --data /data/imagenet-v2 \\
      --sizes 224 256 288 --crop-ratios 0.875 1.0 --flip --save figures.json
  %(prog)s yamls/p3.yaml --weights raw \\
      --checkpoint s3://bucket/runs/p3 --csv classes.csv
  composer -n 8 -m recipes.evaluate yamls/p3.yaml
      the images shared among eight GPUs

The YAML gives the run, its data and the device; the checkpoint determines which
network to build. Each image counts exactly once, whatever the batch size and
the number of processes."""
FLIP = "mean of the logits of an image and its mirror image"
SHOWN_SETTINGS, SHOWN_CLASSES, SHOWN_BAD = 4, 20, 5


def main() -> int:
    """Read the command line and evaluate; returns the exit status."""
    command = _parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    config = load_config(*yaml_and_overrides(command, given.words))
    sizes, ratios = given.sizes or config.eval.sizes, given.crop_ratios or [config.eval.crop_ratio]
    settings = [(size, crop) for size in dict.fromkeys(sizes) for crop in dict.fromkeys(ratios)]
    for flag, file in (("--csv", given.csv), ("--save", given.save)):
        if file is None:
            continue
        with writing(file):  # the name may be too long
            if not file.parent.is_dir():
                raise InputError(f"{flag}: {file.parent} is not a directory")
            if file.exists() and not file.is_file():
                raise InputError(f"{flag}: {file} is not a regular file")
    with quick_imports():  # only now: it takes seconds, and a wrong command line is refused before
        from composer.utils import dist

        from data.open import open_evaluation
        from recipes.accuracy import measure
        from recipes.processes import start_processes
        from recipes.trained import load_trained, with_usable_precision

    config = with_usable_precision(config)
    start_processes(config)
    trained = load_trained(config, given.checkpoint, given.weights)
    data, manifest = given.data or config.data.path, trained.manifest
    source = open_evaluation(data, config.data.cache_folder, trained.classes)
    results, bad_images = measure(trained, source, config, settings, data=data, flip=given.flip)
    if dist.get_global_rank() != 0:
        return 0
    found = {
        "run_name": manifest.run_name if manifest else None,
        "checkpoint": trained.location,
        "epoch": manifest.epoch if manifest else None,
        "finished": manifest.finished if manifest else None,
        "weights": trained.weights,
        "weights_sha256": trained.weights_sha256,
        "data": escape(data),
        "flip": FLIP if given.flip else None,
        "precision": config.precision,
        "results": results,
        "bad_images": bad_images,
    }
    short = [{key: value for key, value in one.items() if key != "classes"} for one in results]
    text = to_json(found if given.per_class else found | {"results": short}, indent=2)
    if given.json:
        print(text)
    else:
        _print(found, trained, given.per_class)
    sys.stdout.flush()  # what was measured is shown even if a file cannot be written
    for file, content in ((given.csv, _csv(results)), (given.save, text + "\n")):
        if file is not None:
            with writing(file):
                replace_text(file, content)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Top-1 and top-5 accuracy of a checkpoint on a folder of images, at any image\nsizes and crop ratios."
    command = command_parser("evaluate", about, EXAMPLES)
    add_checkpoint_arguments(command)
    where = "class folders, or a folder with val/ (default: the YAML's data.path)"
    command.add_argument("--data", metavar="FOLDER", help=where)
    command.add_argument("--sizes", nargs="+", type=pixels, metavar="PX", help="image sizes (default: eval.sizes)")
    ratios = "kept share of the resized image's side, in (0, 1] (default: eval.crop_ratio)"
    command.add_argument("--crop-ratios", nargs="+", type=ratio, metavar="X", help=ratios)
    flip = "average the logits of each image and its mirror image, as FFCV does for ImageNet"
    command.add_argument("--flip", action="store_true", help=flip)
    command.add_argument("--per-class", action="store_true", help="also show the accuracy of each class")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the figures of each class to this file")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    save = "write the JSON to this file (with composer, which prints lines of its own)"
    command.add_argument("--save", type=Path, metavar="FILE", help=save)
    return command


def _csv(results: list[dict[str, Any]]) -> str:
    """The figures of each class, one line per setting and class.

    A name that a spreadsheet would evaluate as a formula gets a `'` in front, here but not in the JSON.
    """
    fields = ("size", "crop_ratio", "class", "name", "images", "top1_correct", "top5_correct", "top1", "top5")
    lines = [one | row for one in results for row in one["classes"]]
    lines = [line | {"class": spreadsheet(line["class"]), "name": spreadsheet(line["name"])} for line in lines]
    return csv_text(fields, ([line[field] for field in fields] for line in lines))


def _print(found: dict[str, Any], trained: Trained, per_class: bool) -> None:
    """Print the figures for a terminal of 80 columns."""
    if trained.manifest is not None:
        print(f"{escape(trained.manifest.run_name)}, {trained.manifest.describe()}")
    flip = f"; {FLIP}" if found["flip"] else ""
    print(f"{escape(trained.location)}: {trained.weights_name}, {found['precision']}{flip}\non {found['data']}\n")
    headers = ("size, px", "crop ratio", "top-1, %", "top-5, %", "loss", "images")
    rows = []
    for one in found["results"]:
        percent = [f"{100 * one[name]:.2f}" for name in ("top1", "top5")]
        rows.append([one["size"], f"{one['crop_ratio']:g}", *percent, f"{one['loss']:.4f}", f"{one['images']:,}"])
    show({"": [Table(headers, rows, range(6))]})
    if per_class:
        _print_classes(found["results"])
    if found["bad_images"]:
        print(f"\nnot counted, because they cannot be decoded: {len(found['bad_images'])} images")
        for line in found["bad_images"][:SHOWN_BAD]:
            print(f"  {line}")


def _print_classes(results: Sequence[dict[str, Any]]) -> None:
    """Top-1 accuracy of each class at each setting, the worst at the last setting first."""
    shown = results[-SHOWN_SETTINGS:]
    classes = sorted(shown[-1]["classes"], key=lambda row: row["top1"])
    more = f" (the worst {SHOWN_CLASSES} of {len(classes)})" if len(classes) > SHOWN_CLASSES else ", worst first"
    last = f"; the last {len(shown)} of {len(results)} settings, --csv has all" if len(shown) < len(results) else ""
    print(f"\ntop-1 of each class, %{more}{last}")
    crops = len({one["crop_ratio"] for one in shown}) > 1
    settings = [f"{one['size']} px" + (f", {one['crop_ratio']:g}" if crops else "") for one in shown]
    top1 = [{row["class"]: f"{100 * row['top1']:.1f}" for row in one["classes"]} for one in shown]
    rows = []
    for row in classes[:SHOWN_CLASSES]:
        name = row["name"] if len(row["name"]) <= 30 else f"{row['name'][:29]}…"
        rows.append([name, *(one.get(row["class"], ABSENT) for one in top1), row["images"]])
    show({"": [Table(("class", *settings, "images"), rows, range(1, 2 + len(settings)))]})


if __name__ == "__main__":
    sys.exit(run_command(main))
