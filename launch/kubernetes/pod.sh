#!/usr/bin/env bash
# What every pod of a training job runs: torchrun's agent, which starts one process for each GPU of the pod, and waits
# for the other pods. The manifests beside this file call it; its arguments are those of launch/train.py.
#
#   PODS, POD_INDEX            how many pods, and which this is, from 0
#   MASTER_ADDR, MASTER_PORT   name and port of pod 0 (the Kubeflow Trainer sets these four as PET_NNODES, ...)
#   RUN_FOLDER                 the run's folder, on a volume that all pods share
#   PROGRAM                    launch/preflight.py looks at the machines first; launch/train.py where it is not set
#   GPUS                       processes in this pod; as many as there are GPUs where it is not set, one without GPUs
#   MIN_PODS                   go on with as few pods as this when some are lost; all of them where it is not set
#   MAX_RESTARTS=10            how often the processes are started again in place, after a fault or another pod's end
#   POD_IP                     address that other pods reach this one by
#
# Exit codes, which the manifests read: 0 the training is finished; 2 a mistake of the user's, not to be tried again;
# 138 (what the training operator calls retryable) the pod is to be started again, and the run goes on from its newest
# checkpoint.
set -uo pipefail

say() { echo "pod.sh: $*" >&2; }
need() { # NAME...: the first that is set
  local name
  for name in "$@"; do [[ -z ${!name:-} ]] || { echo "${!name}"; return; }; done
  say "$1 is not set: the manifests in launch/kubernetes/ set it"
  exit 2
}

# A pod's name resolves only once its cluster's DNS knows it; torch would fill the log while it tries.
wait_for_name() {
  local seconds=0
  until getent hosts "$1" >/dev/null; do
    ((seconds % 30)) || say "waiting for the name $1 to resolve ($seconds s)"
    ((seconds < 600)) || { say "$1 does not resolve after $seconds s: is the headless Service there?"; exit 138; }
    sleep 2
    seconds=$((seconds + 2))
  done
}

# End the agent when rank 0 has found a mistake in what the user gave: it would start the processes again.
watch_for_mistakes() {
  while sleep 0.5; do
    [[ $(cat "$MOE_MAMBA_OUTCOME" 2>/dev/null) != mistake:* ]] || { touch "$MOE_MAMBA_OUTCOME.mistake"; kill -TERM "$1"; return; }
  done
}

main() {
  local pods index host port gpus=${GPUS:-} agent watch code=0
  pods=$(need PODS PET_NNODES) && index=$(need POD_INDEX PET_NODE_RANK) || exit 2
  host=$(need MASTER_ADDR PET_MASTER_ADDR) && port=$(need MASTER_PORT PET_MASTER_PORT) || exit 2
  [[ -n ${RUN_FOLDER:-} ]] || need RUN_FOLDER
  [[ -n $gpus ]] || gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
  export MOE_MAMBA_OUTCOME=/tmp/outcome.$$
  # When one pod is told to end, the processes of all save and end: a failure to the other agents, who start them again.
  export MOE_MAMBA_STOPPED_CODE=75
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90} # more than checkpoint.grace
  rm -f "$RUN_FOLDER/heartbeats/$(cat /proc/sys/kernel/hostname)" # of the pod that had this name before
  wait_for_name "$host"

  torchrun --nnodes="${MIN_PODS:-$pods}:$pods" --nproc-per-node="$((gpus > 0 ? gpus : 1))" \
    --max-restarts="${MAX_RESTARTS:-10}" ${POD_IP:+--local-addr="$POD_IP"} \
    --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-moe-mamba}" --rdzv-endpoint="$host:$port" \
    --rdzv-conf="is_host=$((index == 0)),join_timeout=1800,read_timeout=300" \
    "${PROGRAM:-launch/train.py}" --run.folder="$RUN_FOLDER" "$@" &
  agent=$!
  watch_for_mistakes "$agent" &
  watch=$!
  trap 'kill -TERM "$agent" 2>/dev/null' TERM INT
  while :; do # a signal ends `wait` as well
    wait "$agent" && code=0 || code=$?
    kill -0 "$agent" 2>/dev/null || break
  done
  kill "$watch" 2>/dev/null
  ((code == 0)) || code=138
  [[ $(cat "$MOE_MAMBA_OUTCOME" 2>/dev/null) != mistake:* && ! -e $MOE_MAMBA_OUTCOME.mistake ]] || code=2
  rm -f "$MOE_MAMBA_OUTCOME" "$MOE_MAMBA_OUTCOME.mistake"
  exit "$code"
}

main "$@"
