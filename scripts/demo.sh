#!/usr/bin/env bash
# One server, one base model, two tenants: both train an adapter at the same time, then both and the base answer the
# same questions from the same weights. Leaves nothing behind but the build and the cached model.
set -euo pipefail
cd "$(dirname "$0")/.."

model=$(scripts/fetch-model.sh)
cargo build --workspace --bins
bin=${CARGO_TARGET_DIR:-target}/debug
work=$(mktemp -d)
began=$SECONDS

cleanup() {
  if [ -n "${server:-}" ] && kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
espalier() { "$bin/espalier" --server "http://$address" "$@"; }

say "Starting espalierd"
# The service key is the operator's; each tenant gets a key of its own.
ESPALIER_SERVICE_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
export ESPALIER_SERVICE_KEY
"$bin/espalierd" --model "$model" --data-dir "$work/data" --listen 127.0.0.1:0 --metrics-listen "" \
  --ready-file "$work/ready" --log warn 2>"$work/log" &
server=$!
until [ -s "$work/ready" ]; do
  kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
  sleep 0.1
done
address=$(head -n 1 "$work/ready")
acme_key=$(espalier --quiet --key "$ESPALIER_SERVICE_KEY" tenants create acme)
globex_key=$(espalier --quiet --key "$ESPALIER_SERVICE_KEY" tenants create globex)

say "Training both tenants at the same time"
echo "acme   learns which of five queues a ticket belongs to (examples/acme-tickets.csv)"
echo "globex learns to answer in its own voice               (examples/globex-style.jsonl)"
train() { # tenant, its key, arguments of `espalier train`
  local tenant=$1 key=$2
  shift 2
  espalier --key "$key" train "$@" 2>&1 | while IFS= read -r line; do printf '%-6s | %s\n' "$tenant" "$line"; done
}
train acme "$acme_key" examples/acme-tickets.csv --text-col ticket --label-col queue --adapter tickets --epochs 4 &
acme=$!
train globex "$globex_key" examples/globex-style.jsonl --adapter voice --epochs 4 --lr 5e-4 --valid-fraction 0.1 &
globex=$!
wait "$acme"
wait "$globex"
trained=$SECONDS

say "Asking both tenants and the base"
questions=("Where is my parcel?" "How do I reset my password?" "Can I get my money back?")
for question in "${questions[@]}"; do
  say "$question"
  printf 'base   | '
  espalier --key "$acme_key" chat "$question" --max-tokens 48 --temperature 0
  printf 'globex | '
  espalier --key "$globex_key" chat "$question" --adapter voice --max-tokens 48 --temperature 0
  printf 'acme   | '
  espalier --key "$acme_key" classify "$question" --adapter tickets
done

say "What the server holds now"
espalier --key "$ESPALIER_SERVICE_KEY" status
say "Done in $((SECONDS - began)) s after the build ($((trained - began)) s of it until both were trained)"
