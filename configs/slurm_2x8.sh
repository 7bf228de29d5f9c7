#!/bin/bash
# Two machines with eight GPUs each on Slurm: sbatch configs/slurm_2x8.sh --recipe recipes/X.yaml
# Slurm signals this shell two minutes before the time is up. The shell then stops the run, which saves a checkpoint, and puts
# the job into the queue again. A run that fails by itself is not queued again.
#SBATCH --job-name=minivlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=no
srun bash -c 'exec accelerate launch --config_file configs/ddp_2x8.yaml \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$0" train_accelerate.py "$@"' "$head" "$@" &
run=$!
# SIGTERM: the launcher passes this signal on to the training processes.
trap 'again=yes; kill -TERM "$run"' USR1
wait "$run"
status=$?
if [ "$again" = yes ]; then
  wait "$run" # the signal ended the first `wait`
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
