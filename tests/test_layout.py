"""The shape of the repository: imports go one way, stages are small and cheap to import, --help works."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

import tasks

STAGES = ["sft", "generate", "compare", "refine", "dpo", "evaluate"]
ALLOWED = {("compare", "sft"), ("dpo", "sft")}


def imports_of(path):
    """Names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way():
    files = {p.stem: p for p in ROOT.glob("*.py")}
    assert set(files) == set(STAGES)
    edges = {(name, other) for name, path in files.items() for other in imports_of(path) & set(STAGES)}
    assert edges == ALLOWED
    assert all("tasks" in imports_of(path) for path in files.values())
    for path in (ROOT / "tasks").glob("*.py"):
        helper = path.stem in ("_memory", "_models", "_parallel")        # what trainers share; they import torch inside functions
        assert not imports_of(path) & {*STAGES, *([] if helper else ["torch", "transformers"])}, path


def test_importing_loads_no_library():
    heavy = ["torch", "transformers", "tokenizers", "bitsandbytes", "numpy", "matplotlib"]
    code = (f"import sys, {', '.join(STAGES)}\n" + "".join(f"import tasks.{t}\n" for t in tasks.TASKS)
            + "import tasks._figures, tasks._judges, tasks._memory, tasks._methods, tasks._models, tasks._parallel, tasks._statistics\n" + f"print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_short(stage):
    assert 150 <= len((ROOT / f"{stage}.py").read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("command", [*([f"{s}.py"] for s in STAGES), *([f"tasks/{t}.py"] for t in tasks.TASKS), ["compare.py", "train"],
                                     ["compare.py", "score"], ["evaluate.py", "grade"], ["evaluate.py", "report"]], ids=" ".join)
def test_help(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
    wrong = subprocess.run([sys.executable, *command, "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "error: " in wrong.stderr
