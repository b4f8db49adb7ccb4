"""generate.py: decoding against plain loops and transformers' own, sampling noise, continuing."""
import gc
import json
import logging
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import Interrupted, interrupt_after, rows, run, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig

import generate
import sft
from core import decoding, merge
from core.cli import run_stage
from core.decoding import (
    check_decoding,
    choose_tokens,
    decode,
    decode_beams,
    roomy_cache,
    sample_uniforms,
    strip_eos,
)
from core.models import open_model
from core.records import InputError, half_of, write_jsonl
from core.tokens import encode_prompt
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


def plain_loop(model, prompt, choose=lambda logits, step: logits.argmax().item(), eos=(EOS,)):
    """Continuation of one prompt without batch, padding or cache; `choose(logits, step)` picks a
    token."""
    ids = list(prompt)
    for step in range(NEW):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(choose(logits, step))
        if ids[-1] in eos:
            return ids[len(prompt):-1], False
    return ids[len(prompt):], True


def transformers_own(model, prompt, eos=EOS, **more):
    """The continuation by `generate` of transformers, EOS and what follows it included."""
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    out = model.generate(torch.tensor([prompt]), attention_mask=mask, do_sample=False,
                         max_new_tokens=NEW, eos_token_id=eos, pad_token_id=EOS, **more)
    return out[0, len(prompt):].tolist()


def test_greedy_is_the_plain_loop_and_transformers(model, monkeypatch):
    compacted, original = [], DynamicCache.reorder_cache

    def select(cache, indices):
        compacted.append(len(indices))
        return original(cache, indices)
    monkeypatch.setattr(DynamicCache, "reorder_cache", select)
    prompts = prompts_of(24)
    completions, truncated = decode(model, prompts, [EOS], NEW)
    plain = [plain_loop(model, p) for p in prompts]
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


def test_every_eos_id_ends_an_answer(model):
    prompts, eos = prompts_of(16, seed=4), [EOS, 7, 9]
    completions, truncated = decode(model, prompts, eos, NEW)
    plain = [plain_loop(model, p, eos=eos) for p in prompts]
    assert list(zip(completions, truncated, strict=True)) == plain
    one = decode(model, prompts, [EOS], NEW)[0]
    assert [] != [c for c, longer in zip(completions, one, strict=True) if len(c) < len(longer)]
    ending = {tuple(p): c for p, (c, cut) in zip(prompts, plain, strict=True) if not cut}
    passes, hook = [], model.register_forward_hook(lambda *_: passes.append(1))
    decode(model, list(map(list, ending)), eos, NEW)
    hook.remove()
    assert len(passes) == max(map(len, ending.values())) + 1 < NEW
    completions, truncated = decode_beams(model, prompts[:6], eos, NEW, 3)
    for prompt, completion, cut in zip(prompts[:6], completions, truncated, strict=True):
        theirs = transformers_own(model, prompt, eos, num_beams=3)
        end = next((i for i, token in enumerate(theirs) if token in eos), NEW)
        assert (completion, cut) == (theirs[:end], end == NEW)


@pytest.fixture(params=[2, 128])
def slack(request, monkeypatch):
    """How often the cache of a sliding window moves its window: at every third token, or never."""
    monkeypatch.setattr(decoding, "SLACK", request.param)
    return request.param


def sliding_model(family, window):
    """Gemma 2 and 3 have sliding and full layers in turn, Mistral sliding ones only."""
    if family == "gemma3_text":
        return other_model(family, sliding_window=window,
                           layer_types=["sliding_attention", "full_attention"])
    return tiny_model(family, vocab=12, seed=1, sliding_window=window)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("window", [4, 6, 33])     # 9 + 24 = 33 tokens are needed
def test_sliding_windows(family, window, slack, monkeypatch):
    """Prompts shorter and longer than the window, padded, finished rows leaving: the answers of the
    plain loop, and those of transformers' cache, whose logits are the same but for rounding."""
    model, eos, logits = sliding_model(family, window), [EOS, 7, 9], []
    prompts = [*prompts_of(15), [1, *range(3, 11)], [1]]
    model.register_forward_hook(lambda model, args, out: logits.append(out.logits))
    found = decode(model, prompts, eos, NEW)
    ours, logits[:] = list(logits), []
    assert len(ours[-1]) < len(ours[0]) == 17       # rows left
    cache, own = roomy_cache(model, 33), DynamicCache(config=model.config)
    assert cache.is_sliding == own.is_sliding and True in own.is_sliding
    assert all(hasattr(layer, "room") for layer in cache.layers)
    with monkeypatch.context() as m:
        m.setattr(decoding, "roomy_cache", lambda *_: own)
        assert decode(model, prompts, eos, NEW) == found
    for a, b in zip(ours, logits, strict=True):
        torch.testing.assert_close(a, b)
    plain = [plain_loop(model, p, eos=eos) for p in prompts]
    assert found == tuple(map(list, zip(*plain, strict=True)))


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("prompt", [1, 4, 5, 9])
def test_the_cache_gives_what_transformers_gives(window, prompt, slack):
    """The same keys, values and mask sizes, bit for bit, also when rows are repeated, exchanged and
    dropped; of what is shared, rows are not exchanged."""
    config = tiny_config("mistral", num_hidden_layers=1, sliding_window=window)
    model, generator = types.SimpleNamespace(config=config), torch.Generator().manual_seed(0)
    ours, own = roomy_cache(model, prompt + 20), DynamicCache(config=config)
    rows, order = 2, [None] * 21
    order[0], order[14] = [0, 0, 0, 1, 1, 1], [1, 4, 5]
    for step in (2, 5, 6, 7, 11):           # beams of the two prompts
        order[step] = [1, 1, 0, 5, 3, 4]
    for step in (15, 18):
        order[step] = [1, 1, 0] if step == 18 else [2, 0]
    for step in range(20):
        new = [torch.rand(rows, 1, prompt if step == 0 else 1, 8, generator=generator)
               for _ in range(2)]
        assert ours.get_mask_sizes(len(new[0][0, 0]), 0) == own.get_mask_sizes(
            len(new[0][0, 0]), 0)
        for a, b in zip(ours.update(*new, 0), own.update(*new, 0), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == own.get_seq_length() == prompt + step
        if step == 14:
            ours.layers[0].shared = 0
        if order[step]:
            rows = len(order[step])
            for cache in (ours, own):
                cache.reorder_cache(torch.tensor(order[step]))
        if step == 0:
            ours.layers[0].shared = ours.layers[0].end


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_beams_with_the_cache_are_those_without(family, dtype, slack):
    """The same answers in batches, where every prompt is read once and its last token once a beam;
    windows of 6 are shorter than prompts."""
    model = tiny_model(vocab=12, seed=22) if family == "llama" else sliding_model(family, 6)
    model, read = model.to(dtype), []
    prompts = [*prompts_of(9, seed=3), [1], [1, 5, 6, 7, 8, 9, 10, 11, 3, 4, 5]]
    hook = model.register_forward_pre_hook(
        lambda model, args, inputs: read.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    found = decode_beams(model, prompts, [EOS], NEW, 4)
    hook.remove()
    assert read[0] == (11, 10) and set(read[1:]) == {(44, 1)}
    ids, mask = decoding.padded(prompts, "cpu")
    own = model.generate(ids, attention_mask=mask)[:, ids.shape[1]:].tolist()
    assert found == strip_eos([row + [EOS] * (NEW - len(row)) for row in own], [EOS])


SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
             initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
             mamba_chunk_size=8)
OTHERS = {
    "mamba": dict(state_size=8), "lfm2": dict(full_attn_idxs=[1], block_ff_dim=32),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8,
                  use_mamba_kernels=False),
    "falcon_h1": dict(head_dim=8, mamba_d_ssm=32, **MAMBA),
    "roberta": dict(is_decoder=True), "rwkv": dict(attention_hidden_size=16),
    "recurrent_gemma": dict(head_dim=8, lru_width=16, num_hidden_layers=3),
    "minimax": dict(head_dim=8, num_local_experts=2), "openai-gpt": dict(n_positions=64),
    "gemma3_text": dict(head_dim=8)}


def other_model(family, vocab=12, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocab, **{**SHAPE, **OTHERS[family], **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["mamba", "lfm2", "jamba", "falcon_h1"])
def test_models_with_states_decode_as_they_read(family):
    """States of all layers, states beside attention in turn, or both in one layer."""
    model = other_model(family)
    check_decoding(model, [1, 5, 9])
    check_decoding(model, [1, 5, 9], 3)
    prompts = [*prompts_of(7), *prompts_of(3)]
    for prompt, completion in zip(prompts, decode(model, prompts, [EOS], NEW)[0], strict=True):
        assert completion == plain_loop(model, prompt)[0]


@pytest.mark.parametrize("family, beams, message", [
    ("roberta", 1, "off by [0-9]+%"),               # its positions count padding
    ("rwkv", 1, "off by [0-9]+%"),                  # its state has seen the padding
    ("recurrent_gemma", 1, "off by [0-9]+%"),       # its state is not in the cache
    ("minimax", 1, "ValueError: MiniMax uses cache of its own"),
    ("openai-gpt", 1, "RuntimeError"),              # it has no cache
    ("rwkv", 3, "cannot use beam search"), ("roberta", 3, "off by [0-9]+%"),
    ("recurrent_gemma", 3, "off by [0-9]+%"),
    ("minimax", 3, "off by [0-9]+%"),               # its states are not reordered
    ("openai-gpt", 3, None)])       # transformers' beams need none
def test_models_that_decode_otherwise_than_they_read_are_refused(family, beams, message):
    model = other_model(family)
    if message is None:
        check_decoding(model, [1, 5, 9], beams)
    else:
        with pytest.raises(InputError, match=message):
            check_decoding(model, [1, 5, 9], beams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
def test_the_check_sees_a_mask_that_is_ignored(family, dtype, monkeypatch):
    model = tiny_model(family).to(dtype)
    check_decoding(model, [1, 5, 9, 3])
    check_decoding(model, [1, 5, 9, 3], 3)
    original = model.forward

    def forward(attention_mask=None, **inputs):
        return original(**inputs)
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(InputError, match="off by"):
        check_decoding(model, [1, 5, 9, 3])
    monkeypatch.setattr(model, "forward", lambda **_: lack())
    with pytest.raises(torch.OutOfMemoryError):
        check_decoding(model, [1, 5, 9, 3])


def lack():
    raise torch.OutOfMemoryError("CUDA out of memory")


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


@pytest.mark.parametrize("more", [[], ["--num-beams", 2], ["--load-in-4bit"]])
def test_the_first_model_is_gone_before_the_second_is_opened(tiny, problems, tmp_path, monkeypatch,
                                                             more):
    """Whatever gc.freeze() in open_tokenizer makes permanent: an exception of the tokenizer that
    refers to itself, as transformers has one at its first opening, holds the frames around it."""
    write_jsonl(tmp_path / "d.jsonl", problems[:3])
    opened, originals = [], (generate.open_model, generate.open_tokenizer)
    # a warning with an exception in it, which pytest would keep
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "propagate", False)

    def open_tokenizer(*args):
        try:
            raise ValueError
        except ValueError as e:
            error = e
        return originals[1](*args), error

    def open_model(*args, **kwargs):
        assert not [ref for ref in opened if ref()]
        model = originals[0](*args, **kwargs)
        opened.append(weakref.ref(model))
        return model
    monkeypatch.setattr(generate, "open_model", open_model)
    monkeypatch.setattr(generate, "open_tokenizer", lambda *args: open_tokenizer(*args)[0])
    argv = ["--model", tiny / "model", tiny / "other", "--data", tmp_path / "d.jsonl", "--out",
            tmp_path / "1.jsonl", tmp_path / "2.jsonl", "--max-new-tokens", 3, *more]
    try:
        run_stage(generate.parser(), generate.main, [str(a) for a in argv])
        assert len(opened) == 2 and not [ref for ref in opened if ref()]
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.parametrize("more", [[], ["--num-beams", 2], ["--temperature", 1, "--num-samples", 2]])
def test_a_batch_is_decoded_in_as_many_rows_as_fit(tiny, problems, tmp_path, monkeypatch, capsys,
                                                   more):
    write_jsonl(tmp_path / "d.jsonl", problems[:9])
    argv = ["--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--max-new-tokens", 8, *more]
    run(generate, *argv, "--out", tmp_path / "a.jsonl")
    assert "note" not in capsys.readouterr().out
    name, sizes = "decode_beams" if "--num-beams" in more else "decode", []
    original, count = getattr(generate, name), 18 if "--num-samples" in more else 9

    def counted(model, prompts, *rest):
        sizes.append(len(prompts))
        return original(model, prompts, *rest)
    monkeypatch.setattr(generate, name, counted)
    # the weights of the tiny model, and a little
    monkeypatch.setattr("core.memory.device_bytes", lambda device: 4 * 26064 + 300_000)
    run(generate, *argv, "--out", tmp_path / "b.jsonl")
    said = capsys.readouterr().out
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sum(sizes) == count and 1 < max(sizes) < count
    assert said.count(f"memory for {max(sizes)} of a batch's {count} rows at once") == 1


def test_what_ends_answers_comes_from_the_model_too(tiny, problems, tokenizer, tmp_path):
    """A price counts the token that ended an answer, whichever it was."""
    write_jsonl(tmp_path / "d.jsonl", problems[:9])
    argv = ["--data", tmp_path / "d.jsonl", "--max-new-tokens", 12, "--out"]
    model = open_model(tiny / "model", torch.device("cpu")).eval()
    prompts = [encode_prompt(tokenizer, p["prompt"]) for p in problems[:9]]
    eos = [EOS, decode(model, prompts, [EOS], 12)[0][0][4]]
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    run(generate, "--model", tmp_path / "m", *argv, tmp_path / "a.jsonl")
    expected, truncated = decode(model, prompts, eos, 12)
    answers = rows(tmp_path / "a.jsonl")
    assert [a["completion"] for a in answers] == tokenizer.batch_decode(expected)
    assert [a["truncated"] for a in answers] == truncated and not truncated[0]
    generated = sum(map(len, expected)) + truncated.count(False)
    assert json.loads((tmp_path / "a.jsonl.price").read_text())["generated_tokens"] == generated


def test_dtype_and_models_that_are_refused(tiny, problems, tokenizer, tmp_path, monkeypatch,
                                           capsys):
    write_jsonl(tmp_path / "d.jsonl", problems[:3])
    argv = ["--data", tmp_path / "d.jsonl", "--max-new-tokens", 3, "--out", tmp_path / "a.jsonl"]
    seen, original = [], generate.check_decoding
    monkeypatch.setattr(generate, "check_decoding",
                        lambda model, *rest: (seen.append(model.dtype), original(model, *rest)))
    run(generate, "--model", tiny / "model", "--dtype", "bfloat16", *argv)
    assert seen == [torch.bfloat16] and len(rows(tmp_path / "a.jsonl")) == 3
    (tmp_path / "a.jsonl").unlink()
    other_model("rwkv", len(tokenizer)).save_pretrained(tmp_path / "rwkv")
    tiny_model(vocab=2).save_pretrained(tmp_path / "small")     # without an embedding for EOS
    capsys.readouterr()
    for name, message in (("rwkv", "off by"), ("small", "only 2 embeddings")):
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(SystemExit) as e:
            run_stage(generate.parser(), generate.main,
                      [str(a) for a in ("--model", tmp_path / name, *argv)])
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.count("\n") == 1, error
        assert error.startswith("generate.py: error:") and message in error


@pytest.mark.parametrize("more", [[], ["--num-beams", 2], ["--temperature", 1]])
def test_adapters_answer_as_the_merged_model(tiny, problems, tmp_path, more):
    write_jsonl(tmp_path / "d.jsonl", problems)
    run(sft, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "lora",
        "--lora-rank", 2, "--lr", 0.03, "--epochs", 2)
    run(merge, "--model", tmp_path / "lora", "--out", tmp_path / "merged")
    answers = {}
    for name, model in (("lora", tmp_path / "lora"), ("merged", tmp_path / "merged"),
                        ("base", tiny / "model")):
        run(generate, "--model", model, "--data", tmp_path / "d.jsonl", "--max-new-tokens", 8,
            "--out", tmp_path / f"{name}.jsonl", *more)
        answers[name] = rows(tmp_path / f"{name}.jsonl")
    assert answers["lora"] == answers["merged"] != answers["base"]
