#!/usr/bin/env bash
# Trains over two machines under PyTorch's own torchrun, with hybrid sharding: two network namespaces
# with a cable between them play the machines, two workers on each. Compares the losses with those of
# one worker. Needs root for the namespaces; without it, or without PyTorch, says so and ends with 77.
#
# usage: scripts/check_torchrun.sh      after cargo build --release
#
# environment: PYTHON  an interpreter with PyTorch (default: that of scripts/setup.sh --python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BIN=${CARGO_TARGET_DIR:-target}/release
readonly PORT=29511
readonly STEPS=8
# Losses of two ways to divide the same work.
readonly CLOSE=1e-5
# Per process, so that two of these scripts do not meet.
readonly MACHINES=("rr-a-$$" "rr-b-$$")
readonly NET=10.213.77

skip() {
    echo "check_torchrun: skipped: $*"
    exit 77
}

fail() {
    echo "check_torchrun: $*" >&2
    exit 1
}

agents=()
work=""

# shellcheck disable=SC2329 # called by trap
clean_up() {
    local pid machine
    for pid in "${agents[@]}"; do kill "$pid" 2>/dev/null || true; done
    for machine in "${MACHINES[@]}"; do
        # Whatever still runs inside would keep the namespace alive.
        ip netns pids "$machine" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns delete "$machine" 2>/dev/null || true
    done
    [[ -z $work ]] || rm -rf "$work"
}

make_machines() {
    local i machine
    for machine in "${MACHINES[@]}"; do
        ip netns add "$machine" 2>"$work/ip.log" || skip "no network namespaces here: $(<"$work/ip.log")"
    done
    ip link add "rr$$a" netns "${MACHINES[0]}" type veth peer name "rr$$b" netns "${MACHINES[1]}" \
        2>"$work/ip.log" || skip "no virtual cables here: $(<"$work/ip.log")"
    for i in 0 1; do
        machine=${MACHINES[i]}
        ip -n "$machine" address add "$NET.$((i + 1))/24" dev "$(interface $i)"
        ip -n "$machine" link set "$(interface $i)" up
        ip -n "$machine" link set lo up
    done
}

interface() { if (($1)); then echo "rr$$b"; else echo "rr$$a"; fi; }

write_files() {
    head -n $((4 * STEPS)) example_data/train_pointwise.jsonl >"$work/train.jsonl"
    cat >"$work/train.yaml" <<YAML
model_name_or_path: tests/golden/bert_tiny
model_type: bert_encoder
train_dataset: $work/train.jsonl
max_label: 2
max_len: 48
batch_size: 1
epochs: 1
lr: 1e-3
max_grad_norm: 0.5
log_interval: 1
YAML
}

# The losses of a run, one a line.
losses() { sed -n 's/.*"loss":\([-0-9.e]*\).*"type":"train".*/\1/p' "$1/runs/metrics.jsonl"; }

start_agents() { # python
    local node
    for node in 0 1; do
        ip netns exec "${MACHINES[node]}" env OMP_NUM_THREADS=1 "$1" -m torch.distributed.run \
            --nnodes 2 --nproc-per-node 2 --node-rank $node --master-addr $NET.1 \
            --master-port $PORT --no-python "$BIN/reranker" train --device cpu \
            --config "$work/train.yaml" --parallel config/fsdp/hybrid.yaml \
            --set "output_dir=$work/hybrid" >"$work/node$node.log" 2>&1 &
        agents+=($!)
    done
}

main() {
    local pid python ours reference worst
    ((EUID == 0)) || skip "not root"
    command -v ip >/dev/null || skip "no ip command (iproute2)"
    python=${PYTHON:-$(scripts/setup.sh --python)}
    "$python" -c 'import torch.distributed.run' 2>/dev/null || skip "$python has no torchrun"
    [[ -x $BIN/reranker ]] || fail "$BIN/reranker is missing: run cargo build --release first"
    work=$(mktemp -d)
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    make_machines
    write_files

    OMP_NUM_THREADS=1 "$BIN/reranker" train --device cpu --config "$work/train.yaml" \
        --set batch_size=4 --set "output_dir=$work/one" 2>"$work/one.log" || fail "$(tail -n 3 "$work/one.log")"
    start_agents "$python"
    for pid in "${agents[@]}"; do
        wait "$pid" || fail "a node failed:"$'\n'"$(tail -n 15 "$work"/node*.log)"
    done
    agents=()
    losses "$work/one" >"$work/reference"
    losses "$work/hybrid" >"$work/ours"
    ours=$(grep -c . "$work/ours") reference=$(grep -c . "$work/reference")
    [[ $ours == "$STEPS" && $reference == "$STEPS" ]] ||
        fail "took $ours and $reference steps, expected $STEPS"
    worst=$(paste "$work/ours" "$work/reference" |
        awk '{ d = $1 - $2; if (d < 0) d = -d; if (d > worst) worst = d } END { printf "%.1e", worst }')
    awk -v worst="$worst" "BEGIN { exit !(worst <= $CLOSE) }" ||
        fail "losses are off one worker's by $worst, expected at most $CLOSE"
    [[ -s $work/hybrid/model/model.safetensors ]] || fail "no model was saved"
    echo "check_torchrun: 2 machines x 2 workers under torchrun, hybrid sharding: $STEPS steps, losses" \
        "off one worker's by $worst"
}

main
