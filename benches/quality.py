#!/usr/bin/env python3
"""How well adapters classify banking77, beside PEFT on the same rows: accuracy on the whole test set, seed by seed.

usage: benches/quality.py ESPALIERD ESPALIER MODEL DATA HF_DIR PYTHON PER_CLASS EPOCHS WHAT...

DATA holds train.csv and test.csv (text,category). PER_CLASS rows of each category are drawn once, the same for every run; 0 is
all. WHAT is any of: head (a head alone, defaults), mean (the same on the mean of all states), auto (LoRA and head, every number the server's), SEED (a number: LoRA r=16
and head, EPOCHS passes of 16 rows at 1e-3, by Espalier) and peft:SEED (the same by PEFT, with PYTHON and the weights of HF_DIR).
"""

import csv
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from server import Server, moment

TUNED = "--rank 16 --alpha 32 --batch-size 16 --lr 1e-3 --head-lr 1e-3 --warmup-ratio 0.05 --schedule linear --clip 1".split()


def rows(path):
    with open(path, newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def drawn(data, per_class):
    """The training rows: so many of each category, drawn with seed 0."""
    train, of = rows(data / "train.csv"), {}
    if not per_class:
        return train
    for row in train:
        of.setdefault(row[1], []).append(row)
    draw = random.Random(0)
    return [row for name in sorted(of) for row in draw.sample(of[name], min(per_class, len(of[name])))]


def accuracy(server, test):
    texts = "\n".join(text.replace("\n", " ") for text, _ in test)
    said = server.ask("--json", "classify", "--adapter", "bank", stdin=texts)
    answers = [result for line in said.splitlines() for result in json.loads(line)["results"]]
    assert len(answers) == len(test)
    return sum(answer["scores"][0]["label"] == label for answer, (_, label) in zip(answers, test)) / len(test)


def ours(programs, file, test, way):
    with Server(*programs) as server:
        began = time.time()
        server.ask("train", file, "--text-col", "text", "--label-col", "category", "--adapter", "bank", "--quiet", *way)
        live = time.time() - began
        job = json.loads(server.ask("--json", "jobs", "list"))[0]
        took = moment(job["end_time"]) - moment(job["start_time"])
        right = accuracy(server, test)
        return dict(accuracy=right, live_s=live, job_s=took, steps=job["progress"]["step"], epochs=job["spec"]["hyper_parameters"]["epochs"])


def main():
    if len(sys.argv) < 10:
        sys.exit(__doc__)
    programs, (data, hf, python) = [os.path.abspath(p) for p in sys.argv[1:4]], sys.argv[4:7]
    data, per_class, epochs = pathlib.Path(data), int(sys.argv[7]), int(sys.argv[8])
    test = rows(data / "test.csv")
    with tempfile.TemporaryDirectory() as work:
        file = pathlib.Path(work) / "rows.csv"
        with open(file, "w", newline="") as out:
            csv.writer(out).writerows([("text", "category"), *drawn(data, per_class)])
        for what in sys.argv[9:]:
            side, _, seed = what.rpartition(":")
            if side == "peft":
                peer = [python, pathlib.Path(__file__).with_name("peft_banking77.py"), hf, file, data / "test.csv", str(epochs), seed]
                found = json.loads(subprocess.run(peer, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            else:
                head = ["--head-only", "--seed", "0"]
                ways = {"head": head, "mean": [*head, "--pooling", "mean"], "auto": ["--seed", "0"]}
                found = ours(programs, file, test, ways.get(what) or [*TUNED, "--epochs", str(epochs), "--seed", what])
            print(json.dumps(dict(what=what, per_class=per_class, **found)), flush=True)


if __name__ == "__main__":
    main()
