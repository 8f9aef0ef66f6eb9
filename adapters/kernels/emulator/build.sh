#!/bin/sh
# Builds the kernels for the processor: libespalier_kernels.so and the checker, into the directory given (default:
# target/kernels). It needs a C++20 compiler and nothing of CUDA.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
to=${1:-$here/../../../target/kernels}
mkdir -p "$to"
export CXX="${CXX:-g++}" TO="$to" HERE="$here"
export FLAGS="-std=c++20 -O2 -ffp-contract=off -fno-strict-aliasing -fPIC -pthread -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter ${CXXFLAGS:-}"
{
    ls "$here"/../*.cu | grep -v /all.cu
    echo "$here/emulator.cc"
    echo "$here/check.cc"
} | xargs -P "${JOBS:-2}" -n 1 sh -c '$CXX $FLAGS -I"$HERE/.." -x c++ -c "$0" -o "$TO/$(basename "${0%.*}").o"'
rm -f "$to/all.o"
objects=$(ls "$to"/*.o | grep -v /check.o)
$CXX $FLAGS -shared $objects -o "$to/libespalier_kernels.so"
$CXX $FLAGS "$to/check.o" "$to/libespalier_kernels.so" -Wl,-rpath,"$to" -o "$to/check"
