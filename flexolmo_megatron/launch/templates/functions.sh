# What the job scripts of a launch share. They set out, what, logs, run (to train), python, srun_options, requeues and
# warn_seconds, then source it.

job=$SLURM_JOB_ID
# The bare number of an array's last task would mean the whole array.
if [ -n "${SLURM_ARRAY_TASK_ID-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# srun knows the job's nodes and tasks, but since Slurm 22.05 not its processors.
if [ -n "${SLURM_CPUS_PER_TASK-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export PYTHONUNBUFFERED=1
srun_options=(--export=ALL --kill-on-bad-exit=0 --open-mode=append "${srun_options[@]}")
mkdir -p "$logs"
said=    # whether this start has a line in the log of the launch
worked=  # whether this start has done a part of the job, which the next one need not do again
declare -A before=() # size of each log before the step that runs

# A line in the log of the launch and in this job's own.
say() {
    said=yes
    printf '%s  %s (job %s): %s\n' "$(date '+%F %T')" "$what" "$job" "$*" | tee -a "$out/launch.log"
}
trap 'status=$?; [ -n "$said" ] || say "ended with exit status $status; see $logs."' EXIT

# patiently COMMAND…: its output, at a third try at the latest: Slurm's controller may be busy, or be starting anew.
patiently() {
    local pause
    for pause in 5 10 ''; do
        if "$@"; then return 0; fi
        if [ -n "$pause" ]; then sleep "$pause"; fi
    done
    return 1
}

# asked FIELD: what squeue says of this job, or nothing.
asked() {
    patiently squeue --noheader --format="$1" --jobs="$job" | head -n 1
}

# Logs of a step that were written since `mark STEP`, the first process to fall silent first.
mark() {
    local log
    for log in "$logs/$1".*log; do [ ! -e "$log" ] || before[$log]=$(stat --format=%s "$log"); done
}
written() {
    local log
    while IFS= read -r log; do
        if [ "$(stat --format=%s "$log")" -gt "${before[$log]:-0}" ]; then printf '%s\n' "$log"; fi
    done < <(ls -tr "$logs/$1".*log 2>/dev/null)
}

# found STEP PATTERN [BUT]: the last line that matches PATTERN and not BUT, of the first log that has one, with the
# number of its process.
found() {
    local log line rank
    while IFS= read -r log; do
        line=$(tail -c "+$((${before[$log]:-0} + 1))" "$log" | grep -aE "$2" | grep -avE "${3:-^$}" | tail -n 1)
        [ -n "$line" ] || continue
        rank=${log##*.rank_}
        if [ "$rank" = "$log" ]; then rank=; else rank="rank ${rank%.log}: "; fi
        line=${line#\[rank*\]: } # of torch
        printf '%s%s\n' "$rank" "${line#flexolmo: }"
        return
    done < <(written "$1")
}

# refused STEP: what a process has said of its input. A run that was asked to stop says so in the same way.
refused() {
    found "$1" '^flexolmo: ' ': stopped after step [0-9]+ of |was asked to stop; |: interrupted$'
}

# reason STATUS STEP: why a step has ended, as far as its logs tell; first what is no echo of another process's end.
reason() {
    local error='^(\[rank[0-9]+\]: )?[A-Za-z_][A-Za-z0-9_.]*(Error|Exception)(:|$)' line
    line=$(refused "$2")
    [ -n "$line" ] || line=$(found "$2" "$error" 'Dist[A-Za-z]*Error|[Cc]onnection (closed|reset)|NCCL|gloo')
    [ -n "$line" ] || line=$(found "$2" "$error")
    if [ -z "$line" ] && [ "$1" = 137 ]; then line='killed, perhaps for want of memory'; fi
    if [ -z "$line" ] && [ "$1" = 138 ]; then line='not done within the time limit'; fi
    printf '%s' "${line:0:500}"
}

# fail STATUS STEP: the end of this job, and through their dependency of all jobs that wait for it.
fail() {
    local why
    why=$(reason "$1" "$2")
    say "FAILED in $2 with exit status $1${why:+: $why}; see $logs." \
        'Slurm cancels the jobs that wait for it (DependencyNeverSatisfied).'
    exit "$1"
}

# requeue STATUS STEP WORD: back into the queue; the next start goes on from the last checkpoint.
requeue() {
    local state count counted="$logs/requeues.$job"
    state=$(asked %T)
    case $state in # cancelled, or Slurm puts it back without our help
        COMPLETING | CANCELLED | PREEMPTED | TIMEOUT)
            say "$3 in $2 (exit status $1): left to Slurm, which is ending the job ($state)"
            exit "$1"
            ;;
    esac
    # SLURM_RESTART_COUNT would count preemptions, too, which are nobody's fault.
    count=$(cat "$counted" 2>/dev/null)
    if [ "${count:-0}" -ge "$requeues" ]; then
        say "$3 once more after $requeues requeues, the most that slurm.requeues allows"
        fail "$1" "$2"
    fi
    echo $((${count:-0} + 1)) >"$counted"
    say "$3 in $2 (exit status $1): back into the queue"
    if ! patiently scontrol requeue "$job"; then
        say 'Slurm does not put it back into the queue'
        fail "$1" "$2"
    fi
    exit "$1"
}

# left: seconds up to the time limit, or nothing where there is none or Slurm does not say.
left() {
    local time days=0 part total=0
    time=$(asked %L)
    [[ $time =~ ^[0-9:-]+$ ]] || return 0
    if [[ $time = *-* ]]; then days=${time%%-*} time=${time#*-}; fi
    for part in ${time//:/ }; do total=$((total * 60 + 10#$part)); done
    echo $((10#$days * 86400 + total))
}

# enough_time STEP: back into the queue where the warning before the time limit has come already, or would come at once.
enough_time() {
    local rest
    if [ -z "$worked" ]; then return; fi
    rest=$(left)
    if [ -n "$rest" ] && [ "$rest" -le "$warn_seconds" ]; then
        requeue 75 "$1" "stopped $rest s before the time limit"
    fi
}

# single VERB ARGUMENT…: a `flexolmo` command in one process, on the first node.
single() {
    local status
    enough_time "$1"
    mark "$1"
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --output="$logs/$1.log" "${srun_options[@]}" \
        "${python[@]}" -m flexolmo_megatron.cli "$@"
    status=$?
    case $status in
        0) worked=yes ;;
        143) requeue $status "$1" interrupted ;; # SIGTERM: preempted
        138) # SIGUSR1: at the time limit. A whole one may do, if this one had less.
            if [ -n "$worked" ]; then requeue $status "$1" interrupted; fi
            fail $status "$1"
            ;;
        *) fail $status "$1" ;;
    esac
}

# The last checkpoint, if there is one; router tuning has them in several runs within its own.
newest() {
    find "$run" -regex '.*/checkpoints/step_[0-9]+' -prune -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 |
        cut -d ' ' -f 2-
}

# train MODE OPTION…: one process per task on all nodes, each with a log of its own. srun starts them without torchrun,
# so Slurm's signals reach them, and it returns their highest exit status.
# 2: the input is at fault; 75: a checkpoint was written and steps are left; 138 and 143: SIGUSR1 or SIGTERM came before
# training could listen to it. Anything else is a crash, and worth another try: the third in a row that has saved
# nothing is the last.
train() {
    local first last status why crashed crashes="$logs/crashes.$job"
    enough_time train
    first=$(newest)
    mark train
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Its own for every job, below the ports that systems hand out; another one after a crash: it may have been taken.
    crashed=$(cat "$crashes" 2>/dev/null | wc -l)
    MASTER_PORT=$((15000 + (SLURM_JOB_ID + 1009 * crashed) % 15000))
    # Processes save together, however long it takes, and then end together. The first to end gives the others a minute:
    # if they are not about to end too, they wait for it in vain.
    srun --wait=60 --output="$logs/train.rank_%t.log" "${srun_options[@]}" \
        bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
        "${python[@]}" -m "${module:-flexolmo_megatron.train}" "$@"
    status=$?
    last=$(newest)
    if [ "$last" != "$first" ]; then
        worked=yes
        rm -f "$crashes"
    fi
    case $status in
        0) ;;
        2) fail 2 train ;;
        75 | 138 | 143) requeue $status train interrupted ;;
        *)
            # One process alone may have refused its input; the others were killed then.
            if [ -n "$(refused train)" ]; then fail 2 train; fi
            if [ "$last" = "$first" ]; then echo >>"$crashes"; fi
            if [ -e "$crashes" ] && [ "$(wc -l <"$crashes")" -gt 2 ]; then
                say 'the third crash in a row without a new checkpoint'
                fail $status train
            fi
            why=$(reason $status train)
            requeue $status train "crashed${last:+ after ${last##*/}}${why:+ ($why)}"
            ;;
    esac
}
