"""What makes probabilities of images: a run's checkpoint, or an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.imagefolder import class_names
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.export.folder import CLASSES, FILES, PREPROCESSING

if TYPE_CHECKING:
    from recipes.trained import Weights


class Classifier(NamedTuple):
    """A network, and what belongs to it."""

    probabilities: Callable[[NDArray[np.uint8]], NDArray[np.float64]]
    """Of images, uint8 (N, size, size, 3), in [0, 1]: (N, num_classes)."""
    classes: list[str]
    """Class folder names, in the order of the outputs."""
    names: list[str]
    """Their English names."""
    size: int
    """Side of an image in pixels."""
    crop_ratio: float


def is_exported(path: str) -> bool:
    """Whether it is a folder that `recipes.export` wrote."""
    return (Path(path) / PREPROCESSING).is_file()


def from_export(path: str) -> Classifier:
    """The ONNX file of an exported folder, run by onnxruntime on the CPU.

    Raises:
        InputError: A file is missing or not what recipes.export writes.
    """
    from recipes.export.session import open_onnx, run_onnx

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
    if not (folder / FILES["onnx"]).is_file():
        raise InputError(f"{path}: holds no {FILES['onnx']}; export with --formats onnx, or name the run's YAML")
    try:
        session = open_onnx(folder / FILES["onnx"])
    except Exception as error:  # onnxruntime's own kinds
        raise InputError(f"{path}/{FILES['onnx']}: {str(error).splitlines()[0][:200]}") from None

    def probabilities(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        floats = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        return normalised(run_onnx(session, np.ascontiguousarray((floats - mean) / std)), independent)

    return Classifier(probabilities, classes, names, size, crop_ratio)


def from_run(
    config: RunConfig, checkpoint: str | None, weights: Weights | None, size: int | None, crop_ratio: float | None
) -> Classifier:
    """A run's checkpoint, on the config's device.

    Args:
        config: Says where the run is, and the device.
        checkpoint: As in `load_network`.
        weights: As in `load_network`.
        size: Of the images in pixels; None: the last of eval.sizes.
        crop_ratio: None: the config's.

    Raises:
        InputError: There is no such checkpoint, or it takes no images of this size.
    """
    import torch
    from composer.core import Precision, get_precision_context

    from data.normalise import Normalise
    from recipes.evaluate.count import require_sizes
    from recipes.trained import labels, load_network, say_skipped, to_device, usable

    config = usable(config)
    trained = load_network(config, checkpoint, weights)
    say_skipped(trained)
    run, size = trained.config, size or config.eval.sizes[-1]
    network, device = to_device(trained.network, config.device)
    require_sizes(network, run.model.name, [size], device)
    normalise, independent = Normalise(run.data.mean, run.data.std), run.loss.name == "binary_cross_entropy"

    @torch.no_grad()
    def probabilities(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        batch, _ = normalise((torch.from_numpy(images).permute(0, 3, 1, 2).to(device), None))
        with get_precision_context(Precision(config.precision)):
            logits = network(batch)
        return normalised(logits.float().cpu().numpy(), independent)

    classes = labels(trained, config.data.path)
    return Classifier(probabilities, classes, class_names(classes), size, crop_ratio or config.eval.crop_ratio)


def normalised(logits: NDArray[np.floating[Any]], independent: bool) -> NDArray[np.float64]:
    """Probabilities in [0, 1] of logits (N, num_classes), in float64.

    Args:
        logits: Of a network.
        independent: It was trained with binary cross-entropy, whose classes have each a probability of its own
            (sigmoid); else they sum to one (softmax).
    """
    wide: NDArray[np.float64] = logits.astype(np.float64)
    if independent:
        return 0.5 * (1 + np.tanh(wide / 2))
    powers: NDArray[np.float64] = np.exp(wide - wide.max(1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return shares
