"""Kill a run again and again, start it again each time, and compare it byte for byte with one that
was left alone.

    python tests/kill_test.py [--kills 10] [--seed 0]

Both runs train base models of their own. Two kills of three end every process of the run at once;
the third ends only run_ilr.sh itself, and then a restart must be refused for as long as a stage
that it left behind is at work. Compared is every file but the logs of time (stages.jsonl, log.txt,
the report from its prices on). Exit 1 on a difference.
"""
import argparse
import atexit
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIR = min((ROOT / "bases").glob("arithmetic-*/seed_0"))     # the shipped base models
# The smallest run whose models learn to write `#### N`, and one whose stages last long enough
# to be cut in two.
TINY = dict(TRAIN=100, GT=40, TEST=16, PRETRAIN=300, PRETRAIN_WEAK=200, ROUNDS=1, WEAK_EPOCHS=60,
            WEAK_LR="3e-3", SFT_EPOCHS=15, SFT_LR="4e-3", JUDGE_LR="1e-3", JUDGE_EPOCHS=2,
            DPO_LR="5e-5", DPO_EPOCHS=1)
SMALL = dict(TRAIN=500, GT=100, TEST=100, PRETRAIN=2000, PRETRAIN_WEAK=1500, ROUNDS=1,
             WEAK_EPOCHS=30, WEAK_LR="3e-3", JUDGE_EPOCHS=2)
UNTIMED = {"stages.jsonl", "log.txt", ".lock", "report.html"}


def environment(out, bases, **settings):
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH")
    return {**{k: v for k, v in os.environ.items() if k in kept}, "PYTHON": sys.executable,
            "OUT": str(out), "BASES": str(bases), "HF_HUB_OFFLINE": "1",
            **{k: str(v) for k, v in settings.items()}}


def call(out, bases, *words, script="run_ilr.sh", root=ROOT, **settings):
    """One run of run_ilr.sh to its end: the CompletedProcess."""
    return subprocess.run(["bash", script, *words], cwd=root, capture_output=True, text=True,
                          env=environment(out, bases, **settings))


@functools.cache
def finished_run():
    """(OUT, BASES) of one undisturbed TINY run, for all tests of a process."""
    top = Path(tempfile.mkdtemp(prefix="ilr_run_"))
    atexit.register(shutil.rmtree, top, True)
    done = call(top / "run", top / "bases", **TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    return top / "run", top / "bases"


def contents(folder, keep=lambda path: True):
    """{relative path: bytes} of a folder, without what tells the time or the commit (which may come
    between two runs)."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            files[name] = os.readlink(path).encode()
        elif path.is_file() and path.name not in UNTIMED and keep(path):
            files[name] = path.read_bytes()
    if "config.json" in files:
        lines = files["config.json"].splitlines()
        files["config.json"] = b"\n".join(x for x in lines if b'"commit"' not in x)
    if "report.md" in files:
        files["report.md"] = files["report.md"].partition(b"## Price")[0]
    return files


def differences(a, b):
    """Names of the files that are not the same in two {path: bytes}."""
    return [f"{name} ({'differs' if name in a and name in b else 'only on one side'})"
            for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


# ---------------------------------------------------------------- killing
def processes(session):
    """Living processes of a session: orphans have no parent to be found by."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            # a first thread that is dead waits for the others, who still hold the locks
            threads = len(os.listdir(stat.parent / "task"))
        except OSError:
            continue
        if int(sid) == session and (state != "Z" or threads > 1):
            found.append(int(stat.parent.name))
    return found


def at_work(session):
    """What the stages of a session are writing, as `sft.py ilr_1/half_1`; of one that is a copy of
    the runner the name that it has in `ps`."""
    found = set()
    for pid in processes(session):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        if "core.stages" in words and "/" in name:
            found.add(name)
        if "--out" in words and words[1].endswith(".py"):
            found.add(words[1] + " " + "/".join(words[words.index("--out") + 1].split("/")[-2:]))
    return sorted(found)


def signal_all(session, sent):
    for pid in processes(session):
        try:
            os.kill(pid, sent)
        except ProcessLookupError:
            pass


def kill_all(session):
    while processes(session):
        signal_all(session, signal.SIGSTOP)     # stopped first: all at one moment
        signal_all(session, signal.SIGKILL)
        time.sleep(0.02)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def killed_run(out, bases, kills, seed, wait=9.0, leader_every=3, **settings):
    """A run killed `kills` times and started again: rows (seconds since the start, what was killed,
    stages at work, note).

    The seed draws how many stages are complete when a kill comes (the run is cut in as many parts
    as there are kills, one in each) and how many seconds, below `wait`, later it comes.
    """
    rng, rows, began = random.Random(seed), [], time.monotonic()
    stages = call(out, bases, "--dry-run", **settings).stdout.count("\n# ")
    moments = [((k + rng.random()) / kills * 0.7 * stages, rng.uniform(0.2, wait))
               for k in range(kills)]
    for k, (complete, later) in enumerate(moments):
        run = start(out, bases, **settings)
        while run.poll() is None and finished_stages(out) < complete:
            time.sleep(0.05)
        time.sleep(later)
        if run.poll() is not None:
            note = f"had ended by itself, exit {run.returncode}"
            rows.append((time.monotonic() - began, "-", "", note))
            break
        moment, note, leader = time.monotonic() - began, "", (k + 1) % leader_every == 0
        working = " + ".join(at_work(run.pid)) or "between stages"
        if leader:
            run.kill()
            run.wait()
            signal_all(run.pid, signal.SIGSTOP)     # what is left cannot end before the restart
            if processes(run.pid):
                again = call(out, bases, **settings)
                note = f"restart refused, exit {again.returncode}"
                if "is in use" not in again.stderr:
                    note = "RESTART NOT REFUSED"
        kill_all(run.pid)
        run.wait()
        rows.append((moment, "run_ilr.sh alone" if leader else "everything", working, note))
    last = call(out, bases, **settings)
    assert last.returncode == 0, last.stdout[-2000:] + last.stderr
    return rows


def finished_stages(out):
    return sum('"seconds"' in line for line in lines(out / "stages.jsonl"))


def start(out, bases, **settings):
    return subprocess.Popen(["bash", "run_ilr.sh"], cwd=ROOT, start_new_session=True,
                            env=environment(out, bases, **settings), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def print_table(rows):
    print(f"{'second':>7}  {'killed':18}  {'at work':58}  note")
    for moment, what, working, note in rows:
        print(f"{moment:7.1f}  {what:18}  {working:58}  {note}")


def resumed(out):
    return [line for line in lines(out / "log.txt") if line.startswith("continuing after step")]


def main(args):
    top = Path(tempfile.mkdtemp(prefix="ilr_kill_"))
    settings = {**SMALL, "STATE_EVERY": 0.5}
    try:
        began = time.monotonic()
        done = call(top / "a", top / "bases_a", **settings)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        print(f"undisturbed run: {time.monotonic() - began:.0f} s; seed {args.seed}, "
              f"{args.kills} kills", flush=True)
        rows = killed_run(top / "b", top / "bases_b", args.kills, args.seed, **settings)
        print_table(rows)
        continued = resumed(top / "b")
        print(f"trainings that continued in the middle: {len(continued)} ({'; '.join(continued)})")
        count, wrong = 0, [row[3] for row in rows if "NOT" in row[3]]
        for a, b in (("a", "b"), ("bases_a", "bases_b")):
            count += len(contents(top / a))
            wrong += differences(contents(top / a), contents(top / b))
        delivered = sum(row[1] != "-" for row in rows)
        print(f"{delivered} kills, {count} files compared, "
              + (f"{len(wrong)} WRONG: " + "; ".join(wrong) if wrong else "all the same"))
        return 1 if wrong or delivered < args.kills else 0
    finally:
        shutil.rmtree(top, ignore_errors=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    sys.exit(main(p.parse_args()))
