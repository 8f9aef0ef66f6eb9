#!/usr/bin/env bash
# Espalier beside transformers + PEFT: prepares the peer once (about 6 GB of Python packages), then runs `peers compare`.
# ESPALIER_PEERS names the directory of peft_peer.py and its requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

peers=${ESPALIER_PEERS:-../shared/peers}
cache=${ESPALIER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/espalier}
python=$cache/peers/bin/python
[ -f "$peers/peft_peer.py" ] || { echo "no peft_peer.py in '$peers'; set ESPALIER_PEERS" >&2; exit 1; }
model=$(scripts/fetch-model.sh)

if ! "$python" -c 'import peft, torch' 2>/dev/null; then
  python3 -m venv "$cache/peers"
  "$cache/peers/bin/pip" install --quiet --disable-pip-version-check -r "$peers/requirements.txt"
fi
[ -f "$cache/peers-hf/model.safetensors" ] || "$python" "$peers/peft_peer.py" prepare "$model" "$cache/peers-hf"
[ -d "$cache/peers-adapters/a7" ] || "$python" "$peers/peft_peer.py" adapters "$cache/peers-hf" "$cache/peers-adapters" 8 16

cargo build --workspace --bins
exec target/debug/peers compare --model "$model" --hf "$cache/peers-hf" --adapters "$cache/peers-adapters" \
  --python "$python" --peer "$peers/peft_peer.py" "$@"
