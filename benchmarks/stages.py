"""Seconds per stage of the default run, twice: without base models in the cache, then with them.

    python benchmarks/stages.py                          # two runs in a temporary folder
    python benchmarks/stages.py runs/first runs/second   # two finished runs instead

The settings of run_ilr.sh (ROUNDS=1, SEEDS="0 1") hold here too. Prints one Markdown table with
machine and commit. Stages run side by side, so the sum exceeds the total.
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
    rows = map(json.loads, (Path(out) / "stages.jsonl").read_text().splitlines())
    return {row["stage"]: row["seconds"] for row in rows if "seconds" in row}


def main(outs):
    with tempfile.TemporaryDirectory() as folder:
        if not outs:
            outs = [f"{folder}/first", f"{folder}/second"]
            for out in outs:
                variables = {"OUT": out, "BASES": f"{folder}/bases", "PYTHON": sys.executable}
                subprocess.run(["bash", ROOT / "run_ilr.sh"], check=True, stdout=sys.stderr,
                               env={**os.environ, **variables})
        first, second = map(seconds, outs)
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"commit {git.stdout.strip()}, {time.strftime('%Y-%m-%d')}\n")
    print("| stage | seconds, bases trained | seconds, bases cached |\n| --- | --- | --- |")
    for stage in first:
        print(f"| {stage} | {first[stage]} | {second.get(stage, '')} |")


if __name__ == "__main__":
    main(sys.argv[1:])
