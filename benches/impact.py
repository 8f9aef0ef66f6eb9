#!/usr/bin/env python3
"""The table of run-impact.sh: impact.py DIRECTORY, which holds NAME.ROUND.json of `espalier bench` and NAME.ROUND.jobs."""

import json
import pathlib
import statistics
import sys

from server import moment


def trained(path):
    """Tokens a second over all jobs of a run, from their starts to their ends."""
    jobs = [job for job in json.loads(path.read_text()) if "start_time" in job]
    spent = sum(moment(job["end_time"]) - moment(job["start_time"]) for job in jobs)
    return sum(job["progress"].get("tokens", 0) for job in jobs) / spent if spent else None


def main():
    work, runs = pathlib.Path(sys.argv[1]), {}
    for path in sorted(work.glob("*.jobs")):
        name, _ = path.stem.rsplit(".", 1)
        result = path.with_suffix(".json")
        found = json.loads(result.read_text()) if result.exists() else {}
        runs.setdefault(name, []).append((found, trained(path)))
    names = {"alone": "no training", "0.1": "10 %", "0.5": "50 %", "100": "no bound", "idle": "nobody served"}
    keys = ["mean_tpot_ms", "p50_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "p99_ttft_ms"]
    middle = lambda name, key: statistics.median(run[0][key] for run in runs[name])
    print("| bound | mean TPOT ms | p50 | p99 | p99 to that alone | p99 ITL ms | p99 TTFT ms | training tokens/s | rounds: p99 TPOT |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, said in names.items():
        speeds = [speed for _, speed in runs[name] if speed]
        speed = f"{statistics.median(speeds):.0f}" if speeds else ""
        if name == "idle":
            print(f"| {said} | | | | | | | {speed} | |")
            continue
        mean, p50, p99, itl, ttft = (middle(name, key) for key in keys)
        every = ", ".join(f"{run[0]['p99_tpot_ms']:.1f}" for run in runs[name])
        ratio = p99 / middle("alone", "p99_tpot_ms")
        print(f"| {said} | {mean:.1f} | {p50:.1f} | {p99:.1f} | {ratio:.2f} | {itl:.1f} | {ttft:.0f} | {speed} | {every} |")


if __name__ == "__main__":
    main()
