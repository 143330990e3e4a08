"""Export a trained network for use outside this project: the exported files, and how to run the ONNX program."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

FILES = {"safetensors": "model.safetensors", "pth": "model.pth", "torch_export": "model.pt2", "onnx": "model.onnx"}
"""File name of each format."""
PREPROCESSING, CLASSES, CONFIG, CARD = "preprocessing.json", "classes.json", "config.json", "README.md"
OURS = (*FILES.values(), PREPROCESSING, CLASSES, CONFIG, CARD)


class _Result(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    size: int
    crop_ratio: float
    images: int
    top1: float
    top5: float
    loss: float


class SavedEvaluation(BaseModel):
    """The used keys of a file that `recipes.evaluate --save` wrote."""

    model_config = ConfigDict(strict=True)

    weights_sha256: str
    data: str
    flip: str | None
    results: list[_Result]


def open_onnx(path: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Open an ONNX file on the CPU with OMP_NUM_THREADS threads; torch is not needed. Returns a function.

    Returns:
        The function maps float32 images (N, 3, H, W) to logits (N, num_classes).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: images})[0]
        return logits

    return run
