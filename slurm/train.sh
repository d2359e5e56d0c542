# shellcheck shell=bash
# What the jobs in this folder share; sourced by them, in the batch shell on the job's first node.
#
#   train STAGE RECIPE [key=value ...]
#
# May be set before, here or in the environment of sbatch:
#   PENSTOCK_CODE      the code to run; else the folder that the job was sent from
#   PENSTOCK_PYTHON    else .venv/bin/python of the code, else python3
#   PENSTOCK_PROCS     ranks of a node; else one per GPU that Slurm gave, or one
#   PENSTOCK_TORCHRUN  more options of torchrun, such as --numa-binding=node
#   PENSTOCK_LOGS      folder of the job's logs; else runs/logs
#   PENSTOCK_CRASHES   crashes in a row after which the job is left to fail; else 3

STOPPED=75 # the exit code of a run that was asked to stop, saved, and can go on

train() {
    attempt=${SLURM_RESTART_COUNT:-0}
    job=$SLURM_JOB_ID # of an array, this task alone: the id of its last one names the whole array
    [[ -n ${SLURM_ARRAY_JOB_ID:-} ]] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    export PENSTOCK_CODE=${PENSTOCK_CODE:-$SLURM_SUBMIT_DIR}
    logs=${PENSTOCK_LOGS:-$PWD/runs/logs}/$job
    export ATTEMPT_LOGS=$logs/$attempt
    export PENSTOCK_STOP_FILE=$ATTEMPT_LOGS/stop PENSTOCK_EXIT_FILE=$ATTEMPT_LOGS/exit
    mkdir -p "$ATTEMPT_LOGS"
    rm -f "$PENSTOCK_STOP_FILE" "$PENSTOCK_EXIT_FILE"
    asked=
    trap ask_to_stop USR1 TERM
    choose_python
    meet_at_first_node
    echo "job $job, start $((attempt + 1)), on $SLURM_JOB_NODELIST; each rank's words: $ATTEMPT_LOGS/rank-N.log"

    # In the background, since a shell that waits for a foreground srun hears no signal before it ends.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
        --kill-on-bad-exit=1 --wait=600 --unbuffered --label \
        bash "$PENSTOCK_CODE/slurm/node.sh" "$@" &
    local step=$!
    touch "$ATTEMPT_LOGS/rank-0.log"
    tail --pid=$step -n +1 -f "$ATTEMPT_LOGS/rank-0.log" &
    name_the_run "$step" &
    until wait_for "$step"; do :; done
    conclude
}

choose_python() {
    export PENSTOCK_PYTHON=${PENSTOCK_PYTHON:-$PENSTOCK_CODE/.venv/bin/python}
    [[ -x $PENSTOCK_PYTHON ]] || PENSTOCK_PYTHON=$(command -v python3)
    # The job's code and no other, whatever the folder it runs in holds.
    export PYTHONSAFEPATH=1 PYTHONPATH=$PENSTOCK_CODE${PYTHONPATH:+:$PYTHONPATH}
}

meet_at_first_node() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The address that Slurm itself uses; on most clusters it is the name.
    MASTER_ADDR=$(scontrol show node "$first" --oneliner | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
    # Below the ports that systems hand out by themselves; another one for each job and start.
    MASTER_PORT=$((15000 + (SLURM_JOB_ID * 7 + attempt) % 15000))
    export MASTER_ADDR MASTER_PORT
}

ask_to_stop() {
    asked=yes
    touch "$PENSTOCK_STOP_FILE" # every rank looks for it once a second; they agree, save, and end
}

# Wait for a process; fails when a signal came first.
wait_for() {
    wait "$1" && return
    ! kill -0 "$1" 2>/dev/null
}

# Where PENSTOCK_RUN names the run's folder, the job's comment names its MLflow run, once there is one.
name_the_run() {
    local id file=${PENSTOCK_RUN:-}/run.json
    trap - USR1 TERM
    [[ -n ${PENSTOCK_RUN:-} ]] || return 0
    while kill -0 "$1" 2>/dev/null; do
        id=$(sed -n 's/.*"run_id": "\([0-9a-f]*\)".*/\1/p' "$file" 2>/dev/null) || true
        if [[ -n $id ]]; then
            scontrol update JobId="$job" Comment="run $PENSTOCK_RUN, MLflow $id" || true
            return
        fi
        sleep 5
    done
}

conclude() {
    local code
    code=$(cat "$PENSTOCK_EXIT_FILE" 2>/dev/null) || code=crash
    case $code in
        0) exit 0 ;;
        "$STOPPED")
            if [[ $asked ]] || preempted; then again "stopped, and saved"; fi
            exit "$STOPPED"
            ;;
        crash)
            if [[ $(crashes) -lt ${PENSTOCK_CRASHES:-3} ]]; then again "crashed"; fi
            echo "crashed $(crashes) times in a row; see $logs"
            exit 1
            ;;
        *) exit "$code" ;; # the input is wrong, or training diverged: another start would end alike
    esac
}

preempted() {
    [[ $(scontrol show job "$job") == *PreemptTime=[0-9]* ]]
}

# Starts in a row, this one the last, that ended without an exit code.
crashes() {
    local count=0
    while [[ $count -le $attempt && ! -e $logs/$((attempt - count))/exit ]]; do count=$((count + 1)); done
    echo "$count"
}

# Put the job back into the queue, unless Slurm is about to end or to requeue it by itself.
again() {
    trap - USR1 TERM
    [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]] || exit "$STOPPED"
    echo "$1; back into the queue"
    scontrol requeue "$job" && sleep 300 # Slurm ends this script
    exit "$STOPPED"
}
