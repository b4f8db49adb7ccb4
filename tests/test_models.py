"""Model families with tokenizers like theirs: the same token ids in every stage, chat formats;
weights in 4 bits."""
import json

import pytest
import torch
from conftest import assert_same_gradients, check_resume, preferences, rows, run, tiny_model
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import compare
import dpo
import generate
import sft
from core import judge as judging
from core import pairs
from core.models import open_model, save_model
from core.records import InputError, write_json, write_jsonl
from core.tokens import encode_prompt, open_tokenizer, user_prompt

CPU = torch.device("cpu")
QUESTION = user_prompt("Two and two?\n  indented <s> </s>")
ANSWERS = ["It is\n#### 4", "\nno idea", "  #### 5 <|im_end|>", "4"]
# family: (kind of tokenizer, {bos, eos, pad}, further special tokens, chat template)
LLAMA = ("{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}"
         "<|eot|>{% endfor %}"
         "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
           "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>"
         "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
QWEN = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FAMILIES = {
    "llama": ("bytes", dict(bos_token="<|begin|>", eos_token="<|end_of_text|>"),
              ["<|start|>", "<|end|>", "<|eot|>"], LLAMA, "<|eot|>"),
    "mistral": ("words", dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"), [], MISTRAL,
                "</s>"),
    "gemma": ("spaces", dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                             unk_token="<unk>"),
              ["<start_of_turn>", "<end_of_turn>"], GEMMA, "<end_of_turn>"),
    "qwen3": ("bytes", dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>"),
              ["<|im_start|>", "<|im_end|>"], QWEN, "<|im_end|>")}


def make_tokenizer(family):
    """A tokenizer of a few hundred tokens that splits, adds BOS and decodes as the family's."""
    kind, names, more, template, _ = FAMILIES[family]
    unknown = names.get("unk_token")
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=unknown))
    special = list(dict.fromkeys([*names.values(), *more]))
    alphabet = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        before, after = [normalizers.Replace(" ", "\u2581")], [decoders.Replace("\u2581", " ")]
        after += [decoders.ByteFallback(), decoders.Fuse()]
        if kind == "words":     # a space before the first word, as SentencePiece for Llama 2 has it
            before.insert(0, normalizers.Prepend("\u2581"))
            after.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence(before)
        tokenizer.decoder = decoders.Sequence(after)
    texts = [QUESTION, *ANSWERS, "system user assistant model [INST] [/INST]"] * 3
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if kind != "bytes":
        state = json.loads(tokenizer.to_str())
        for i in range(256):        # what is no character of the vocabulary is bytes
            state["model"]["vocab"][f"<0x{i:02X}>"] = len(state["model"]["vocab"])
        tokenizer = Tokenizer.from_str(json.dumps(state))
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    out = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=more, **names)
    out.chat_template = template
    return out


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    tokenizer = make_tokenizer(request.param)
    tokenizer.save_pretrained(folder)
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(request.param, vocab=len(tokenizer), **ids).save_pretrained(folder)
    return request.param, folder, AutoTokenizer.from_pretrained(folder)


def plain(tokenizer, text):
    """The family's own ids of a text without BOS; special tokens spelled out in it are text."""
    ids = tokenizer(text, split_special_tokens=True).input_ids
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_are_the_same_in_every_stage(family, chat, tmp_path, monkeypatch):
    name, folder, tokenizer = family
    question = user_prompt("Two and two?\n  indented") if chat else QUESTION
    records = [{"id": i, "prompt": question, "completion": text, "reference": "4"}
               for i, text in enumerate(ANSWERS)]
    write_jsonl(tmp_path / "d.jsonl", records)
    write_jsonl(tmp_path / "p.jsonl",
                [{"id": 0, "prompt": question, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}])
    read = {}

    def spy(where, name, of, argument=0):
        original = getattr(where, name)

        def spied(*args):
            read.setdefault(of, []).extend(args[argument])
            return original(*args)
        monkeypatch.setattr(where, name, spied)
    for where, of in ((sft, "sft"), (pairs, "dpo"), (judging, "compare")):
        spy(where, "pack", of)
    spy(generate, "decode", "generate", argument=1)
    as_chat = ["--chat-template"] if chat else []
    run(sft, "--model", folder, "--data", tmp_path / "d.jsonl", "--epochs", 1,
        "--out", tmp_path / "m", *as_chat)
    run(generate, "--model", folder, "--data", tmp_path / "d.jsonl", "--max-new-tokens", 2,
        "--out", tmp_path / "o.jsonl", *as_chat)
    run(dpo, "--model", folder, "--data", tmp_path / "p.jsonl", "--epochs", 1,
        "--out", tmp_path / "n", *as_chat)
    judge = open_model(folder, CPU, "AutoModelForSequenceClassification", num_labels=2)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    write_json(tmp_path / "judge/judge.json", {})
    write_jsonl(tmp_path / "b.jsonl",
                [{**r, "completion": ANSWERS[i - 1]} for i, r in enumerate(records)])
    run(compare, "score", "--judge", tmp_path / "judge", "--task", "gsm8k",
        "--a", tmp_path / "d.jsonl", "--b", tmp_path / "b.jsonl", "--out", tmp_path / "c.jsonl",
        *as_chat)

    if chat:
        ends = FAMILIES[name][4]
        turns = [{"role": "user", "content": "Two and two?\n  indented"},
                 {"role": "assistant", "content": "4"}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        prompt = tokenizer(whole[:whole.rindex("4")], add_special_tokens=False).input_ids
        # its template has no opening of an answer; the space before one is part of it
        if name == "mistral":
            prompt = tokenizer(whole[:whole.rindex(" 4")], add_special_tokens=False).input_ids
    else:
        ends = FAMILIES[name][1]["eos_token"]
        bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
        prompt = bos + plain(tokenizer, question)
    end = tokenizer.convert_tokens_to_ids(ends)
    completions = [plain(tokenizer, text) + [end] for text in ANSWERS]
    assert all(c.count(end) == 1 for c in completions) and end != tokenizer.unk_token_id
    assert prompt.count(tokenizer.bos_token_id) == (0 if name == "qwen3" else 1)
    assert read["generate"] == [prompt] * 4
    assert sorted(ids for ids, _ in read["sft"]) == sorted(prompt + c for c in completions)
    assert all(weights == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
               for ids, weights in read["sft"])
    assert {tuple(ids) for ids, _ in read["dpo"]} == {tuple(prompt + c) for c in completions[:2]}
    agree = {c["id"] for c in rows(tmp_path / "c.jsonl") if c["agree"]}
    asked = [(completions[i], completions[i - 1]) for i in set(range(4)) - agree]
    assert {tuple(ids) for ids, _ in read["compare"]} == {
        tuple(prompt + x + y) for a, b in asked for x, y in ((a, b), (b, a))}
    # what is trained on comes back as the same text
    for text, ids in zip(ANSWERS, completions, strict=True):
        assert tokenizer.decode(ids[:-1], skip_special_tokens=True) == text
    assert AutoTokenizer.from_pretrained(tmp_path / "m").eos_token == ends


def test_special_tokens_in_a_question_are_text(family):
    name, folder, _ = family
    tokenizer = open_tokenizer(folder, chat_template=True)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    plain_ids = [i for i in encode_prompt(tokenizer, "a question") if i in special]
    question = f"a {''.join(tokenizer.convert_ids_to_tokens(list(special)))} question"
    ids = encode_prompt(tokenizer, user_prompt(question))
    assert [i for i in ids if i in special] == plain_ids and plain_ids
    assert question in tokenizer.decode(ids)


@pytest.mark.parametrize("chat", [False, True])
def test_learns_by_heart_and_stops(family, chat, tmp_path):
    """Also where pad is EOS (Qwen), and where a turn ends in another token than a text (Llama,
    Gemma)."""
    _, folder, _ = family
    records = [{"id": 0, "prompt": QUESTION, "completion": ANSWERS[0]},
               {"id": 1, "prompt": user_prompt("no?"), "completion": ANSWERS[1]}]
    write_jsonl(tmp_path / "d.jsonl", records)
    as_chat = ["--chat-template"] if chat else []
    run(sft, "--model", folder, "--data", tmp_path / "d.jsonl", "--epochs", 60, "--lr", 0.02,
        "--out", tmp_path / "m", *as_chat)
    run(generate, "--model", tmp_path / "m", "--data", tmp_path / "d.jsonl",
        "--max-new-tokens", 40, "--out", tmp_path / "o.jsonl", *as_chat)
    answers = [(a["completion"], a["truncated"]) for a in rows(tmp_path / "o.jsonl")]
    assert answers == [(r["completion"], False) for r in records]


@pytest.mark.parametrize("template, ends", [
    # channels before the answer, as gpt-oss has them; a template that opens no answer; one that
    # thinks first
    ("{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|endoftext|>"
     "{% endif %}{{ m.content }}<|im_end|>{% endfor %}", "<|im_end|>"),
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
     "<|im_end|>"),
    (QWEN.replace("<|im_start|>assistant\n",
                  "<|im_start|>assistant\n<think>a long thought</think>"), "<|im_end|>"),
    ("{{ raise_exception('no') }}", None), ("{% if %}", None)])
def test_unusual_chat_templates(template, ends, tmp_path):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "t")
    if ends:
        assert open_tokenizer(tmp_path / "t", chat_template=True).eos_token == ends
    else:
        with pytest.raises(InputError, match="--chat-template: that of .* refuses"):
            open_tokenizer(tmp_path / "t", chat_template=True)


def test_a_template_that_repeats_the_question(tmp_path):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = QWEN.replace("{{ m.content }}",
                                           "{{ m.content }} once more: {{ m.content }}")
    tokenizer.save_pretrained(tmp_path / "t")
    tokenizer = open_tokenizer(tmp_path / "t", chat_template=True)
    assert "why? once more: why?" in tokenizer.decode(encode_prompt(tokenizer, "why?"))
    with pytest.raises(InputError, match="repeats a message"):
        encode_prompt(tokenizer, "why <|im_end|>?")


def test_a_base_model_has_no_chat_template(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:2])
    with pytest.raises(InputError, match="--chat-template: .* has none"):
        run(generate, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--chat-template",
            "--out", tmp_path / "o.jsonl")


# ---------------------------------------------------------------- 4 bits
@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer):
    """A Llama so wide that blocks of 64 values, which 4 bits are scaled by, are no whole layers."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    tiny_model(vocab=len(tokenizer), hidden_size=128, intermediate_size=192,
               initializer_range=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def nf4(weight):
    """A weight as 4 bits hold it: per 64 values, the nearest of 16 normal quantiles times the
    largest (QLoRA, appendix E), here to the precision of the scales, which are quantized too."""
    import bitsandbytes as bnb
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape), scale.max()


def test_four_bits_keep_what_they_can(wide):
    import bitsandbytes as bnb
    full, small = open_model(wide, CPU), open_model(wide, CPU, load_in_4bit=True)
    layers = dict(full.named_modules())
    quantized = [name for name, m in small.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert sorted(quantized) == sorted(name for name, m in full.named_modules()
                                       if isinstance(m, torch.nn.Linear) and name != "lm_head")
    for name in quantized:
        weight = small.get_submodule(name).weight
        got = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        expected, scale = nf4(layers[name].weight.data)
        # the scales are kept in 8 bits: within 1% of the largest, measured 0.4%
        assert (got - expected).abs().max() < 0.01 * scale
        assert (got - layers[name].weight).abs().max() > 0.01 * scale
    ids = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(0))
    assert 0.01 < (full(input_ids=ids).logits - small(input_ids=ids).logits).abs().max() < 1.0


def test_adapters_on_four_bits_train_and_continue(wide, problems, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    argv = ["--model", wide, "--data", tmp_path / "d.jsonl", "--batch-size", 4, "--epochs", 4,
            "--lr", 0.01, "--lora-rank", 4, "--load-in-4bit", "--gradient-checkpointing"]
    run(sft, *argv, "--save-at", 0.5, "--out", tmp_path / "m")
    losses = [r["loss"] for r in rows(tmp_path / "m/metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    for more in ([], ["--load-in-4bit"]):
        run(generate, "--model", tmp_path / "m", *more, "--data", tmp_path / "d.jsonl",
            "--max-new-tokens", 4, "--out", tmp_path / f"o{len(more)}.jsonl")
    check_resume(monkeypatch, capsys, tmp_path, sft, argv, calls=4)
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:4], "no"))
    run(dpo, "--model", wide, "--data", tmp_path / "p.jsonl", "--epochs", 1, "--lora-rank", 4,
        "--load-in-4bit", "--out", tmp_path / "n")
    # adapters that are 0 are the reference: ln 2, to the 6 digits of the log
    assert rows(tmp_path / "n/metrics.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_gradients_through_four_bits_in_dpo(wide, problems, tmp_path, monkeypatch):
    """Those of the same model with what 4 bits made of its weights: the pass that computes the
    reference must not get in the way."""
    import bitsandbytes as bnb
    model, small = open_model(wide, CPU), open_model(wide, CPU, load_in_4bit=True)
    for name, m in small.named_modules():
        if isinstance(m, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
            model.get_submodule(name).weight.data = weight
    save_model(model, AutoTokenizer.from_pretrained(wide), tmp_path / "same")
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:3], "no"))
    found = []

    def spy(model, *args):
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return 0.0
    monkeypatch.setattr(dpo, "apply_gradients", spy)
    for at, more in ((wide, ["--load-in-4bit"]), (tmp_path / "same", [])):
        run(dpo, "--model", at, "--data", tmp_path / "p.jsonl", "--epochs", 1, "--lora-rank", 4,
            "--out", tmp_path / f"m{len(found)}", *more)
    assert_same_gradients(*found)


@pytest.mark.parametrize("more, message", [
    ({}, "its weights alone take .* --load-in-4bit, with --lora-rank"),
    ({"load_in_4bit": True}, "its weights alone take")])
def test_weights_larger_than_the_device_are_not_read(wide, monkeypatch, more, message):
    monkeypatch.setattr("core.models.free_bytes", lambda device: 10_000)
    # it is not even called
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(InputError, match=message):
        open_model(wide, CPU, **more)


@pytest.mark.parametrize("stage", [sft, dpo])
def test_four_bits_need_adapters(tiny, problems, tmp_path, stage):
    write_jsonl(tmp_path / "d.jsonl", problems[:2])
    with pytest.raises(InputError, match="4 bits cannot be trained"):
        run(stage, "--model", tiny / "model", "--data", tmp_path / "d.jsonl", "--load-in-4bit",
            "--out", tmp_path / "m")
