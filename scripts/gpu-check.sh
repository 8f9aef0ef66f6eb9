#!/usr/bin/env bash
# Proves and measures a built espalierd on the GPU of this machine: gpu-check.sh [PROGRAM] [PART ...].
#
# The parts are tests, serve, train and peer, each with eight minutes. Tables and their JSON go to $OUT, else to ./gpu-check. It
# needs no compiler and no network; ESPALIER_ variables (ESPALIER_SYNTHETIC, ESPALIER_DEVICE) choose model and device.
set -uo pipefail

program=$(dirname "$0")/../target/cuda/espalierd
if [ $# -gt 0 ] && [ -f "$1" ]; then
  program=$1
  shift
fi
if [ ! -x "$program" ]; then
  echo "gpu-check: no program at $program; build one with scripts/build-cuda.sh" >&2
  exit 2
fi
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then
  parts=(tests serve train peer)
fi
out=${OUT:-gpu-check}
mkdir -p "$out"

# What is known of a part, from its last line of JSON or from how it ended.
verdict() {
  local json=$1 code=$2
  if [ ! -s "$json" ]; then
    echo "no result (exit $code)"
    return
  fi
  local rows failed skipped cut
  rows=$(grep -o '"rows":.*' "$json" | grep -o '{' | wc -l)
  failed=$(grep -o '"failed":' "$json" | wc -l)
  skipped=$(grep -o '"not run":"[^"]*"' "$json" | head -n 1)
  cut=$(grep -o '"cut":true' "$json" | sed 's/.*/, cut/')
  echo "$rows rows, $failed failed$cut (exit $code) $skipped"
}

summary=()
worst=0
for part in "${parts[@]}"; do
  echo "=== $part"
  began=$SECONDS
  timeout 480 "$program" check "$part" 2>"$out/$part.err" | tee "$out/$part.txt"
  code=${PIPESTATUS[0]}
  grep '^{"part":' "$out/$part.txt" | tail -n 1 >"$out/$part.json"
  if [ "$code" -ne 0 ]; then
    worst=1
    tail -n 20 "$out/$part.err"
  fi
  summary+=("$part: $(verdict "$out/$part.json" "$code"), $((SECONDS - began)) s")
done

echo "=== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit "$worst"
