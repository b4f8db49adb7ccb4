"""core/jobs: a stage that starts as a copy of the runner is what a new interpreter would be."""
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, everything, rows
from kill_test import environment, processes
from test_stages import HEAD, SLOW, call, house_in, wait_for

# Starts a script both ways, tqdm and a module of the project being imported already, as in a run.
# Prints [[how it ended, what it said, its errors], the same of a new interpreter].
BOTH = """
import json, os, signal, sys, tempfile
import tqdm, tasks
from core import jobs
for number in jobs.STOPS:
    signal.signal(number, lambda *_: None)
words, found = sys.argv[1:], []
for how in ("fork", "spawn"):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    more = 3, {"TQDM_POSITION": "2"}, {1: out.fileno(), 2: err.fileno()}
    pid = (jobs.fork(words, *more, "a name") if how == "fork" else
           jobs.spawn([sys.executable, *words], *more))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found.append([code, jobs.read_all(out), jobs.read_all(err)])
print(json.dumps(found))
"""
SEES = """
import atexit, os, signal, sys, threading, time
from tqdm import tqdm
import tasks
atexit.register(print, "at exit")
threading.Timer(0.2, print, ["a thread"]).start()
print(__name__, __file__, sys.argv[1:], sys.path[0], os.getcwd(), sys.stdin.read())
print(os.nice(0), sys.stdout.isatty(), tqdm(range(3), file=sys.stdout).pos)
print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
print([signal.getsignal(n) for n in (signal.SIGPIPE, signal.SIGCHLD)])
print(sys.modules["__main__"].atexit is atexit, tasks.__file__, signal.pthread_sigmask(0, []))
print("no end of line", end="")
"""


def both(tmp_path, text, *words):
    """[code, output, errors] of a script that a copy runs, and of one that a new Python runs."""
    script = tmp_path / "script.py"
    script.write_text(text)
    done = subprocess.run([sys.executable, "-c", BOTH, script, *words], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------- one script
def test_a_script_sees_the_same(tmp_path):
    copy, new = both(tmp_path, SEES, "--out", "a b")
    assert copy == new and new[0] == 0
    assert "at exit" in new[1] and "a thread" in new[1] and "False -2" in new[1], new


@pytest.mark.parametrize("text, code", [
    ("", 0), ("import sys; sys.exit()", 0), ("import sys; sys.exit(3)", 3),
    ("import sys; sys.exit('words')", 1), ("raise ValueError('words')", 1), ("x = = 1", 1),
    ("import os; os.kill(os.getpid(), 9)", -9), ("import os; os.kill(os.getpid(), 15)", -15)])
def test_a_script_ends_the_same(text, code, tmp_path):
    copy, new = both(tmp_path, text)
    assert copy[:2] == new[:2] == [code, ""]
    assert copy[2].splitlines()[-1:] == new[2].splitlines()[-1:]


def test_what_a_script_cost_is_measured(tmp_path):
    """200 MB beside an interpreter of less than 50, and half a second of work."""
    house = house_in(tmp_path)
    (house / "costs.py").write_text(SLOW.replace("time.sleep(120)", """x = bytearray(200_000_000)
    while time.process_time() < 0.5:
        pass
    from core.records import write_text
    write_text(args.out, "")"""))
    (house / "small.sh").write_text(HEAD + 'stage x costs.py --out "$OUT/x"\nrun_plan\n')
    plain(house)
    assert call(house).returncode == 0
    row = {row["stage"]: row for row in rows(house / "runs/a/stages.jsonl")}["seed_0/x"]
    assert 0.5 <= row["cpu_seconds"] < 2 and 0.2 < row["peak_gb"] < 0.3


@pytest.mark.parametrize("before", [
    "sys.platform = 'darwin'", "os.environ['NPROC'] = '2'", "sys.modules['torch'] = None",
    "sys.modules['transformers'] = None", "torch.accelerator.is_available = lambda: True",
    "threading.Thread(target=time.sleep, args=[5], daemon=True).start()"])
def test_nothing_is_forked_where_a_fork_is_not_safe(before):
    code = ("import gc, os, sys, threading, time, torch\nfrom core import jobs\n"
            f"os.environ['NPROC'] = '1'\n{before}\nprint(jobs.can_fork(), gc.isenabled())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False True\n", "")


# ---------------------------------------------------------------- runs
def plain(house):
    """Let this copy of the project fork no stage."""
    jobs = house / "core/jobs.py"
    jobs.write_text(jobs.read_text().replace('"linux"', '"no such system"'))


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_results_are_those_of_new_interpreters(threads, tiny, tmp_path):
    """Trainings side by side, then answers, with one and with two threads: byte for byte."""
    plan, found = HEAD, []
    for k in (1, 2):
        plan += (f'stage train_{k} sft.py --model {tiny}/model --data "$data/gt.jsonl" --lr 1e-3 '
                 f'--epochs 1 --batch-size 8 --half {k} --out "$OUT/seed_0/model_{k}" '
                 "--state-every 1e9\n")
    plan += ('stage data tasks/arithmetic.py --out "$data" --train 40 --gt 20 --test 10 --seed '
             '0\nstage answer generate.py --model "$OUT/seed_0/model_1" --data "$data/test.jsonl" '
             '--max-new-tokens 8 --temperature 1 --out "$OUT/seed_0/answers.jsonl"\nrun_plan\n')
    for way in ("copies", "new"):
        (tmp_path / way).mkdir()
        house = house_in(tmp_path / way)
        (house / "small.sh").write_text(plan)
        if way == "new":
            plain(house)
        done = call(house, JOBS=2, THREADS=threads)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        found.append(everything(house / "runs/a/seed_0"))
        cost = {row["stage"]: row["cpu_seconds"] for row in rows(house / "runs/a/stages.jsonl")
                if "cpu_seconds" in row}
        assert cost.keys() == {"seed_0/data", "seed_0/train_1", "seed_0/train_2", "seed_0/answer",
                               "whole run"}
        assert all(value > 0 for value in cost.values())
        assert cost["whole run"] >= sum(cost.values()) - cost["whole run"]
    assert found[0] == found[1] and "model_1/model.safetensors" in found[0]


def test_a_stage_runs_the_source_that_is_there_when_it_starts(tmp_path):
    """The runner, whose copies the stages are, has imported what the first one edits."""
    house = house_in(tmp_path)
    (house / "helper.py").write_text("WORD = 'old'\n")
    text = SLOW.replace("time.sleep(120)", """import helper
    from pathlib import Path
    from core.records import write_text
    command = Path("/proc/self/cmdline").read_text()
    write_text(args.out, helper.WORD + " in a copy" * ("core.stages" in command))
    Path("helper.py").write_text("WORD = 'another'")""")
    (house / "one.py").write_text("import helper\n" + text)
    (house / "two.py").write_text("import helper\n" + text.replace('"--out"', '"--out")\n'
                                  '    p.add_argument("--data"'))
    (house / "small.sh").write_text(HEAD + 'stage one one.py --out "$OUT/one.jsonl"\nstage two '
                                    'two.py --data "$OUT/one.jsonl" --out "$OUT/two"\nrun_plan\n')
    done = call(house)
    assert done.returncode == 0, done.stderr
    made = [(house / "runs/a" / name).read_text() for name in ("one.jsonl", "two")]
    assert made == ["old in a copy", "another in a copy"]


# ---------------------------------------------------------------- signals
@pytest.fixture
def endless(tmp_path):
    """A house in which a run forks a stage that never ends; returns it and the run."""
    house = house_in(tmp_path)
    says = 'print("note: here", flush=True)'
    (house / "endless.py").write_text(SLOW.replace("    time", f"    {says}\n    time"))
    (house / "small.sh").write_text(HEAD + 'stage x endless.py --out "$OUT/x"\nrun_plan\n')
    run = subprocess.Popen(["bash", "small.sh"], cwd=house, text=True, start_new_session=True,
                           env=environment("runs/a", "bases"), stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    lines = iter(run.stdout.readline, "")
    assert "note: here" in next(line for line in lines if "note" in line)
    yield house, run
    for pid in processes(run.pid):
        os.kill(pid, signal.SIGKILL)


def test_an_interrupt_ends_a_copy(endless):
    house, run = endless
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and processes(run.pid) == []
    assert err == "run_ilr.sh: error: interrupted; the same command continues from here\n"


def test_a_copy_that_outlives_the_run_keeps_its_folder(endless):
    house, run = endless
    run.kill()
    run.wait()
    left = processes(run.pid)
    assert len(left) == 1
    refused = call(house)
    assert refused.returncode == 1 and "in use by another run" in refused.stderr
    os.kill(left[0], signal.SIGKILL)
    wait_for(lambda: processes(run.pid) == [])
    (house / "endless.py").write_text(SLOW.replace("time.sleep(120)", "pass"))
    assert "in use" not in call(house).stderr


def test_a_stage_that_imports_torch_at_its_top_gets_a_new_interpreter():
    """The runner has then imported it, and OpenMP's threads, if any ran, do not survive a fork."""
    code = ("import torch; torch.randn(400000).exp().sum(); from core import jobs; "
            "print(jobs.can_fork())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "NPROC": "1"})
    assert done.stdout == "False\n", done.stderr
