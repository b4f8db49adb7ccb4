"""What a run costs, stage by stage: seconds, CPU-seconds, starting, and the floor.

    python benchmarks/stages.py                       # a run of the default task, then its table
    python benchmarks/stages.py runs/arithmetic       # the table of a finished run
    python benchmarks/stages.py --imitate-avx2        # as if the CPU had no AVX512

The settings of run_ilr.sh (ROUNDS=1, SEEDS="0 1") hold here too. Stages run side by side, so the
sum of their seconds exceeds the run's. The floor is what the operations of a stage take at the rate
at which one thread multiplies 1024 x 1024 matrices in fp32: for each weight and token 2 to read or
generate it and 6 to train on it (report/prices.py), without attention's own part and without the
optimizer's. Starting lasts until a stage opens its unfinished work, its model being ready.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from _bench import AVX2, ROOT, about, in_words, matrix_rate, save

# A stage that ends when it begins to work, and says the CPU-seconds of its process until then.
BEGINS = f"""import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from core import training, unfinished
def begins(*_):
    os.write(1, str(time.process_time()).encode())
    os._exit(0)
training.Training.__init__ = unfinished.BatchLog.__init__ = begins
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


# ---------------------------------------------------------------- what a run's files say
def rows_of(run):
    """The rows of a run's finished stages, and the names of those that went on after a kill."""
    rows = [json.loads(line) for line in (run / "stages.jsonl").read_text().splitlines()]
    begun = Counter(row["stage"] for row in rows if "begun" in row)
    found = [row for row in rows if "cpu_seconds" in row and "from" not in row]
    if not any(row["stage"] == "whole run" for row in found):
        sys.exit(f"{run}: interrupted, taken over, or made before rows had CPU-seconds")
    return found, [name for name, count in begun.items() if count > 1]


def operations(run, bases, row):
    """Counted operations of a stage; 0 for one without a model."""
    from core.records import read_json
    from report.prices import flops_of, free_of, price_file
    total = 0
    for out in row["outs"] if "peak_gb" in row else []:
        path = bases / out[6:] if out.startswith("BASES/") else run / out
        total += flops_of({**free_of(path, "trained"), **read_json(price_file(path))}) or 0
    return total


def commands_of(run):
    """The words of every stage with a model, as the run's log has them."""
    lines = (run / "log.txt").read_text().splitlines()
    commands = [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ ")]
    return [words for words in commands
            if words[0] in ("sft.py", "generate.py", "compare.py", "dpo.py")]


# ---------------------------------------------------------------- starting
def starting(words, folder):
    """CPU-seconds until a stage begins to work: (as a copy of this process, as a new Python)."""
    from core import jobs
    script = Path(folder) / "begins.py"
    script.write_text(BEGINS)
    at = words.index("--out") + 1
    while at < len(words) and not words[at].startswith("--"):
        words = [*words[:at], f"{folder}/out_{at}", *words[at + 1:]]
        at += 1
    found, words = [], [str(script), *words]
    for way in ("copy", "new"):
        with tempfile.TemporaryFile() as out:
            pid = (jobs.fork(words, 0, {}, {1: out.fileno()}, "start") if way == "copy" else
                   jobs.spawn([sys.executable, *words], 0, {}, {1: out.fileno()}))
            if os.waitpid(pid, 0)[1]:
                sys.exit(f"{shlex.join(words)} does not begin")
            found.append(float(jobs.read_all(out).splitlines()[-1]))
    return found


def starts_table(run):
    """Starting of every script: a table, and the CPU-seconds of all starts of the run."""
    from core import jobs
    os.environ.update(THREADS="1", NPROC="1")
    jobs.set_environment()
    began, commands = time.process_time(), commands_of(run)
    if not jobs.can_fork():
        sys.exit("stages are not forked on this machine")
    once = time.process_time() - began
    counts, lines, sums = Counter(words[0] for words in commands), [], [once, 0]
    with tempfile.TemporaryDirectory() as folder:
        for script, count in counts.items():
            costs = starting(next(words for words in commands if words[0] == script), folder)
            sums = [total + count * cost for total, cost in zip(sums, costs, strict=True)]
            lines.append(f"| {script} | {count} | {costs[0]:.2f} | {costs[1]:.2f} |")
    lines.append(f"| all, and {once:.2f} for importing once | {len(commands)} | {sums[0]:.1f} | "
                 f"{sums[1]:.1f} |")
    head = ["| starting, CPU-seconds | stages | a copy of the runner | a new interpreter |",
            "| --- | --- | --- | --- |"]
    return "\n".join(head + lines), sums


# ---------------------------------------------------------------- the table
def table(rows, needed, rate):
    """The stages' table. needed: {stage: counted operations}."""
    lines = ["| stage | seconds | CPU-seconds | peak GB | operations, 1e9 | floor, seconds |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        counted = needed[row["stage"]]
        cells = [row["seconds"], row["cpu_seconds"], row.get("peak_gb", ""),
                 f"{counted / 1e9:.0f}" if counted else "",
                 f"{counted / rate:.1f}" if counted else ""]
        lines.append(f"| {' | '.join(map(str, [row['stage'], *cells]))} |")
    return "\n".join(lines)


def main(args):
    if args.imitate_avx2:
        os.environ.update(AVX2)     # before torch is imported
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        run, bases = args.run or Path(folder) / "run", Path(os.environ.get("BASES", "bases"))
        if not args.run:
            subprocess.run(["bash", "run_ilr.sh"], check=True, stdout=sys.stderr,
                           env={**os.environ, "OUT": str(run), "PYTHON": sys.executable})
        rows, continued = rows_of(run)
        starts, sums = starts_table(run)
        import torch
        torch.set_num_threads(1)
        rate = matrix_rate(100)
        needed = {row["stage"]: operations(run, bases, row) for row in rows}
    whole = next(row for row in rows if row["stage"] == "whole run")
    used, floor = whole["cpu_seconds"], sum(needed.values()) / rate
    text = "\n\n".join([
        f"**A run: {whole['seconds']} seconds, {used:.0f} CPU-seconds, {used / floor:.2f} times "
        f"the floor of {floor:.0f}**",
        f"The floor is that of {sum(needed.values()):.3g} operations at {rate / 1e9:.0f} GFLOP a "
        "second, which one thread reaches in products of 1024 x 1024 fp32 matrices."
        + (" AVX2 is imitated: torch and oneDNN use no newer instructions, numpy and tokenizers "
           "do." if args.imitate_avx2 else ""),
        *([f"Went on after a kill, with the cost of the last start only: {', '.join(continued)}."]
          if continued else []),
        starts, table(rows, needed, rate), in_words(about())])
    print(text)
    save("stages_avx2" if args.imitate_avx2 else "stages", text,
         {"about": about(), "rate": rate, "starting": sums, "floor": floor, "stages": rows},
         indent=None)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", type=lambda path: Path(path).resolve(), help="a finished run")
    p.add_argument("--imitate-avx2", action="store_true")
    main(p.parse_args())
