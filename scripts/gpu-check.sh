#!/usr/bin/env bash
# Checks the built programs on a machine with NVIDIA GPUs: parity with the CPU, every strategy on all
# GPUs, a resumed run, NCCL, throughput and memory. One line a check (ok, FAIL or skip; name; figures), then a count.
#
# usage: scripts/gpu-check.sh [--stand-in] [--bin DIR]
#   --stand-in  without a GPU: on stand-ins for CUDA, NVML and NCCL that compute on the host
#               (tests/fake_cuda), with four devices
#   --bin DIR   where reranker, rr-launch and examples/parity are (default target/release)
#
# Needs this checkout, the three binaries (cargo build --release --workspace --bins --examples, on any
# machine with the same processor family) and python3 with PyTorch 2.11; no Rust, no network. The
# stand-ins are built first, by cc and c++.
#
# environment: PYTHON        the interpreter that has PyTorch (default python3)
#              NCCL_LIBRARY  a libnccl.so.2 to use instead of PyTorch's, for two ranks on one GPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

readonly PYTHON=${PYTHON:-python3}
readonly TORCH=2.11
# From this version on NCCL takes several ranks on one GPU.
readonly NCCL_SHARING=23003
# Losses of two ways to divide the same work.
readonly CLOSE=1e-4
# A worker whose peer died has to end within this many seconds.
readonly END_WITHIN=20

bin=${CARGO_TARGET_DIR:-target}/release
stand_in=false
passed=0 failed=0 skipped=0
gpus=0
port=0

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
    case $1 in
    --stand-in) stand_in=true ;;
    --bin)
        bin=${2:?--bin needs a directory}
        shift
        ;;
    --help | -h)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
    shift
done

report() { # ok|FAIL|skip, name, figures
    printf '%-4s  %-46s  %s\n' "$1" "$2" "$3"
    case $1 in
    ok) passed=$((passed + 1)) ;;
    FAIL) failed=$((failed + 1)) ;;
    skip) skipped=$((skipped + 1)) ;;
    esac
}

# Reports ok where the awk condition holds of the numbers a, b and c.
judge() { # name, figures, condition, a, b, c
    local verdict=FAIL
    awk -v a="$4" -v b="${5:-0}" -v c="${6:-0}" "BEGIN { exit !($3) }" && verdict=ok
    report "$verdict" "$1" "$2"
}

calculate() { awk "BEGIN { printf \"$1\", $2 }"; } # format, expression

last_line() { tail -n 1 "$1" 2>/dev/null | cut -c 1-160; }

# The number behind "key" in the last line of metrics of a type.
metric() { # run, type, key
    grep "\"type\":\"$2\"" "$work/$1/runs/metrics.jsonl" 2>/dev/null | tail -n 1 |
        sed -n "s/.*\"$3\":\([-0-9.e+]*\).*/\1/p"
}

# What workers held between steps, of all kinds and on the host too, in bytes.
held() { # run
    grep '"type":"memory"' "$work/$1/runs/metrics.jsonl" |
        sed 's/.*"held":{\([^}]*\)}.*/\1/' | tr ',' '\n' | awk -F: '{ sum += $2 } END { print sum }'
}

write_config() { # file, model, lines...
    local file=$1 model=$2
    shift 2
    printf '%s\n' "model_name_or_path: $model" "model_type: bert_encoder" "loss_type: pointwise_bce" \
        "train_dataset_type: pointwise" "max_label: 2" "epochs: 1" "log_interval: 1" "$@" >"$file"
}

# Trains into $work/RUN through the launcher, with a worker on each of the first GPUs.
launch() { # run, workers, arguments...
    local run=$1 gpus
    gpus=$(seq -s, 0 $(($2 - 1)))
    shift 2
    "$bin/rr-launch" --gpus "$gpus" --set "output_dir=$work/$run" "$@" >"$work/$run.log" 2>&1
}

# Starts one worker by hand, in the background.
worker() { # run, rank, world size, workers of a machine, arguments...
    local run=$1 rank=$2 world=$3 local_size=$4
    shift 4
    RANK=$rank WORLD_SIZE=$world LOCAL_RANK=0 LOCAL_WORLD_SIZE=$local_size \
        GROUP_RANK=$((rank / local_size)) MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
        OMP_NUM_THREADS=1 "$bin/reranker" train --device cuda --set "output_dir=$work/$run" \
        "$@" >"$work/$run.$rank.log" 2>&1 &
}

next_port() {
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
}

# Waits for processes; fails when one did.
wait_for_all() { # pid...
    local pid status=0
    for pid in "$@"; do wait "$pid" || status=1; done
    return $status
}

# Compares the last loss of a run with that of one worker that did the same work.
judge_loss() { # name, run, log, tolerance
    local loss reference difference
    loss=$(metric "$2" train loss) reference=$(metric reference train loss)
    if [[ -z $loss || -z $reference ]]; then
        report FAIL "$1" "$(last_line "$3")"
        return
    fi
    difference=$(calculate %.1e "($loss - $reference < 0 ? $reference - $loss : $loss - $reference)")
    judge "$1" "loss $loss, off one worker's by $difference" "a <= b" "$difference" "$4"
}

check_libraries() {
    local found root libraries
    found=$("$PYTHON" -c 'import torch; print(torch.__version__, torch.__path__[0])' 2>/dev/null)
    root=${found#* }
    if [[ $found != "$TORCH".* ]]; then
        report FAIL "PyTorch's libraries" "$PYTHON has PyTorch '${found%% *}', expected $TORCH"
        return 1
    fi
    libraries=$root/lib$(printf ':%s' "${root%/torch}"/nvidia/*/lib)
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    report ok "PyTorch's libraries" "${found%% *}"
    found=$("$PYTHON" -c 'import torch
for i in range(torch.cuda.device_count()): print(torch.cuda.get_device_name(i))' 2>/dev/null)
    gpus=$(grep -c . <<<"$found")
    judge "GPUs" "$gpus: ${found//$'\n'/, }" "a > 0" "$gpus"
    ((gpus > 0))
}

# Loads libtorch's CUDA half into our own process first of all.
check_parity() {
    local line verdict rest before=$((passed + failed))
    while read -r verdict rest; do
        line=${rest%%  *}
        report "$verdict" "$line" "${rest#*  }"
    done < <("$bin/examples/parity" cuda tests/golden/bert_tiny tests/golden/bert_odd \
        2>"$work/parity.log")
    ((passed + failed > before)) || report FAIL "parity" "$(last_line "$work/parity.log")"
}

# Every shipped file, offload, and low precision, against one worker that takes batches as large as
# all of theirs together.
check_strategies() {
    local workers=$1 file name run
    local config=$work/tiny.yaml total=$((2 * workers))
    head -n $((4 * total)) example_data/train_pointwise.jsonl >"$work/tiny.jsonl"
    write_config "$config" tests/golden/bert_tiny "train_dataset: $work/tiny.jsonl" "max_len: 48" \
        "lr: 1e-3" "max_grad_norm: 0.5" "batch_size: 2"
    launch reference 1 --config "$config" --set batch_size=$total
    for file in config/deepspeed/*.yaml config/fsdp/*.yaml; do
        name=${file#config/} run=${name//\//-}
        if [[ $name == fsdp/hybrid.yaml ]]; then
            check_hybrid "$workers" "$config"
            continue
        fi
        launch "$run" "$workers" --config "$config" --parallel "$file"
        judge_loss "$name x $workers" "$run" "$work/$run.log" $CLOSE
    done
    local offload=(--set deepspeed_config.offload_optimizer_device=cpu)
    launch offload2 "$workers" --config "$config" --parallel config/deepspeed/zero2.yaml "${offload[@]}"
    judge_loss "zero2, states offloaded x $workers" offload2 "$work/offload2.log" $CLOSE
    offload+=(--set deepspeed_config.offload_param_device=cpu)
    launch offload3 "$workers" --config "$config" --parallel config/deepspeed/zero3.yaml "${offload[@]}"
    judge_loss "zero3, all offloaded x $workers" offload3 "$work/offload3.log" $CLOSE
    for precision in bf16 fp16; do
        launch $precision "$workers" --config "$config" --parallel config/deepspeed/zero3.yaml \
            --set mixed_precision=$precision
        judge_loss "zero3 in $precision x $workers" $precision "$work/$precision.log" 5e-2
    done
}

# Workers by hand, as if half of them were on another machine.
check_hybrid() { # workers, config
    local workers=$1 rank pids=()
    if ((workers < 2 || workers % 2)); then
        report skip "fsdp/hybrid.yaml" "needs an even number of GPUs, here $workers"
        return
    fi
    next_port
    for ((rank = 0; rank < workers; rank++)); do
        CUDA_VISIBLE_DEVICES=$rank worker hybrid "$rank" "$workers" $((workers / 2)) --config "$2" \
            --parallel config/fsdp/hybrid.yaml
        pids+=($!)
    done
    wait_for_all "${pids[@]}"
    judge_loss "fsdp/hybrid.yaml x $workers" hybrid "$work/hybrid.0.log" $CLOSE
}

# Two ranks on the first GPU, which NCCL takes from 2.30.3 on.
check_shared_gpu() {
    local name="two ranks on one GPU" version stage pids
    version=$("$PYTHON" -c 'import ctypes, sys
number = ctypes.c_int()
ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(number))
print(number.value)' "${NCCL_LIBRARY:-libnccl.so.2}" 2>/dev/null)
    if ((${version:-0} < NCCL_SHARING)); then
        report skip "$name" "NCCL is ${version:-not found}, needed $NCCL_SHARING; set NCCL_LIBRARY"
        return
    fi
    head -n 16 example_data/train_pointwise.jsonl >"$work/tiny.jsonl"
    launch reference 1 --config "$work/tiny.yaml" --set batch_size=4 --overwrite
    for stage in 0 1 2 3; do
        start_pair "shared$stage" --config "$work/tiny.yaml" \
            --parallel "config/deepspeed/zero$stage.yaml"
        wait_for_all "${pids[@]}"
        judge_loss "$name, zero$stage" "shared$stage" "$work/shared$stage.0.log" $CLOSE
    done
    check_death "two ranks on one GPU"
}

# Two workers by hand into `pids`, on the first GPU.
start_pair() { # run, arguments...
    local rank
    next_port
    pids=()
    for rank in 0 1; do
        CUDA_VISIBLE_DEVICES=0 NCCL_MULTI_RANK_GPU_ENABLE=1 \
            LD_PRELOAD=${NCCL_LIBRARY:-}${LD_PRELOAD:+:$LD_PRELOAD} worker "$1" "$rank" 2 2 "${@:2}"
        pids+=($!)
    done
}

# A worker that is killed in the middle takes the other with it, soon and with a message.
check_death() { # name
    local name="a rank dies: $1" pids begin seconds waited=0
    start_pair death --config "$work/tiny.yaml" --parallel config/deepspeed/zero3.yaml \
        --set epochs=100000
    until [[ -n $(metric death train loss) ]] || ((++waited > 300)); do sleep 0.1; done
    kill -KILL "${pids[1]}" 2>/dev/null
    begin=$(date +%s%N)
    (sleep $((3 * END_WITHIN)) && kill -KILL "${pids[0]}") 2>/dev/null &
    local guard=$!
    wait "${pids[0]}" 2>/dev/null
    local code=$?
    seconds=$(calculate %.1f "($(date +%s%N) - $begin) / 1e9")
    kill "$guard" 2>/dev/null
    wait "${pids[1]}" "$guard" 2>/dev/null
    judge "$name" "the other ended after $seconds s with code $code: $(last_line "$work/death.0.log")" \
        "a <= $END_WITHIN && b == 1" "$seconds" $code
}

# A run that is killed while it saves and then goes on ends with the bits of one that is left alone: with
# dropout, in the precisions of every attention kernel, and where several workers divide the work.
check_resume() { # workers
    local workers=$1 precision name
    "$PYTHON" scripts/random_bert.py --dropout 0.1 --layers 2 --hidden 64 --heads 4 --vocab 2000 \
        "$work/dropping" >"$work/dropping.log" 2>&1
    head -n 64 example_data/train_pointwise.jsonl >"$work/dropping.jsonl"
    write_config "$work/dropping.yaml" "$work/dropping" "train_dataset: $work/dropping.jsonl" \
        "max_len: 64" "lr: 1e-3" "batch_size: 4" "save_steps: 2"
    for precision in no bf16 fp16; do
        name=${precision/no/fp32}
        judge_resume "resumed in $name" "whole-$name" 1 --set mixed_precision=$precision
    done
    if ((workers > 1)); then
        judge_resume "resumed under zero3 x $workers" whole-zero3 "$workers" \
            --parallel config/deepspeed/zero3.yaml
    fi
}

judge_resume() { # name, run, workers, arguments...
    local name=$1 run=$2 workers=$3 killed=killed-$2 verdict=FAIL
    shift 3
    launch "$run" "$workers" --config "$work/dropping.yaml" "$@"
    RR_FAIL_POINT=before_manifest:2@0 launch "$killed" "$workers" --config "$work/dropping.yaml" "$@"
    launch "$killed" "$workers" --config "$work/dropping.yaml" "$@"
    if ! grep -q "going on from .*/step-2:" "$work/$killed.log"; then
        report FAIL "$name" "did not go on from step 2: $(last_line "$work/$killed.log")"
        return
    fi
    cmp "$work/$run/model/model.safetensors" "$work/$killed/model/model.safetensors" \
        >"$work/$killed.cmp" 2>&1 && verdict=ok
    report $verdict "$name" "killed and resumed at step 2: $(
        [[ $verdict == ok ]] && echo "the same bits" || last_line "$work/$killed.cmp")"
}

# A model of MiniLM's shape: throughput, and memory against the forecast and the formulas.
check_size() {
    local workers=$1 shape=() pairs=2048 batch=64 max_len=256 parameters
    if $stand_in; then
        shape=(--layers 2 --hidden 64 --heads 4 --vocab 2000) pairs=64 batch=4 max_len=64
    fi
    parameters=$("$PYTHON" scripts/random_bert.py "$work/sized" "${shape[@]}" |
        sed 's/.*: \([0-9,]*\) parameters/\1/; s/,//g')
    head -n $pairs example_data/train_pointwise.jsonl >"$work/sized.jsonl"
    write_config "$work/sized.yaml" "$work/sized" "train_dataset: $work/sized.jsonl" \
        "max_len: $max_len" "batch_size: $batch" "mixed_precision: bf16"
    check_throughput "throughput in bf16" throughput
    check_throughput "throughput in bf16, not deterministic" fast --set deterministic=false
    local stage run
    for stage in 0 2 3; do
        run=sized-zero$stage
        launch $run "$workers" --config "$work/sized.yaml" \
            --parallel "config/deepspeed/zero$stage.yaml" --set mixed_precision=no
        judge_held "$run" $stage "$workers" "$parameters"
    done
}

# Bytes held between steps in fp32: 4 for parameters, 4 for gradients, 8 for states, each divided
# from its stage on (Rajbhandari et al. 2020, section 3).
judge_held() { # run, stage, workers, parameters
    local held formula name="held under zero$2 x $3"
    held=$(held "$1")
    if [[ -z $held ]]; then
        report FAIL "$name" "$(last_line "$work/$1.log")"
        return
    fi
    formula=$(awk -v s="$2" -v n="$3" -v p="$4" 'BEGIN {
        printf "%.0f", p * (4 / (s >= 3 ? n : 1) + 4 / (s >= 2 ? n : 1) + 8 / (s >= 1 ? n : 1)) }')
    judge "$name" "$(calculate %.1f "$held / 1e6") MB, formula $(calculate %.1f "$formula / 1e6") MB" \
        "a >= 0.95 * b && a <= 1.05 * b" "$held" "$formula"
}

# One worker in bf16. The first step, which warms everything up, is left out.
check_throughput() { # name, run, arguments...
    local name=$1 run=$2 first last rate forecast peak
    launch "$run" 1 --config "$work/sized.yaml" "${@:3}"
    first=$(sed -n '1s/.*"elapsed_s":\([0-9.e-]*\).*"pairs":\([0-9]*\).*/\1 \2/p' \
        "$work/$run/runs/metrics.jsonl" 2>/dev/null)
    last="$(metric "$run" train elapsed_s) $(metric "$run" train pairs)"
    if [[ -z $first || $last == " " ]]; then
        report FAIL "$name" "$(last_line "$work/$run.log")"
        return
    fi
    rate=$(awk -v a="$first" -v b="$last" \
        'BEGIN { split(a, f); split(b, l); printf "%.1f", (l[2] - f[2]) / (l[1] - f[1]) }')
    judge "$name" "$rate pairs/s, one worker" "a > 0" "$rate"
    forecast=$(sed -n 's/.*; \([0-9]*\) MB in all.*/\1/p' "$work/$run.log")
    peak=$(calculate %.0f "$(metric "$run" memory peak_gpu) / 1e6")
    judge "peak GPU memory, $run" "$peak MB, forecast up to ${forecast:-none} MB" \
        "a > 0 && a <= 1.1 * b" "$peak" "${forecast:-0}"
}

# Has every program from here on find four devices that are none.
use_stand_ins() {
    local built=${CARGO_TARGET_DIR:-target}/fake_cuda
    tests/fake_cuda/build.sh "$built" || exit 2
    built=$(realpath "$built")
    export LD_PRELOAD=$built/libcudart.so.13:$built/libfake_cuda.so LD_LIBRARY_PATH=$built
    export FAKE_CUDA_DEVICES=4 NCCL_LIBRARY=$built/libfake_nccl.so OMP_NUM_THREADS=1
}

main() {
    local program
    for program in reranker rr-launch examples/parity; do
        if [[ ! -x $bin/$program ]]; then
            echo "$bin/$program is missing: run cargo build --release --workspace --bins --examples" >&2
            exit 2
        fi
    done
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    if $stand_in; then use_stand_ins; fi
    if check_libraries; then
        check_parity
        check_strategies "$gpus"
        check_resume "$gpus"
        check_shared_gpu
        check_size "$gpus"
    fi
    printf '%d passed, %d failed, %d skipped\n' $passed $failed $skipped
    ((failed == 0 && passed > 0))
}

main
