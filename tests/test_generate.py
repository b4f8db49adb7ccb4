"""generate.py: decoding against plain loops and transformers' own, sampling noise, continuing."""
import numpy as np
import pytest
import torch
from conftest import Interrupted, interrupt_after, rows, run, tiny_model
from transformers import DynamicCache, GenerationConfig

import generate
from core.decoding import choose_tokens, decode, decode_beams, sample_uniforms
from core.models import open_model
from core.records import half_of, write_jsonl
from core.unfinished import BatchLog

EOS, NEW = 2, 24


@pytest.fixture(scope="module")
def model():
    """Float64, so that no rounding difference between batch shapes can turn an argmax; 12 tokens,
    so that EOS comes up."""
    return tiny_model(vocab=12, seed=22).double()


def prompts_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, 12, rng.integers(1, 9)).tolist()] for _ in range(count)]


def plain_loop(model, prompt, choose):
    """Continuation of one prompt without batch, padding or cache; `choose(logits, step)` picks a
    token."""
    ids = list(prompt)
    for step in range(NEW):
        ids.append(choose(model(input_ids=torch.tensor([ids])).logits[0, -1], step))
        if ids[-1] == EOS:
            return ids[len(prompt):-1], False
    return ids[len(prompt):], True


def transformers_own(model, prompt, **more):
    """The continuation by `generate` of transformers, EOS and what follows it included."""
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    out = model.generate(torch.tensor([prompt]), attention_mask=mask, do_sample=False,
                         max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=EOS, **more)
    return out[0, len(prompt):].tolist()


def test_greedy_is_the_plain_loop_and_transformers(model, monkeypatch):
    compacted, original = [], DynamicCache.reorder_cache

    def select(cache, indices):
        compacted.append(len(indices))
        return original(cache, indices)
    monkeypatch.setattr(DynamicCache, "reorder_cache", select)
    prompts = prompts_of(24)
    completions, truncated = decode(model, prompts, [EOS], NEW)
    plain = [plain_loop(model, p, lambda x, _: x.argmax().item()) for p in prompts]
    assert list(zip(completions, truncated, strict=True)) == plain
    # the batch held rows of both kinds, and finished rows left it on the way
    assert 0 < sum(truncated) < 24 and compacted == sorted(compacted, reverse=True) and compacted
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion == [t for t in transformers_own(model, prompt) if t != EOS]


def test_samples_are_those_of_each_prompt_alone(model, monkeypatch):
    prompts, read = [p for p in prompts_of(8, seed=1) for _ in range(2)], []
    original = model.forward

    def forward(**inputs):
        read.append(inputs["input_ids"].shape)
        return original(**inputs)
    monkeypatch.setattr(model, "forward", forward)
    uniforms = torch.tensor(np.stack([sample_uniforms(0, i, 0, NEW) for i in range(16)]))
    completions, truncated = decode(model, prompts, [EOS], NEW, 0.9, uniforms)
    assert 0 < sum(truncated) < 16 and len(set(map(tuple, completions))) > 8
    # the two samples of a prompt share its prefill
    assert [rows for rows, _ in read[:2]] == [8, 16]
    for i, prompt in enumerate(prompts):
        def choose(logits, step, noise=uniforms[i]):   # inverse of the CDF, in float64 numpy
            cdf = np.exp(logits.detach().numpy() / 0.9).cumsum()
            return int((cdf / cdf[-1] <= noise[step].item()).sum())
        assert (completions[i], truncated[i]) == plain_loop(model, prompt, choose)
        alone = decode(model, [prompt], [EOS], NEW, 0.9, uniforms[i:i + 1])
        assert alone == ([completions[i]], [truncated[i]])


def test_a_prompt_whose_samples_all_end_at_once_leaves_the_others_alone(model):
    """The batch is then as long as the prefill of its prompts was: the cache must not take the one
    for the other."""
    a, b = [1, 5, 6, 7], [1, 8, 9, 10]
    cdf = model(input_ids=torch.tensor([a])).logits[0, -1].softmax(-1).cumsum(-1)
    uniforms = torch.rand(4, NEW, generator=torch.Generator().manual_seed(3))
    uniforms[:2, 0] = (cdf[EOS - 1] + cdf[EOS]) / 2         # both samples of a draw EOS
    completions, _ = decode(model, [a, a, b, b], [EOS], NEW, 1.0, uniforms)
    assert completions[:2] == [[], []] and len(completions[2]) > 1
    for i in (2, 3):
        assert completions[i] == decode(model, [b], [EOS], NEW, 1.0, uniforms[i:i + 1])[0][0]


def test_beams_are_transformers_of_each_prompt_alone(model, monkeypatch):
    prompts = prompts_of(6, seed=2)
    completions, truncated = decode_beams(model, prompts, [EOS], NEW, 4)
    for prompt, completion, cut in zip(prompts, completions, truncated, strict=True):
        theirs = transformers_own(model, prompt, num_beams=4)
        assert completion == [t for t in theirs if t != EOS]
        assert cut == (EOS not in theirs and len(theirs) == NEW)
    assert completions != decode(model, prompts, [EOS], NEW)[0]     # a search, not greedy decoding
    with monkeypatch.context() as m:       # what a model folder says of decoding changes nothing
        m.setattr(model, "generation_config",
                  GenerationConfig(repetition_penalty=5.0, min_new_tokens=20))
        assert decode_beams(model, prompts, [EOS], NEW, 4) == (completions, truncated)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_sampling_frequencies(temperature):
    """Chi-square of 20,000 draws against softmax(logits / T); 7 degrees of freedom exceed 30 with
    probability 1e-4."""
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0]), 20000
    uniforms = torch.tensor(np.random.default_rng(0).random(n, dtype=np.float32))
    drawn = choose_tokens(logits.expand(n, 8), temperature, uniforms).bincount(minlength=8).numpy()
    expected = np.exp(logits.numpy() / temperature)
    expected *= n / expected.sum()
    assert ((drawn - expected) ** 2 / expected).sum() < 30


def test_choose_tokens_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    # an impossible token is never drawn
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 2), (below_one, 2)):
        assert choose_tokens(logits, 1.0, torch.tensor([u])).item() == token
    assert choose_tokens(torch.tensor([[0.0, 3.0, 3.5]]), 0.0).item() == 2


def test_sample_uniforms():
    base = sample_uniforms(0, "a", 0, 4000)
    assert base.dtype == np.float32 and base.min() >= 0 and base.max() < 1
    # 4000 uniforms: the mean is 0.5 within 4.5 standard errors of 0.0046
    assert abs(base.mean() - 0.5) < 0.02
    np.random.seed(1)
    assert (sample_uniforms(0, "a", 0, 4000) == base).all()
    # --max-new-tokens changes no draw
    assert (sample_uniforms(0, "a", 0, 10) == base[:10]).all()
    for other in [(1, "a", 0), (0, "b", 0), (0, "a", 1)]:
        assert (sample_uniforms(*other, 4000) != base).mean() > 0.99


def test_answers_do_not_depend_on_batches_or_neighbours(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:9])
    write_jsonl(tmp_path / "few.jsonl", problems[5:2:-1])
    argv = ["--model", tiny / "model", "--temperature", 0.8, "--num-samples", 2,
            "--max-new-tokens", 12, "--data"]
    run(generate, *argv, tmp_path / "d.jsonl", "--out", tmp_path / "a.jsonl")
    run(generate, *argv, tmp_path / "d.jsonl", "--out", tmp_path / "b.jsonl", "--batch-size", 1)
    run(generate, *argv, tmp_path / "d.jsonl", "--out", tmp_path / "c.jsonl", "--batch-size", 7)
    run(generate, *argv, tmp_path / "few.jsonl", "--out", tmp_path / "few.out")
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b == c
    answers = {(r["id"], r["sample"]): r for r in rows(tmp_path / "a.jsonl")}
    assert len(answers) == 18 and len({r["completion"] for r in answers.values()}) > 15
    few = [answers[p["id"], s] for p in problems[5:2:-1] for s in (0, 1)]
    assert rows(tmp_path / "few.out") == few


def test_records_of_the_output(tiny, problems, tokenizer, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{**p, "extra": i} for i, p in enumerate(problems[:6])])
    run(generate, "--model", tiny / "model", "--data", tmp_path / "d.jsonl",
        "--out", tmp_path / "o.jsonl", "--max-new-tokens", 5, "--source", "proposal", "--limit", 4)
    answers = rows(tmp_path / "o.jsonl")
    assert [(a["id"], a["prompt"], a["reference"], a["extra"]) for a in answers] == [
        (p["id"], p["prompt"], p["reference"], i) for i, p in enumerate(problems[:4])]
    model = open_model(tiny / "model", torch.device("cpu")).eval()
    for a in answers:
        prompt = [1, *tokenizer(a["prompt"], add_special_tokens=False).input_ids]
        completion, cut = decode(model, [prompt], [EOS], 5)
        assert a["completion"] == tokenizer.decode(completion[0], skip_special_tokens=True)
        assert (a["truncated"], a["source"]) == (cut[0], "proposal") and "sample" not in a


def test_halves_of_the_output(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems)
    run(generate, "--model", tiny / "model", tiny / "other", "--data", tmp_path / "d.jsonl",
        "--half", 1, 2, "--round", 2, "--out", tmp_path / "1.jsonl", tmp_path / "2.jsonl",
        "--max-new-tokens", 4)
    run(generate, "--model", tiny / "other", "--data", tmp_path / "d.jsonl",
        "--out", tmp_path / "other.jsonl", "--max-new-tokens", 4)
    other = {r["id"]: r for r in rows(tmp_path / "other.jsonl")}
    first, second = rows(tmp_path / "1.jsonl"), rows(tmp_path / "2.jsonl")
    assert [r["id"] for r in first] == [p["id"] for p in problems if half_of(0, 2, p["id"]) == 1]
    assert sorted(r["id"] for r in first + second) == sorted(p["id"] for p in problems)
    # each by its own model
    assert second == [other[r["id"]] for r in second]
    assert first != [other[r["id"]] for r in first]


def test_killed_generation_continues_byte_for_byte(tiny, problems, tmp_path, monkeypatch):
    data = [{**p, "prompt": p["prompt"] + "é" * (i % 3)} for i, p in enumerate(problems[:9])]
    write_jsonl(tmp_path / "d.jsonl", data)
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--temperature", 1.0,
            "--num-samples", 2, "--batch-size", 4, "--max-new-tokens", 20, "--out"]
    run(generate, *argv, tmp_path / "whole.jsonl")
    with monkeypatch.context() as m:
        interrupt_after(m, BatchLog, "append", 2)
        with pytest.raises(Interrupted):
            run(generate, *argv, tmp_path / "cut.jsonl")
    partial, = tmp_path.glob(".cut.jsonl.partial")
    lines = partial.read_bytes().split(b"\n")
    assert len(lines) == 9
    # a kill in the middle of a write: three lines of the second batch, the last of them cut inside
    # a character
    partial.write_bytes(b"\n".join(lines[:7]) + b"\n" + '[3, 1, "é'.encode()[:-1])
    calls = []

    def counted(model, prompts, *args):
        calls.append(len(prompts))
        return decode(model, prompts, *args)
    monkeypatch.setattr(generate, "decode", counted)
    run(generate, *argv, tmp_path / "cut.jsonl")
    assert calls == [4, 4, 4, 2]        # 18 answers, of which the first batch of 4 was kept
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_finished_files_are_kept(tiny, problems, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "d.jsonl", problems[:3])
    (tmp_path / "1.jsonl").write_text("kept")
    run(generate, "--model", tiny / "model", "--data", tmp_path / "d.jsonl",
        "--out", tmp_path / "1.jsonl", tmp_path / "2.jsonl", "--max-new-tokens", 2)
    assert (tmp_path / "1.jsonl").read_text() == "kept" and len(rows(tmp_path / "2.jsonl")) == 3
