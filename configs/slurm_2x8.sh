#!/bin/bash
# Two machines with eight GPUs each on Slurm: sbatch configs/slurm_2x8.sh --recipe recipes/X.yaml
# Slurm asks the run to stop two minutes before its time is up; it saves, and is queued again to go on from there.
#SBATCH --job-name=minivlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 bash -c 'exec accelerate launch --config_file configs/ddp_2x8.yaml \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$0" train_accelerate.py "$@"' "$head" "$@"
status=$?
if [ "$status" -ne 0 ] && ls runs/*/checkpoint-*/COMPLETE >/dev/null 2>&1; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
