# What the job scripts of a launch share. They set out, what, logs, run (to train), python, srun_options and requeues,
# then source it.

job=$SLURM_JOB_ID
# The bare number of an array's last task would mean the whole array.
if [ -n "${SLURM_ARRAY_TASK_ID-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# srun knows the job's nodes and tasks, but since Slurm 22.05 not its processors.
if [ -n "${SLURM_CPUS_PER_TASK-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export PYTHONUNBUFFERED=1
srun_options=(--export=ALL --kill-on-bad-exit=0 --open-mode=append "${srun_options[@]}")
mkdir -p "$logs"

# A line in the log of the launch and in this job's own.
say() {
    printf '%s  %s (job %s): %s\n' "$(date '+%F %T')" "$what" "$job" "$*" | tee -a "$out/launch.log"
}

# fail STATUS STEP: the end of this job, and through their dependency of all jobs that wait for it.
fail() {
    local reason=''
    case $1 in
        2) reason=$(grep -hs '^flexolmo: ' "$logs/$2".*log | tail -n 1) ;;
        137) reason='killed, perhaps for want of memory' ;;
        138) reason='not done within the time limit' ;;
    esac
    say "FAILED in $2 with exit status $1${reason:+: ${reason#flexolmo: }}; see $logs." \
        'Slurm cancels the jobs that wait for it (DependencyNeverSatisfied).'
    exit "$1"
}

# requeue STATUS STEP WORD: back into the queue; the next start goes on from the last checkpoint.
requeue() {
    # A job that Slurm is ending has been cancelled, or is being requeued without our help.
    if [ "$(squeue --noheader --format=%T --jobs="$job")" != RUNNING ]; then exit "$1"; fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$requeues" ]; then
        say "$3 once more after $requeues requeues, the most that slurm.requeues allows"
        fail "$1" "$2"
    fi
    say "$3 in $2 (exit status $1): back into the queue"
    scontrol requeue "$job" || fail "$1" "$2"
    exit "$1"
}

# single VERB ARGUMENT…: a `flexolmo` command in one process, on the first node.
single() {
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --output="$logs/$1.log" "${srun_options[@]}" \
        "${python[@]}" -m flexolmo_megatron.cli "$@"
    local status=$?
    case $status in
        0) ;;
        143) requeue $status "$1" interrupted ;; # SIGTERM: preempted
        *) fail $status "$1" ;;
    esac
}

# The name of the last checkpoint, if there is one.
newest() {
    ls "$run/checkpoints" 2>/dev/null | grep '^step_' | tail -n 1
}

# train MODE OPTION…: one process per task on all nodes, each with a log of its own. srun starts them without torchrun,
# so Slurm's signals reach them, they may take as long as they need to save, and srun returns their highest exit status.
# 2: the input is at fault; 75: a checkpoint was written and steps are left; 138 and 143: SIGUSR1 or SIGTERM came before
# training could listen to it. Anything else is a crash, and worth another try if this one has saved something.
train() {
    local before status
    before=$(newest)
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # its own for every job, below the ports that systems hand out
    # A process that has ended gives the others a minute: they may be about to end too, or wait for it in vain.
    srun --wait=60 --output="$logs/train.rank_%t.log" "${srun_options[@]}" \
        bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
        "${python[@]}" -m flexolmo_megatron.train "$@"
    status=$?
    case $status in
        0) ;;
        75 | 138 | 143) requeue $status train interrupted ;;
        2) fail $status train ;;
        *)
            if [ "$(newest)" != "$before" ]; then requeue $status train "crashed after $(newest)"; fi
            fail $status train
            ;;
    esac
}
