#!/usr/bin/env bash
# What train.sbatch and evaluate.sbatch share. Variables, all optional, kept by sbatch from the shell that submits:
#   SSOPD_IMAGE    container image; with it every process runs in it, by pyxis. Without it, bare.
#   SSOPD_MOUNTS   what the container sees besides the checkout, as pyxis takes it: /data:/data,/models:/models:ro
#   SSOPD_PYTHON   interpreter; else python3 in a container, and bare the checkout's .venv where there is one
#   SSOPD_LOGS     folder of the logs, JOB/restart_N.log (logs/slurm)
# Exit codes: 0 finished; 75 stopped on request, and requeued unless the job was cancelled; others failed.

STOPPED=75
STOPPED_EARLY="138 143" # SIGUSR1 or SIGTERM before Python was there to note it

nodes=$SLURM_JOB_NUM_NODES
restart=${SLURM_RESTART_COUNT:-0}
log=${SSOPD_LOGS:-logs/slurm}/$SLURM_JOB_ID/restart_$restart.log
mounts=$PWD:$PWD${SSOPD_MOUNTS:+,$SSOPD_MOUNTS}
if [[ -n ${SSOPD_IMAGE:-} ]]; then
    container=(--container-image="$SSOPD_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD" --no-container-entrypoint)
    python=${SSOPD_PYTHON:-python3}
else
    container=()
    python=${SSOPD_PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
fi

# The batch shell gets SIGTERM when the whole job ends: cancelled, or requeued by SLURM itself. It never requeues then.
ending=
trap 'ending=1' TERM

# run_job train|evaluate MODULE RESUME CONFIG [KEY=VALUE ...]; RESUME is the override that makes a restart go on.
# Modules, not scripts: python -m takes the checkout's code, whatever else the image has installed.
run_job() {
    local kind=$1 module=$2 resume=$3 config=${4:?give the name of a config, such as tiny_cpu}
    local overrides=("${@:5}") steps tasks extra
    ((restart == 0)) || overrides+=("$resume")
    set_end_time
    mkdir -p "$(dirname "$log")"
    echo "job $SLURM_JOB_ID, restart $restart, nodes $SLURM_JOB_NODELIST: $kind $config ${overrides[*]}, log $log"
    steps=$(in_job 1 1 "$python" -m nemo_ssopd.run.slurm "$kind" "$nodes" "$config" "${overrides[@]}") || exit 1
    while read -r tasks extra; do
        start "$tasks" "$module" --config-name "$config" "${overrides[@]}" ${extra:+"$extra"}
    done <<<"$steps"
    echo "finished"
}

# start TASKS MODULE ARGUMENTS...: one process per rank. Returns when all are well; else requeues or fails, and does not return.
start() {
    local code=0
    in_job "$nodes" "$1" --label --output="$log" --open-mode=append "$python" -m "${@:2}" &
    local step=$!
    # A signal ends `wait` early; the step is over when it is gone.
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    ((code != 0)) || return 0
    tail -n 3 "$log" || true
    if [[ $code == "$STOPPED" || " $STOPPED_EARLY " == *" $code "* ]]; then
        echo "stopped on request with code $code"
        [[ -n $ending ]] || scontrol requeue "$SLURM_JOB_ID"
        exit "$STOPPED"
    fi
    echo "failed with code $code"
    exit "$code"
}

# in_job NODES TASKS [SRUN OPTIONS] COMMAND...: ranks follow each other on a node; one that fails ends the others.
in_job() {
    local per_node=$(($2 / $1)) cpus
    cpus=$((SLURM_CPUS_ON_NODE / per_node))
    local share=(--cpus-per-task="$cpus")
    ((cpus > 0)) || share=(--overcommit)
    srun --nodes="$1" --ntasks="$2" --ntasks-per-node="$per_node" --distribution=block:block "${share[@]}" \
        --kill-on-bad-exit=1 --mpi=none "${container[@]}" "${@:3}"
}

# SLURM_JOB_END_TIME for the time budget; SLURM before 23.02 does not set it.
set_end_time() {
    [[ -z ${SLURM_JOB_END_TIME:-} ]] || return 0
    local end
    end=$(date --date="$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)" +%s 2>/dev/null) || return 0
    export SLURM_JOB_END_TIME=$end
}
