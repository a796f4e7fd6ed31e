#!/usr/bin/env bash
# One process on this machine, over all of its devices.
#
#   launch/local.sh [--dry-run] CONFIG RUN [section.key=value …]
#
# train.mesh is (data, fsdp, tensor): the default here takes every device that is there for fsdp.
# Exit code 75: stopped by SIGTERM, run it again; anything else but 0 is an error.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; }
dry=
case ${1-} in --help | -h) usage; exit 0 ;; --dry-run) dry=1; shift ;; esac
[ $# -ge 2 ] || { usage >&2; echo "error: CONFIG and RUN are needed" >&2; exit 2; }
config=$1 run=$2
shift 2
# JAX takes three quarters of a GPU's memory by itself; a step that is planned takes what it needs.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
line=(larimar train --config="$config" --run "$run" --set 'train.mesh=[1,-1,1]' "$@")
if [ "$dry" ]; then printf '%q ' "${line[@]}"; echo; else exec "${line[@]}"; fi
