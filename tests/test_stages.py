"""core/stages: plans of real stages that need no model, in a copy of the project that is edited.

The copy has a script beside run_ilr.sh, as a researcher would write one.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_test
import pytest
from conftest import ROOT, everything, rows
from kill_test import environment

HEAD = """set -euo pipefail
caller=$PWD here=$(cd "$(dirname "$0")" && pwd)
. "$here/core/stages.sh"
at=seed_0 data=$OUT/seed_0/data
"""
PLAN = HEAD + """
stage data tasks/arithmetic.py --out "$data" --train 40 --gt 20 --test 10 --seed 0
stage gt/grade evaluate.py grade --task arithmetic --data "$data/gt.jsonl" \\
  --out "$OUT/seed_0/gt/a.graded.jsonl"
stage clean refine.py --method clean --labels "$data/unlab.jsonl" --task arithmetic \\
  --out "$OUT/seed_0/clean/labels.jsonl"
run_plan
"""
# A task that never ends: what a failure or an interrupt has to end.
SLOW = """import sys, time
sys.path.insert(0, ".")
from core.cli import make_parser, run_stage
def main(args):
    time.sleep(120)
def parser():
    p = make_parser("slow", prog="tasks/slow.py")
    p.add_argument("--out")
    return p
if __name__ == "__main__":
    run_stage(parser(), main)
"""

# What another script does instead of never ending.
TOUCH = """time.sleep(0.3)
    from core.records import write_text
    write_text(args.out, "")"""


def house_in(folder):
    """A copy of the project."""
    top = folder / "house"
    top.mkdir()
    for part in ("core", "tasks", "report", "baselines", "presets"):
        shutil.copytree(ROOT / part, top / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "run_ilr.sh"]:
        shutil.copy(path, top)
    return top


@pytest.fixture
def house(tmp_path):
    """A copy of the project with the script small.sh."""
    top = house_in(tmp_path)
    (top / "small.sh").write_text(PLAN)
    return top


def call(house, *words, out="runs/a", script="small.sh", **settings):
    return kill_test.call(out, "bases", *words, script=script, root=house, **settings)


def edit(path, text="\n# a comment\n"):
    path.write_text(path.read_text() + text)


def said(done):
    """{stage: what was said of it} of the lines with a place."""
    lines = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    return dict((*line.split(": ", 1), "ran")[:2] for line in lines)


@pytest.fixture
def made(house):
    done = call(house)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert said(done) == {"seed_0/data": "ran", "seed_0/gt/grade": "ran", "seed_0/clean": "ran"}
    return house


# ---------------------------------------------------------------- running and skipping
def test_a_plan_runs_once(made):
    run = made / "runs/a"
    assert len(rows(run / "seed_0/clean/labels.jsonl")) == 20
    assert {p.name for p in (run / "seed_0/data").iterdir()} >= {"gt.jsonl", "test.jsonl"}
    recorded = {row["stage"]: row for row in rows(run / "stages.jsonl") if "begun" not in row}
    assert {*recorded} == {"seed_0/data", "seed_0/gt/grade", "seed_0/clean", "whole run"}
    clean = recorded["seed_0/clean"]
    assert clean["outs"] == ["seed_0/clean/labels.jsonl"] and clean["seconds"] >= 0
    assert all(row["cpu_seconds"] > 0 for row in recorded.values())
    assert {"refine.py", "core/records.py", "tasks/arithmetic.py"} <= set(clean["sources"])
    assert list(clean["inputs"]) == ["OUT/seed_0/data/unlab.jsonl"]
    before = everything(run)
    again = call(made)
    assert set(said(again).values()) == {"complete"} and again.returncode == 0
    assert everything(run) == before


def test_one_job_takes_the_order_of_the_plan(house, made):
    done = call(house, out="runs/b", JOBS=1)
    assert list(said(done)) == ["seed_0/data", "seed_0/gt/grade", "seed_0/clean"]
    a, b = (everything(house / "runs" / name) for name in "ab")
    assert {n: c for n, c in a.items() if n.startswith("seed_")} == {
        n: c for n, c in b.items() if n.startswith("seed_")}


def test_what_is_missing_is_made_again(made):
    before = everything(made / "runs/a")
    shutil.rmtree(made / "runs/a/seed_0/clean")
    again = call(made)
    assert said(again) == {"seed_0/data": "complete", "seed_0/gt/grade": "complete",
                           "seed_0/clean": "ran"}
    now = everything(made / "runs/a")
    assert now["seed_0/clean/labels.jsonl"] == before["seed_0/clean/labels.jsonl"]


def test_a_torn_row_of_the_journal_is_dropped(made):
    with open(made / "runs/a/stages.jsonl", "a") as f:
        f.write('{"stage": "seed_0/x", "sec')
    shutil.rmtree(made / "runs/a/seed_0/clean")
    assert call(made).returncode == 0
    found = [row["stage"] for row in rows(made / "runs/a/stages.jsonl") if "seconds" in row]
    assert found.count("seed_0/clean") == 2 and len(found) == 5


def test_out_may_be_a_link_and_the_script_be_called_from_elsewhere(house, tmp_path):
    (tmp_path / "disk").mkdir()
    (house / "runs").mkdir()
    (house / "runs/a").symlink_to(tmp_path / "disk")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/py"        # a link would leave the virtual environment
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    done = call(tmp_path, script="house/small.sh", PYTHON="./bin/py", out="runs/a/")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "disk/seed_0/clean/labels.jsonl").exists()
    shown = call(tmp_path, "--help", script="house/run_ilr.sh", PYTHON="bin/py")
    assert (shown.returncode, shown.stderr) == (0, "") and "bash run_ilr.sh" in shown.stdout


def test_two_runs_in_one_folder_are_refused(made):
    import fcntl
    with open(made / "runs/a/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = call(made)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr == ("run_ilr.sh: error: runs/a is in use by another run (or a stage that "
                              "one left behind)\n")


# ---------------------------------------------------------------- edits
def test_an_unchanged_run_is_taken_over_whole(made):
    done = call(made, out="runs/b", FROM="runs/a")
    assert set(said(done).values()) == {"taken over from runs/a"} and done.returncode == 0
    a, b = (everything(made / "runs" / name) for name in "ab")
    assert {n: c for n, c in a.items() if n.startswith("seed_")} == {
        n: c for n, c in b.items() if n.startswith("seed_")}
    third = call(made, out="runs/c", FROM="runs/b/")
    assert set(said(third).values()) == {"taken over from runs/b"}


def test_an_edited_stage_runs_again_and_nothing_else(made):
    edit(made / "refine.py")
    refused = call(made)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "runs/a holds seed_0/clean (refine.py has changed)" in refused.stderr
    assert "FROM=runs/a OUT=runs/a_2 bash run_ilr.sh" in refused.stderr
    done = call(made, out="runs/b", FROM="runs/a")
    assert said(done) == {"seed_0/data": "taken over from runs/a",
                          "seed_0/gt/grade": "taken over from runs/a", "seed_0/clean": "ran"}
    assert done.stdout.count("note: seed_0/clean is not taken over: refine.py has changed") == 1
    assert rows(made / "runs/b/seed_0/clean/labels.jsonl") == rows(
        made / "runs/a/seed_0/clean/labels.jsonl")


def test_the_settings_of_from_are_the_defaults(made):
    """FROM alone repeats the run's own experiment; what is given comes first."""
    settings = made / "runs/x/config.json"
    settings.parent.mkdir(exist_ok=True)
    config = json.loads((made / "runs/a/config.json").read_text())
    config["settings"].update(TRAIN="7", GT="3", SFT_LR="2e-3", WEAK_MODEL="x y")
    settings.write_text(json.dumps(config))
    (made / "runs/x/stages.jsonl").write_text("")
    (made / "small.sh").write_text(HEAD + 'echo "$TRAIN $GT $SFT_LR $WEAK_MODEL $TEST"')
    done = call(made, out="runs/y", FROM="runs/x", GT=5)
    assert done.stdout == "7 5 2e-3 x y 1000\n", done.stderr


def test_what_is_not_imported_makes_nothing_new(made):
    before = everything(made / "runs/a")
    for path in ("report/page.py", "sft.py", "core/decoding.py", "baselines/filter.py"):
        edit(made / path)
    shutil.copy(made / "tasks/arithmetic.py", made / "tasks/mine.py")
    shutil.copy(made / "baselines/filter.py", made / "baselines/mine.py")
    done = call(made)
    assert set(said(done).values()) == {"complete"} and done.returncode == 0
    assert everything(made / "runs/a") == before


def test_an_edit_of_evaluate_grades_again(made):
    edit(made / "evaluate.py")
    done = call(made)
    assert done.returncode == 0, done.stderr
    assert said(done) == {"seed_0/data": "complete", "seed_0/gt/grade": "ran",
                          "seed_0/clean": "complete"}
    assert "note: seed_0/gt/grade is made again: evaluate.py has changed" in done.stdout


def test_a_changed_command_is_refused_by_name_and_not_taken_over(made):
    script = made / "small.sh"
    script.write_text(script.read_text().replace("--test 10", "--test 12"))
    refused = call(made)
    assert refused.returncode == 2 and "seed_0/data (--test was 10, is 12)" in refused.stderr
    done = call(made, out="runs/b", FROM="runs/a")
    assert "note: seed_0/data is not taken over: --test was 10, is 12" in done.stdout
    # gt.jsonl comes out the same, so what reads nothing else is taken over all the same
    assert said(done)["seed_0/gt/grade"] == "taken over from runs/a"


def test_a_changed_input_is_not_taken_over(made):
    unlab = made / "runs/a/seed_0/data/unlab.jsonl"
    unlab.write_text("".join(unlab.read_text().splitlines(keepends=True)[1:]))
    refused = call(made)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert ("seed_0/clean was made from other files: OUT/seed_0/data/unlab.jsonl has changed. "
            "Delete runs/a/seed_0/clean/labels.jsonl to make it again") in refused.stderr
    done = call(made, out="runs/b", FROM="runs/a")
    assert "seed_0/clean is not taken over: OUT/seed_0/data/unlab.jsonl has changed" in done.stdout
    assert len(rows(made / "runs/b/seed_0/clean/labels.jsonl")) == 19


def test_what_was_cut_off_between_its_files_is_made_again_by_other_source(made):
    """A stage of several files, of which one is there: begun by a killed run, then edited."""
    plan = made / "small.sh"
    plan.write_text(plan.read_text().replace("run_plan", """
stage two two.py --out "$OUT/seed_0/x1" "$OUT/seed_0/x2"
run_plan"""))
    script = made / "two.py"
    script.write_text(SLOW.replace("time.sleep(120)", """from core.records import write_text
    from pathlib import Path
    for out in args.out:
        if not Path(out).exists():
            write_text(out, "old")""").replace('"--out"', '"--out", nargs="+"'))
    assert call(made).returncode == 0
    (made / "runs/a/seed_0/x2").unlink()
    script.write_text(script.read_text().replace('"old"', '"new"'))
    done = call(made)
    assert done.returncode == 0, done.stderr
    assert "note: seed_0/two is made again: two.py has changed" in done.stdout
    assert [(made / f"runs/a/seed_0/x{k}").read_text() for k in (1, 2)] == ["new", "new"]


def test_a_stage_that_outlives_a_killed_run_is_known_by_what_it_was(made):
    """Its row says what was begun: with other source it is refused, like any finished stage."""
    journal = made / "runs/a/stages.jsonl"
    kept = [row for row in rows(journal) if "seconds" not in row or row["stage"] != "seed_0/clean"]
    journal.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert said(call(made))["seed_0/clean"] == "complete"
    edit(made / "refine.py")
    refused = call(made)
    assert refused.returncode == 2 and "seed_0/clean (refine.py has changed)" in refused.stderr
    taken = call(made, out="runs/b", FROM="runs/a")     # and nothing says that it was finished
    assert said(taken)["seed_0/clean"] == "ran"


@pytest.mark.parametrize("out", ["./runs/a", "runs//a", "runs/a/", "runs/./a", "runs/x/../a"])
def test_out_may_be_written_in_any_way(out, made):
    done = call(made, out=out)
    assert done.returncode == 0, done.stderr
    assert set(said(done).values()) == {"complete"}


def test_a_stage_killed_by_a_signal_says_so(house):
    dies = SLOW.replace("time.sleep(120)", "import os; os.kill(os.getpid(), 9)")
    (house / "dies.py").write_text(dies)
    (house / "small.sh").write_text(HEAD + 'stage x dies.py --out "$OUT/x"\nrun_plan\n')
    done = call(house)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "run_ilr.sh: error: stage seed_0/x was killed by signal 9 (out of memory?); the same "
        "command continues from here")


def test_a_run_that_was_taken_over_shares_no_small_file(made):
    call(made, out="runs/b", FROM="runs/a")
    name = "seed_0/clean/labels.jsonl"
    before = (made / "runs/a" / name).read_text()
    with open(made / "runs/b" / name, "a") as f:
        f.write("{}\n")
    assert (made / "runs/a" / name).read_text() == before


@pytest.mark.parametrize("source, message", [("runs/none", "expected a run folder"),
                                             ("runs/a", "FROM and OUT are the same folder")])
def test_a_wrong_from_is_refused(source, message, made):
    refused = call(made, FROM=source)
    assert refused.returncode == 2 and message in refused.stderr


def test_dry_run_says_what_would_be_taken_over(made):
    edit(made / "refine.py")
    before = everything(made / "runs")
    done = call(made, "--dry-run", out="runs/b", FROM="runs/a")
    assert (done.returncode, done.stderr) == (0, "") and everything(made / "runs") == before
    lines = done.stdout.splitlines()
    assert lines[0::2] == ["# [1/3] seed_0/data: taken over from runs/a",
                           "# [2/3] seed_0/gt/grade: taken over from runs/a",
                           "# [3/3] seed_0/clean: would run: refine.py has changed"]
    assert all(" --out runs/b/seed_0/" in line for line in lines[1::2])
    refused = call(made, "--dry-run")       # as the run itself would be
    assert refused.returncode == 2 and "seed_0/clean (refine.py has changed)" in refused.stderr


def test_dry_run_says_what_is_complete(made):
    lines = call(made, "--dry-run").stdout.splitlines()
    assert [line.endswith(": complete") for line in lines[0::2]] == [True] * 3


def test_a_stage_that_waits_for_a_slot_is_looked_at_once(house):
    """Model stages that cannot be taken over and have to wait say so one time only."""
    (house / "quick.py").write_text(SLOW.replace("time.sleep(120)", TOUCH).replace(
        'p.add_argument("--out")', 'p.add_argument("--out")\n    p.add_argument("--n")'))
    plan = "".join(f'stage s{k} quick.py --out "$OUT/seed_0/s{k}" --n $N\n' for k in range(3))
    (house / "small.sh").write_text(HEAD + plan + "run_plan\n")
    assert call(house, N=1).returncode == 0
    done = call(house, out="runs/b", FROM="runs/a", N=2, JOBS=2)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"s{k} is not taken over: --n was 1, is 2") for k in range(3)] == [
        1, 1, 1]


# ---------------------------------------------------------------- failing
def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def slow_processes(house):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):      # it has just ended
            found.append(path.read_text().replace("\0", " "))
    return [line for line in found if f" tasks/slow.py --out {house}" in line]


@pytest.fixture
def failing(house):
    """A plan with stages that never end and one that fails."""
    (house / "tasks/slow.py").write_text(SLOW)
    slow = "".join(f'stage slow_{k} tasks/slow.py --out "$here/slow_{k}"\n' for k in range(6))
    (house / "small.sh").write_text(HEAD + slow + """
stage data tasks/arithmetic.py --out "$data" --train 40 --gt 20 --test 10 --seed 0
stage bad refine.py --method clean --labels "$data/none.jsonl" --task arithmetic --out "$OUT/x"
run_plan
""")
    return house


def test_a_failing_run_ends_with_its_one_line(failing):
    done = call(failing)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "refine.py: error: runs/a/seed_0/data/none.jsonl: No such file or directory",
        "run_ilr.sh: error: stage seed_0/bad failed (exit 2)"]
    assert slow_processes(failing) == [] and not (failing / "runs/a/x").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything_with_one_line(sent, failing):
    script = failing / "small.sh"
    script.write_text(script.read_text().replace("none.jsonl", "unlab.jsonl"))
    run = subprocess.Popen(
        ["bash", "small.sh"], cwd=failing, env=environment("runs/a", "bases"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(lambda: len(slow_processes(failing)) == 6)
    run.send_signal(sent)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 130 and slow_processes(failing) == []
    assert err == "run_ilr.sh: error: interrupted; the same command continues from here\n"


def test_a_run_under_nohup_outlives_its_terminal(house):
    (house / "tasks/slow.py").write_text(SLOW.replace("time.sleep(120)", """time.sleep(1)
    import pathlib
    pathlib.Path(args.out).mkdir()"""))
    (house / "small.sh").write_text(HEAD + 'stage x tasks/slow.py --out "$here/x"\nrun_plan\n')
    run = subprocess.Popen(["bash", "small.sh"], cwd=house, env=environment("runs/a", "bases"),
                           preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: slow_processes(house))
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=30) == 0


@pytest.mark.parametrize("line, message", [
    ("stage a refine.py --method clean --labels x.jsonl --task arithmetic --out $OUT/a --rond 1",
     "stage seed_0/a: refine.py: unrecognized arguments: --rond 1"),
    ("stage a refine.py --method ilr --labels x.jsonl --task arithmetic --out $OUT/a",
     "stage seed_0/a: refine.py: --method ilr needs --comparisons"),
    ("stage a dpo.py --model m --data p.jsonl --out $OUT/a --loss kto", "invalid choice: 'kto'"),
    ("stage a nothing.py --out $OUT/a", "there is no nothing.py"),
    ("stage a evaluate.py grade --task arithmetic --data $OUT/b.jsonl --out $OUT/a",
     "stage seed_0/a reads runs/a/b.jsonl, which no stage makes"),
    ("stage a evaluate.py grade --task arithmetic --data x.jsonl --out $OUT/a\n"
     "stage a evaluate.py grade --task arithmetic --data x.jsonl --out $OUT/b",
     "two stages are called seed_0/a")], ids=["flag", "check", "choice", "script", "hole", "twice"])
def test_a_plan_that_cannot_work_is_refused_before_anything_runs(line, message, house):
    (house / "small.sh").write_text(HEAD + line + "\nrun_plan\n")
    refused = call(house)
    assert refused.returncode == 2 and message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (house / "runs").exists()


def test_stages_start_by_what_they_read(house):
    """Independent stages run side by side, and one that is longest on the way starts first."""
    (house / "small.sh").write_text(PLAN.replace("run_plan", """
stage last evaluate.py grade --task arithmetic --data "$OUT/seed_0/clean/labels.jsonl" \\
  --out "$OUT/seed_0/clean/labels.graded.jsonl"
run_plan"""))
    done = call(house)
    assert done.returncode == 0, done.stderr
    order = list(said(done))
    assert order[0] == "seed_0/data" and order[-1] == "seed_0/last"
    config = json.loads((house / "runs/a/config.json").read_text())
    assert config["settings"]["TASK"] == "arithmetic"
    assert os.listdir(house / "runs") == ["a"]
