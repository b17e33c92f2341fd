#!/usr/bin/env bash
# One training run on N nodes:
#   sbatch --nodes 2 recipes/slurm/train.sh llada_moe_8gpu_memdlm [--any_option value]
# ACCELERATE_CONFIG chooses the launcher's configuration (default: ddp.yaml of memdlm's recipes). Every node needs the
# environment, the data and output_dir under the same path. A job that is requeued goes on from its newest checkpoint.
#SBATCH --job-name=memdlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "usage: sbatch [--nodes N] recipes/slurm/train.sh RECIPE [--option value ...]" >&2
  exit 2
fi

config=${ACCELERATE_CONFIG:-$(python -m memdlm recipes --folder)/accelerate/ddp.yaml}
gpus=${SLURM_GPUS_ON_NODE:-8}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# $SLURM_NODEID is each node's own, so it is expanded there; the arguments after -- arrive as they were given.
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$1" --num_machines "$2" --num_processes "$3" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$4" --main_process_port "$5" \
    -m memdlm train "${@:6}"
' -- "$config" "$SLURM_NNODES" "$((SLURM_NNODES * gpus))" "$address" "$port" "$@" --resume latest
