#!/usr/bin/env bash
# The table of where a step's time goes: run-profile.sh MODEL [DTYPE [SECONDS]]. Needs `perf` and a build with line tables (the
# default profile has them).
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1
dtype=${2:-f32}
seconds=${3:-8}
bin=${ESPALIER_PROFILE:-target/debug/profile}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
columns=()
for rows in 1 8 32 0; do
  name=decode-$rows
  [ "$rows" = 0 ] && name=prefill-512
  echo "== $name"
  "$bin" drive --model "$model" --dtype "$dtype" --rows "$rows" --seconds "$seconds" --perf "$out/$name.data"
  perf script -i "$out/$name.data" -F tid,comm,ip,sym,srcline --max-stack 127 2>/dev/null >"$out/$name.txt"
  columns+=("$name=$out/$name.txt")
done
"$bin" table "${columns[@]}"
