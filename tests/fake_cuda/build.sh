#!/usr/bin/env bash
# Builds the stand-in for CUDA (docs/gpu-check.md) where it is older than its sources.
#
# usage: tests/fake_cuda/build.sh DIR
#
# To run a program with it:
#   LD_PRELOAD=DIR/libcudart.so.13:DIR/libfake_cuda.so LD_LIBRARY_PATH=DIR PROGRAM…
#
# Needs a libtorch with its CUDA half (.libtorch, as scripts/setup.sh makes it), cc, c++, python3, readelf.
# Exit code 2: there is none.
set -euo pipefail

out=$(realpath -m "${1:?usage: tests/fake_cuda/build.sh DIR}")
cd "$(dirname "${BASH_SOURCE[0]}")"
torch=$(readlink -f ../../.libtorch)
headers=$torch/../nvidia/cu13/include
for needed in "$torch/lib/libtorch_cuda.so" "$headers/cuda_runtime_api.h"; do
    if [[ ! -e $needed ]]; then
        echo "fake CUDA: no $needed; scripts/setup.sh --cpu brings it" >&2
        exit 2
    fi
done
# Tests and the GPU check may want it at the same time.
mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9
if [[ -e $out/built && -z $(find . ../fake_nccl ../../scripts/torch_cpu_stubs.py -newer "$out/built") &&
    $(<"$out/built") == "$torch" ]]; then
    exit
fi

rm -rf "$out"
mkdir -p "$out/stubs"
${PYTHON:-python3} ../../scripts/torch_cpu_stubs.py "$torch/lib" "$out/stubs"
echo 'libcudart.so.13 { global: *; };' >"$out/map"
library() { # name, options...
    cc -std=gnu11 -O1 -shared -fPIC -pthread -Wall -Wextra -Werror -Wl,-soname,"$1" -o "$out/$1" "${@:2}"
}
c++ -std=c++20 -O1 -fPIC -Wall -Wextra -Werror -c races.cpp -o "$out/races.o"
library libcudart.so.13 runtime.c launch.c "$out/races.o" -I. -isystem "$headers" \
    -Wl,--version-script="$out/map" -lstdc++
library libcuda.so.1 driver.c
library libnvidia-ml.so.1 nvml.c
library libfake_nccl.so ../fake_nccl/nccl.c
library libfake_cuda.so load.c
c++ -std=c++20 -O1 -shared -fPIC -Wall -Wextra -Werror -isystem "$torch/include" \
    -isystem "$torch/include/torch/csrc/api/include" -o "$out/libfake_kernels.so" kernels.cpp attention.cpp \
    -L"$torch/lib" -ltorch_cpu -lc10
printf '%s\n' "$torch" >"$out/built"
