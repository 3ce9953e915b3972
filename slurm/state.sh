# shellcheck shell=bash
# Files of a job's state, as lib.sh uses them. Whoever can write to a run directory, or made it, may have put anything
# there: links, devices, pipes, and texts that are no numbers. Nothing here is written or read through a link, and what
# is read is bounded and checked before it is used.

MOST_BYTES=1048576 # of a file: of a long run, ten thousand starts

absolute() { if [[ $1 == /* ]]; then printf '%s\n' "${1%/}"; else printf '%s\n' "$PWD/${1%/}"; fi; }

# A text as one line: what would begin another one, or steer a terminal, is a question mark.
one_line() { printf '%s' "$1" | LC_ALL=C tr '\t\n' '  ' | LC_ALL=C tr '\000-\037\177' '?'; }

# whole_number WORD prints it; fails for all else. Arithmetic would run commands in some words: a[$(command)].
whole_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,17})$ ]] && printf '%s\n' "$1"; }

# open_state DIRECTORY: makes it, and it is MEPA_STATE from here on. That of an array's member is in the array's own.
open_state() {
    local state folder
    state=$(absolute "$1")
    local -a folders=("$state")
    case ${state##*/} in part-* | merge)
        folders+=("${state%/*}")
        [[ ${state%/*/*} != */slurm ]] || folders+=("${state%/*/*}")
        ;;
    esac
    MEPA_STATE='' # until it is known to be no link, nothing is noted there
    for folder in "${folders[@]}"; do
        [[ ! -L $folder ]] ||
            fail "$USER_ERROR_CODE" "$folder is a link, through which no job writes its state; remove it, or choose another output_dir"
    done
    mkdir -p -- "$state" ||
        fail "$USER_ERROR_CODE" "$state: cannot be made on $SLURMD_NODENAME; choose an output_dir that all nodes can write"
    MEPA_STATE=$state
}

# put FILE TEXT: a file with that text takes FILE's place, at once; if that is a link, its target stays as it is.
put() {
    local new
    new=$(mktemp -- "${1%/*}/.${1##*/}.XXXXXXXXXX") || return 1
    if ! { chmod "=rw" -- "$new" && printf '%s\n' "$2" >"$new" && mv -fT -- "$new" "$1"; }; then
        rm -f -- "$new"
        return 1
    fi
}

# The text of a file; empty where none is there, or something else.
content() {
    [[ ! -f $1 || -L $1 || ! -r $1 ]] || head -c "$MOST_BYTES" -- "$1" | tr -d '\000'
}

# Job and restart that own the state, "7 0"; empty where none does. What else is there is nobody's.
owner_of_state() {
    local job restart
    read -r job restart _ < <(content "$MEPA_STATE/owner" | head -n 1) || true
    whole_number "${job:-}" >/dev/null && whole_number "${restart:-}" >/dev/null || return 0
    printf '%s\n' "$job $restart"
}

forget_exits() {
    rm -rf -- "$MEPA_STATE/exit-$SLURM_JOB_ID"
    mkdir -- "$MEPA_STATE/exit-$SLURM_JOB_ID"
}

# The ranks' exit codes, with blanks around each. None where all were killed before they could write any.
exit_codes() {
    local file code codes=' '
    for file in "$MEPA_STATE/exit-$SLURM_JOB_ID"/*; do
        code=$(whole_number "$(content "$file" | head -c 4)") || continue
        codes+="$code "
    done
    printf '%s\n' "$codes"
}
