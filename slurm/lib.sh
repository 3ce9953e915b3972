# shellcheck shell=bash
# The life of a job, shared by all batch scripts. They source this file after `set -euo pipefail`.
#
#   mepa_setup                  signals, cluster profile
#   mepa_begin STATE PROGRESS   addresses, ownership, bound on restarts. STATE: directory of this run's or array member's
#                               state; PROGRESS: a directory or file whose newest entry says how far the work is
#   mepa_check [RECIPE ...]     one look at the nodes before work begins
#   mepa_work COMMAND...        runs COMMAND on every rank, then ends the job: done, requeued, or failed with its cause
#
# In STATE: owner (job and restart that may write), result (done, requeued, or failed: CAUSE), starts-JOB (a line a
# start: restart, newest progress), exit-JOB/ (exit status of every rank).

REQUEUE_CODE=75   # "not done yet, start me again": what pretrain.py exits with when it was asked to stop
FENCE_SECONDS=15  # longer than OWNER_CHECK_SECONDS of launch.py
USER_ERROR_CODE=2 # "your input is wrong": starting again would not help

say() { printf '=== %(%F %T)T %s\n' -1 "$*"; }

# The last line of the log is the cause: fail STATUS CAUSE
fail() {
    [[ -z ${MEPA_STATE:-} ]] || echo "failed: $2" >"$MEPA_STATE/result"
    echo "error: $2"
    exit "$1"
}

mepa_setup() {
    trap 'STOP=signal' USR1
    trap 'STOP=terminated' TERM
    set -E
    trap 'fail 1 "slurm: ${BASH_SOURCE[0]##*/} line $LINENO: $BASH_COMMAND"' ERR # `set -e` alone would end without a word
    # The number of an array's last member is also that of the whole array: name members by their place.
    JOB=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    STOP='' LOG_START=0 RESTART=${SLURM_RESTART_COUNT:-0}
    cd "$MEPA_ROOT" || fail $USER_ERROR_CODE "MEPA_ROOT=$MEPA_ROOT: not visible on $SLURMD_NODENAME"
    export PYTHONPATH=$MEPA_ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    load_profile
}

mepa_begin() {
    MEPA_STATE=$1 PROGRESS=$2
    mkdir -p "$MEPA_STATE" || fail $USER_ERROR_CODE "$MEPA_STATE: cannot be made on $SLURMD_NODENAME; choose an output_dir that all nodes can write"
    LOG=$(scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p')
    [[ ! -r $LOG ]] || LOG_START=$(stat -c %s "$LOG")
    set_addresses
    take_ownership
    bound_restarts
    rm -rf "$MEPA_STATE/exit-$SLURM_JOB_ID"
    mkdir "$MEPA_STATE/exit-$SLURM_JOB_ID"
    echo running >"$MEPA_STATE/result"
    say "job $JOB, start $((RESTART + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $RANKS_PER_NODE ranks," \
        "$MEPA_LAUNCHER, $MASTER_ADDR:$MASTER_PORT"
}

# slurm/clusters/$MEPA_CLUSTER.env, or a file of that name; what it does not set keeps the value of the environment.
load_profile() {
    local profile=${MEPA_CLUSTER:-}
    [[ $profile == *.env ]] || profile=$MEPA_ROOT/slurm/clusters/$profile.env
    [[ -r $profile ]] || fail $USER_ERROR_CODE "MEPA_CLUSTER=${MEPA_CLUSTER:-}: no profile $profile; see slurm/clusters/"
    set -a
    # shellcheck disable=SC1090
    source "$profile"
    set +a
    : "${MEPA_LAUNCHER:=srun}" "${MEPA_MAX_RESTARTS:=3}" "${MEPA_STOP_SECONDS:=300}" "${MEPA_SCRATCH:=/tmp}"
    if [[ -z ${MEPA_PYTHON:-} ]]; then
        MEPA_PYTHON=python3
        [[ ! -x $MEPA_ROOT/.venv/bin/python ]] || MEPA_PYTHON=$MEPA_ROOT/.venv/bin/python
    fi
    if [[ -n ${MEPA_SETUP:-} ]]; then # module systems do not bear `set -u`
        set +u
        eval "$MEPA_SETUP"
        set -u
    fi
    [[ $MEPA_LAUNCHER == srun || $MEPA_LAUNCHER == torchrun ]] ||
        fail $USER_ERROR_CODE "MEPA_LAUNCHER=$MEPA_LAUNCHER: expected srun or torchrun"
    # A prefix of every command on the nodes, such as "apptainer exec --nv /path/image.sif".
    read -r -a CONTAINER <<<"${MEPA_CONTAINER:-}"
}

# Ranks and threads from the allocation; a port that differs between jobs, and between the starts of one job.
set_addresses() {
    RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    CPUS_PER_RANK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))}
    ((CPUS_PER_RANK > 0)) || CPUS_PER_RANK=1
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 64 + RESTART * 2) % 20000)) # below the range the kernel gives out
    while port_in_use "$MASTER_PORT"; do MASTER_PORT=$((10000 + (MASTER_PORT - 10000 + 2) % 20000)); done
    RENDEZVOUS_ID=mepa-$SLURM_JOB_ID-$RESTART
    : "${OMP_NUM_THREADS:=$((CPUS_PER_RANK < 8 ? CPUS_PER_RANK : 8))}" "${OMP_WAIT_POLICY:=PASSIVE}"
    if [[ -n ${MEPA_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=$MEPA_INTERFACE GLOO_SOCKET_IFNAME=$MEPA_INTERFACE
    fi
    export MASTER_ADDR MASTER_PORT RENDEZVOUS_ID RANKS_PER_NODE OMP_NUM_THREADS OMP_WAIT_POLICY
}

# This script runs on the head node, so it can ask: somebody answers on the port.
port_in_use() { (: <>"/dev/tcp/127.0.0.1/$1" || : <>"/dev/tcp/$MASTER_ADDR/$1") 2>/dev/null; }

# Two jobs must not write one run: another job that still runs is an error; ranks of an earlier start that lost touch
# with SLURM (a node cut from the network) see that they are no longer the owner, and end (launch.py).
take_ownership() {
    local owner='' state
    [[ ! -r $MEPA_STATE/owner ]] || read -r owner _ <"$MEPA_STATE/owner"
    if [[ -n $owner && $owner != "$SLURM_JOB_ID" ]]; then
        state=$(squeue --noheader --jobs="$owner" --format=%T 2>/dev/null || true)
        if [[ $state == *RUNNING* ]]; then
            echo "error: job $owner is working in $MEPA_STATE; cancel it first (scancel $owner), or choose another output_dir"
            exit $USER_ERROR_CODE
        fi
    fi
    echo "$SLURM_JOB_ID $RESTART" >"$MEPA_STATE/.owner.$SLURM_JOB_ID"
    mv -f "$MEPA_STATE/.owner.$SLURM_JOB_ID" "$MEPA_STATE/owner"
    if [[ $(cat "$MEPA_STATE/result" 2>/dev/null) == running ]]; then
        say "the last start ended without a word, perhaps with its node; waiting $FENCE_SECONDS s until its ranks have seen this one"
        sleep $FENCE_SECONDS
    fi
}

# Age and name of the newest entry of PROGRESS; empty before the first. Names with a dot in front are being written.
progress() {
    [[ ! -e $PROGRESS ]] || find "$PROGRESS" -maxdepth 1 ! -name '.*' -printf '%T@ %p\n' | sort -n | tail -n 1
}

# How many starts of this job in a row found the same progress, this one among them.
idle_starts() {
    local last=$1 count=0 line
    while read -r _ line; do
        if [[ $line == "$last" ]]; then count=$((count + 1)); else count=0; fi
    done <"$MEPA_STATE/starts-$SLURM_JOB_ID"
    echo "$count"
}

bound_restarts() {
    local now
    now=$(progress)
    echo "$RESTART $now" >>"$MEPA_STATE/starts-$SLURM_JOB_ID"
    # mepa_work gives up before this can happen, unless the node died with it.
    if (($(idle_starts "$now") > MEPA_MAX_RESTARTS + 1)); then
        fail 1 "$MEPA_MAX_RESTARTS restarts without progress; the last start ended without a word, perhaps with its node (scontrol show job $JOB)"
    fi
}

# Runs a step on the allocation: step TASKS_PER_NODE CPUS_PER_TASK COMMAND... Returns its status.
step() {
    local tasks=$1 cpus=$2 status=0 stopping=''
    shift 2
    [[ -z $STOP ]] || return $REQUEUE_CODE
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$cpus" --cpu-bind="${MEPA_CPU_BIND:-cores}" --kill-on-bad-exit=1 --wait=60 \
        "${CONTAINER[@]}" "$@" &
    STEP_PID=$!
    while kill -0 $STEP_PID 2>/dev/null; do
        if [[ -n $STOP && -z $stopping ]]; then
            stopping=yes
            say "asked to stop ($STOP): ranks save and end"
            kill -USR1 $STEP_PID 2>/dev/null || true # srun passes it on to its tasks
            (sleep "$MEPA_STOP_SECONDS" && say "ranks did not end in $MEPA_STOP_SECONDS s: killed" && kill_steps) &
            local watchdog=$!
        fi
        wait $STEP_PID 2>/dev/null || true # also returns when a signal comes
    done
    [[ -z ${watchdog:-} ]] || kill "$watchdog" 2>/dev/null || true
    wait $STEP_PID || status=$?
    return $status
}

kill_steps() {
    local id
    squeue --noheader --steps --jobs="$JOB" --format=%i | while read -r id; do
        [[ $id == *.batch || $id == *.extern ]] || scancel "$id"
    done
}

# One look at the nodes before work begins; MEPA_HEALTH=off leaves it out.
mepa_check() {
    [[ ${MEPA_HEALTH:-on} != off ]] || return 0
    local status=0
    step "$RANKS_PER_NODE" "$CPUS_PER_RANK" "$MEPA_PYTHON" slurm/launch.py rank "$MEPA_STATE" \
        "$MEPA_PYTHON" slurm/health.py "$MEPA_STATE" "$@" || status=$?
    ((status == 0)) || finish $status
    rm -f "$MEPA_STATE/exit-$SLURM_JOB_ID"/*
}

mepa_work() {
    local status=0
    if [[ $MEPA_LAUNCHER == srun ]]; then
        step "$RANKS_PER_NODE" "$CPUS_PER_RANK" "$MEPA_PYTHON" slurm/launch.py rank "$MEPA_STATE" "$@" || status=$?
    else
        step 1 "$((RANKS_PER_NODE * CPUS_PER_RANK))" "$MEPA_PYTHON" slurm/launch.py torchrun "$MEPA_STATE" "$@" || status=$?
    fi
    finish $status
}

# What comes next: finish STATUS. Ranks' own exit codes decide; launchers and killed neighbours blur the step's.
finish() {
    local status=$1 codes cause
    # None where all ranks were killed before they could write any.
    codes=" $(find "$MEPA_STATE/exit-$SLURM_JOB_ID" -type f -exec cat {} + | tr '\n' ' ')"
    if ((status == 0)); then
        echo "done" >"$MEPA_STATE/result"
        say "job $JOB: done"
        exit 0
    fi
    if [[ $STOP == terminated && $(job_state) != RUNNING ]]; then # cancelled, or SLURM requeues it by itself
        echo "ended by SLURM ($(job_state))" >"$MEPA_STATE/result"
        exit 143
    fi
    if [[ -n $STOP || $codes == *" $REQUEUE_CODE "* ]]; then
        requeue "stopped in good order"
    fi
    cause=$("$MEPA_PYTHON" -m mepa_ds.slurm.cause "$LOG" "$LOG_START" || echo "status $status, no message in $LOG")
    [[ $codes != *" $USER_ERROR_CODE "* ]] || fail $USER_ERROR_CODE "$cause"
    if (($(idle_starts "$(progress)") > MEPA_MAX_RESTARTS)); then
        fail 1 "$cause (gave up: $MEPA_MAX_RESTARTS restarts without progress)"
    fi
    requeue "failed (status $status): $cause"
}

job_state() { scontrol show job "$JOB" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p'; }

requeue() {
    echo "requeued: $1" >"$MEPA_STATE/result"
    say "job $JOB: $1; requeued"
    set +e
    if scontrol requeue "$JOB"; then
        sleep 120 # SLURM ends this script meanwhile
        exit $REQUEUE_CODE
    fi
    fail $REQUEUE_CODE "SLURM did not requeue job $JOB; submit it again, it goes on from its last checkpoint"
}

# A whole training job: mepa_train PROGRESS PROGRAM RECIPE [key=value ...], PROGRESS in output_dir, PROGRAM one word or two.
mepa_train() {
    local progress=$1 program out staged=()
    read -r -a program <<<"$2"
    shift 2
    out=$(mepa_output_dir "$@")
    mepa_begin "$out/slurm" "$out/$progress"
    mepa_check "$@"
    if [[ ${MEPA_STAGE:-off} == on ]]; then
        mepa_stage "$@"
        mapfile -t staged < <("$MEPA_PYTHON" -m mepa_ds.slurm.stage overrides "$MEPA_SCRATCH" "$@")
    fi
    mepa_work "$MEPA_PYTHON" "${program[@]}" "$@" "${staged[@]}"
}

mepa_output_dir() {
    local out
    out=$("$MEPA_PYTHON" -m mepa_ds.slurm.recipe_value output_dir "$@" 2>&1) || fail $USER_ERROR_CODE "${out#error: }" >&2
    echo "$out"
}

# Copies the run's shard sets to every node's own disk, once a node.
mepa_stage() {
    local status=0
    say "staging shard sets to $MEPA_SCRATCH of every node"
    step 1 "$CPUS_PER_RANK" "$MEPA_PYTHON" slurm/launch.py rank "$MEPA_STATE" \
        "$MEPA_PYTHON" -m mepa_ds.slurm.stage copy "$MEPA_SCRATCH" "$@" || status=$?
    ((status == 0)) || finish $status
    rm -f "$MEPA_STATE/exit-$SLURM_JOB_ID"/*
}

# An array member does part SLURM_ARRAY_TASK_ID of the work: mepa_part DIRECTORY PROGRESS COMMAND...
mepa_part() {
    mepa_begin "$1/part-$SLURM_ARRAY_TASK_ID" "$2"
    shift 2
    MEPA_LAUNCHER=srun # parts do not talk to each other
    mepa_work "$MEPA_PYTHON" "$@"
}

# The job after an array names the parts that are not done, and fails: mepa_check_parts DIRECTORY PARTS
mepa_check_parts() { "$MEPA_PYTHON" -m mepa_ds.slurm.parts "$1" "$2" || exit 1; }

# The word after an option: option_value --out DEFAULT ARGUMENTS...
option_value() {
    local name=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
        "$name") value=${2:-} ;;
        "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}
