"""A run's folder as a run of two stages would leave it, without training."""

import json

import numpy as np
from PIL import Image

from data.imagefolder import ImageFolder
from recipes.load import load_config
from recipes.resolved import resolved
from tests.support import ROOT

STEPS = 10
"""Batches of an epoch."""


def figures(batch, seconds, size):
    """A line of training figures; a step takes `seconds`, a tenth of it waiting for the loader."""
    step = {"loss": 2 / batch, "lr": 0.1, "momentum": 0.9, "image_size": size, "batch_size": 32}
    step |= {"images_per_second": 32 / seconds, "loader_wait_fraction": 0.1}
    time = {"train": 0.9 * seconds * batch, "loader_wait": 0.1 * seconds * batch, "evaluation": 0, "checkpointing": 0}
    return {
        **{"batch": batch, "epoch": batch / STEPS, "samples": 32 * batch, "wall_seconds": seconds * batch},
        **{f"train/{name}": value for name, value in step.items()},
        **{f"time/{name}_seconds": float(value) for name, value in time.items()},
    }


def write_run(folder, photos, epochs=4, seconds=0.5):
    """Write a folder; half of the epochs are at 24 px, the rest at 32. Returns it."""
    (folder / "images").mkdir(parents=True)
    config = load_config(ROOT / "yamls" / "demo.yaml", [f"run_name={folder.name}", f"data.path={photos}"])
    (folder / "config.yaml").write_text(resolved(config))
    lines = []
    for batch in range(1, epochs * STEPS + 1):
        lines.append(figures(batch, seconds, 24 if batch <= epochs * STEPS // 2 else 32))
        if batch % STEPS == 0:
            kept = {name: lines[-1][name] for name in ("batch", "epoch", "samples", "wall_seconds")}
            accuracy = {"top1": 0.2 * batch / STEPS, "top5": 1.0, "loss": 0.5}
            lines.append(kept | {f"eval/{size}/{name}": accuracy[name] for size in (32, 36) for name in accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "run_name": folder.name,
        "finished": True,
        "epochs": epochs,
        "batches": epochs * STEPS,
        "samples": 32 * epochs * STEPS,
        "wall_seconds": 3725.0,
        "images_per_second": 64.0,
        "top1": 7 / 9,
        "top5": 1.0,
        "eval_by_size": {"32": {"top1": 0.5, "top5": 1.0, "loss": 1.25}, "36": {"top1": 7 / 9, "top5": 1.0, "loss": 1}},
        "resumed_from": ["s3://bucket/one/ep001-ba000015.safetensors"],
        "versions": {"python": "3.11.7", "commit": "0123456789" * 4 + "-dirty", "device": "1 x CPU x86_64"},
        "seconds": {"train": 3000.0, "loader_wait": 500.0, "evaluation": 200.0, "checkpointing": 25.0},
        "bad_images": 0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    for epoch, size in ((0, 24), (epochs // 2, 32)):
        Image.new("RGB", (8 * size, 4 * size), "teal").save(folder / "images" / f"ep{epoch:03d}-{size}px.png")
    source = ImageFolder(photos / "val", None)
    write_predictions(folder, source.labels, (source.labels + (np.arange(9) >= 7)) % 3, source.classes)
    return folder


def write_predictions(folder, label, predicted, classes, names=None):
    """predictions.npz, with a probability of 0.6 for what was predicted."""
    label = np.asarray(label, np.int32)
    half = np.full(len(label), 0.6, np.float32)
    np.savez(
        folder / "predictions.npz",
        label=label,
        predicted=np.asarray(predicted, np.int32),
        probability=half,
        label_probability=half / 2,
        classes=np.array(classes, np.str_),
        names=np.array(names or classes, np.str_),
        size=np.int64(36),
        batch=np.int64(40),
    )
