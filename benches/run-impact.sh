#!/usr/bin/env bash
# What training costs those who are served, and what serving leaves of training: run-impact.sh ESPALIERD ESPALIER MODEL [ROUNDS]
#
# A fixed load alone and beside a job, in turns, at each bound of --training-max-tpot-impact; the mean over a request's tokens
# after its first ("time per output token") is what the bound is about; 100 is no bound. Needs python3 for the table; nothing else should run.
set -euo pipefail
cd "$(dirname "$0")/.."
daemon=$1 cli=$2 model=$3 rounds=${4:-3}
load=(--rate 0.5 --arrivals constant --input 64 --output 48 --duration 40s --warmup 5s --seed 1)
work=$(mktemp -d)
trap '[ -z "${server:-}" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

start() { # flags
  rm -rf "$work/data" "$work/ready"
  "$daemon" --model "$model" --data-dir "$work/data" --listen 127.0.0.1:0 --metrics-listen "" --ready-file "$work/ready" \
    --log warn "$@" >/dev/null 2>"$work/log" &
  server=$!
  until [ -s "$work/ready" ]; do
    kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
  done
  ESPALIER_SERVER=http://$(head -n 1 "$work/ready")
  ESPALIER_API_KEY=
  unset ESPALIER_API_KEY
  export ESPALIER_SERVER
  ESPALIER_API_KEY=$("$cli" --quiet tenants create impact)
  export ESPALIER_API_KEY
}

measure() { # name, flags of the server, flags of the load
  local name=$1 flags=$2
  shift 2
  # shellcheck disable=SC2086
  start $flags
  "$cli" bench "${load[@]}" "$@" --out "$work/$name.json" >/dev/null
  "$cli" --json jobs list >"$work/$name.jobs"
  kill "$server"
  wait "$server" 2>/dev/null || true
  server=
}

job=(--beside "train:file=examples/globex-style.jsonl,adapter=voice,steps=1000")
for round in $(seq "$rounds"); do
  measure "alone.$round" ""
  for bound in 0.1 0.5 100; do
    measure "$bound.$round" "--training-max-tpot-impact $bound" "${job[@]}"
  done
  # The same job with nobody to serve.
  start
  "$cli" train examples/globex-style.jsonl --adapter voice --max-steps 60 --epochs 20 --quiet
  "$cli" --json jobs list >"$work/idle.$round.jobs"
  kill "$server"
  wait "$server" 2>/dev/null || true
  server=
done
python3 benches/impact.py "$work"
