"""Seconds per stage of the default run, twice: without base models in the cache, then with them.

    python benchmarks/stages.py            # two whole runs of run_ilr.sh in a temporary folder; variables override as usual

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


def timed_run(out, bases):
    """(total seconds, {stage: seconds}) of one run."""
    start = time.monotonic()
    subprocess.run(["bash", ROOT / "run_ilr.sh"], check=True, stdout=sys.stderr, env={
        **os.environ, "OUT": str(out), "BASES": str(bases), "PYTHON": sys.executable})
    total = time.monotonic() - start
    return total, {row["stage"]: row["seconds"] for row in map(json.loads, (out / "times.jsonl").read_text().splitlines())}


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        runs = [timed_run(folder / name, folder / "bases") for name in ("cold", "warm")]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, commit {commit}, {time.strftime('%Y-%m-%d')}\n")
    print("| stage | seconds, bases trained | seconds, bases cached |\n| --- | --- | --- |")
    for stage in runs[0][1]:
        print(f"| {stage} | {runs[0][1][stage]} | {runs[1][1].get(stage, '')} |")
    print(f"| **whole run** | **{runs[0][0]:.0f}** | **{runs[1][0]:.0f}** |")


if __name__ == "__main__":
    main()
