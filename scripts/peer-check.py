"""Decode steps and training of LoRA adapters by PEFT on transformers, in a given shape with random weights.

`missing TASK` prints what this Python lacks, or nothing. `measure TASK SECONDS` prints a line of JSON for each result.
`espalierd check peer` runs both and compares the results with its own.
"""

import importlib
import json
import signal
import statistics
import sys
import time

SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def missing(task):
    for name in ("torch", "transformers", "peft"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"python3 has no {name} ({error})"
    import torch

    if task["device"] == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    return ""


def say(step, **found):
    print(json.dumps({"step": step, **found}), flush=True)


def wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def build(task):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=task["vocab"],
        hidden_size=task["hidden"],
        intermediate_size=task["intermediate"],
        num_hidden_layers=task["layers"],
        num_attention_heads=task["heads"],
        num_key_value_heads=task["kv_heads"],
        head_dim=task["head_dim"],
        max_position_embeddings=32768,
        tie_word_embeddings=task["tied"],
        rope_theta=task["rope_theta"],
        attn_implementation="sdpa",
    )
    torch.manual_seed(1)
    dtype = torch.bfloat16 if task["device"] == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(task["device"]):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.to(dtype)


def lora(task):
    from peft import LoraConfig

    return LoraConfig(
        r=task["rank"],
        lora_alpha=2 * task["rank"],
        target_modules=SITES,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def ids(task, rows, length):
    import torch

    return torch.randint(0, task["vocab"], (rows, length), device=task["device"])


def decode(task, base):
    """Steps of rows that each have an adapter of their own, by PEFT's mixed batches and the cache that transformers takes by itself."""
    import torch
    from peft import get_peft_model

    names = [f"adapter-{number}" for number in range(task["rows"])]
    model = get_peft_model(base, lora(task), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(task))
    model.eval()
    took = []
    with torch.inference_mode():
        prompt = ids(task, task["rows"], task["context"])
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1, adapter_names=names)
        for _ in range(task["steps"] + 3):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            wait(task["device"])
            began = time.perf_counter()
            out = model(
                input_ids=token,
                past_key_values=out.past_key_values,
                use_cache=True,
                adapter_names=names,
            )
            wait(task["device"])
            took.append(time.perf_counter() - began)
    seconds = statistics.median(took[3:])
    say("decode", **{"ms": 1e3 * seconds, "tokens/s": task["rows"] / seconds})
    return model.unload()


def train(task, base, checkpointing):
    import torch
    from peft import get_peft_model

    on_gpu = task["device"] == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = get_peft_model(base, lora(task))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = ids(task, task["examples"], task["example_tokens"])
    took = []
    for _ in range(task["train_steps"] + 1):
        wait(task["device"])
        began = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(task["device"])
        took.append(time.perf_counter() - began)
    seconds = statistics.median(took[1:])
    tokens = task["examples"] * task["example_tokens"]
    peak = (torch.cuda.max_memory_allocated() - before) * 1e-9 if on_gpu else None
    found = {"ms": 1e3 * seconds, "loss": loss.item(), "tokens/s": tokens / seconds, "GB above the base": peak}
    say("train", **found, checkpointing=checkpointing)


def measure(task, seconds):
    import torch

    def late(*_):
        say("time", failed=f"{seconds} s were not enough")
        sys.stdout.flush()
        raise SystemExit(0)

    signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, seconds))
    began = time.perf_counter()
    base = build(task)
    wait(task["device"])
    import peft
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    say("base", **{"s": time.perf_counter() - began}, **versions)
    try:
        base = decode(task, base)
    except Exception as error:
        say("decode", failed=f"{type(error).__name__}: {error}")
        del base
        base = build(task)
    for checkpointing in (False, True):
        try:
            return train(task, base, checkpointing)
        except torch.OutOfMemoryError as error:
            failed = str(error)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            break
        del base
        torch.cuda.empty_cache()
        base = build(task)
    say("train", failed=failed)


if __name__ == "__main__":
    verb, task = sys.argv[1], json.loads(sys.argv[2])
    if verb == "missing":
        print(missing(task))
    else:
        measure(task, int(sys.argv[3]))
