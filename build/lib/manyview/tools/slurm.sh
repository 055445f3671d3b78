#!/usr/bin/env bash
# Train on SLURM, one task a process (a GPU); saved, requeued and gone on with when preempted or at the time limit.
# From the checkout, which all nodes must see, with sbatch's flags before and train.py's after:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 tools/slurm.sh --data shards/imagenet --out runs/big
#SBATCH --job-name=manyview
#SBATCH --output=manyview-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Where one task ends, --wait ends those that wait for it. No binding: the engine's threads share the cores of the node.
code=0
# shellcheck disable=SC2016 # the variables are each task's own
srun --wait=60 --cpu-bind=none bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec .venv/bin/python train.py --resume "$@"' train "$@" || code=$?

if ((code == 75)); then # asked to stop, and saved
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until the requeued job ends this one
fi
exit "$code"
