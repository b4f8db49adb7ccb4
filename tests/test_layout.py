"""The rules of the house: imports go one way, importing is cheap, --help works, old shells do."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import baselines
import tasks

STAGES = ["sft", "generate", "compare", "refine", "dpo", "evaluate"]
HEAVY = ["torch", "transformers", "tokenizers", "bitsandbytes", "numpy", "matplotlib"]
# What each part of the house may import besides itself.
MAY_IMPORT = {"core": set(), "tasks": {"core"}, "report": {"core", "tasks", "baselines"},
              "baselines": {"core", "tasks", "refine"}, "evaluate": {"core", "tasks", "report"},
              **{stage: {"core", "tasks"} for stage in STAGES if stage != "evaluate"}}


def imports_of(path):
    """Names of all top-level modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    files = list((ROOT / part).glob("*.py")) or [ROOT / f"{part}.py"]
    for path in files:
        ours = imports_of(path) & {*MAY_IMPORT, "tests", "benchmarks"}
        assert ours - {part} <= MAY_IMPORT[part], path


def test_importing_loads_no_library():
    modules = [*STAGES, *(f"{part}.{path.stem}" for part in ("core", "tasks", "report", "baselines")
                          for path in sorted((ROOT / part).glob("[!_]*.py")))]
    code = (f"import sys, {', '.join(modules)}\n"
            f"print([m for m in {HEAVY} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("command", [
    *([f"{s}.py"] for s in STAGES), *([f"tasks/{t}.py"] for t in tasks.TASKS),
    *([f"baselines/{name.replace('-', '_')}.py"] for name in baselines.names()),
    ["baselines/label_noise.py"], ["compare.py", "train"], ["compare.py", "score"],
    ["evaluate.py", "grade"], ["evaluate.py", "report"]], ids=" ".join)
def test_help(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
    wrong = subprocess.run([sys.executable, *command, "--no-such-flag"], cwd=ROOT,
                           capture_output=True, text=True)
    assert wrong.returncode == 2 and "error: " in wrong.stderr


SHELL = [ROOT / "run_ilr.sh", *(ROOT / "core").glob("*.sh"), *(ROOT / "presets").glob("*.sh")]
# What bash 3.2 and BSD tools, which macOS has, do not know.
TOO_NEW = {"wait -n": r"\bwait +-n", "BASHPID": r"\bBASHPID\b", "negative index": r"\[-[0-9]+\]",
           "mapfile": r"\b(mapfile|readarray)\b", "case change": r"\$\{\w+(,|\^)",
           "associative array": r"\b(declare|local|typeset) +-A", "name reference": r"\blocal +-n",
           "&>>": "&>>", "|&": r"\|&", "-v test": r"\[\[? +-v ", "printf time": r"%\(",
           "sed -i": r"\bsed +-i", "grep -P": r"\bgrep +-\w*P", "readlink -f": r"\breadlink +-f",
           "@Q": r"\$\{\w+@", "coproc": r"\bcoproc\b", "realpath": r"\brealpath\b",
           "date -d": r"\bdate +-d", "flock": r"\bflock\b", "cp --": r"\b(cp|mv|rm|ls) +--\w"}


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_files_run_on_bash_3_2_and_bsd_tools(path):
    text = path.read_text(encoding="utf-8")
    code = "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines())
    assert [name for name, regex in TOO_NEW.items() if re.search(regex, code)] == []
    # an array that may be empty ends bash 3.2 under `set -u`: these are filled before they are read
    filled = {"samples", "checkpoints", "models", "outs", "proposals", "sources"}
    assert set(re.findall(r"\$\{(\w+)\[@\]\}", code)) <= filled
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_an_array_that_may_be_empty_is_found():
    """The check above can fail."""
    for name, line in {"wait -n": "wait -n", "BASHPID": "echo $BASHPID", "mapfile": "mapfile -t x",
                       "negative index": "echo ${x[-1]}", "case change": "echo ${x,,}"}.items():
        assert re.search(TOO_NEW[name], line)


def test_lines_have_at_most_100_columns():
    prose = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *SHELL]
    long = [f"{path.name}:{number}" for path in prose
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100 and not line.startswith("|")]
    assert long == []
