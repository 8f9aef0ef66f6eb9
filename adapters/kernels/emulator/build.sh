#!/bin/sh
# Builds the kernels for the processor: libespalier_kernels.so and the checker, into the directory given (default: target).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
to=${1:-$here/../../../target/kernels}
mkdir -p "$to"
flags="-std=c++20 -O2 -ffp-contract=off -fPIC -Wall -Wextra -Wno-unknown-pragmas ${CXXFLAGS:-}"
cxx=${CXX:-g++}
objects=
for file in "$here"/../*.cu; do
    name=$(basename "$file" .cu)
    [ "$name" = all ] && continue
    object=$to/$name.o
    objects="$objects $object"
    $cxx $flags -I"$here/.." -x c++ -c "$file" -o "$object" &
    [ "$(jobs -p | wc -l)" -lt "${JOBS:-2}" ] || wait
done
$cxx $flags -c "$here/emulator.cc" -o "$to/emulator.o"
$cxx $flags -c "$here/check.cc" -o "$to/check.o"
wait
$cxx $flags -shared $objects "$to/emulator.o" -o "$to/libespalier_kernels.so"
$cxx $flags "$to/check.o" "$to/libespalier_kernels.so" -Wl,-rpath,"$to" -o "$to/check"
