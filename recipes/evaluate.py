"""`python -m recipes.evaluate YAML [key=value ...]`: top-1 and top-5 accuracy of a checkpoint on a folder of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import replace_text
from data.text import escape, spreadsheet
from recipes.cli import add_checkpoint_arguments, command_parser, pixels, ratio, run_command, yaml_and_overrides
from recipes.config import RunConfig, at_size
from recipes.errors import InputError
from recipes.load import load_config
from recipes.results import to_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from data.buffers import Batch
    from data.source import Source
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
    path, overrides = yaml_and_overrides(command, given.words)
    config = load_config(path, overrides)
    sizes, ratios = given.sizes or config.eval.sizes, given.crop_ratios or [config.eval.crop_ratio]
    settings = [(size, crop) for size in dict.fromkeys(sizes) for crop in dict.fromkeys(ratios)]
    for flag, file in (("--csv", given.csv), ("--save", given.save)):
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{flag}: {file.parent} is not a directory")
    # Only now: importing torch and Composer takes seconds, and a wrong command line is refused before.
    from composer.utils import dist

    from data.source import open_evaluation
    from recipes.run import start_processes
    from recipes.trained import load_trained, with_usable_precision

    config = with_usable_precision(config)
    start_processes(config)
    trained = load_trained(config, given.checkpoint, given.weights)
    data = given.data or config.data.path
    source = open_evaluation(data, config.data.cache_folder, trained.classes)
    found = evaluate(trained, source, config, settings, data=data, flip=given.flip)
    if dist.get_global_rank() != 0:
        return 0
    if given.csv is not None:
        replace_text(given.csv, _csv(found))
    short = [{key: value for key, value in one.items() if key != "classes"} for one in found["results"]]
    text = to_json(found if given.per_class else found | {"results": short}, indent=2)
    if given.save is not None:
        replace_text(given.save, text + "\n")
    if given.json:
        print(text)
    else:
        _print(found, trained, per_class=given.per_class)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Top-1 and top-5 accuracy of a checkpoint on a folder of images, at any image\nsizes and crop ratios."
    command = command_parser("evaluate", about, EXAMPLES)
    add_checkpoint_arguments(command)
    command.add_argument(
        "--data", metavar="FOLDER", help="class folders, or a folder with val/ (default: the YAML's data.path)"
    )
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


def evaluate(
    trained: Trained, source: Source, config: RunConfig, settings: Sequence[tuple[int, float]], *, data: str, flip: bool
) -> dict[str, Any]:
    """Evaluate a network; every process of the run calls this, and all get the same figures.

    The source's labels are the network's outputs. `settings` has (size in pixels, crop ratio) of each pass; `data` says
    where the images are, for display; `flip` averages the logits of each image and its mirror image, as
    libffcv/ffcv-imagenet does.

    Returns:
        What `--json --per-class` prints: escaped names, accuracies in [0, 1].

    Raises:
        InputError: The network does not accept images of such a size, or cannot distinguish the source's classes.
        DataError: There are fewer images than processes, or none can be decoded.
    """
    from composer.utils import dist
    from tqdm import tqdm

    from data.errors import DataError
    from data.imagefolder import class_names
    from data.loader import eval_loader
    from recipes.trained import to_device
    from recipes.trainer import device_name, loading

    outputs, manifest = trained.num_classes, trained.manifest
    if len(source.classes) > outputs or (not trained.classes and len(source.classes) < outputs):
        raise InputError(
            f"{data}: {len(source.classes)} classes, but {trained.location} has {outputs} outputs and does not say "
            "which is which"
        )
    folders = [*source.classes, *(f"output {index}" for index in range(len(source.classes), outputs))]
    pairs = zip(folders, class_names(folders), strict=True)
    names = [{"class": escape(folder), "name": escape(name)} for folder, name in pairs]
    network, device = to_device(trained, config.device, *(size for size, _ in settings))
    results: list[dict[str, Any]] = []
    bad: dict[str, None] = {}
    share = len(source) * len(settings) // dist.get_world_size()
    with tqdm(total=share, unit="img", desc="evaluating", disable=dist.get_global_rank() != 0, leave=False) as bar:
        for size, crop in settings:
            loader = eval_loader(
                source,
                size=size,
                crop_ratio=crop,
                device_batch_size=at_size(config.eval.device_batch_size, size),
                rank=dist.get_global_rank(),
                world_size=dist.get_world_size(),
                **loading(config.data, device_name(config.device)),
            )
            logits_of = (lambda images: (network(images) + network(images.flip(3))) / 2) if flip else network
            counts, loss = _count(logits_of, loader, trained, config.precision, device, bar)
            if not sum(counts[0]):
                raise DataError(f"{data}: none of its {len(source)} images can be decoded")
            classes = [name | _shares(*one) for name, *one in zip(names, *counts, strict=True) if one[0]]
            figures = {"size": size, "crop_ratio": crop} | _shares(*map(sum, counts))
            results.append(figures | {"loss": loss, "classes": classes})
            bad |= dict.fromkeys(_bad_images(loader))
    return {
        "run_name": manifest.run_name if manifest else None,
        "checkpoint": trained.location,
        "epoch": manifest.epoch if manifest else None,
        "finished": manifest.finished if manifest else None,
        "weights": trained.weights,
        "weights_sha256": trained.weights_sha256,
        "data": escape(data),
        "flip": FLIP if flip else None,
        "precision": config.precision,
        "results": results,
        "bad_images": list(map(escape, bad)),
    }


def _shares(images: int, top1: int, top5: int) -> dict[str, Any]:
    hits = {"top1_correct": top1, "top5_correct": top5, "top1": top1 / images, "top5": top5 / images}
    return {"images": images} | hits


def _count(
    logits_of: Callable[[Tensor], Tensor] | nn.Module,
    loader: DataLoader[Batch],
    trained: Trained,
    precision: str,
    device: torch.device,
    bar: tqdm[Any],
) -> tuple[list[list[int]], float]:
    """Images, top-1 and top-5 hits of each class, and the mean cross-entropy, over all processes.

    Images that cannot be decoded have the label IGNORED_LABEL and do not count.
    """
    import torch
    import torch.nn.functional as F
    from composer.core import Precision, get_precision_context
    from composer.utils import dist

    from data.augment import Normalise
    from data.loader import IGNORED_LABEL

    normalise = Normalise(trained.config.data.mean, trained.config.data.std)
    labels_of, hits_of, losses = [], [], []
    with torch.no_grad(), get_precision_context(Precision(precision)):
        for images, labels in loader:
            batch, target = normalise((images.to(device, non_blocking=True), labels.to(device, non_blocking=True)))
            logits = logits_of(batch).float()
            hits = logits.topk(min(5, trained.num_classes)).indices == target[:, None]
            # Kept on the device until the end: fetching them would wait for the device after each batch.
            labels_of.append(labels)
            hits_of.append(torch.stack([hits[:, 0], hits.any(1)]))
            losses.append(F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED_LABEL))
            bar.update(len(images))
    labels, hits, loss = torch.cat(labels_of), torch.cat(hits_of, 1).cpu(), torch.cat(losses).cpu().double().sum()
    kept = [labels != IGNORED_LABEL, *hits]
    counts = torch.stack([torch.bincount(labels[mask], minlength=trained.num_classes) for mask in kept])
    if dist.get_world_size() > 1:
        counts, loss = counts.to(device), loss.to(device)
        dist.all_reduce(counts)
        dist.all_reduce(loss)
    total = int(counts[0].sum())
    return counts.tolist(), float(loss) / total if total else float("nan")


def _bad_images(loader: DataLoader[Batch]) -> list[str]:
    """The images of all processes that cannot be decoded, each with the reason."""
    from composer.utils import dist

    from data.loader import BatchDataset

    assert isinstance(loader.dataset, BatchDataset)  # as data/loader.py builds it
    lines = [f"{one.name}: {one.reason}" for one in loader.dataset.bad.new()]
    if dist.get_world_size() == 1:
        return lines
    return sorted(line for part in dist.all_gather_object(lines) for line in part)


def _csv(found: dict[str, Any]) -> str:
    """The figures of each class, one line per setting and class.

    A name that a spreadsheet would evaluate as a formula gets a `'` in front, here but not in the JSON.
    """
    from recipes.output import csv_text

    fields = ("size", "crop_ratio", "class", "name", "images", "top1_correct", "top5_correct", "top1", "top5")
    rows = [
        result | row | {key: spreadsheet(row[key]) for key in ("class", "name")}
        for result in found["results"]
        for row in result["classes"]
    ]
    return csv_text(fields, ([row[field] for field in fields] for row in rows))


def _print(found: dict[str, Any], trained: Trained, *, per_class: bool) -> None:
    """Print the figures for a terminal of 80 columns."""
    weights = "EMA's average" if trained.weights == "ema" else "trained weights"
    if trained.manifest is None:
        weights = "weights of another project"
    else:
        print(f"{escape(trained.manifest.run_name)}, {trained.manifest.describe()}")
    print(f"{escape(trained.location)}: {weights}, {found['precision']}{f'; {FLIP}' if found['flip'] else ''}")
    print(f"on {found['data']}\n")
    rows = [
        (
            *(one["size"], f"{one['crop_ratio']:g}", f"{100 * one['top1']:.2f}", f"{100 * one['top5']:.2f}"),
            *(f"{one['loss']:.4f}", f"{one['images']:,}"),
        )
        for one in found["results"]
    ]
    _print_table(("size, px", "crop ratio", "top-1, %", "top-5, %", "loss", "images"), rows, numbers=range(6))
    if per_class:
        _print_classes(found["results"])
    if found["bad_images"]:
        print(f"\nnot counted, because they cannot be decoded: {len(found['bad_images'])} images")
        for line in found["bad_images"][:SHOWN_BAD]:
            print(f"  {line}")


def _print_classes(results: list[dict[str, Any]]) -> None:
    """Top-1 accuracy of each class at each setting, the worst at the last setting first."""
    shown = results[-SHOWN_SETTINGS:]
    classes = sorted(shown[-1]["classes"], key=lambda row: row["top1"])
    title = f" (the worst {SHOWN_CLASSES} of {len(classes)})" if len(classes) > SHOWN_CLASSES else ", worst first"
    if len(shown) < len(results):
        title += f"; the last {len(shown)} of {len(results)} settings, --csv has all"
    print(f"\ntop-1 of each class, %{title}")
    crops = len({one["crop_ratio"] for one in shown}) > 1
    sizes = [f"{one['size']} px" + (f", {one['crop_ratio']:g}" if crops else "") for one in shown]
    top1 = [{row["class"]: f"{100 * row['top1']:.1f}" for row in one["classes"]} for one in shown]
    rows = [
        (
            row["name"] if len(row["name"]) <= 30 else f"{row['name'][:29]}…",
            *(one.get(row["class"], "-") for one in top1),
            row["images"],
        )
        for row in classes[:SHOWN_CLASSES]
    ]
    _print_table(("class", *sizes, "images"), rows, numbers=range(1, 2 + len(sizes)))


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int]) -> None:
    from rich.console import Console

    from recipes.output import Table

    console = Console(highlight=False)
    console.print(Table(headers, rows, numbers).terminal(console.width))


if __name__ == "__main__":
    sys.exit(run_command(main))
