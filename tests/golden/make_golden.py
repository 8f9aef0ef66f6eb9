#!/usr/bin/env python3
"""Makes the small goldens in this directory with transformers + PEFT (torch, CPU, float32).

    python make_golden.py            # with torch, transformers 5, peft 0.21 installed; rewrites everything here
    python make_golden.py dora       # only this way of training (a key of WAYS), on the model that is here

The model is a two-layer Llama with random weights, small enough to be committed; the files have the same form as the
large goldens that ESPALIER_GOLDEN names, so that one test reads both.
"""
import json, os, shutil, sys
import numpy as np, torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = f"{HERE}/model"
TEXTS = [
    "The quarterly report was late because",
    "x=10**3;\n\tif a>=b:",
    "<|im_start|>user\nWhere is my parcel?<|im_end|>\n<|im_start|>assistant\n",
    "A refund, ½ of it, for the customer who waited in the rain for six days and then wrote to us about it twice",
]
CORPUS = TEXTS + ["where is the parcel", "the customer waits for the refund", "my report was late", "in the rain the user waited"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
torch.manual_seed(7)
torch.set_num_threads(1)


def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        json.dump(value, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")


def short(xs, digits=6):
    return [round(float(x), digits) for x in xs]


def make_model():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE)
    config = LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=2)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "norm" in name else 0.25 * torch.randn_like(p))
    model.save_pretrained(MODEL)
    fast.save_pretrained(MODEL)
    return fast


def base(model=MODEL):
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def expected(model, tok, texts):
    out = []
    for text in texts:
        ids = tok(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            lp = logits.log_softmax(-1)
            last = logits[-1]
            top = last.topk(10)
            index = sorted(np.random.default_rng(len(ids)).choice(last.numel(), 32, replace=False).tolist())
            greedy, margins, seq = [], [], list(ids)
            for _ in range(12):
                step = model(input_ids=torch.tensor([seq])).logits[0, -1]
                two = step.topk(2)
                greedy.append(int(two.indices[0]))
                margins.append(round(float(two.values[0] - two.values[1]), 4))
                seq.append(greedy[-1])
                if greedy[-1] == 2:
                    break
        out.append(dict(text=text, input_ids=ids, last_logits_index=index, last_logits=short(last[index]), top10_ids=top.indices.tolist(), top10_logits=short(top.values),
                        prompt_logprobs=short(lp[range(len(ids) - 1), ids[1:]]), greedy_ids=greedy, greedy_margins=margins))
    return out


def randomise(peft, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_A" in name: p.normal_(0, 0.3)
            if "lora_B" in name: p.normal_(0, 0.2)
            if "magnitude" in name: p.mul_(1 + 0.2 * torch.rand_like(p))
            if "ia3_l" in name: p.normal_(1, 0.3)
            if "score" in name and "modules_to_save" in name: p.normal_(0, 0.5)


def save(peft, path, dtype=None):
    peft.peft_config["default"].base_model_name_or_path = "espalier/tiny-golden"
    peft.save_pretrained(path)
    os.remove(f"{path}/README.md")
    file = f"{path}/adapter_model.safetensors"
    if dtype:
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def adapters(tok):
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    cases = dict(
        all_linear_r3=dict(r=3, lora_alpha=8, target_modules=seven),
        qv_rslora_r4=dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True),
        dora_r2=dict(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
        patterns=dict(r=4, lora_alpha=8, target_modules=seven, rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 6}, alpha_pattern={"gate_proj": 3}),
        bf16_r3=dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "up_proj"]),
        last_layer_r2=dict(r=2, lora_alpha=7, target_modules=seven, layers_to_transform=[1]),
    )
    for i, (name, c) in enumerate(cases.items()):
        peft = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **c)).eval()
        randomise(peft, 100 + i)
        bf16 = name.startswith("bf16")
        save(peft, f"{HERE}/adapters/{name}", torch.bfloat16 if bf16 else None)
        if bf16:
            with torch.no_grad():
                for n, p in peft.named_parameters():
                    if "lora_" in n: p.copy_(p.bfloat16().float())
        write(f"{HERE}/adapters/{name}/expected.json", expected(peft, tok, TEXTS))
    peft = classifier(5, dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"])).eval()
    randomise(peft, 200)
    save(peft, f"{HERE}/adapters/seq_cls")
    rows = []
    for text in TEXTS:
        ids = tok(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([ids])).logits[0]
        rows.append(dict(text=text, input_ids=ids, logits=short(logits), probs=short(logits.softmax(-1))))
    write(f"{HERE}/adapters/seq_cls/expected.json", rows)


def classifier(labels, c, hidden=None):
    model = LlamaForSequenceClassification.from_pretrained(MODEL, num_labels=labels, dtype=torch.float32)
    if hidden:
        widths = [model.config.hidden_size] + hidden
        layers = [layer for i, o in zip(widths, hidden) for layer in (torch.nn.Linear(i, o), torch.nn.GELU())]
        model.score = torch.nn.Sequential(*layers, torch.nn.Linear(hidden[-1], labels, bias=False))
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **c))


def save_deep(peft, path, way):
    """A head of several layers in our own form: PEFT has none."""
    save(peft, path)
    file, last = f"{path}/adapter_model.safetensors", 2 * len(way["hidden_layers"])
    names = {f"score.{2 * i}.": f"score.hidden.{i}." for i in range(len(way["hidden_layers"]))} | {f"score.{last}.": "score."}
    tensors = {}
    for name, tensor in load_file(file).items():
        old = next((old for old in names if f".{old}" in name), None)
        tensors[name.replace(old, names[old]) if old else name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    with open(f"{path}/head.json", "w") as f:
        said = dict(version=1, problem_type=way["problem"], hidden_layers=way["hidden_layers"], activation="gelu")
        json.dump(said | ({"pooling": "mean"} if way.get("mean") else {}), f, indent=2)


def mean_logits(peft, ids):
    """Of a text alone, whose states are pooled by their mean: transformers' classifier knows the last one only."""
    model = peft.base_model.model
    return model.score(model.model(input_ids=ids).last_hidden_state.mean(1))


def train(peft, path, batches, loss_of, ratio=None, keep=save):
    """Twenty steps: AdamW with decay 0.1 on every trained tensor, five steps of warm-up, clipping at 1; LoRA+ with a ratio."""
    lr, decay, clip = 2e-3, 0.1, 1.0
    keep(peft, f"{path}/init")
    peft.train()
    params = [p for p in peft.parameters() if p.requires_grad]
    adam = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8)
    if ratio:
        opt = create_loraplus_optimizer(peft, torch.optim.AdamW, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **adam)
    else:
        opt = torch.optim.AdamW(params, weight_decay=decay, **adam)
    peaks, steps = [g["lr"] for g in opt.param_groups], []
    for i, batch in enumerate(batches):
        warm = min(1.0, (i + 1) / 5)
        now = lr * warm
        for g, peak in zip(opt.param_groups, peaks):
            g["lr"] = peak * warm
        loss = loss_of(peft, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, clip)
        opt.step(), opt.zero_grad()
        steps.append(dict(batch=batch, lr=now, loss=float(f"{loss.item():.8g}"), grad_norm=float(f"{norm.item():.8g}")))
    peft.eval()
    keep(peft, f"{path}/final")
    way = dict(lora_plus_ratio=ratio) if ratio else {}
    write(f"{path}/curve.json", dict(lr=lr, weight_decay=decay, betas=[0.9, 0.999], eps=1e-8, clip=clip, **way, steps=steps))


def sft_loss(peft, batch):
    total, count = 0.0, 0
    for row in batch:
        ids = torch.tensor([row["input_ids"]])
        lp = peft(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(row["loss_start"], ids.shape[1]):
            total, count = total - lp[t - 1, ids[0, t]], count + 1
    return total / count


def cls_loss(peft, batch):
    rows = [torch.nn.functional.cross_entropy(peft(input_ids=torch.tensor([r["input_ids"]])).logits, torch.tensor([r["label"]])) for r in batch]
    return torch.stack(rows).mean()


def last_logits(peft, ids):
    return peft(input_ids=ids).logits


def answered(problem, weights=None, logits_of=last_logits):
    """The loss that transformers computes for a head of this problem; class weights as torch's cross-entropy takes them."""
    def loss(peft, batch):
        logits = torch.cat([logits_of(peft, torch.tensor([r["input_ids"]])) for r in batch])
        if weights:
            return torch.nn.functional.cross_entropy(logits, torch.tensor([r["label"] for r in batch]), weight=torch.tensor(weights))
        model = peft.base_model.model
        model.config.problem_type = problem
        if problem == "regression":
            wanted = torch.tensor([r["score"] for r in batch])
        else:
            wanted = torch.zeros_like(logits)
            for row, r in zip(wanted, batch):
                row[r["labels"]] = 1.0
        return model.loss_function(logits=logits, labels=wanted, pooled_logits=logits, config=model.config)
    return loss


def batches(tok):
    rng = np.random.default_rng(3)
    words = "refund parcel late report customer rain user wrote six days the of and to".split()
    text = lambda n: " ".join(rng.choice(words, n))
    sft, cls = [], []
    for _ in range(20):
        rows, labelled = [], []
        for n in rng.integers(2, 7, 4):
            prompt, completion = tok(text(n), add_special_tokens=False).input_ids, tok(" " + text(int(n) // 2 + 1), add_special_tokens=False).input_ids + [2]
            rows.append(dict(input_ids=prompt + completion, loss_start=len(prompt)))
            body = text(n)
            labelled.append(dict(input_ids=tok(body, add_special_tokens=False).input_ids, label=0 if "refund" in body else 1 if "parcel" in body else 2))
        sft.append(rows), cls.append(labelled)
    return sft, cls


def lora(**c):
    return get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **c))


def training(tok):
    sft, cls = batches(tok)
    torch.manual_seed(11)
    train(lora(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]), f"{HERE}/train_sft", sft, sft_loss)
    torch.manual_seed(12)
    train(classifier(3, dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])), f"{HERE}/train_seq_cls", cls, cls_loss)


def loraplus(tok):
    torch.manual_seed(13)
    train(lora(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]), f"{HERE}/train_loraplus", batches(tok)[0], sft_loss, ratio=8)


def dora(tok):
    peft = lora(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], use_dora=True)
    randomise(peft, 14)  # B of zeros would leave the norms those of W, and the magnitudes too
    train(peft, f"{HERE}/train_dora", batches(tok)[0], sft_loss)


def heads(tok, way):
    """Texts of random words, with every word that is named as a label, and with how many of them as a number."""
    rng, names = np.random.default_rng(5), ["refund", "parcel", "report", "rain"]
    words = "refund parcel late report customer rain user wrote six days the of and to".split()
    rows = []
    for _ in range(20):
        batch = []
        for n in rng.integers(2, 7, 4):
            said = list(rng.choice(words, n))
            labels = [i for i, name in enumerate(names) if name in said]
            ids = tok(" ".join(said), add_special_tokens=False).input_ids
            batch.append(dict(input_ids=ids, **way["answer"](labels, len(said))))
        rows.append(batch)
    torch.manual_seed(way["seed"])
    peft = classifier(way["rows"], dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]), way.get("hidden_layers"))
    path = f"{HERE}/train_{way['name']}"
    keep = (lambda peft, path: save_deep(peft, path, way)) if "hidden_layers" in way else save
    train(peft, path, rows, answered(way["problem"], way.get("weights"), mean_logits if way.get("mean") else last_logits), keep=keep)
    curve = json.load(open(f"{path}/curve.json"))
    curve["problem_type"] = way["problem"]
    if "weights" in way:
        curve["class_weights"] = way["weights"]
    if "hidden_layers" in way:
        curve["hidden_layers"], curve["activation"] = way["hidden_layers"], "gelu"
    if way.get("mean"):
        curve["pooling"] = "mean"
    write(f"{path}/curve.json", curve)


HEADS = [
    dict(name="multi_label", problem="multi_label_classification", rows=4, seed=21, answer=lambda labels, n: dict(labels=labels)),
    dict(name="regression", problem="regression", rows=1, seed=22, answer=lambda labels, n: dict(score=0.5 * n - len(labels))),
    dict(name="weighted", problem="single_label_classification", rows=3, seed=23, weights=[0.5, 1.0, 3.0], answer=lambda labels, n: dict(label=min(len(labels), 2))),
    dict(name="deep_head", problem="single_label_classification", rows=3, seed=24, weights=[1.0, 2.0, 0.5], hidden_layers=[16, 8], answer=lambda labels, n: dict(label=min(len(labels), 2))),
    dict(name="mean_head", problem="single_label_classification", rows=3, seed=25, weights=[0.5, 1.0, 2.0], hidden_layers=[24], mean=True, answer=lambda labels, n: dict(label=min(len(labels), 2))),
]


def ia3(tok):
    scaled = lambda **c: get_peft_model(base(), IA3Config(task_type="CAUSAL_LM", **c))
    cases = dict(
        ia3=dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ia3_wide=dict(target_modules="all-linear", feedforward_modules=["q_proj", "o_proj", "up_proj"], exclude_modules=["gate_proj"]),
    )
    for i, (name, c) in enumerate(cases.items()):
        peft = scaled(**c).eval()
        randomise(peft, 300 + i)
        shutil.rmtree(f"{HERE}/adapters/{name}", ignore_errors=True)
        save(peft, f"{HERE}/adapters/{name}")
        write(f"{HERE}/adapters/{name}/expected.json", expected(peft, tok, TEXTS))
    peft = scaled(**cases["ia3"])
    randomise(peft, 15)
    train(peft, f"{HERE}/train_ia3", batches(tok)[0], sft_loss)


OUTSIDE = ["embed_tokens", "norm", "lm_head"]


def delta(model, path, layers, modules, of=MODEL):
    """What was added to the base's tensors, in our own form: PEFT has none for single tensors."""
    start = dict(base(of).named_parameters())
    deltas = {f"{name}.delta": p.detach() - start[name] for name, p in model.named_parameters() if p.requires_grad}
    os.makedirs(path, exist_ok=True)
    save_file(deltas, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(base_model_name_or_path="espalier/tiny-golden", layers=layers, modules=modules, modules_to_save=None, peft_type="ESPALIER_FULL", task_type="CAUSAL_LM")
    with open(f"{path}/adapter_config.json", "w") as f:
        json.dump(config, f, indent=2, sort_keys=True)


def unfrozen(layers, modules, of=MODEL):
    """A base of which only these modules of these layers learn, all of theirs where none is named, and those that stand outside."""
    model, inside = base(of), [m for m in modules if m not in OUTSIDE]
    for name, p in model.named_parameters():
        parts = name.split(".")
        of_layer = parts[1] == "layers"
        p.requires_grad_(int(parts[2]) in layers and (not inside or parts[-2] in inside) if of_layer else parts[-2] in modules)
    return model


def untied(path):
    """The model with an output head of its own."""
    torch.manual_seed(31)
    model = base()
    weights = model.state_dict() | {"lm_head.weight": 0.25 * torch.randn_like(model.lm_head.weight)}
    model.config.tie_word_embeddings = False
    other = LlamaForCausalLM(model.config).float()
    other.load_state_dict(weights)
    other.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{MODEL}/{name}", path)
    return path


def whole(tok):
    layers = list(range(base().config.num_hidden_layers))
    shutil.rmtree(f"{HERE}/train_whole_untied", ignore_errors=True)
    for path, of, modules in ((f"{HERE}/train_whole", MODEL, OUTSIDE[:2]), (f"{HERE}/train_whole_untied", untied(f"{HERE}/train_whole_untied/model"), OUTSIDE)):
        train(unfrozen(layers, modules, of), path, batches(tok)[0], sft_loss, keep=lambda m, path: delta(m, path, layers, modules, of))
    model = unfrozen(layers, OUTSIDE[:2])
    torch.manual_seed(32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    shutil.rmtree(f"{HERE}/adapters/whole", ignore_errors=True)
    delta(model, f"{HERE}/adapters/whole", layers, OUTSIDE[:2])
    write(f"{HERE}/adapters/whole/expected.json", expected(model.eval(), tok, TEXTS))


def unfreeze(tok):
    cases = dict(unfreeze=([1], []), unfreeze_some=([0, 1], ["q_proj", "down_proj", "input_layernorm", "post_attention_layernorm"]))
    for i, (name, (layers, modules)) in enumerate(cases.items()):
        shutil.rmtree(f"{HERE}/train_{name}", ignore_errors=True)
        torch.manual_seed(16 + i)
        train(unfrozen(layers, modules), f"{HERE}/train_{name}", batches(tok)[0], sft_loss, keep=lambda m, path: delta(m, path, layers, modules))
    layers, modules = cases["unfreeze_some"]
    model = unfrozen(layers, modules)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.1 * torch.randn_like(p))
    shutil.rmtree(f"{HERE}/adapters/unfrozen", ignore_errors=True)
    delta(model, f"{HERE}/adapters/unfrozen", layers, modules)
    write(f"{HERE}/adapters/unfrozen/expected.json", expected(model.eval(), tok, TEXTS))


WAYS = dict(loraplus=loraplus, dora=dora, ia3=ia3, unfreeze=unfreeze, whole=whole, **{way["name"]: lambda tok, way=way: heads(tok, way) for way in HEADS})


def only(ways):
    tok = PreTrainedTokenizerFast.from_pretrained(MODEL)
    for way in ways:
        shutil.rmtree(f"{HERE}/train_{way}", ignore_errors=True)
        WAYS[way](tok)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(only(sys.argv[1:]))
    for d in ("model", "adapters", "train_sft", "train_seq_cls"):
        shutil.rmtree(f"{HERE}/{d}", ignore_errors=True)
    tok = make_model()
    chats = [[dict(role="user", content="Where is my parcel?")], [dict(role="system", content="Be brief."), dict(role="user", content="hi"), dict(role="assistant", content="yes"), dict(role="user", content="why?")]]
    write(f"{HERE}/tokenizer.json", dict(texts=[dict(text=t, ids=tok(t, add_special_tokens=False).input_ids) for t in TEXTS + [" leading", "trailing ", "I've don't", "½ ℃ ﬁ"]],
                                         chats=[dict(messages=c, rendered=tok.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in chats]))
    write(f"{HERE}/base.json", expected(base(), tok, TEXTS))
    adapters(tok)
    training(tok)
    only(WAYS)
