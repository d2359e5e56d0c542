#!/usr/bin/env bash
# One task on each node: torchrun, which starts the ranks of this node. Called by train.sh with STAGE RECIPE ...
set -euo pipefail

procs=${PENSTOCK_PROCS:-${SLURM_GPUS_ON_NODE:-1}}
threads=$((SLURM_CPUS_PER_TASK / procs))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export PYTHONFAULTHANDLER=1
PENSTOCK_BEGAN=$(date +%s)
export PENSTOCK_BEGAN

# Slurm signals every process of the step. This one waits for torchrun, which passes SIGTERM on and lets ranks save; if
# it died instead, srun would give the others no more than Slurm's KillWait.
trap : TERM

read -ra options <<<"${PENSTOCK_TORCHRUN:-}"

# A static rendezvous: rank 0 is on the job's first node after every restart.
code=0
# shellcheck disable=SC2016 # each rank expands it, not this shell
"$PENSTOCK_PYTHON" -m penstock.torchrun \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$procs" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 --shutdown-timeout 600 \
    "${options[@]}" \
    --no-python bash -c 'exec "$PENSTOCK_PYTHON" -u -m "$@" >>"$ATTEMPT_LOGS/rank-$RANK.log" 2>&1' rank "$@" || code=$?

# Stopped on request is no reason for srun to kill the nodes that are still saving.
[[ $code -eq 75 ]] && code=0
exit "$code"
