"""bases/: the shipped pair is the one of the recipe, in 16 bits; other recipes make their own."""
import pytest
import torch
from conftest import preferences, run
from kill_test import PAIR, ROOT, TINY, call
from test_stages import house_in
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

import compare
import dpo
import generate
import sft
from core.records import write_jsonl


def stages(*words, **settings):
    done = call("runs/x", "bases", *words, "--dry-run", **settings)
    assert done.returncode == 0, done.stderr
    return [line.split("] ")[1] for line in done.stdout.splitlines() if line.startswith("# ")]


def test_the_default_run_uses_the_shipped_pair():
    """If this fails, the recipe was edited: make its pair (bases/README.md) and ship that one."""
    names = stages()
    assert names[0] == "seed_0/data" and not [n for n in names if n.startswith("bases/")]
    told = call("runs/x", "bases", "--dry-run").stdout
    for base in ("weak", "strong"):
        assert f"--model {PAIR.relative_to(ROOT)}/{base} " in told
    made = call("runs/x", "bases", "--bases")
    assert (made.returncode, made.stdout) == (0, f"{PAIR.relative_to(ROOT)}: complete\n")
    refused = call("runs/x", "bases", "gsm8k", "--bases")
    assert refused.returncode == 2 and "--bases: gsm8k has none of its own" in refused.stderr


@pytest.mark.parametrize("base, weights", [("strong", 400_032), ("weak", 144_816)])
def test_the_shipped_models_are_small_ordinary_folders(base, weights):
    folder = PAIR / base
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(
        folder)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == weights
    # 2 bytes a weight and a header
    assert (folder / "model.safetensors").stat().st_size < 2 * weights + 8000
    problem = "Mia has 3 books. She buys 2. How many now?\n"
    ids = tokenizer(problem, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == problem
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("settings", [{"PRETRAIN": 300}, {"BASE_SEED": 1},
                                      {"PRETRAINING": "--lr 0.02"}])
def test_another_recipe_makes_another_pair(settings):
    names = stages(**settings)
    assert names[:5] == ["bases/corpora", "bases/train_weak", "bases/weak", "bases/train_strong",
                         "bases/strong"]
    assert stages("--bases", **settings) == names[:5]


def test_only_the_recipe_counts(tmp_path):
    """An edit of grading keeps the pair, one of the problems' language asks for another."""
    house = house_in(tmp_path)
    (house / "bases").symlink_to(ROOT / "bases")
    task = house / "tasks/arithmetic.py"
    text = task.read_text()
    for old, new, remade in (("exactly, else 0.0", "or else 0.0", False),
                             ('"wins {n}"', '"gains {n}"', True)):
        assert text.count(old) == 1
        task.write_text(text.replace(old, new))
        told = call("runs/x", "bases", "--dry-run", root=house).stdout
        assert ("bases/corpora" in told) is remade


def test_a_given_model_is_not_made():
    names = stages(**{**TINY, "STRONG_MODEL": PAIR / "strong"})
    assert names[:3] == ["bases/corpora", "bases/train_weak", "bases/weak"]
    assert "bases/strong" not in names


@pytest.mark.slow
def test_bases_is_a_command(tmp_path):
    """Alone, without a run folder; the same seed gives the same bytes, another one another pair."""
    tiny = {"PRETRAIN": 60, "PRETRAIN_WEAK": 40}
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = call(tmp_path / "run", tmp_path / name, "--bases", BASE_SEED=seed, **tiny)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "run").exists()
        folder, = (tmp_path / name).glob("*/*")
        assert folder.name == f"seed_{seed}" and str(folder) in done.stdout.splitlines()[-1]
        found.append([(folder / f"{base}/model.safetensors").read_bytes()
                      for base in ("weak", "strong")])
    assert found[0] == found[1] and found[1][0] != found[2][0] and found[1][1] != found[2][1]


# ---------------------------------------------------------------- what the default run computes in
class Narrow(TorchDispatchMode):
    """Collects the operations that compute with floating-point numbers of less than 32 bits."""

    def __init__(self):
        super().__init__()
        self.names, self.count = set(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, name = op(*args, **(kwargs or {})), op._overloadpacket.__name__
        self.count += 1
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if name not in ("_to_copy", "detach", "copy_") and any(
                x.is_floating_point() and x.dtype.itemsize < 4 for x in tensors):
            self.names.add(name)
        return out


def test_nothing_is_computed_in_16_bits_on_a_cpu(problems, tmp_path):
    """Most CPUs emulate bf16. The shipped models are read from 16 bits, and that is all."""
    right, wrong = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    write_jsonl(right, problems[:20])
    write_jsonl(wrong, [{**p, "completion": f"#### {int(p['reference']) + 1}"}
                        for p in problems[:20]])
    write_jsonl(tmp_path / "pairs.jsonl", preferences(problems[:4]))
    strong, answers = PAIR / "strong", ["--data", right, "--max-new-tokens", 3]
    with Narrow() as narrow:
        run(sft, "--model", strong, "--data", right, "--optimizer", "muon", "--out", tmp_path / "m")
        run(dpo, "--model", tmp_path / "m", "--data", tmp_path / "pairs.jsonl", "--out",
            tmp_path / "d")
        run(generate, "--model", strong, *answers, "--out", tmp_path / "greedy.jsonl")
        run(generate, "--model", strong, *answers, "--temperature", 1, "--out",
            tmp_path / "sampled.jsonl")
        run(compare, "train", "--model", PAIR / "weak", "--task", "arithmetic", "--data", wrong,
            "--gold", right, "--optimizer", "muon", "--epochs", 1, "--out", tmp_path / "j")
        run(compare, "score", "--judge", tmp_path / "j", "--task", "arithmetic", "--a", right,
            "--b", wrong, "--out", tmp_path / "c.jsonl")
    assert narrow.count > 10_000 and narrow.names == set()
