#!/bin/sh
# One task per GPU: JAX takes one GPU for each, and finds the others by Slurm.
#
#   make setup DEVICE=cuda
#   sbatch examples/slurm.sh --config=imagenet_resnet50 --workdir=/shared/run1
#
#SBATCH --job-name=conadv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

set -u
srun --kill-on-bad-exit=0 .venv/bin/python -m conadv_jax.train "$@"
code=$?
# 42: stopped and saved.
if [ "$code" -eq 42 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
