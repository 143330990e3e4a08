#!/bin/bash
# Train on one or several nodes of a Slurm cluster: one task per node, Composer's launcher, which starts one process per
# GPU. From the checkout's root, on a file system that all nodes share:
#
#   sbatch cloud/slurm.sh yamls/p3.yaml data.path=/data/imagenet run_name=two-nodes
#   sbatch --nodes=1 --gpus-per-node=4 --cpus-per-task=48 cloud/slurm.sh yamls/g5.yaml ...
#
# A run that Slurm stops saves its state and is requeued (status 75); after `scancel` it saves and is not requeued.
#SBATCH --job-name=resnet50
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
# Signal this script only, 90 s before the time limit: saving takes at most 22 s (recipes/checkpoints/interrupt.py), and
# the launcher waits 30 s for its processes.
#SBATCH --signal=B:USR1@90
set -u

if [ $# -eq 0 ]; then
    echo "usage: sbatch cloud/slurm.sh YAML [key=value ...]" >&2
    exit 2
fi
processes=${SLURM_GPUS_ON_NODE:-1}
export PROCESSES=$processes
export WORLD=$((SLURM_JOB_NUM_NODES * processes))
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER
# Two jobs may share a node, so each uses its own port, below the range of ephemeral ports.
export PORT=$((20000 + SLURM_JOB_ID % 10000))

# --wait: if a node fails, the others would wait for it forever; after an interruption they end by themselves.
# --cpus-per-task: since Slurm 22.05, srun no longer inherits it from sbatch.
# shellcheck disable=SC2016  # each node's shell fills in its own number
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=60 \
    bash -c 'exec .venv/bin/composer -n "$PROCESSES" --world_size "$WORLD" --node_rank "$SLURM_NODEID" \
        --base_rank $((SLURM_NODEID * PROCESSES)) --master_addr "$MASTER" --master_port "$PORT" entrypoint.py "$@"' \
    composer "$@" &
step=$!

# srun forwards a signal to the tasks on all nodes.
signalled='' cancelled=''
trap 'signalled=yes; kill -TERM "$step" 2>/dev/null' USR1
trap 'signalled=yes; cancelled=yes; kill -TERM "$step" 2>/dev/null' TERM
while :; do
    signalled=''
    wait "$step"
    status=$?
    [ -n "$signalled" ] || break  # otherwise our signal ended the wait
done

if [ "$status" -eq 75 ] && [ -z "$cancelled" ]; then
    echo "interrupted, the state is saved: requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
