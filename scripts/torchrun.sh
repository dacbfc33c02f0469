#!/usr/bin/env bash
# Trains under PyTorch's torchrun, where that is what a cluster starts jobs with. Run it on every node.
#
# usage: scripts/torchrun.sh NNODES NODE_RANK HOST:PORT ARG...      ARGs go to reranker train
#        scripts/torchrun.sh 2 0 node0:29400 --config train.yaml
#
# environment: NPROC  workers a node (default: one for each GPU)
#              BIN    where reranker is (default: target/release)
set -euo pipefail

if (($# < 4)); then
    sed -n 's/^# //; 4,5p' "$0" >&2
    exit 2
fi
nnodes=$1 node_rank=$2 address=$3
shift 3
# An IPv6 address stands in brackets, which torchrun does not take.
host=${address%:*} host=${host#[} host=${host%]}
exec torchrun --nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "${NPROC:-gpu}" \
    --master-addr "$host" --master-port "${address##*:}" --no-python \
    "${BIN:-target/release}/reranker" train "$@"
