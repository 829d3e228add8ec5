#!/usr/bin/env bash
# Run the preflight and the training on this node: by hand on one machine, or as one task per node of
# launch/retrofit.sbatch.
#
#   launch/torchrun.sh [--dry-run] [--only preflight|train] [--hosts A,B,... --node-rank R] ENV_FILE
#
# After USR1 or TERM the run saves at the end of its training step and ends; the same command resumes it.
# Exit status: 0 the run is done, or it saved after a signal; 2 bad input; 3 the preflight failed; 6 the watchdog
# ended the run; otherwise the status of the rank that failed first.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/settings.sh
source "$ROOT/launch/settings.sh"
catch_signals

only='' hosts=localhost node_rank=${SLURM_NODEID:-0} env_file=''
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage ;;
        --dry-run) dry_run=yes ;;
        --only | --hosts | --node-rank)
            [ $# -gt 1 ] || die "$1 needs a value"
            case $1 in --only) only=$2 ;; --hosts) hosts=$2 ;; --node-rank) node_rank=$2 ;; esac
            shift
            ;;
        -*) die "unknown option $1 (see launch/torchrun.sh --help)" ;;
        *)
            [ -z "$env_file" ] || die "found two env files, $env_file and $1; expected one"
            env_file=$1
            ;;
    esac
    shift
done
[[ $only =~ ^(preflight|train)?$ ]] || die "--only is '$only'; expected preflight or train"
[ -n "$env_file" ] || die "no env file given (see launch/torchrun.sh --help)"
read_settings "$env_file"
IFS=, read -r -a nodes <<<"$hosts"
# shellcheck disable=SC2153  # NODES comes from the env file
[ "${#nodes[@]}" = "$NODES" ] ||
    die "NODES is $NODES, found ${#nodes[@]} hosts ($hosts); give --hosts A,B,... --node-rank R or mend NODES"
[[ $node_rank =~ ^[0-9]+$ && $node_rank -lt $NODES ]] ||
    die "--node-rank is '$node_rank'; expected 0 to $((NODES - 1))"

# Each worker gets the signal once, and only when it has its handler: before that, it ignores USR1. TERM must not go
# to torchrun, which would end its workers 30 seconds later, saved or not.
readonly USR1_BIT=$((1 << 9)) # the bit of USR1 in the mask of caught signals
declare -A told=()
forward() {
    local workers worker caught
    read -r -a workers <<<"$(cat /proc/"$1"/task/*/children 2>/dev/null)" || true
    for worker in "${workers[@]}"; do
        if [ -n "${told[$worker]:-}" ]; then continue; fi
        caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$worker/status" 2>/dev/null) || continue
        if ((0x${caught:-0} & USR1_BIT)) && kill -USR1 "$worker" 2>/dev/null; then
            told[$worker]=1
            say "${nodes[node_rank]}: USR1 to worker $worker, which saves after its training step"
        fi
    done
}
[ -r "/proc/$$/task/$$/children" ] ||
    die "this kernel has no /proc/PID/task/PID/children, by which signals reach the workers"

threads=1
if [ "${CPUS_PER_TASK:-0}" -gt "$GPUS_PER_NODE" ]; then threads=$((CPUS_PER_TASK / GPUS_PER_NODE)); fi
if [ -n "$VENV" ]; then
    [ -n "$dry_run" ] || [ -x "$VENV/bin/python" ] ||
        die "VENV is $VENV, which has no bin/python on ${nodes[node_rank]}"
    set_env VIRTUAL_ENV "$VENV"
    set_env PATH "$VENV/bin:$PATH"
fi
set_env PYTHONPATH "$ROOT${PYTHONPATH:+:$PYTHONPATH}"
set_env PYTHONUNBUFFERED 1
set_env OMP_NUM_THREADS "$threads"
set_env CUDA_DEVICE_MAX_CONNECTIONS 1
for pair in "${EXPORTS[@]}"; do set_env "${pair%%=*}" "${pair#*=}"; done

ignored=USR1
if [ "$only" != train ] && [ "$PREFLIGHT" = yes ]; then
    step python "$ROOT/tools/preflight.py" --hosts "$hosts" --node-rank "$node_rank" --port "$PORT" \
        --gpus-per-node "$GPUS_PER_NODE" --device "$DEVICE" --min-free-gb "$MIN_FREE_GB" \
        --timeout "$PREFLIGHT_TIMEOUT" -- "${TRAINING[@]}" || exit 3
fi
if [ "$only" = preflight ] || [ -n "$stopped" ]; then exit 0; fi

is_host=$((node_rank == 0))
step python -m megatron_dms.launch.elastic --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:$PORT" --rdzv-id "${SLURM_JOB_ID:-retrofit}" \
    --rdzv-conf "is_host=$is_host,join_timeout=$((2 * PREFLIGHT_TIMEOUT))" \
    --local-addr "${nodes[node_rank]}" \
    "$ROOT/pretrain_dms.py" "${TRAINING[@]}" --exit-signal-handler --exit-signal SIGUSR1
