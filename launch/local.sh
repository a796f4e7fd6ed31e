#!/usr/bin/env bash
# One process on this machine, over all of its devices. The mesh is (data, fsdp, tensor); -1 takes
# every device that is there.
#
#   launch/local.sh configs/smol.py runs/smol [section.key=value …]
set -euo pipefail
config=$1 run=$2
shift 2
exec larimar train --config="$config" --run "$run" --set 'train.mesh=[-1,1,1]' "$@"
