#!/usr/bin/env bash
# Pretrain, finetune, distill: three jobs, each waiting until the one before it has succeeded.
#
#   bash slurm/pipeline.sh PRETRAIN_RECIPE FINETUNE_RECIPE DISTILL_RECIPE
#
# The recipes name what they start from (backbone.weights, task.teacher), and are read when their job starts. Options of
# sbatch come from the environment (SBATCH_PARTITION, SBATCH_TIMELIMIT, ...) or are written here. `python -m launch
# pipeline` does more: it checks all of it first, freezes it, and goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pretrain=$(sbatch --parsable --nodes 1 slurm/pretrain.sbatch "$1")
echo "pretrain: job $pretrain"
finetune=$(sbatch --parsable --nodes 1 --dependency "afterok:$pretrain" --kill-on-invalid-dep yes slurm/finetune.sbatch "$2")
echo "finetune: job $finetune"
distill=$(sbatch --parsable --nodes 1 --dependency "afterok:$finetune" --kill-on-invalid-dep yes slurm/finetune.sbatch "$3")
echo "distill: job $distill"
