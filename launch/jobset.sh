#!/usr/bin/env bash
# A Kubernetes JobSet: one pod per node, restarted together where a pod asks to be run again.
#
#   launch/jobset.sh [--dry-run] NAME IMAGE NODES CONFIG RUN [section.key=value …]
#
# Needs the JobSet controller. IMAGE has the package and CONFIG; the claim LARIMAR_CLAIM (default
# larimar) is mounted at /data for RUN and the cache. Parameters are split over the GPUs of a node, whose
# links are fast, and the nodes split the batch (train.mesh); BATCH_PER_NODE=8 makes data.batch 8 for each
# node, and train.steps and train.learning_rate are then yours to change. GPUS_PER_NODE is what a node
# has (default 8). --dry-run prints the manifest and applies nothing.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; }
dry=
case ${1-} in --help | -h) usage; exit 0 ;; --dry-run) dry=1; shift ;; esac
[ $# -ge 5 ] || { usage >&2; echo "error: NAME, IMAGE, NODES, CONFIG and RUN are needed" >&2; exit 2; }
name=$1 image=$2 nodes=$3 config=$4 run=$5
shift 5
arguments=
for word in train --config="$config" --run "$run" --set "train.mesh=[$nodes,-1,1]" 'train.stall=900' \
  ${BATCH_PER_NODE:+"data.batch=$((BATCH_PER_NODE * nodes))"} "$@"; do
  arguments+=$'\n'"                    - '${word//\'/\'\'}'"
done
manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  # Any other end of a pod than those below is an error, and ends the whole set.
  failurePolicy:
    maxRestarts: 100
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: node
      replicas: 1
      template:
        spec:
          parallelism: $nodes
          completions: $nodes
          completionMode: Indexed
          backoffLimit: 0
          # 75: run me again. 134: my peer has died. 137, 143: the node was drained.
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: larimar
                  operator: NotIn
                  values: [75, 134, 137, 143]
          template:
            spec:
              restartPolicy: Never
              # As process 1 of a container, one whose peer has died would end with 139, as if by a fault.
              shareProcessNamespace: true
              terminationGracePeriodSeconds: 300
              containers:
                - name: larimar
                  image: $image
                  command: [larimar]
                  args:$arguments
                  env:
                    - name: LARIMAR_COORDINATOR
                      value: $name-node-0-0.$name:12345
                    - name: LARIMAR_PROCESSES
                      value: "$nodes"
                    - name: LARIMAR_PROCESS
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                    - name: LARIMAR_CACHE
                      value: /data/cache
                    - name: XLA_PYTHON_CLIENT_MEM_FRACTION
                      value: "0.92"
                  resources:
                    limits:
                      nvidia.com/gpu: ${GPUS_PER_NODE:-8}
                  volumeMounts:
                    - name: data
                      mountPath: /data
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: data
                  persistentVolumeClaim:
                    claimName: ${LARIMAR_CLAIM:-larimar}
                - name: shared-memory
                  emptyDir:
                    medium: Memory
YAML
}
if [ "$dry" ]; then manifest; else manifest | kubectl apply -f -; fi
