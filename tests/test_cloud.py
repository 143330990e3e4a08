"""The launch files for SkyPilot and Slurm: their commands run, with executables on PATH that note their arguments."""

import os
import re
import signal
import subprocess

import pytest
import yaml
from composer.cli.launcher import _get_parser

from recipes.checkpoints.interrupt import EXIT_INTERRUPTED, EXIT_NOT_UPLOADED, GRACE
from recipes.load import load_config
from tests.support import ROOT, wait_for

TASK = yaml.safe_load((ROOT / "cloud" / "skypilot.yaml").read_text())
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
    """Instead of a checkout: `.venv/bin/composer` writes its arguments, one a line, into composer.NODE."""
    executable(tmp_path / ".venv" / "bin" / "composer", RECORD.format(folder=tmp_path))
    return tmp_path


def launched(path):
    """What the launcher was called with, as it reads it: its own flags, and the arguments of entrypoint.py."""
    given = vars(_get_parser().parse_args(path.read_text().splitlines()))
    assert given["training_script"] == "entrypoint.py"
    names = ("nproc", "world_size", "node_rank", "base_rank", "master_addr", "master_port")
    return tuple(given[name] for name in names), given["training_script_args"]


def test_skypilot_restarts_after_the_statuses_that_ask_for_it():
    codes = TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert sorted(codes) == sorted([EXIT_INTERRUPTED, EXIT_NOT_UPLOADED])


@pytest.mark.parametrize(("profile", "gpus"), [("g5", 4), ("p3", 8)])
@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_skypilots_command_starts_the_run(cluster, profile, gpus, nodes, rank):
    envs = {key: str(value) for key, value in TASK["envs"].items()}
    envs |= {"PROFILE": profile, "BUCKET": "my-bucket", "DATA": "s3://my-bucket/imagenet"}
    sky = {
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "\n".join(["10.0.0.7", "10.0.0.8"][:nodes]),
    }
    subprocess.run(["bash", "-c", TASK["run"]], cwd=cluster, env=os.environ | envs | sky, check=True)
    flags, arguments = launched(cluster / "composer.0")
    assert flags == (gpus, nodes * gpus, rank, rank * gpus, "10.0.0.7", 29500)
    assert arguments[0] == f"yamls/{profile}.yaml"
    config = load_config(ROOT / arguments[0], arguments[1:])
    assert config.autoresume
    assert config.checkpoints.folder == "s3://my-bucket/runs/{run_name}"
    assert (config.run_name, config.data.path) == ("g5-spot", "s3://my-bucket/imagenet")


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
    """Start the script as Slurm would on the first of two nodes of eight GPUs, where srun's tasks end with `status`."""

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
        assert flags == (8, 16, node, 8 * node, "gpu-01", 23456)
        assert arguments == given
        assert load_config(ROOT / arguments[0], arguments[1:]).data.path == "/data/image net"
    assert "--cpus-per-task=64" in (cluster / "srun").read_text().splitlines()
    assert not requeued(cluster)


@pytest.mark.parametrize("status", [0, 1, 2, 74, 75, 137])
def test_only_an_interrupted_run_is_requeued(sbatch, cluster, status):
    assert sbatch("yamls/p3.yaml", status=status).wait(timeout=30) == status
    assert requeued(cluster) == (status == 75)


@pytest.mark.parametrize(("number", "back"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_run_and_only_slurms_warning_requeues(sbatch, cluster, number, back):
    job = sbatch("yamls/p3.yaml", wait="yes")
    wait_for((cluster / "srun.started").exists)
    job.send_signal(number)
    assert job.wait(timeout=30) == 75
    assert (cluster / "srun.signal").read_text() == "TERM\n"
    assert requeued(cluster) == back


def test_slurm_without_a_yaml_is_status_2(sbatch, capfd):
    assert sbatch().wait(timeout=30) == 2
    assert "usage: sbatch cloud/slurm.sh YAML" in capfd.readouterr().err


def test_slurm_warns_in_time_to_save():
    before = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SLURM.read_text(), re.MULTILINE)[1])
    assert before > GRACE + 30  # what Composer's launcher waits for its processes
