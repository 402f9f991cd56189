#!/bin/bash
# Two nodes of eight GPUs under SLURM; the arguments are those of `lit-rlhf fit`:
#
#   sbatch experiments/strategies/slurm.sh -c experiments/own_pairs/ppo.yaml \
#     -c experiments/strategies/fsdp2.yaml -c experiments/strategies/multi_node.yaml --data.train pairs.jsonl
#
# SLURM starts one process per GPU; Lightning reads ranks and addresses from its variables. Two minutes before the time
# is up every process gets SIGTERM: the run stops with status 143 and prints the command that resumes it.
#SBATCH --job-name=lit-rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -eu
srun --kill-on-bad-exit=1 lit-rlhf fit "$@"
