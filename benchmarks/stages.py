"""Seconds per stage of the default run, twice: without base models in the cache, then with them.

    python benchmarks/stages.py                          # two runs of run_ilr.sh in a temporary folder; variables override
    python benchmarks/stages.py runs/first runs/second   # two finished runs instead

Prints one Markdown table with machine and commit. Stages of two lanes run side by side, so the sum exceeds the total.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds(out):
    """{stage: seconds} of one finished run that was not interrupted."""
    return {row["stage"]: row["seconds"] for row in map(json.loads, (Path(out) / "times.jsonl").read_text().splitlines())}


def main(outs):
    with tempfile.TemporaryDirectory() as folder:
        for name in () if outs else ("first", "second"):
            subprocess.run(["bash", ROOT / "run_ilr.sh"], check=True, stdout=sys.stderr, env={
                **os.environ, "OUT": f"{folder}/{name}", "BASES": f"{folder}/bases", "PYTHON": sys.executable})
        first, second = map(seconds, outs or (f"{folder}/first", f"{folder}/second"))
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {commit}, {time.strftime('%Y-%m-%d')}\n")
    print("| stage | seconds, bases trained | seconds, bases cached |\n| --- | --- | --- |")
    for stage in first:
        print(f"| {stage} | {first[stage]} | {second.get(stage, '')} |")


if __name__ == "__main__":
    main(sys.argv[1:])
