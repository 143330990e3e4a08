"""Two processes: only the first writes, the figures are those of both, and what one finds both know."""

import json
import multiprocessing
import os
import traceback

import numpy as np
import torch

from tests.recipes.watch.tiny import train_tiny
from tests.support import free_port


def one_process(root, rank, port):
    """Runs in a process of its own: the first finds two bad images, the second one more."""
    torch.set_num_threads(1)
    names = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def prepare(result):
        result.train.broken.update({0: "broken", 1: "broken"} if rank == 0 else {2: "broken"})

    bounded = train_tiny(root, folder="enough", prepare=prepare, max_bad_fraction=0.15, interval=1)
    too_many = train_tiny(root, folder="too_many", prepare=prepare, max_bad_fraction=0.1)
    report = {
        "error": repr(bounded.error) if bounded.error else None,
        "console": bounded.stream.getvalue(),
        "bad": bounded.watchers.summary.bad_images.found,
        "seconds": bounded.watchers.summary.figures.clock.wall,
        "too_many": [type(too_many.error).__name__, str(too_many.error)],
    }
    (root / f"rank{rank}.json").write_text(json.dumps(report))


def one_process_or_its_traceback(root, rank, port):
    try:
        one_process(root, rank, port)
    except BaseException:
        (root / f"rank{rank}.txt").write_text(traceback.format_exc())


def test_two_processes_are_one_run(tmp_path):
    port, folder = free_port(), tmp_path / "enough"
    # Forked, so that they need not import Composer again, which takes longer than all else here.
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_process_or_its_traceback, args=(tmp_path, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert not list(tmp_path.glob("rank*.txt")), [path.read_text() for path in tmp_path.glob("rank*.txt")]
    first, second = reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    # Only the first writes.
    assert first["error"] is second["error"] is None
    assert (second["console"], first["console"].count("done, batch")) == ("", 4)
    assert len(list((folder / "tensorboard").iterdir())) == 1
    training = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [entry for entry in training if "train/loss" in entry]
    assert [entry["batch"] for entry in training] == list(range(1, 13))

    # Figures and answers are of both; each process of this tiny run trains on all 20 images.
    assert [entry["train/batch_size"] for entry in training] == [16, 16, 8] * 4
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["samples"], summary["versions"]["device"][:4]) == (160, "2 x ")
    assert first["seconds"] > 0 < second["seconds"]
    with np.load(folder / "predictions.npz") as file:
        assert file["label"].tolist() == [index % 10 for index in range(20)]
        assert (file["predicted"] >= 0).all()

    # What one finds, both know.
    union = {"train": {f"n01/0{index}.jpeg": "broken" for index in range(3)}, "val": {}}
    assert [report["bad"] for report in reports] == [union, union]
    assert sum("bad image" in line for line in (folder / "log.txt").read_text().splitlines()) == 3
    for kind, text in (report["too_many"] for report in reports):
        assert kind == "InputError"
        assert text.startswith("data.max_bad_fraction: 3 of 20 images of train")
