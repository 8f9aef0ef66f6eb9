#!/usr/bin/env python3
"""How far torch's bf16 strays from its own f32 on the goldens: the mean Kullback-Leibler divergence by adapter.

    python bf16_kl.py MODEL GOLDENS OUT.json TOKENS [ADAPTER...]

MODEL is a Hugging Face directory, GOLDENS a directory of goldens, OUT.json the file to write. Every prompt of at most TOKENS
tokens with its greedy continuation, every position but the last; the base, and the adapters named (all of them without a
name) as PEFT loads them, in f32. The decoder in bf16 may stray 1.2 times as far (tests/it/golden_inference.rs).
"""
import json, os, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model, goldens, out, tokens, *named = sys.argv[1:]


def log_probabilities(dtype, adapter, rows):
    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    if adapter:
        net = PeftModel.from_pretrained(net, adapter).eval()
    with torch.no_grad():
        return [net(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1).double() for row in rows]


def divergence(adapter, cases):
    rows = [(c["input_ids"] + c["greedy_ids"])[:-1] for c in cases if len(c["input_ids"]) <= int(tokens)]
    exact, rough = (log_probabilities(dtype, adapter, rows) for dtype in (torch.float32, torch.bfloat16))
    each = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, rough)])
    return dict(mean=float(f"{each.mean().item():.6g}"), positions=each.numel())


def read(path):
    with open(path) as f:
        return json.load(f)


names = sorted(named or os.listdir(f"{goldens}/adapters"))
found = {"base": divergence(None, read(f"{goldens}/base.json"))}
for name in names:
    cases = read(f"{goldens}/adapters/{name}/expected.json")
    if "greedy_ids" in cases[0]:
        found[name] = divergence(f"{goldens}/adapters/{name}", cases)
with open(out, "w") as f:
    json.dump(found, f, indent=1)
    f.write("\n")
