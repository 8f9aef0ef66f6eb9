#!/usr/bin/env bash
# Espalier beside its peers: prepares them once (about 6 GB of Python packages; llama.cpp's server takes some minutes to
# compile), then measures.
#
#   benches/run-peers.sh [serve] [--dtype NAME]... [--rounds N]   eight tenants over gRPC beside PEFT and a llama.cpp server
#   benches/run-peers.sh compare [--rounds N]                     engine and trainer beside PEFT, no server
#
# ESPALIER_PEERS names the directory of peft_peer.py, llama_server_peer.py and requirements.txt. What cannot be had is
# said and left out of the table. ESPALIER_TEXTS names a CSV with the columns text and category, for training on short texts.
set -euo pipefail
cd "$(dirname "$0")/.."

peers=${ESPALIER_PEERS:-../shared/peers}
cache=${ESPALIER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/espalier}
python=$cache/peers/bin/python
llama=$cache/peers-llama
llama_package=llama-cpp-python==0.3.36

say() { printf 'run-peers: %s\n' "$*" >&2; }

prepare_peft() {
  [ -f "$peers/peft_peer.py" ] || { say "no peft_peer.py in '$peers'; set ESPALIER_PEERS"; exit 1; }
  if ! "$python" -c 'import peft, torch' 2>/dev/null; then
    say "installing transformers and PEFT"
    python3 -m venv "$cache/peers"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$peers/requirements.txt"
  fi
  [ -f "$cache/peers-hf/model.safetensors" ] || "$python" "$peers/peft_peer.py" prepare "$model" "$cache/peers-hf"
  [ -d "$cache/peers-adapters/a7" ] || "$python" "$peers/peft_peer.py" adapters "$cache/peers-hf" "$cache/peers-adapters" 8 16
}

# The server from the sources that the Python package carries, for this processor; cmake comes as a Python package too.
# Makefiles, because ninja runs in circles where a source file is dated later than the build.
build_llama() {
  mkdir -p "$llama"
  say "building llama.cpp's server ($llama_package); its log is $llama/log"
  {
    "$python" -m pip install --quiet cmake &&
      "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$llama" "$llama_package" &&
      tar -xzf "$llama"/llama_cpp_python-*.tar.gz -C "$llama" --strip-components=1 --wildcards '*/vendor/llama.cpp' &&
      "$cache/peers/bin/cmake" -S "$llama/vendor/llama.cpp" -B "$llama/build" -G "Unix Makefiles" \
        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_BUILD_APP=OFF &&
      "$cache/peers/bin/cmake" --build "$llama/build" --target llama-server --parallel
  } >"$llama/log" 2>&1
}

# The same base and the same adapters in llama.cpp's format.
convert_llama() {
  mkdir -p "$llama/files"
  local source=$llama/vendor/llama.cpp i
  [ -f "$llama/files/base.gguf" ] || "$python" "$source/convert_hf_to_gguf.py" "$cache/peers-hf" \
    --outtype q8_0 --outfile "$llama/files/base.gguf" || return 1
  for i in 0 1 2 3 4 5 6 7; do
    [ -f "$llama/files/a$i.gguf" ] || "$python" "$source/convert_lora_to_gguf.py" --base "$cache/peers-hf" \
      --outtype f16 --outfile "$llama/files/a$i.gguf" "$cache/peers-adapters/a$i" || return 1
  done
} >>"$llama/log" 2>&1

prepare_llama() {
  [ -f "$peers/llama_server_peer.py" ] || { say "no llama_server_peer.py in '$peers'; its rows are left out"; return 1; }
  [ -x "$llama/build/bin/llama-server" ] || build_llama ||
    { say "llama.cpp's server could not be built, its rows are left out; see $llama/log"; return 1; }
  convert_llama || { say "the files for llama.cpp could not be made, its rows are left out; see $llama/log"; return 1; }
}

# Short texts as prompts, their categories as completions; in an order of its own, because the file is sorted.
prepare_texts() {
  [ -f "$texts" ] || { say "no short texts at '$texts'; set ESPALIER_TEXTS"; return 1; }
  python3 - "$texts" >"$cache/short-texts.jsonl" <<'PY'
import csv, json, random, sys
rows = list(csv.DictReader(open(sys.argv[1], encoding="utf-8")))
random.Random(0).shuffle(rows)
for row in rows[:800]:
    print(json.dumps({"prompt": row["text"], "completion": " " + row["category"]}))
PY
}

texts=${ESPALIER_TEXTS:-../shared/data/banking77/train.csv}
verb=serve
case ${1:-} in serve | compare) verb=$1; shift ;; esac
model=$(scripts/fetch-model.sh)
prepare_peft
sides=(--model "$model" --hf "$cache/peers-hf" --adapters "$cache/peers-adapters" --python "$python" --peer "$peers/peft_peer.py")
if [ "$verb" = serve ] && prepare_llama; then
  sides+=(--llama-server "$llama/build/bin/llama-server" --llama-peer "$peers/llama_server_peer.py" --llama-files "$llama/files")
fi

if [ "$verb" = compare ] && prepare_texts; then
  sides+=(--data "$cache/short-texts.jsonl")
fi

cargo build --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/debug/peers" "$verb" "${sides[@]}" "$@"
