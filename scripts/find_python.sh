#!/bin/sh
# Print the path of a Python >= 3.12 that can make virtual environments, or one line on stderr and exit 1.
#
#   scripts/find_python.sh
#
# Looked at: python3.12, python3.13, python3, python on PATH; then pyenv's versions; then `uv python find`.
# Of all found, 3.12 wins (the version the constraints were tested on), then 3.13, then the first newer one.
#
# Trap: a name on PATH proves nothing. A pyenv shim exists for every version installed anywhere and exits 127
# unless that version is switched on, and Debian's python3.12 has no ensurepip until python3.12-venv is
# installed. So each candidate is run, and says itself which file it is.
set -u

probe='import sys, venv, ensurepip; print("%d %d %s" % (sys.version_info[0], sys.version_info[1], sys.executable))'
second=''
third=''

consider() {  # consider COMMAND: exits the script with 3.12's path, remembers other fitting ones
    answer=$("$1" -c "$probe" 2>/dev/null </dev/null) || return 0
    major=${answer%% *}
    rest=${answer#* }
    minor=${rest%% *}
    path=${rest#* }
    case "$major.$minor" in
        3.12) printf '%s\n' "$path"; exit 0 ;;
        3.13) [ -n "$second" ] || second=$path ;;
        3.[0-9] | 3.1[01]) ;;
        3.*) [ -n "$third" ] || third=$path ;;
    esac
}

for name in python3.12 python3.13 python3 python; do
    if found=$(command -v "$name" 2>/dev/null); then consider "$found"; fi
done

roots="${HOME:-}/.pyenv"
if pyenv_root=$(pyenv root 2>/dev/null </dev/null); then roots="$pyenv_root
$roots"; fi
old_ifs=$IFS
IFS='
'
for root in $roots; do
    for candidate in "$root"/versions/*/bin/python; do
        if [ -x "$candidate" ]; then consider "$candidate"; fi
    done
done
IFS=$old_ifs

for wanted in 3.12 '>=3.12'; do
    if found=$(uv python find "$wanted" 2>/dev/null </dev/null); then consider "$found"; fi
done

if [ -n "$second$third" ]; then
    printf '%s\n' "${second:-$third}"
    exit 0
fi
echo "error: no Python >= 3.12 with venv found on PATH, in pyenv or by uv; install one, e.g." \
    "'apt install python3.12 python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12'" >&2
exit 1
