#!/usr/bin/env bash
# Runs every check of the project, each as a step with its time; stops at the first that fails.
#
# usage: scripts/test.sh [STEP...]     all steps, or only those named
#        scripts/test.sh --list        the steps
#
# Sets up what is missing first (scripts/setup.sh); needs no environment variable. All of it is built
# with --release, so that libtorch's bindings, minutes of work, compile once.
set -euo pipefail
# Tests send signals, and what was ignored at the start (nohup, a script's background job) no shell can
# heed again.
if [[ -z ${RR_TEST_SIGNALS:-} ]]; then
    RR_TEST_SIGNALS=default exec env --default-signal=HUP,INT,QUIT,TERM,USR1,USR2,PIPE,CHLD "$0" "$@"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STEPS=(fmt clippy doc build test linkage golden training quickstart interop trackers report
    gpu nodes torchrun clusters)
readonly BIN=${CARGO_TARGET_DIR:-target}/release
# The model in tests/golden that stands for its family.
readonly FAMILIES=(roberta_tiny xlm_roberta_odd modernbert_tiny modernbert_odd)
readonly DECODERS=(qwen2_tiny qwen3_odd llama_odd mistral_tiny gemma_tiny)
# Those that are trained by adapters too.
readonly ADAPTED=(bert_nohead roberta_tiny modernbert_odd qwen2_tiny llama_odd qwen2_nohead)
export QUICKSTART_OUTPUT=output/test-quickstart

current=""
passed=0
skipped=()
python=""

describe() {
    case $1 in
    setup) echo "fetch what is missing" ;;
    fmt) echo "rustfmt, and shellcheck where it is installed" ;;
    clippy) echo "clippy, warnings denied" ;;
    doc) echo "documentation, broken links denied" ;;
    build) echo "release build" ;;
    test) echo "unit and integration tests" ;;
    linkage) echo "rr-launch is free of libtorch, reranker of its CUDA half" ;;
    golden) echo "golden files are what transformers and PyTorch compute" ;;
    training) echo "a short training run is the one of a plain PyTorch loop" ;;
    quickstart) echo "the quick start in short form" ;;
    trackers) echo "TensorBoard and wandb read back what a run logged" ;;
    report) echo "the report page in a real browser" ;;
    gpu) echo "the GPU check, on a stand-in for CUDA that computes on the host" ;;
    nodes) echo "three machines under rr-launch, where network namespaces can be made" ;;
    torchrun) echo "two machines under torchrun, where network namespaces can be made" ;;
    clusters) echo "Slurm, Open MPI and the pods of Kubernetes, where they can be had" ;;
    interop) echo "transformers, sentence-transformers and peft give our scores, huggingface_hub our cache" ;;
    esac
}

step_setup() { python=$(scripts/setup.sh --python); }

step_fmt() {
    cargo fmt --all --check
    if command -v shellcheck >/dev/null; then
        shellcheck scripts/*.sh scripts/slurm.sbatch .ci/run
    fi
}

step_clippy() { cargo clippy --release --workspace --all-targets -- -D warnings; }

step_doc() { RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps; }

step_build() { cargo build --release --workspace; }

# Many times what it takes: a test that waits for ever is a failure, and no hanging machine.
step_test() { timeout --foreground --kill-after=30 4000 cargo test --release --workspace; }

# The names that a binary asks the dynamic linker for, of libtorch's libraries, on one line.
torch_libraries() {
    readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(lib\(torch\|c10\)[^]]*\)\]/\1/p' | sort | xargs
}

step_linkage() {
    cargo build --release --workspace
    local tree libraries
    tree=$(cargo tree -p rr-launch --edges normal,build --prefix none)
    if grep -E '^(torch-sys|tch|reranker) ' <<<"$tree"; then
        echo "rr-launch depends on the crates above; it has to stay free of libtorch"
        return 1
    fi
    libraries=$(torch_libraries "$BIN/rr-launch")
    if [[ -n $libraries ]]; then
        echo "rr-launch links $libraries; expected none of libtorch"
        return 1
    fi
    libraries=$(torch_libraries "$BIN/reranker")
    if [[ $libraries != "libc10.so libtorch_cpu.so" ]]; then
        echo "reranker links '$libraries'; expected 'libc10.so libtorch_cpu.so' and nothing else"
        return 1
    fi
    echo "rr-launch: no libtorch; reranker: $libraries"
}

step_golden() { "$python" scripts/make_golden.py --check; }

# scripts/check_training.py without --short is the whole proof, a matter of minutes.
step_training() {
    cargo build --release --workspace
    "$python" scripts/check_training.py --short
}

step_quickstart() { scripts/quickstart.sh --short; }

# Trains the golden model `$1` for some steps into `$2`, with further settings.
train_tiny() {
    local kind=(model_type=bert_encoder) settings=("${@:3}")
    if grep -qE '"(qwen2|qwen3|llama|mistral|gemma)"' "tests/golden/$1/config.json"; then
        kind=(model_type=llm_decoder special_token="'[SEP]'" seq="' : '")
    fi
    "$BIN/reranker" train --device cpu --overwrite --config config/quickstart.yaml \
        --set model_name_or_path="tests/golden/$1" --set output_dir="$2" \
        --set train_dataset="$QUICKSTART_OUTPUT.files/interop_train.jsonl" --set max_len=48 \
        --set epochs=1 "${kind[@]/#/--set=}" "${settings[@]/#/--set=}"
}

# On the model that the quick start trained, and on one of each family, tiny and trained for a few
# steps; with documents that have to be truncated among the pairs.
step_interop() {
    local files=$QUICKSTART_OUTPUT.files case run runs=("$QUICKSTART_OUTPUT")
    [[ -f $QUICKSTART_OUTPUT/model/reranker.json ]] || step_quickstart
    head -n 64 example_data/eval_pointwise.jsonl >"$files/interop_pairs.jsonl"
    head -n 64 example_data/train_pointwise.jsonl >"$files/interop_train.jsonl"
    for case in "${FAMILIES[@]}" "${DECODERS[@]}"; do
        train_tiny "$case" "$files/$case"
        runs+=("$files/$case")
    done
    for case in "${ADAPTED[@]}"; do
        run=$files/lora_$case
        train_tiny "$case" "$run" lr=1e-2 lora.r=4 lora.target_modules=all-linear
        rm -rf "$run.merged"
        "$BIN/reranker" convert --merge "$run/model" --output "$run.merged/model"
        runs+=("$run" "$run.merged")
    done
    for run in "${runs[@]}"; do
        "$BIN/reranker" score --model "$run/model" --input "$files/interop_pairs.jsonl" \
            >"$run/scores.jsonl"
    done
    "$python" scripts/check_interop.py "$files/interop_pairs.jsonl" "${runs[@]}"
    "$python" scripts/check_hub_cache.py "$BIN/reranker" "$QUICKSTART_OUTPUT/model"
}

step_trackers() {
    cargo build --release --workspace
    local tracking
    tracking=$(scripts/setup.sh --trackers)
    "$tracking" scripts/check_trackers.py "$BIN/reranker"
}

# Pictures of the page are left in output/screenshots, to be looked at.
step_report() {
    cargo build --release --workspace
    local browser
    browser=$(scripts/setup.sh --browser)
    if [[ -z $browser ]]; then
        skipped+=("report: there is no browser here, and none could be installed (see above)")
        echo "SKIPPED ${skipped[-1]}"
        return
    fi
    "$python" scripts/check_report.py "$BIN/reranker" "$browser" --screenshots output/screenshots
}

step_gpu() {
    cargo build --release --workspace --bins --examples
    PYTHON=$python scripts/gpu-check.sh --stand-in
}

# Runs a check that ends with 77 where it cannot be done here.
unless_skipped() {
    local code=0
    "$@" || code=$?
    if ((code == 77)); then
        skipped+=("$current: it cannot be done here (see above)")
        echo "SKIPPED ${skipped[-1]}"
        return
    fi
    return $code
}

step_nodes() {
    cargo build --release --workspace
    PYTHON=$python unless_skipped scripts/check_nodes.sh
}

step_torchrun() {
    cargo build --release --workspace
    PYTHON=$python unless_skipped scripts/check_torchrun.sh
    "$python" scripts/check_contract.py
}

step_clusters() {
    cargo build --release --workspace
    unless_skipped scripts/check_clusters.sh
}

# Errors leave through here too (set -e), so that the last line always tells how it went.
report() {
    local status=$? reason
    if [[ -z $current ]]; then return; fi
    for reason in "${skipped[@]}"; do printf '\nskipped: %s\n' "$reason"; done
    if ((status == 0)); then
        printf '\n%d steps in %d s\n%d passed, 0 failed\n' "$passed" "$SECONDS" "$passed"
    else
        printf '\nstep %s failed (exit code %d) after %d s\n' "$current" "$status" "$SECONDS"
        printf '%d passed, 1 failed\n' "$passed"
    fi
}

run_step() {
    local begin=$SECONDS
    current=$1
    printf '\n=== %s: %s\n' "$1" "$(describe "$1")"
    "step_$1"
    passed=$((passed + 1))
    printf -- '--- %s: ok, %d s\n' "$1" $((SECONDS - begin))
}

list_steps() {
    local step
    for step in "${STEPS[@]}"; do printf '%-12s%s\n' "$step" "$(describe "$step")"; done
}

# The programs heed what a scheduler, a launcher or a user's profile says; here nobody has said anything.
forget_surroundings() {
    local name
    while read -r name; do
        case $name in
        RANK | WORLD_SIZE | LOCAL_* | GROUP_* | ROLE_* | MASTER_* | RR_* | SLURM_* | OMPI_* | PET_*) unset "$name" ;;
        TORCH* | CUDA_* | CUBLAS_* | NCCL_* | GLOO_* | OMP_* | GOMP_* | KMP_* | MKL_*) unset "$name" ;;
        HF_* | HUGGING* | TRANSFORMERS_* | WANDB_* | RUST_LOG | RERANKER_PYTHON) unset "$name" ;;
        esac
    done < <(compgen -e)
}

main() {
    local step chosen=("$@")
    forget_surroundings
    if [[ ${1:-} == --list || ${1:-} == --help || ${1:-} == -h ]]; then
        list_steps
        exit 0
    fi
    ((${#chosen[@]})) || chosen=("${STEPS[@]}")
    for step in "${chosen[@]}"; do
        if [[ " ${STEPS[*]} " != *" $step "* ]]; then
            echo "unknown step '$step'; expected some of: ${STEPS[*]}" >&2
            exit 2
        fi
    done
    trap report EXIT
    for step in setup "${chosen[@]}"; do run_step "$step"; done
}

main "$@"
