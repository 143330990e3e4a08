"""Two nodes that share a bucket only: one dies, then the other with its disk, and the run ends as if untouched."""

import json
import os
import re
import shutil
import signal
import time

import pytest

from tests.s3 import ADMIN, free_ports, running
from tests.support import LAUNCHER, ROOT, Process

RECIPE = """
run_name: calm
device: cpu
max_duration: 16ep
global_batch_size: 8
model: {name: timm/test_resnet}
optimizer: {lr: 0.05}
data: {path: IMAGES, train_size: 32, workers: 0}
eval: {sizes: [32], interval: 8}
checkpoints: {folder: 's3://bucket/{run_name}', interval: 2ba}
loggers: {progress_bar: false, tensorboard: false, interval: 1}
algorithms: {label_smoothing: {}, mixup: {}, cutmix: {}, ema: {half_life: 3ba}}
"""
LIMIT = 600.0


class Cluster:
    """Two nodes of two processes on this machine, each with a disk of its own, started as docs/multi-gpu.md says."""

    def __init__(self, place, recipe, server):
        self.place, self.recipe, self.server = place, recipe, server
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "S3_ENDPOINT_URL")
        values = (*ADMIN, "us-east-1", server.endpoint)
        kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.environment = kept | dict(zip(names, values, strict=True)) | {"OMP_NUM_THREADS": "1"}
        self.nodes = []

    def disk(self, node):
        return self.place / f"node{node}"

    def output_file(self, node):
        return (self.place / f"node{node}.txt").open("w")

    def output(self, node):
        return (self.place / f"node{node}.txt").read_text()

    def program(self, name, node):
        return [ROOT / "entrypoint.py", self.recipe, f"run_name={name}", f"runs_folder={self.disk(node)}"]

    def launch(self, name):
        """The two commands of docs/multi-gpu.md."""
        (port,) = free_ports(1)
        self.nodes = []
        for node in (0, 1):
            flags = ["-n", "2", "--world_size", "4", "--node_rank", node, "--base_rank", 2 * node]
            flags += ["--master_addr", "127.0.0.1", "--master_port", port]
            with self.output_file(node) as output:
                self.nodes.append(
                    [Process([*LAUNCHER, *flags, *self.program(name, node)], self.environment, output, output)]
                )

    def start(self, name):
        """The same processes as from these commands, without their launchers, which import everything anew."""
        (port,) = free_ports(1)
        together = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.nodes = []
        for node in (0, 1):
            with self.output_file(node) as output:
                own = [
                    {"RANK": str(2 * node + local), "LOCAL_RANK": str(local), "NODE_RANK": str(node)}
                    for local in (0, 1)
                ]
                words = self.program(name, node)
                self.nodes.append([Process(words, self.environment | together | one, output, output) for one in own])

    def wait_until(self, condition):
        """Poll, as long as both nodes live."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert all(one.poll() is None for node in self.nodes for one in node), (self.output(0), self.output(1))
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self, node):
        """All processes of a node at once, as when its power goes; the statuses of the other's, which nobody stops."""
        for one in self.nodes[node]:
            os.killpg(one.pid, signal.SIGKILL)
        assert {one.wait(LIMIT) for one in self.nodes[node]} == {-signal.SIGKILL}
        return {one.wait(LIMIT) for one in self.nodes[1 - node]}

    def finish(self):
        assert {one.wait(LIMIT) for node in self.nodes for one in node} == {0}, (self.output(0), self.output(1))

    def summary(self, name):
        return json.loads((self.disk(0) / name / "summary.json").read_text())

    def close(self):
        for one in (one for node in self.nodes for one in node):
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path, images):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("IMAGES", str(images)))
    with running(tmp_path / "s3") as server:
        server.client().create_bucket(Bucket="bucket")
        cluster = Cluster(tmp_path, recipe, server)
        yield cluster
        cluster.close()


def test_a_node_dies_then_the_other_with_its_disk_and_the_weights_are_those_of_a_calm_run(cluster):
    cluster.start("calm")
    cluster.finish()
    # Only the first process writes; so what the second node resumes from must come to it.
    assert not cluster.disk(1).exists()

    def newest_in_bucket():
        listed = cluster.server.client().list_objects_v2(Bucket="bucket", Prefix="hit/ep").get("Contents", ())
        return max((item["Key"] for item in listed if item["Key"].endswith(".json")), default="")

    def went_on_from():
        """Of the second start's; past every name until it is said."""
        found = re.search(r"hit resumes from .*?(ep\d+-ba\d+)", cluster.output(0))
        return f"hit/{found[1]}.json" if found else "hit/eq"

    cluster.launch("hit")
    cluster.wait_until(lambda: any((cluster.disk(0) / "hit" / "checkpoints").glob("ep*.json")))
    # The other ends by itself, and its status does not say that anything is finished (0), wrong (2) or saved (75).
    assert cluster.kill(1).isdisjoint({0, 2, 74, 75})
    assert "the run ends here" in cluster.output(0)
    cluster.start("hit")
    # The bucket knows of this resume once it has a checkpoint made after it.
    cluster.wait_until(lambda: newest_in_bucket() > went_on_from())
    assert cluster.kill(0).isdisjoint({0, 2, 74, 75})
    shutil.rmtree(cluster.disk(0) / "hit")  # a new machine takes its place
    cluster.start("hit")
    cluster.finish()

    calm, hit = cluster.summary("calm"), cluster.summary("hit")
    assert hit["weights_sha256"] == calm["weights_sha256"]
    assert (hit["batches"], hit["samples"], hit["eval_by_size"]) == (48, 384, calm["eval_by_size"])
    assert len(hit["resumed_from"]) == 2
    assert hit["resumed_from"][1].startswith("s3://bucket/hit/")
