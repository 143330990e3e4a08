"""Watching a run: figures, files, curves, pictures, the progress bar and the log.

`build_watchers` in build.py makes all of it. `figures.py` computes the figures and hands them to Composer's Logger; the
destinations (metrics.jsonl, TensorBoard, progress bar, text log, W&B, MLflow) write them where people look.
"""

from __future__ import annotations
