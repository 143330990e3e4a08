"""Running an exported ONNX file, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime


def open_onnx(path: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU, with as many threads as OMP_NUM_THREADS says."""
    import os

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """Logits (N, num_classes) of float32 images (N, 3, H, W)."""
    return session.run(None, {session.get_inputs()[0].name: images})[0]
