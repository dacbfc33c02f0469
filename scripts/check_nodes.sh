#!/usr/bin/env bash
# Trains over three machines under rr-launch: network namespaces on one switch play the machines, two
# workers on each. The weights have to be those of six workers on one machine. Needs root for the
# namespaces; without it, or without PyTorch, says so and ends with 77.
#
# usage: scripts/check_nodes.sh      after cargo build --release --workspace
#
# environment: PYTHON  an interpreter with PyTorch (default: that of scripts/setup.sh --python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BIN=${CARGO_TARGET_DIR:-target}/release
readonly STEPS=6
# Per process, so that two of these scripts do not meet.
readonly SWITCH="rr-switch-$$"
readonly MACHINES=("rr-0-$$" "rr-1-$$" "rr-2-$$")
readonly NET=10.213.79

skip() {
    echo "check_nodes: skipped: $*"
    exit 77
}

fail() {
    echo "check_nodes: $*" >&2
    exit 1
}

launchers=()
work=""

# shellcheck disable=SC2329 # called by trap
clean_up() {
    local pid machine
    for pid in "${launchers[@]}"; do kill "$pid" 2>/dev/null || true; done
    for machine in "${MACHINES[@]}" "$SWITCH"; do
        # Whatever still runs inside would keep the namespace alive.
        ip netns pids "$machine" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns delete "$machine" 2>/dev/null || true
    done
    [[ -z $work ]] || rm -rf "$work"
}

make_machines() {
    local i machine
    for machine in "$SWITCH" "${MACHINES[@]}"; do
        ip netns add "$machine" 2>"$work/ip.log" || skip "no network namespaces here: $(<"$work/ip.log")"
    done
    ip -n "$SWITCH" link add bridge type bridge 2>"$work/ip.log" ||
        skip "no virtual switches here: $(<"$work/ip.log")"
    ip -n "$SWITCH" link set bridge up
    for i in "${!MACHINES[@]}"; do
        machine=${MACHINES[i]}
        ip link add "port$i" netns "$SWITCH" type veth peer name eth0 netns "$machine"
        ip -n "$SWITCH" link set "port$i" master bridge up
        ip -n "$machine" address add "$NET.$((i + 1))/24" dev eth0
        ip -n "$machine" link set eth0 up
        ip -n "$machine" link set lo up
    done
}

write_files() {
    head -n $((6 * STEPS)) example_data/train_pointwise.jsonl >"$work/train.jsonl"
    cat >"$work/train.yaml" <<YAML
model_name_or_path: tests/golden/bert_tiny
model_type: bert_encoder
train_dataset: $work/train.jsonl
max_label: 2
max_len: 48
batch_size: 1
epochs: 1
lr: 1e-3
log_interval: 1
YAML
}

start_launchers() {
    local node
    for node in "${!MACHINES[@]}"; do
        # rr-launch itself, not a shell around it, is what the trap ends.
        ip netns exec "${MACHINES[node]}" "$BIN/rr-launch" --cpu --nproc 2 --nnodes 3 \
            --node-rank "$node" --rdzv "$NET.1:29400" --rdzv-timeout 60 \
            --config "$work/train.yaml" --set "output_dir=$work/three" >"$work/node$node.log" 2>&1 &
        launchers+=($!)
    done
}

compare() { # python
    "$1" - "$work/one/model/model.safetensors" "$work/three/model/model.safetensors" <<'PYTHON'
import sys
from safetensors.torch import load_file

one, three = map(load_file, sys.argv[1:])
assert one.keys() == three.keys() and one
worst = max((one[name].double() - three[name].double()).abs().max().item() for name in one)
print(f"{worst:.1e}")
sys.exit(worst > 1e-6)
PYTHON
}

main() {
    local pid python worst
    ((EUID == 0)) || skip "not root"
    command -v ip >/dev/null || skip "no ip command (iproute2)"
    python=${PYTHON:-$(scripts/setup.sh --python)}
    "$python" -c 'import safetensors.torch' 2>/dev/null || skip "$python has no PyTorch"
    [[ -x $BIN/reranker ]] || fail "$BIN/reranker is missing: run cargo build --release first"
    work=$(mktemp -d)
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    make_machines
    write_files
    export OMP_NUM_THREADS=1

    "$BIN/rr-launch" --cpu --nproc 6 --config "$work/train.yaml" --set "output_dir=$work/one" \
        >"$work/one.log" 2>&1 || fail "$(tail -n 3 "$work/one.log")"
    start_launchers
    for pid in "${launchers[@]}"; do
        wait "$pid" || fail "a node failed:"$'\n'"$(tail -n 15 "$work"/node*.log)"
    done
    launchers=()
    worst=$(compare "$python") || fail "weights differ by ${worst:-(unreadable)}"
    echo "check_nodes: 3 machines x 2 workers under rr-launch: $STEPS steps, weights off those of one" \
        "machine by $worst"
}

main
