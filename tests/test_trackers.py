"""W&B offline and MLflow on a local file store, for real: an interrupted run and its resumption."""

import json
import re
import signal
from pathlib import Path

from recipes.watch.trackers import _EXTERNAL
from tests.support import ROOT, end, start, wait_for
from tests.support import summary_of as summary

RECIPE = """
run_name: tracked
device: cpu
max_duration: 2ep
global_batch_size: 4
model: {name: timm/test_resnet}
data: {path: IMAGES, train_size: 32, workers: 0}
eval: {sizes: [24, 32], device_batch_size: 4}
checkpoints: {interval: 1ep}
loggers:
  progress_bar: false
  tensorboard: false
  interval: 1
  wandb: {project: try, init_kwargs: {mode: offline}}
  mlflow: {experiment_name: try, tracking_uri: STORE}
algorithms:
  mixup: {}
"""


# In place of the process that was forked: wandb removes its temporary folder when the process that imported it ends.
ANEW = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def test_both_trackers_hold_the_run_its_pictures_and_its_table(tmp_path, images):
    recipe, store = tmp_path / "recipe.yaml", tmp_path / "mlruns"
    recipe.write_text(RECIPE.replace("IMAGES", str(images)).replace("STORE", str(store)))
    command = ["-c", ANEW, "entrypoint.py", str(recipe), f"runs_folder={tmp_path}"]
    folder = tmp_path / "tracked"
    process = start(command, WANDB_SILENT="true")
    wait_for(lambda: "ep001" in "".join(path.name for path in folder.glob("checkpoints/*.json")), process)
    process.send_signal(signal.SIGTERM)
    status, output = end(process)
    assert status == 75, output
    status, output = end(start([*command, "data.prefetch_factor=3"], WANDB_SILENT="true"))
    assert (status, "WARNING" in output) == (0, False), output
    top1 = summary(tmp_path, "tracked")["eval_by_size"]["32"]["top1"]
    in_mlflow(store, top1)
    in_wandb(folder / "wandb", top1)


def in_mlflow(store, top1):
    from mlflow import MlflowClient

    client = MlflowClient(str(store))
    experiment = client.get_experiment_by_name("try")
    (run,) = client.search_runs([experiment.experiment_id])  # a resumed run continues its own
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert run.data.params["data.train_size"] == "32"
    assert run.data.metrics["eval/32/top1"] == top1
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(set(steps)) == list(range(1, 13))
    assert [one.path for one in client.list_artifacts(run.info.run_id, "images") if "train#images" in one.path]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "evaluation.json")).read_text())
    assert table["columns"] == ["size", "top1", "top5", "loss"]
    assert [row[:2] for row in table["data"]][1] == [32, top1]


def in_wandb(folder, top1):
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    runs = sorted(folder.glob("offline-run-*-tracked"))  # `wandb sync` joins the two, which have one id
    assert len(runs) == 2
    config, losses, last = {}, [], {}
    for run in runs:
        (file,) = run.glob("*.wandb")
        store = DataStore()
        store.open_for_scan(str(file))
        while data := store.scan_data():
            record = Record()
            record.ParseFromString(data)
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            items = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
            losses += [record.history.step.num] * ("train/loss" in items)
            last |= items
    assert config["data.train_size"] == 32
    assert sorted(set(losses)) == list(range(1, 13))
    assert last["eval/32/top1"] == top1
    assert list(runs[0].glob("files/media/images/train/images_0_*.png"))
    (table,) = runs[1].glob("files/media/table/evaluation_*.table.json")
    assert json.loads(table.read_text())["data"][1][:2] == [32, top1]


def test_the_tested_versions_are_those_that_a_run_accepts():
    tested = re.findall(r'"(wandb|mlflow)(?:-skinny)?([<>=].*)"', (ROOT / "pyproject.toml").read_text())
    assert dict(tested) == {package: versions for package, (_, versions) in _EXTERNAL.items()}
