#!/usr/bin/env bash
# Builds espalierd with the GPU kernels into target/cuda/espalierd: one binary for machines with and without a GPU.
#
# The compiler is $NVCC, or the nvcc of the path if it is new enough, or one from the Python index, kept in the cache. The build
# needs no GPU; ESPALIER_FATBIN may name kernels that are compiled already.
set -euo pipefail
cd "$(dirname "$0")/.."

limit_mib=24
cache=${ESPALIER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/espalier}

# Whether a compiler is 12.8 or newer: older ones cannot compress what they make.
new_enough() {
  local version
  version=$("$1" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
  [ -n "$version" ] && [ "$(printf '12.8\n%s\n' "$version" | sort -V | head -n 1)" = 12.8 ]
}

fetched() {
  local env=$cache/python-nvcc-13.0
  if ! compgen -G "$env/lib/python3*/site-packages/nvidia/cu13/bin/nvcc" >/dev/null; then
    rm -rf "$env"
    python3 -m venv "$env"
    "$env/bin/pip" install --quiet --disable-pip-version-check 'cuda-toolkit[nvcc,cccl]==13.0.*' >&2
  fi
  compgen -G "$env/lib/python3*/site-packages/nvidia/cu13/bin/nvcc"
}

compiler() {
  if [ -n "${NVCC:-}" ]; then
    echo "$NVCC"
  elif new_enough nvcc; then
    command -v nvcc
  else
    fetched
  fi
}

mib() {
  awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'
}

compressed() {
  if command -v xz >/dev/null; then xz -6 -c "$1"; else gzip -9 -c "$1"; fi
}

if [ -z "${ESPALIER_FATBIN:-}" ]; then
  NVCC=$(compiler)
  export NVCC
  echo "compiler: $NVCC"
fi
# The path of the program as cargo reports it, wherever the target directory is.
built=$(cargo build --workspace --features espalier-server/cuda --bin espalierd --message-format json-render-diagnostics |
  sed -n 's/.*"executable":"\([^"]*\/espalierd\)".*/\1/p' | tail -n 1)
mkdir -p target/cuda
strip -o target/cuda/espalierd "$built"

whole=$(stat -c %s "$built")
stripped=$(stat -c %s target/cuda/espalierd)
packed=$(compressed target/cuda/espalierd | wc -c)
echo "target/cuda/espalierd: $(mib "$whole") as built, $(mib "$stripped") stripped, $(mib "$packed") compressed"
if [ "$packed" -gt $((limit_mib * 1048576)) ]; then
  echo "build-cuda: more than $limit_mib MiB compressed" >&2
  exit 1
fi
