# shellcheck shell=bash
# The life of a job, shared by all batch scripts. They source this file after `set -euo pipefail`.
#
#   mepa_setup                  signals, cluster profile
#   mepa_begin STATE PROGRESS   addresses, ownership, bound on restarts. STATE: directory of this run's or array member's
#                               state; PROGRESS: a directory or file whose newest entry says how far the work is
#   ask MODULE WORDS...         what a module of ours prints; its error is the job's
#   mepa_check [RECIPE ...]     one look at the nodes before work begins
#   mepa_work COMMAND...        runs COMMAND on every rank, then ends the job: done, requeued, or failed with its cause
#
# In STATE: owner (job and restart that may write), result (done, requeued, or failed: CAUSE), starts-JOB (a line a
# start: restart, newest progress), exit-JOB/ (exit status of every rank). A run directory may come from a stranger, and
# others may write to it: what is read there is checked, and links are not followed (state.sh).

# This file's own folder: in a clone $MEPA_ROOT/slurm, else inside the installed package.
MEPA_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/state.sh
source "$MEPA_SLURM/state.sh"
REQUEUE_CODE=75   # "not done yet, start me again": what pretrain.py exits with when it was asked to stop
FENCE_SECONDS=15  # longer than OWNER_CHECK_SECONDS of launch.py
USER_ERROR_CODE=2 # "your input is wrong": starting again would not help

say() { printf '=== %(%F %T)T %s\n' -1 "$*"; }

# The last line of the log is the cause: fail STATUS CAUSE
fail() {
    [[ -z ${MEPA_STATE:-} ]] || put "$MEPA_STATE/result" "failed: $(one_line "$2")" || true
    printf 'error: %s\n' "$(one_line "$2")"
    exit "$1"
}

mepa_setup() {
    trap 'STOP=signal' USR1
    trap 'STOP=terminated' TERM
    set -E
    # `set -e` alone would end without a word. What has said its cause already ends with `|| exit`.
    trap 'fail 1 "slurm: ${BASH_SOURCE[0]##*/} line $LINENO: $BASH_COMMAND"' ERR
    # The number of an array's last member is also that of the whole array: name members by their place.
    JOB=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    STOP='' LOG_START=0 RESTART=${SLURM_RESTART_COUNT:-0}
    cd "$MEPA_ROOT" || fail $USER_ERROR_CODE "MEPA_ROOT=$MEPA_ROOT: not visible on $SLURMD_NODENAME"
    export PYTHONUNBUFFERED=1
    export SLURM_EXPORT_ENV=ALL # sbatch had a list of what the job gets; all of that, and what is set here, is the ranks'
    [[ ! -d $MEPA_ROOT/mepa_ds ]] || export PYTHONPATH=$MEPA_ROOT${PYTHONPATH:+:$PYTHONPATH} # a clone
    load_profile
}

mepa_begin() {
    open_state "$1"
    PROGRESS=$(absolute "$2")
    LOG=$(patiently scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p') || LOG=''
    LOG=${LOG%%$'\n'*}
    [[ ! -f $LOG || ! -r $LOG ]] || LOG_START=$(stat -L -c %s -- "$LOG")
    set_addresses
    take_ownership
    bound_restarts
    forget_exits
    put "$MEPA_STATE/result" running
    say "job $JOB, start $((RESTART + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x $RANKS_PER_NODE ranks," \
        "$MEPA_LAUNCHER, $MASTER_ADDR:$MASTER_PORT"
}

# slurm/clusters/$MEPA_CLUSTER.env, or a file of that name: that of MEPA_ROOT goes before the shipped one. What it does not set keeps the value of the environment.
load_profile() {
    local profile=${MEPA_CLUSTER:-} stage=${MEPA_STAGE:-}
    [[ $profile == *.env ]] || profile=$MEPA_ROOT/slurm/clusters/$profile.env
    [[ -r $profile ]] || profile=$MEPA_SLURM/clusters/${profile##*/}
    [[ -r $profile ]] || fail $USER_ERROR_CODE "MEPA_CLUSTER=${MEPA_CLUSTER:-}: no profile $profile; see slurm/clusters/"
    set -a
    # shellcheck disable=SC1090
    source "$profile"
    set +a
    [[ -z $stage ]] || MEPA_STAGE=$stage # --stage goes before the profile
    : "${MEPA_LAUNCHER:=srun}" "${MEPA_MAX_RESTARTS:=3}" "${MEPA_STOP_SECONDS:=240}" "${MEPA_SCRATCH:=/tmp}"
    export MEPA_SCRATCH # for the ranks
    if [[ -z ${MEPA_PYTHON:-} ]]; then
        MEPA_PYTHON=python3
        [[ -n ${MEPA_CONTAINER:-} || ! -x $MEPA_ROOT/.venv/bin/python ]] || MEPA_PYTHON=$MEPA_ROOT/.venv/bin/python
    fi
    set +u # module systems bear neither `set -u` nor, but for `||`, `set -e`
    find_modules
    eval "${MEPA_SETUP:-}" || fail $USER_ERROR_CODE "MEPA_SETUP ended with status $?: $MEPA_SETUP"
    set -u
    [[ $MEPA_LAUNCHER == srun || $MEPA_LAUNCHER == torchrun ]] ||
        fail $USER_ERROR_CODE "MEPA_LAUNCHER=$MEPA_LAUNCHER: expected srun or torchrun"
    # A prefix of every command on the nodes, such as "apptainer exec --nv /path/image.sif".
    read -r -a CONTAINER <<<"${MEPA_CONTAINER:-}"
}

# `module` is a function of login shells. Functions do not come along with a job's list of variables.
find_modules() {
    local script
    [[ ${MEPA_SETUP:-} == *module* ]] && ! declare -F module >/dev/null || return 0
    for script in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
        # shellcheck disable=SC1090
        [[ ! -r $script ]] || source "$script" || true
    done
}

run_python() { "${CONTAINER[@]}" "$MEPA_PYTHON" "$@"; }

ask() {
    local errors cause status=0
    errors=$(mktemp)
    run_python -m "$@" 2>"$errors" || status=$?
    cause=$(tail -n 1 "$errors")
    rm "$errors"
    ((status == 0)) || fail $status "${cause#error: }" >&2
}

# The controller may be away for some minutes (an upgrade, a fail-over): patiently COMMAND... tries again, and prints
# what COMMAND says in the end.
patiently() {
    local said status
    for _ in {1..20}; do
        status=0
        said=$("$@" 2>&1) || status=$?
        [[ $status != 0 && $said =~ (Unable to contact|Socket timed out|Zero Bytes|Connection refused) ]] || break
        sleep "${MEPA_RETRY_SECONDS:-15}"
    done
    printf '%s\n' "$said"
    return $status
}

# Ranks and threads from the allocation; a port and an id that nobody can foretell: whoever reaches the store of a
# rendezvous can write there.
set_addresses() {
    RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    CPUS_PER_RANK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))}
    ((CPUS_PER_RANK > 0)) || CPUS_PER_RANK=1
    MEPA_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${MEPA_NODES%%$'\n'*}
    MASTER_PORT=$((10000 + 2 * (16#$(random_hex 4) % 10000))) # below the range the kernel gives out
    while port_in_use "$MASTER_PORT"; do MASTER_PORT=$((10000 + (MASTER_PORT - 10000 + 2) % 20000)); done
    RENDEZVOUS_ID=mepa-$SLURM_JOB_ID-$RESTART-$(random_hex 16)
    : "${OMP_NUM_THREADS:=$((CPUS_PER_RANK < 8 ? CPUS_PER_RANK : 8))}" "${OMP_WAIT_POLICY:=PASSIVE}"
    # The number of rows of an expert is new in every step: a GPU's memory would be cut into pieces of all sizes.
    : "${PYTORCH_ALLOC_CONF:=expandable_segments:True}"
    if [[ -n ${MEPA_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME=$MEPA_INTERFACE GLOO_SOCKET_IFNAME=$MEPA_INTERFACE
    fi
    export MEPA_NODES MASTER_ADDR MASTER_PORT RENDEZVOUS_ID RANKS_PER_NODE OMP_NUM_THREADS OMP_WAIT_POLICY PYTORCH_ALLOC_CONF
}

# random_hex BYTES
random_hex() { od -An -v -tx1 -N"$1" /dev/urandom | tr -d ' \n'; }

# This script runs on the head node, so it can ask: somebody answers on the port.
port_in_use() { (: <>"/dev/tcp/127.0.0.1/$1" || : <>"/dev/tcp/$MASTER_ADDR/$1") 2>/dev/null; }

# Two jobs must not write one run: another job that still runs is an error; ranks of an earlier start that lost touch
# with SLURM (a node cut from the network) see that they are no longer the owner, and end (launch.py).
take_ownership() {
    local owner other
    LAST_RESULT=$(one_line "$(content "$MEPA_STATE/result")")
    owner=$(owner_of_state)
    owner=${owner% *}
    if [[ -n $owner && $owner != "$SLURM_JOB_ID" ]]; then
        # The number of an array's last member is that of the array too, so squeue may list other members.
        other=$(patiently squeue --noheader --jobs="$owner" --format='%A %T %i' | sed -n "s/^$owner RUNNING //p") || true
        if [[ -n $other ]]; then
            echo "error: job $other is working in $MEPA_STATE; cancel it first (scancel $other), or choose another output_dir"
            exit $USER_ERROR_CODE
        fi
    fi
    put "$MEPA_STATE/owner" "$SLURM_JOB_ID $RESTART"
    if [[ $LAST_RESULT == running ]]; then
        say "the last start ended without a word, perhaps with its node; waiting $FENCE_SECONDS s until its ranks have seen this one"
        sleep $FENCE_SECONDS
    fi
}

# Age and name of the newest finished entry of PROGRESS; empty before the first. Names with a dot in front are being
# written, and so change their directory. SETS is a pattern that may follow PROGRESS.
progress() {
    local place
    for place in "$PROGRESS"${SETS:-}; do
        [[ ! -e $place ]] || find -H "$place" -maxdepth 1 ! -name '.*' ! \( -type d -samefile "$place" \) \
            -printf '%T@ %p\n' 2>/dev/null || true # others may rename what was just seen
    done | own_part | sort -n | tail -n 1
}

# Array members write into the same sets; what a member's own is, the first number in a name says.
own_part() {
    if [[ -z ${PARTS:-} ]]; then
        cat
        return
    fi
    awk -v part="$SLURM_ARRAY_TASK_ID" -v parts="$PARTS" -v ranks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" '
        { name = $0; sub(/.*\//, "", name) }
        match(name, /[0-9]+/) && int(substr(name, RSTART, RLENGTH) % (parts * ranks) / ranks) == part'
}

# How many starts of this job in a row found the same progress, this one among them.
idle_starts() {
    local last=$1 count=0 line
    while read -r _ line; do
        if [[ $line == "$last" ]]; then count=$((count + 1)); else count=0; fi
    done < <(content "$MEPA_STATE/starts-$SLURM_JOB_ID")
    echo "$count"
}

bound_restarts() {
    local now starts
    now=$(progress)
    starts=$(content "$MEPA_STATE/starts-$SLURM_JOB_ID")
    put "$MEPA_STATE/starts-$SLURM_JOB_ID" "${starts:+$starts$'\n'}$RESTART $now"
    # mepa_work gives up before this can happen, unless the node died with it, or it was asked to stop each time.
    if (($(idle_starts "$now") > MEPA_MAX_RESTARTS + 1)); then
        [[ $LAST_RESULT != running ]] || LAST_RESULT="without a word, perhaps with its node (scontrol show job $JOB)"
        fail 1 "$MEPA_MAX_RESTARTS restarts without progress; the last start ended: $LAST_RESULT"
    fi
}

# Runs a step on the allocation: step TASKS_PER_NODE CPUS_PER_TASK COMMAND... Returns its status.
step() {
    local tasks=$1 cpus=$2 status=0 stopping=''
    shift 2
    [[ -z $STOP ]] || return $REQUEUE_CODE
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$cpus" --cpu-bind="${MEPA_CPU_BIND:-cores}" --kill-on-bad-exit=1 --wait=0 \
        "${CONTAINER[@]}" "$@" &
    STEP_PID=$!
    while kill -0 $STEP_PID 2>/dev/null; do
        if [[ -n $STOP && -z $stopping ]]; then
            stopping=yes
            say "asked to stop ($STOP): ranks save and end"
            # srun passes it on to its tasks, which have SIGTERM from SLURM: a second signal would end them at once.
            [[ $STOP == terminated ]] || kill -USR1 $STEP_PID 2>/dev/null || true
            (sleep "$MEPA_STOP_SECONDS" && echo "error: ranks did not end within $MEPA_STOP_SECONDS s: killed" && kill_steps) &
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
    patiently squeue --noheader --steps --jobs="$JOB" --format=%i | while read -r id; do
        [[ $id == *.batch || $id == *.extern ]] || scancel "$id"
    done
}

# One look at the nodes before work begins; MEPA_HEALTH=off leaves it out.
mepa_check() {
    [[ ${MEPA_HEALTH:-on} != off ]] || return 0
    local status=0
    step "$RANKS_PER_NODE" "$CPUS_PER_RANK" "$MEPA_PYTHON" "$MEPA_SLURM/launch.py" rank "$MEPA_STATE" \
        "$MEPA_PYTHON" "$MEPA_SLURM/health.py" "$MEPA_STATE" "$@" || status=$?
    ((status == 0)) || finish $status
    forget_exits
}

mepa_work() {
    local status=0
    if [[ $MEPA_LAUNCHER == srun ]]; then
        step "$RANKS_PER_NODE" "$CPUS_PER_RANK" "$MEPA_PYTHON" "$MEPA_SLURM/launch.py" rank "$MEPA_STATE" "$@" || status=$?
    else
        step 1 "$((RANKS_PER_NODE * CPUS_PER_RANK))" "$MEPA_PYTHON" "$MEPA_SLURM/launch.py" torchrun "$MEPA_STATE" "$@" || status=$?
    fi
    finish $status
}

# What comes next: finish STATUS. Ranks' own exit codes decide; launchers and killed neighbours blur the step's.
finish() {
    local status=$1 codes cause owner
    owner=$(owner_of_state)
    if [[ $owner != "$SLURM_JOB_ID $RESTART" ]]; then
        say "the run now belongs to job and restart $owner"
        exit 143
    fi
    codes=$(exit_codes)
    if ((status == 0)); then
        put "$MEPA_STATE/result" "done"
        say "job $JOB: done"
        exit 0
    fi
    if [[ $STOP == terminated && $(job_state) != RUNNING ]]; then # cancelled, or SLURM requeues it by itself
        put "$MEPA_STATE/result" "ended by SLURM ($(job_state))"
        exit 143
    fi
    if in_good_order "$codes"; then
        requeue "stopped in good order"
    fi
    cause=$(run_python -m mepa_ds.slurm.in_job.cause "$LOG" "$LOG_START" || echo "status $status, no message in $LOG")
    [[ $codes != *" $USER_ERROR_CODE "* ]] || fail $USER_ERROR_CODE "$cause"
    if (($(idle_starts "$(progress)") > MEPA_MAX_RESTARTS)); then
        fail 1 "$cause (gave up: $MEPA_MAX_RESTARTS restarts without progress)"
    fi
    requeue "failed (status $status): $cause"
}

# Whether ranks ended because they were asked to: a crash ends its neighbours too, and these may save and ask for more.
in_good_order() {
    local code
    for code in $1; do
        [[ $code == 0 || $code == "$REQUEUE_CODE" || $code == 143 ]] || return 1
    done
    [[ -n $STOP || $1 == *" $REQUEUE_CODE "* ]]
}

job_state() { patiently scontrol show job "$JOB" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p'; }

requeue() {
    [[ -z ${MEPA_STATE:-} ]] || put "$MEPA_STATE/result" "requeued: $(one_line "$1")"
    say "job $JOB: $(one_line "$1"); requeued"
    set +e
    trap - ERR
    if patiently scontrol requeue "$JOB"; then
        sleep 120 # SLURM ends this script meanwhile, sleep first
        exit $REQUEUE_CODE
    fi
    fail $REQUEUE_CODE "SLURM did not requeue job $JOB; submit it again, it goes on from its last checkpoint"
}

# A whole training job: mepa_train PROGRESS COMMAND RECIPE [key=value ...], PROGRESS in output_dir, COMMAND of `mepa`.
mepa_train() {
    local progress=$1 command=$2 out text copies=()
    shift 2
    out=$(ask mepa_ds.slurm.in_job.recipe_value output_dir "$@") || cannot_begin $?
    mepa_begin "$out/slurm" "$out/$progress"
    mepa_check "$@"
    if [[ ${MEPA_STAGE:-off} == on ]]; then
        mepa_copy_sets "$@"
        text=$(ask mepa_ds.slurm.in_job.node_copies overrides "$MEPA_SCRATCH" "$@") || cannot_begin $?
        [[ -z $text ]] || mapfile -t copies <<<"$text"
    fi
    mepa_work "$MEPA_PYTHON" -m mepa_ds "$command" "$@" "${copies[@]}"
}

# The cause is said. A node whose Python does not start is no mistake of the user's: another one may do.
cannot_begin() {
    (($1 != USER_ERROR_CODE && RESTART < MEPA_MAX_RESTARTS)) || exit "$1"
    requeue "could not begin (status $1)"
}

# Copies the run's shard sets to every node's own disk, once a node.
mepa_copy_sets() {
    local status=0
    say "copying shard sets to $MEPA_SCRATCH of every node"
    step 1 "$CPUS_PER_RANK" "$MEPA_PYTHON" "$MEPA_SLURM/launch.py" rank "$MEPA_STATE" \
        "$MEPA_PYTHON" -m mepa_ds.slurm.in_job.node_copies copy "$MEPA_SCRATCH" "$@" || status=$?
    ((status == 0)) || finish $status
    forget_exits
}

# An array member does part SLURM_ARRAY_TASK_ID of the work: mepa_part DIRECTORY PARTS PROGRESS COMMAND...
mepa_part() {
    PARTS=$(whole_number "$2") || fail $USER_ERROR_CODE "$2: expected the number of parts"
    mepa_begin "$1/part-$SLURM_ARRAY_TASK_ID" "$3"
    shift 3
    MEPA_LAUNCHER=srun # parts do not talk to each other
    mepa_work "$MEPA_PYTHON" "$@"
}

# The job after an array names the parts that are not done, and fails: mepa_check_parts DIRECTORY PARTS
mepa_check_parts() { run_python -m mepa_ds.slurm.in_job.parts "$1" "$2" || exit 1; }

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
    printf '%s\n' "$value"
}
