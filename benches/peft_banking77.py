"""PEFT's side of quality.py: LoRA r=16 on all linear layers and a head, on rows of text and category.

usage: peft_banking77.py HF_DIR TRAIN.csv TEST.csv EPOCHS SEED     (needs torch, transformers and peft)
"""

import csv
import json
import random
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROWS, RATE = 16, 1e-3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(path):
    with open(path, newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def main():
    directory, train, test, epochs, seed = sys.argv[1], rows(sys.argv[2]), rows(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    names = sorted({label for _, label in train})
    number = {name: index for index, name in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token_id, tokenizer.padding_side = 2, "right"
    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(names), dtype=torch.float32, pad_token_id=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=MODULES))
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)

    def logits(batch):
        tokens = tokenizer([text for text, _ in batch], padding=True, return_tensors="pt")
        last = tokens.attention_mask.sum(1) - 1
        states = model.base_model.model.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return model.base_model.model.score(states[torch.arange(len(batch)), last])

    total, step, draw, began = epochs * -(-len(train) // ROWS), 0, random.Random(seed), time.time()
    for _ in range(epochs):
        order = train[:]
        draw.shuffle(order)
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / (0.05 * total)) * (1 - step / total)
            loss = torch.nn.functional.cross_entropy(logits(batch), torch.tensor([number[label] for _, label in batch]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    took = time.time() - began
    model.eval()
    by_length, right = sorted(test, key=lambda row: len(row[0])), 0
    with torch.inference_mode():
        for start in range(0, len(test), 64):
            batch = by_length[start : start + 64]
            right += sum(names[best] == label for best, (_, label) in zip(logits(batch).argmax(1).tolist(), batch))
    print(json.dumps(dict(accuracy=right / len(test), job_s=took, steps=step, epochs=epochs)))


if __name__ == "__main__":
    main()
