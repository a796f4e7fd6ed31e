#!/usr/bin/env bash
# One benchmark on this machine, a process and a share of the cases for each of its GPUs.
#
#   launch/bench.sh [--dry-run] GPUS NAME OUT [options of `larimar bench NAME` …]
#
# Results are put together in OUT by the share that is done last. The same command goes on where it was
# stopped. Exit code: that of the first share, in their order, that failed; what each said is in
# OUT/share-I.log.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; }
dry=
case ${1-} in --help | -h) usage; exit 0 ;; --dry-run) dry=1; shift ;; esac
[ $# -ge 3 ] || { usage >&2; echo "error: GPUS, NAME and OUT are needed (launch/bench.sh)" >&2; exit 2; }
gpus=$1 name=$2 out=$3
shift 3
case $gpus in '' | *[!0-9]* | 0) echo "error: GPUS is a number of processes, not '$gpus'" >&2; exit 2 ;; esac
# Those that a scheduler gave, or the first ones.
IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES-}"
pids=()
# None outlives the others: a share that is stopped is taken up by the next call.
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
[ "$dry" ] || mkdir -p "$out"
for ((i = 0; i < gpus; i++)); do
  line=(larimar bench "$name" --out "$out" --share "$i/$gpus" "$@")
  if [ "$dry" ]; then
    printf 'CUDA_VISIBLE_DEVICES=%q ' "${devices[i]-$i}"; printf '%q ' "${line[@]}"; echo
  else
    CUDA_VISIBLE_DEVICES=${devices[i]-$i} "${line[@]}" >>"$out/share-$i.log" 2>&1 &
    pids+=($!)
  fi
done
code=0
for pid in ${pids[@]+"${pids[@]}"}; do
  wait "$pid" || { failed=$?; [ "$code" -ne 0 ] || code=$failed; }
done
[ "$code" -eq 0 ] || echo "error: a share failed; see $out/share-*.log" >&2
exit "$code"
