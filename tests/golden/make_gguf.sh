#!/usr/bin/env bash
# Makes the files in gguf/ from the adapters beside it, with llama.cpp's own converter.
#
#   make_gguf.sh PYTHON LLAMA_CPP     a Python with torch and transformers; a checkout of ggml-org/llama.cpp
#
# The converter asks a base's config.json for the family alone, so the same adapter becomes one of Llama, Mistral, Qwen2 and Qwen3.
# What it writes for rsLoRA and for alpha_pattern is not what PEFT computes: the test says by which factor.
set -euo pipefail
python=$1 llama=$2
cd "$(dirname "$0")"
mkdir -p gguf
base=$(mktemp -d)
trap 'rm -rf "$base"' EXIT

convert() { # ADAPTER ARCHITECTURE MODEL_TYPE OUT
  "$python" - "$base" "$2" "$3" <<'PY'
import json, sys
base, architecture, model_type = sys.argv[1:]
config = json.load(open("model/config.json"))
config.update(architectures=[architecture], model_type=model_type)
json.dump(config, open(f"{base}/config.json", "w"))
PY
  "$python" "$llama/convert_lora_to_gguf.py" --base "$base" --outfile "gguf/$4.gguf" "adapters/$1" 2>/dev/null
}

for adapter in all_linear_r3 qv_rslora_r4 patterns bf16_r3 last_layer_r2; do
  convert $adapter LlamaForCausalLM llama $adapter
done
convert all_linear_r3 MistralForCausalLM mistral mistral
convert all_linear_r3 Qwen2ForCausalLM qwen2 qwen2
convert all_linear_r3 Qwen3ForCausalLM qwen3 qwen3
