"""What several test files use: a tiny tokenizer, random models, records, one way to run a stage."""
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402


def tiny_config(family="llama", vocab=24, **more):
    """A config of a few thousand weights; a large initializer_range makes random answers differ."""
    from transformers import AutoConfig
    extra = {"gemma": {"head_dim": 8}, "qwen3": {"head_dim": 8}, "mistral": {}, "llama": {},
             "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0,
                        "query_pre_attn_scalar": 8}}[family]
    return AutoConfig.for_model(family, **{**dict(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        initializer_range=0.4, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2), **extra, **more})


def tiny_model(family="llama", seed=0, **more):
    """A random causal language model in fp32, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **more), dtype=torch.float32).eval()


def run(stage, *argv):
    """One stage as its command line runs it."""
    stage.main(stage.parser().parse_args([str(a) for a in argv]))


def preferences(problems, rejected="#### 1"):
    """Preference records: each problem's own completion over another text."""
    return [{"id": p["id"], "prompt": p["prompt"], "chosen": p["completion"],
             "rejected": rejected} for p in problems]


def rows(path):
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama and the arithmetic task's tokenizer."""
    from transformers import AutoTokenizer

    from tasks import arithmetic
    top = tmp_path_factory.mktemp("tiny")
    arithmetic.prepare_bases(top, {"strong": 60, "weak": 40})
    tokenizer = AutoTokenizer.from_pretrained(top / "tokenizer")
    for seed in (0, 1):
        folder = top / ("model" if seed == 0 else "other")
        model = tiny_model(seed=seed, vocab=len(tokenizer), tie_word_embeddings=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return top


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(tiny / "model")


@pytest.fixture(scope="session")
def problems():
    """20 solved problems of the default task."""
    from tasks import arithmetic
    found = arithmetic.problems("train", 20, 0)
    return [arithmetic.record("train", 0, i, p) for i, p in enumerate(found)]


class Interrupted(Exception):
    """Stands for a kill: no handler of a stage catches it."""


def interrupt_after(monkeypatch, owner, name, calls):
    """Let `owner.name` run `calls` times, then raise Interrupted, once."""
    original, left = getattr(owner, name), [calls]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise Interrupted
        return original(*args, **kwargs)
    monkeypatch.setattr(owner, name, wrapped)


def everything(folder):
    """{relative path: bytes} of every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_resume(monkeypatch, capsys, tmp_path, stage, argv, calls):
    """A training that is cut after `calls` log rows and started again equals one that never was,
    byte for byte."""
    from core import training
    argv = [*argv, "--state-every", 0]
    run(stage, *argv, "--out", tmp_path / "whole")
    with monkeypatch.context() as m:
        interrupt_after(m, training.Training, "log", calls)
        with pytest.raises(Interrupted):
            run(stage, *argv, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    capsys.readouterr()
    run(stage, *argv, "--out", tmp_path / "cut")
    assert "continuing after step" in capsys.readouterr().out
    whole, cut = (everything(tmp_path / name) for name in ("whole", "cut"))
    assert "metrics.jsonl" in whole
    assert {"model.safetensors", "adapter_model.safetensors"} & set(whole)
    assert [name for name in {**whole, **cut} if whole.get(name) != cut.get(name)] == []


def first_gradients(monkeypatch, stage, *argv):
    """{name: gradient} that reaches the optimizer in the first step of a stage's own loop, before
    clipping."""
    seen, original = {}, stage.apply_gradients

    def spy(model, *args):
        if not seen:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return original(model, *args)
    with monkeypatch.context() as m:
        m.setattr(stage, "apply_gradients", spy)
        run(stage, *argv)
    return seen


def assert_same_gradients(got, expected, tolerance=2e-5):
    """Largest difference of any weight against the largest expected gradient. 2e-5: fp32 sums of a
    few hundred terms carry a relative error of about sqrt(300) * 6e-8 = 1e-6; the rest is margin
    for two layers of backward passes."""
    assert got.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-4      # else the comparison would say nothing
    for name in expected:
        difference = got[name].double() - expected[name].double()
        assert difference.abs().max().item() <= tolerance * scale, name
