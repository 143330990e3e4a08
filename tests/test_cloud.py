"""The launch files: what SkyPilot and Slurm are told and would start, with stand-ins for what only clusters have.

Neither service can be had in a test. So the file for SkyPilot is compared with the fields that its schema knows, and
the commands of both run for real, with executables on PATH that write down what they were called with.
"""

import importlib.util
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from recipes.checkpoints.interrupt import EXIT_INTERRUPTED, EXIT_NOT_UPLOADED
from recipes.load import load_config
from tests.support import ROOT

SKYPILOT = ROOT / "cloud" / "skypilot.yaml"
SLURM = ROOT / "cloud" / "slurm.sh"
RECORD = """#!/bin/bash
printf '%s\\n' "$@" > "{folder}/$(basename "$0").${{SLURM_NODEID:-0}}"
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A checkout's stand-in: `.venv/bin/composer` writes down its arguments, one a line, into composer.NODE."""
    executable(tmp_path / ".venv" / "bin" / "composer", RECORD.format(folder=tmp_path))
    return tmp_path


def launched(path):
    """What the launcher was called with: its own flags, and the arguments of entrypoint.py."""
    words = path.read_text().splitlines()
    at = words.index("entrypoint.py")
    return dict(zip(words[0:at:2], words[1:at:2], strict=True)), words[at + 1 :]


def loads(arguments):
    """The run that arguments of entrypoint.py describe."""
    return load_config(ROOT / arguments[0], arguments[1:])


def task():
    return yaml.safe_load(SKYPILOT.read_text())


def test_skypilot_goes_on_after_the_statuses_that_ask_for_it():
    codes = task()["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert sorted(codes) == sorted([EXIT_INTERRUPTED, EXIT_NOT_UPLOADED])


@pytest.mark.parametrize(("profile", "gpus"), [("g5", 4), ("p3", 8)])
@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_skypilots_command_starts_the_run(cluster, profile, gpus, nodes, rank):
    given = task()
    envs = {key: str(value) for key, value in given["envs"].items()}
    envs |= {"PROFILE": profile, "BUCKET": "my-bucket", "DATA": "s3://my-bucket/imagenet"}
    sky = {
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "\n".join(["10.0.0.7", "10.0.0.8"][:nodes]),
    }
    subprocess.run(["bash", "-c", given["run"]], cwd=cluster, env=os.environ | envs | sky, check=True)
    flags, arguments = launched(cluster / "composer.0")
    assert flags == {
        "-n": str(gpus),
        "--world_size": str(nodes * gpus),
        "--node_rank": str(rank),
        "--base_rank": str(rank * gpus),
        "--master_addr": "10.0.0.7",
        "--master_port": "29500",
    }
    config = loads(arguments)
    assert arguments[0] == f"yamls/{profile}.yaml"
    assert config.autoresume
    assert config.checkpoints.folder == "s3://my-bucket/runs/{run_name}"
    assert (config.run_name, config.data.path) == ("g5-spot", "s3://my-bucket/imagenet")


def test_the_launcher_knows_the_flags():
    (folder,) = importlib.util.find_spec("composer").submodule_search_locations
    source = (Path(folder) / "cli" / "launcher.py").read_text()
    used = set(re.findall(r"(--\w*_\w+) ", SLURM.read_text() + SKYPILOT.read_text()))
    assert used == {"--world_size", "--node_rank", "--base_rank", "--master_addr", "--master_port"}
    assert all(f"'{flag}'" in source for flag in used)


SRUN = """#!/bin/bash
# Two nodes, one after the other; the status is the highest of the tasks', as srun's.
printf '%s\\n' "$@" > "{folder}/srun"
while [[ $1 == --* ]]; do shift; done
trap 'echo TERM > "{folder}/srun.signal"; exit 75' TERM
for node in 0 1; do SLURM_NODEID=$node "$@"; done
touch "{folder}/srun.started"
[ -z "{wait}" ] || for _ in {{1..200}}; do sleep 0.05; done
exit {status}
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "{folder}/scontrol"
[ "$1 $2" != "show hostnames" ] || printf 'gpu-%s\\n' 01 02
"""


@pytest.fixture
def sbatch(cluster):
    """Start the script as Slurm would on the first of two nodes of eight GPUs; srun's tasks end with `status`."""

    def sbatch(*arguments, status=0, wait=""):
        binaries = cluster / "bin"
        executable(binaries / "srun", SRUN.format(folder=cluster, status=status, wait=wait))
        executable(binaries / "scontrol", SCONTROL.format(folder=cluster))
        slurm = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "gpu-[01-02]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
        }
        return subprocess.Popen(["bash", str(SLURM), *arguments], cwd=cluster, env=os.environ | slurm)

    return sbatch


def requeued(cluster):
    return "requeue 123456" in (cluster / "scontrol").read_text().splitlines()


def test_slurm_starts_a_launcher_on_each_node(sbatch, cluster):
    given = ["yamls/p3.yaml", "data.path=/data/image net", "device_batch_size={128: 256, 288: 128}"]
    assert sbatch(*given).wait(timeout=30) == 0
    for node in (0, 1):
        flags, arguments = launched(cluster / f"composer.{node}")
        assert flags == {
            "-n": "8",
            "--world_size": "16",
            "--node_rank": str(node),
            "--base_rank": str(8 * node),
            "--master_addr": "gpu-01",
            "--master_port": "23456",
        }
        assert arguments == given
        assert loads(arguments).data.path == "/data/image net"
    assert "--cpus-per-task=64" in (cluster / "srun").read_text().splitlines()
    assert not requeued(cluster)


@pytest.mark.parametrize("status", [0, 1, 2, 74, 75, 137])
def test_only_an_interrupted_run_goes_back_into_the_queue(sbatch, cluster, status):
    assert sbatch("yamls/p3.yaml", status=status).wait(timeout=30) == status
    assert requeued(cluster) == (status == 75)


@pytest.mark.parametrize(("number", "back"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_run_and_only_slurms_warning_requeues(sbatch, cluster, number, back):
    job = sbatch("yamls/p3.yaml", wait="yes")
    limit = time.monotonic() + 20
    while not (cluster / "srun.started").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(timeout=30) == 75
    assert (cluster / "srun.signal").read_text() == "TERM\n"
    assert requeued(cluster) == back


def test_slurm_without_a_yaml_is_status_2(sbatch, capfd):
    assert sbatch().wait(timeout=30) == 2
    assert "usage: sbatch cloud/slurm.sh YAML" in capfd.readouterr().err


def test_slurm_warns_in_time_to_save():
    before = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SLURM.read_text(), re.MULTILINE)[1])
    source = (ROOT / "recipes" / "checkpoints" / "interrupt.py").read_text()
    grace = float(re.search(r"^GRACE = ([\d.]+)$", source, re.MULTILINE)[1])
    assert before > grace + 30  # what Composer's launcher waits for its processes
