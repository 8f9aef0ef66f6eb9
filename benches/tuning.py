#!/usr/bin/env python3
"""Trains one example of each kind and each way, and writes what it cost and bought into docs/tuning.md.

usage: benches/tuning.py ESPALIERD ESPALIER MODEL [NAME...]     (names of rows; left out: all)

Every row has a server of its own, fresh, so that the growth of its memory is the job's: the most that the process held while
the job ran less what it held before. Nothing else should run on the machine. Needs Linux (/proc) and Python 3.9, no package.
"""

import json
import os
import pathlib
import re
import sys

from server import Server, moment

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tuning.md"
SHARED = "--valid-fraction 0.2 --seed 1"
CHATS = f"globex-style.jsonl {SHARED}"
VOICE = f"{CHATS} --epochs 6"

# Kinds: what is learned. Name, arguments of `espalier train` in examples/.
KINDS = {
    "a head alone": f"acme-tickets.csv --text-col ticket --label-col queue {SHARED} --head-only",
    "one label": f"acme-tickets.csv --text-col ticket --label-col queue {SHARED}",
    "a ladder": f"acme-tickets.csv --text-col ticket --label-col queue {SHARED} --ladder",
    "several labels": f"vandelay-shipments.jsonl {SHARED}",
    "a number": f"sirius-urgency.csv --text-col message --score-col urgency {SHARED}",
    "instructions": f"initech-tasks.jsonl {SHARED}",
    "chats": CHATS,
    "raw text": "press-manual --valid press-letters.md --seed 1",
}
# Ways: what is trained, on the same rows for as many passes.
WAYS = {
    "LoRA": VOICE,
    "rsLoRA": f"{VOICE} --rslora",
    "LoRA+": f"{VOICE} --lora-plus-ratio 16",
    "DoRA": f"{VOICE} --dora",
    "(IA)3": f"{VOICE} --ia3",
    "the last 2 layers": f"{VOICE} --unfreeze-last 2",
    "two modules of the last 8": f"{VOICE} --unfreeze-last 8 --targets o_proj,down_proj",
    "the whole model": f"{VOICE} --unfreeze-all",
    "LoRA, base in 8 bits": VOICE,
    "LoRA, going on from a version": f"{CHATS} --from tuned --epochs 2",
}
EIGHT_BITS = ["--dtype", "q8"]


def seconds(job):
    """From the request to the end."""
    return moment(job["end_time"]) - moment(job["create_time"])


def trained(server, way):
    server.ask("train", *way.split(), "--adapter", "tuned", "--quiet", cwd=ROOT / "examples")
    return max(json.loads(server.ask("--json", "jobs", "list")), key=lambda job: job["create_time"])


def run(programs, name, way):
    with Server(*programs, EIGHT_BITS if "8 bits" in name else []) as server:
        # Buffers that the first request makes are serving's, not the job's.
        server.ask("generate", "The first words", "--max-tokens", "4")
        if "--from" in way:
            trained(server, VOICE)
        before = server.memory("VmRSS")
        server.forget_peak()
        job = trained(server, way)
        grown = server.memory("VmHWM") - before
        server.ask("adapters", "warm", "tuned")
        held = json.loads(server.ask("--json", "adapters", "residency"))
        held = next(entry for entry in held if entry["version"] == job["version"])
    return row(name, way, job, grown, int(held["bytes"]))


def row(name, way, job, grown, held):
    mebibytes = lambda count: f"{count / 2**20:.{2 if count < 2**20 else 1}f}"
    outcome = job["outcome"]
    cells = [name, f"`espalier train {way} --adapter tuned`", *metric(job)]
    cells += [f"{outcome['trained_parameters']:,}", f"{seconds(job):.1f}", mebibytes(grown), mebibytes(outcome["peak_bytes"]), mebibytes(held)]
    return "| " + " | ".join(cells) + " |"


def metric(job):
    """The held-out measure of the job's kind, before and after."""
    outcome = job["outcome"]
    sides = [outcome["baseline"], outcome["result"]]
    problem = job.get("classification_result", {}).get("problem_type", "")
    if problem.endswith("REGRESSION"):
        return [f"{side['loss']:.2f} squared error" for side in sides]
    if problem:
        return [f"{100 * side['accuracy']:.1f} % right, loss {side['loss']:.3f}" for side in sides]
    if "perplexity" in sides[0]:
        return [f"perplexity {side['perplexity']:.2f}" for side in sides]
    return [f"loss {side['loss']:.3f}" for side in sides]


def write(page, marker, rows):
    """Puts rows in place of those between `<!-- marker -->` and `<!-- end -->`; a row whose name is there is replaced."""
    pattern = rf"(<!-- {marker} -->\n)(.*?)(<!-- end -->)"
    old = re.search(pattern, page, re.S)[2].splitlines()
    head, found = old[:3], {line.split(" | ")[0]: line for line in old[3:] if line}
    found.update({line.split(" | ")[0]: line for line in rows})
    text = "\n".join([*head, *found.values()])
    return re.sub(pattern, lambda m: m[1] + text + "\n\n" + m[3], page, flags=re.S)


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    programs = [os.path.abspath(path) for path in sys.argv[1:4]]
    asked = sys.argv[4:]
    unknown = set(asked) - set(KINDS) - set(WAYS)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: none of {', '.join([*KINDS, *WAYS])}")
    for marker, group in [("kinds", KINDS), ("ways", WAYS)]:
        for name, way in group.items():
            if asked and name not in asked:
                continue
            line = run(programs, name, way)
            print(line, flush=True)
            PAGE.write_text(write(PAGE.read_text(), marker, [line]))


if __name__ == "__main__":
    main()
