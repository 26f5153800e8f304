#!/bin/bash
#SBATCH --job-name=rightrank
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --mem-per-gpu=64G
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# One worker for each task, each a step of this job; the driver runs on the first node. Before the time limit the driver
# receives SIGTERM: workers write checkpoints, the job is requeued, and the same command resumes.
#
#   sbatch examples/slurm.sh /shared/model /shared/data.jsonl --out /shared/run

rightrank select "$@" --executor processes --workers "$SLURM_NTASKS" \
  --set launcher="srun --ntasks=1 --exact --gpus=1 --mem-per-gpu=64G" &
driver=$!
trap 'kill -TERM "$driver"' TERM
wait "$driver"
status=$?
if [ "$status" -gt 128 ]; then # the wait was cut short by the signal: the driver is ending
  wait "$driver"
  status=$?
fi
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
