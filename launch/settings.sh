# Functions for retrofit.sbatch and torchrun.sh, which source this file: they read the env file, and print commands
# in place of running them.
# shellcheck shell=bash
#
# example.env is the only list of names: NAME= is required, #NAME=default is optional.

ASSIGNMENT='^(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$'
COUNTS=(NODES GPUS_PER_NODE PORT CPUS_PER_TASK SIGNAL_SECONDS PREFLIGHT_TIMEOUT)
dry_run=

# Print the comment at the head of the script.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

say() { printf '%s\n' "launch: $*" >&2; }

die() {
    printf '%s\n' "error: $*" >&2
    exit 2
}

# run COMMAND...: run the command, or print it in a dry run.
run() {
    if [ -n "$dry_run" ]; then show "$@"; else "$@"; fi
}

# show COMMAND...: print the command as it could be typed.
show() {
    local words
    printf -v words '%q ' "$@"
    printf '%s\n' "${words% }"
}

# set_env NAME VALUE: export the variable for the run, and print the export in a dry run.
set_env() {
    export "$1=$2"
    [ -z "$dry_run" ] || printf 'export %s=%q\n' "$1" "$2"
}

# read_settings FILE: make each setting a shell variable, and keep the `export` lines in EXPORTS as NAME=value.
read_settings() {
    local file=$1 line number=0 start=1 pending='' name value
    local -A required=() known=() seen=()
    EXPORTS=()
    [ -r "$file" ] || die "$file cannot be read; copy launch/example.env and give its name"
    while IFS= read -r line; do
        if [[ $line =~ ^(#?)([A-Z_]+)=(.*)$ ]]; then
            name=${BASH_REMATCH[2]}
            known[$name]=1
            if [ -z "${BASH_REMATCH[1]}" ]; then required[$name]=1; fi
            printf -v "$name" '%s' "${BASH_REMATCH[1]:+${BASH_REMATCH[3]}}" # replaces what the caller exports
        fi
    done <"$ROOT/launch/example.env"
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line%$'\r'}
        if [ -z "$pending" ]; then
            start=$number
            if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
        fi
        if [[ $line == *\\ ]]; then
            pending+="${line%\\} "
            continue
        fi
        line=$pending$line
        pending=''
        [[ $line =~ $ASSIGNMENT ]] || die "$file:$start: found '$line'; expected NAME=value"
        name=${BASH_REMATCH[2]}
        value=$(trimmed "${BASH_REMATCH[3]}")
        [ -z "${seen[$name]:-}" ] ||
            die "$file:$start: $name is set twice, first in line ${seen[$name]}; drop one"
        seen[$name]=$start
        if [[ $value == *[\$\`]* ]]; then
            die "$file:$start: $name holds \$ or a backquote; nothing is expanded here, write the value out"
        fi
        if [ -n "${BASH_REMATCH[1]}" ]; then
            [ -z "${known[$name]:-}" ] || die "$file:$start: $name is the launcher's; drop the word export"
            EXPORTS+=("$name=$value")
        elif [ -n "${known[$name]:-}" ]; then
            printf -v "$name" '%s' "$value"
        else
            die "$file:$start: unknown variable $name; launch/example.env lists all. For the run's" \
                "environment: export $name=..."
        fi
    done <"$file"
    [ -z "$pending" ] || die "$file:$start: the last line ends in \\; expected one more"
    for name in "${!required[@]}"; do
        [ -n "${!name}" ] || die "$file: $name is missing; launch/example.env says what it is"
    done
    check_settings "$file"
}

# Check the values that would otherwise fail late.
check_settings() {
    local name
    for name in "${COUNTS[@]}"; do
        [[ ${!name} =~ ^[1-9][0-9]*$ || ($name == CPUS_PER_TASK && -z ${!name}) ]] ||
            die "$1: $name is '${!name}'; expected a whole number above 0"
    done
    [[ $DEVICE =~ ^(cuda|cpu)$ ]] || die "$1: DEVICE is '$DEVICE'; expected cuda or cpu"
    [[ $PREFLIGHT =~ ^(yes|no)$ ]] || die "$1: PREFLIGHT is '$PREFLIGHT'; expected yes or no"
    read -r -a TRAINING <<<"$TRAIN_ARGS"
}

# Print the value without the blanks and one pair of quotes around it.
trimmed() {
    local value=$1
    value=${value#"${value%%[![:space:]]*}"}
    value=${value%"${value##*[![:space:]]}"}
    if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
    printf '%s' "$value"
}

# flag_value --FLAG: print the flag's value in TRAIN_ARGS, the next word or the text after "=". The last one
# counts; without the flag, print nothing.
flag_value() {
    local position found=''
    for position in "${!TRAINING[@]}"; do
        case ${TRAINING[position]} in
            "$1") found=${TRAINING[position + 1]:-} ;;
            "$1="*) found=${TRAINING[position]#*=} ;;
        esac
    done
    printf '%s' "$found"
}

# step COMMAND...: run the command to its end, whatever signals come meanwhile, and return its status. After USR1
# or TERM (see catch_signals), call `forward PID` five times a second until the command ends.
stopped=
ignored=
catch_signals() { trap 'stopped=yes; say "signal received"' USR1 TERM; }

step() {
    local pid
    if [ -n "$dry_run" ]; then
        show "$@"
        return 0
    fi
    (
        if [ -n "$ignored" ]; then trap '' "$ignored"; fi
        exec "$@"
    ) &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do # a loop, because a single wait could miss a signal
        sleep 0.2 &
        wait $! || true # a signal ends this wait at once
        if [ -n "$stopped" ]; then forward "$pid"; fi
    done
    wait "$pid"
}
