"""`python -m recipes.export YAML --output DIR`: a trained network as files that need nothing of this project."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data.text import clean, escape
from recipes.cli import command_parser, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.evaluate.__main__ import add_checkpoint_arguments
from recipes.export.folder import CARD, CLASSES, FILES, PREPROCESSING, classes, filled, preprocessing, require_free
from recipes.load import load_config

EXAMPLES = """examples:
  %(prog)s yamls/demo.yaml --output exported
  %(prog)s yamls/p3.yaml --output exported --size 288 \\
      --checkpoint s3://bucket/runs/p3 --formats safetensors onnx
  python -m recipes.evaluate yamls/p3.yaml --sizes 288 320 --save figures.json
  %(prog)s yamls/p3.yaml --output exported \\
      --evaluation figures.json

DIR gets model.safetensors, model.pth, model.pt2 (torch.export), model.onnx,
preprocessing.json, classes.json and a model card, README.md. The programs are
run again and must give the network's logits to 1e-4. Where a technique changed
the architecture (BlurPool, squeeze-and-excite), the card says how to load it."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = command_parser(
        "export", "Write a trained network as weights and programs, with its preprocessing and a\nmodel card.", EXAMPLES
    )
    command.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help="the config, and keys that differ")
    add_checkpoint_arguments(command)
    command.add_argument("--output", type=Path, metavar="DIR", required=True, help="where to; empty or not there yet")
    command.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    command.add_argument(
        "--formats",
        nargs="+",
        choices=tuple(FILES),
        default=tuple(FILES),
        metavar="FORMAT",
        help=f"what to write: {', '.join(FILES)} (default: all)",
    )
    command.add_argument("--size", type=int, metavar="PX", help="image size (default: the last of eval.sizes)")
    command.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="what recipes.evaluate --save wrote, for the model card"
    )
    return command


def read_evaluation(path: Path | None) -> dict[str, Any] | None:
    """What `recipes.evaluate --save` wrote.

    Raises:
        InputError: It is something else.
    """
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--evaluation: {path}: {error.strerror or error}") from None
    except ValueError:  # no JSON, or no text: told below
        found = None
    if not isinstance(found, dict) or not {"weights_sha256", "results", "data", "flip"} <= found.keys():
        raise InputError(f"--evaluation: {path} is not what recipes.evaluate --save writes")
    return found


def export(given: argparse.Namespace, config: RunConfig, evaluation: dict[str, Any] | None) -> None:
    """Do what the command line asks for."""
    # Only now: importing torch and Composer takes seconds, and a wrong command line is told before.
    from recipes.export.card import card
    from recipes.export.programs import fixed_blurs, write_onnx, write_torch_export
    from recipes.export.weights import architecture, as_json, examples, write_pth, write_safetensors
    from recipes.trained import labels, load_network, say_skipped

    trained = load_network(config, given.checkpoint, given.weights)
    say_skipped(trained)
    run, network, content = trained.config, trained.network, trained.content
    if evaluation is not None and evaluation["weights_sha256"] != content.weights_sha256:
        raise InputError(f"--evaluation: {given.evaluation} is of other weights than {content.location}'s")
    size = given.size or config.eval.sizes[-1]
    prepared = preprocessing(size, config.eval.crop_ratio, run.data.mean, run.data.std, run.loss.name)
    probe = examples(size, 4, run.data.mean, run.data.std)
    shape = architecture(network, run.model.name, trained.num_classes, run.algorithms, probe)
    about = {"model": run.model.name, "run_name": run.run_name, "weights_sha256": content.weights_sha256}
    program, differences = fixed_blurs(network, probe), {}
    with filled(given.output) as folder:
        for name in dict.fromkeys(given.formats):
            path = folder / FILES[name]
            if name == "safetensors":
                write_safetensors(network, path, about)
            elif name == "pth":
                write_pth(network, path)
            elif name == "torch_export":
                differences[path.name] = write_torch_export(program, path, probe)
            else:
                differences[path.name] = write_onnx(program, path, probe)
        (folder / PREPROCESSING).write_bytes(as_json(prepared))
        (folder / CLASSES).write_bytes(as_json(classes(labels(trained, config.data.path))))
        files = [FILES[name] for name in FILES if name in given.formats] + [PREPROCESSING, CLASSES]
        text = card(
            trained,
            shape=shape,
            preprocessing=prepared,
            differences=differences,
            evaluation=evaluation,
            files=files,
        )
        (folder / CARD).write_text(clean(text), encoding="utf-8")
    weights = "EMA's average" if content.weights == "ema" else "the trained weights"
    print(f"{escape(content.location)}: {weights}, into {escape(given.output)}: {', '.join([*files, CARD])}")
    if shape.plain:
        print(f"The weights load strictly into a plain {run.model.name}.")
    else:
        changed = " and ".join(shape.techniques) or "Something"
        print(f"{changed} changed the architecture: the weights do not load into a plain {run.model.name}; see {CARD}.")


def main() -> int:
    """Read the command line and export; the exit status."""
    command = parser()
    given = command.parse_intermixed_args(sys.argv[1:])
    path, overrides = yaml_and_overrides(command, given.words)
    config = load_config(path, overrides)
    if given.size is not None and not 8 <= given.size <= 4096:
        raise InputError(f"--size: got {given.size}; allowed: 8 to 4096")
    require_free(given.output, given.force)
    export(given, config, read_evaluation(given.evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
