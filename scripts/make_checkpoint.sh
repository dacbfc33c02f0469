#!/usr/bin/env bash
# Writes the checkpoint that every later version has to read, tests/kept_checkpoint/vN, and what the
# run does after it. To be run once for each version of the format, never for an old one.
#
# usage: scripts/make_checkpoint.sh vN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:?usage: scripts/make_checkpoint.sh vN}
kept=$PWD/tests/kept_checkpoint
binaries=$(realpath "${CARGO_TARGET_DIR:-target}/release")
if [[ -e $kept/$version/step-6 ]]; then
    echo "make_checkpoint.sh: $version is kept already" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r tests/golden/bert_tiny "$work/base"
cp "$kept/t.yaml" "$kept/pairs.jsonl" config/deepspeed/zero2.yaml "$work"
cd "$work"
# Ends when it is about to save for the fourth time.
if RR_FAIL_POINT=before_states:4@0 "$binaries/rr-launch" --cpu --nproc 2 --parallel zero2.yaml --config t.yaml; then
    echo "make_checkpoint.sh: the run was to be killed after its third checkpoint" >&2
    exit 1
fi
mkdir -p "$kept/$version"
cp -r run/checkpoints/step-6 "$kept/$version/"
"$binaries/rr-launch" --cpu --nproc 2 --parallel zero2.yaml --config t.yaml
grep '"type":"train"' run/runs/metrics.jsonl >"$kept/$version/metrics.jsonl"
