#!/usr/bin/env bash
# Trains an encoder on two GPUs, data parallel: RAG-Retrieval's
#   CUDA_VISIBLE_DEVICES=0,1 accelerate launch --config_file FSDP.yaml train_reranker.py --config BERT.yaml
#
# usage: scripts/train_bert.sh [FLAG...]   further flags of rr-launch, such as --set lr=2e-5
# environment: DEVICES   where to train (default "--gpus 0,1"; "--cpu --nproc 2" without GPUs)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:${CARGO_TARGET_DIR:-target}/release
read -ra devices <<<"${DEVICES:---gpus 0,1}"
exec rr-launch "${devices[@]}" --config_file config/fsdp/no_shard.yaml --config config/training_bert.yaml "$@"
