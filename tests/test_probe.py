"""Any model, or an honest no: what the probe finds of many families, and what follows from it."""
import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import preferences, rows, run, tiny_model
from test_compare import train_argv, wrong  # noqa: F401  (a fixture)
from test_models import FAMILIES as TOKENIZERS
from test_models import make_tokenizer
from test_parallel import do_with
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

import compare
import dpo
import generate
import sft
from core import judge, packing
from core.adapters import add_lora
from core.attention import causal, is_separate, join, separate
from core.models import open_model, to_4bit
from core.packing import completion_logps, pack
from core.probe import probe, without_dropout
from core.records import InputError, write_jsonl
from core.tokens import open_tokenizer, stop_ids, user_prompt

CPU = torch.device("cpu")
ENDS = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(ENDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
GPT = dict(ENDS, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
EXPERTS = dict(LLAMA, num_local_experts=4, num_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=24)
STATES = dict(ENDS, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
# family: (its config, whether its attention is computed by sequences; else a record is a row);
# dropout as the family has it by default
CONFIGS = {
    "llama": (LLAMA, True), "mistral": (LLAMA, True), "phi": (LLAMA, True),
    "gemma2": (dict(LLAMA, head_dim=8, final_logit_softcapping=2.0), False),
    "granite": (dict(LLAMA, logits_scaling=4.0), True),
    "cohere": (dict(LLAMA, logit_scale=0.25), True),
    "gpt2": (GPT, True), "gptj": (dict(GPT, rotary_dim=4), False), "gpt_neox": (LLAMA, True),
    "mixtral": (EXPERTS, True), "qwen3_moe": (EXPERTS, True),
    "opt": (dict(LLAMA, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3), True),
    "bloom": (dict(ENDS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3), False),
    "falcon": (LLAMA, False), "biogpt": (LLAMA, True),
    "mpt": (dict(ENDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=256, initializer_range=0.3),
            False),
    "mamba": (STATES, False),
    "mamba2": (dict(STATES, num_heads=8, head_dim=8, n_groups=1, chunk_size=16), False)}


def tiny_family(family, seed=0, auto=AutoModelForCausalLM, **more):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**CONFIGS[family][0], **more})
    return auto.from_config(config, dtype=torch.float32)


def random_sequences(lengths=(60, 50, 33, 20, 70, 41, 12, 25), seed=0):
    """(token ids, loss weights): a third of each is prompt, the last token is EOS."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(3, 64, (n - 1,), generator=g).tolist() + [2],
             [0.0] * (n // 3) + [1.0] * (n - n // 3)) for n in lengths]


FLAGS = SimpleNamespace(micro_tokens=200)


def loss_of(model, sequences):
    """The mean over completion tokens, as sft.py computes it."""
    total = 0.0
    for batch in pack(sequences, 200, CPU, model):
        logps, weights, _ = completion_logps(model, batch)
        total -= (logps * weights).sum().item()
    return total / sum(sum(w[1:]) for _, w in sequences)


def own_loss(model, sequences):
    """The same by the model's own loss in transformers, one record at a time."""
    total = 0.0
    for ids, weights in sequences:
        labels = torch.tensor([[i if w else -100 for i, w in zip(ids, weights, strict=True)]])
        loss = model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss
        total += loss.item() * sum(weights[1:])
    return total / sum(sum(w[1:]) for _, w in sequences)


# fp32 sums of 300 terms of size 5
LOSS_TOLERANCE = 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_trains_on_its_own_loss(family, capsys):
    model, sequences = tiny_family(family), random_sequences()
    expected = own_loss(copy.deepcopy(model).eval(), sequences)
    probe(model.train(), sequences, FLAGS, CPU)
    assert model.training and is_separate(model) == CONFIGS[family][1]
    note = capsys.readouterr().out
    assert note == "" if is_separate(model) else re.fullmatch("note: .* a record a row .*\n", note)
    with torch.no_grad():
        assert loss_of(model, sequences) == pytest.approx(expected, abs=LOSS_TOLERANCE)
        join(model)         # every family can be trained on a record a row
        assert loss_of(model, sequences) == pytest.approx(expected, abs=LOSS_TOLERANCE)


# bf16: the loss of a random model has an error of about 0.3%
@pytest.mark.parametrize("family", ["llama", "granite", "mixtral", "opt", "mamba"])
def test_the_probe_in_16_bits(family):
    model, sequences = tiny_family(family).to(torch.bfloat16), random_sequences()
    expected = own_loss(copy.deepcopy(model).eval(), sequences)
    probe(model, sequences, FLAGS, CPU)
    assert is_separate(model) == CONFIGS[family][1]
    with torch.no_grad():
        assert loss_of(model, sequences) == pytest.approx(expected, rel=0.003)


@pytest.mark.parametrize("family", ["llama", "opt", "gptj", "bloom"])
@pytest.mark.parametrize("how", ["lora", "4 bits", "checkpointing"])
def test_the_probe_with_what_training_adds(family, how):
    model = tiny_family(family, initializer_range=0.1, init_std=0.1)
    if how == "4 bits":
        to_4bit(model, CPU, torch.float32)
    if how in ("lora", "4 bits"):
        add_lora(model, 2)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    probe(model.train(), random_sequences(), FLAGS, CPU)
    assert is_separate(model) == CONFIGS[family][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_too_small_for_the_loss_is_found(dtype, monkeypatch, capsys):
    def leak(module, query, key, value, attention_mask, units=None, scaling=None, **more):
        return causal(query, key, value, scaling, None), None       # as if a row were one sequence
    monkeypatch.setattr("core.attention.attend", leak)
    # weights near 0, as a new model has them: records change each other by 1e-4 nats and less
    model = tiny_family("llama", initializer_range=0.01).to(dtype)
    probe(model, random_sequences(), FLAGS, CPU)
    assert not is_separate(model)
    assert re.fullmatch("note: .*: records in one row see each other, which changes them by .* "
                        "nats a token: a record a row instead\n", capsys.readouterr().out)


def test_values_that_are_not_the_models_own_are_refused(monkeypatch):
    model, sequences = tiny_family("granite"), random_sequences()

    def without_scale(model, batch, rows, columns):
        return model.lm_head(packing.hidden_states(model, batch)[rows, columns])
    with monkeypatch.context() as m, pytest.raises(InputError, match="something else: .* nats"):
        m.setattr(packing, "logits_at", without_scale)
        probe(model, sequences, FLAGS, CPU)
    probe(model, sequences, FLAGS, CPU)


def test_how_coarsely_a_model_rounds_is_measured(monkeypatch, capsys):
    """Wide and deep models differ by more in batches of other shapes than small ones: 0.05 nats in
    a random Mistral-7B in bf16 on a card. That is no fault, and does not hide one."""
    model = tiny_family("llama").to(torch.bfloat16)
    head, size = model.lm_head.forward, [0.1]

    def rounded(hidden):
        generator = torch.Generator().manual_seed(hidden.shape[:-1].numel())
        logits = head(hidden)
        return logits + size[0] * torch.randn(logits.shape[-1], generator=generator).to(logits)
    monkeypatch.setattr(model.lm_head, "forward", rounded)
    probe(model, random_sequences(), FLAGS, CPU)
    assert is_separate(model) and not capsys.readouterr().out
    size[0] = 1             # so coarse that nothing can be told: refused
    with pytest.raises(InputError, match="something else"):
        probe(model, random_sequences(), FLAGS, CPU)


def test_positions_that_run_on_are_found(monkeypatch):
    # sequences stay apart, but the model ignores that their positions begin anew
    model = tiny_family("gpt2")
    table = model.transformer.wpe
    monkeypatch.setattr(table, "forward", lambda positions: torch.nn.functional.embedding(
        torch.arange(positions.shape[1])[None] % 128, table.weight))
    probe(model, random_sequences(), FLAGS, CPU)
    assert not is_separate(model)


def test_a_model_that_sees_what_follows_is_refused():
    config = AutoConfig.for_model("bert", **LLAMA)
    with pytest.raises(InputError, match="in padded rows of one record it computes something else"):
        probe(AutoModelForCausalLM.from_config(config), random_sequences(), FLAGS, CPU)


# ---------------------------------------------------------------- dropout
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gpt_neox", "llama"])
def test_no_dropout_is_left(family):
    rates = {"resid_pdrop": 0.3, "dropout": 0.3, "hidden_dropout": 0.3, "attention_dropout": 0.3,
             "layerdrop": 0.3}
    model = tiny_family(family, **rates).train()
    model.config.inner_config = PreTrainedConfig(attention_dropout=0.3)     # as of several parts
    ids = torch.tensor([random_sequences()[0][0]])
    assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    without_dropout(model)
    assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert model.config.inner_config.attention_dropout == 0
    assert [k for k, v in model.config.to_dict().items() if "drop" in k and v] == []


def test_other_randomness_in_training_is_refused():
    model = tiny_family("mixtral", router_jitter_noise=0.05)
    with pytest.raises(InputError, match="in training mode, without dropout, it computes .* else"):
        probe(model, random_sequences(), FLAGS, CPU)


# ---------------------------------------------------------------- the stages
def family_folder(folder, tokenizer, family, **more):
    model = tiny_family(family, vocab_size=len(tokenizer), **more)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_first_dpo_loss_is_ln_2_with_dropout(family, tokenizer, problems, tmp_path, capsys):
    more = dict(hidden_dropout=0.1) if family == "bloom" else {}
    folder = family_folder(tmp_path / "model", tokenizer, family, **more)
    assert AutoConfig.from_pretrained(folder).to_dict()[
        {"gpt2": "resid_pdrop", "opt": "dropout", "bloom": "hidden_dropout"}[family]] == 0.1
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:8], "no"))
    run(dpo, "--model", folder, "--data", tmp_path / "p.jsonl", "--batch-size", 4, "--epochs", 1,
        "--out", tmp_path / "dpo")
    # the log has 6 digits
    assert rows(tmp_path / "dpo/metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert ("note: " in capsys.readouterr().out) == (family == "bloom")


def test_padding_stays_within_the_models_positions(tokenizer, problems, tmp_path):
    # rows of 600 tokens, records of at most 80: padding would count on
    folder = family_folder(tmp_path / "model", tokenizer, "gpt2", n_positions=80)
    records = [p for p in problems if len(tokenizer(p["prompt"] + p["completion"]).input_ids) < 75]
    assert len(records) > 5
    write_jsonl(tmp_path / "d.jsonl", records)
    run(sft, "--model", folder, "--data", tmp_path / "d.jsonl", "--epochs", 1, "--micro-tokens",
        600, "--max-length", 80, "--out", tmp_path / "m")
    sequences = random_sequences((70, 60, 50, 80))
    model = tiny_family("gpt2", n_positions=80).eval()
    without_dropout(model)
    expected = own_loss(model, sequences)
    for way, shape in ((join, (4, 80)), (separate, (1, 288))):
        way(model)
        (batch,) = pack(sequences, 400, CPU, model)
        assert batch["input_ids"].shape == shape and batch["position_ids"].max() == 79
        with torch.no_grad():
            assert loss_of(model, sequences) == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "mpt"])
def test_a_record_longer_than_the_models_positions(family):
    name = {"mpt": "max_seq_len", "opt": "max_position_embeddings"}.get(family, "n_positions")
    model = tiny_family(family, **{name: 64})
    probe(model, random_sequences((64, 60, 10)), FLAGS, CPU)
    with pytest.raises(InputError, match="cannot read a row of 66 tokens") as e:
        probe(model, random_sequences((66, 60, 10)), FLAGS, CPU)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_two_processes_decide_the_same(tokenizer, problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems)
    jobs = []
    for family in ("bloom", "gpt2"):
        folder = family_folder(tmp_path / family, tokenizer, family, n_positions=300)
        jobs.append(("sft", ["--model", folder, "--data", tmp_path / "d.jsonl", "--epochs", 1,
                             "--batch-size", 10, "--out"], None))
    found = {}
    for count in (1, 2):
        here = [(stage, [*argv, tmp_path / f"{argv[1].name}_{count}"], cut)
                for stage, argv, cut in jobs]
        ends, said = do_with(count, here, tmp_path)
        assert ends == ["done", "done"] and said.count("note: ") == said.count("bloom: its") == 1
        found[count] = [[row["loss"] for row in rows(argv[-1] / "metrics.jsonl")]
                        for _, argv, _ in here]
    for one, two in zip(*found.values(), strict=True):
        assert one == pytest.approx(two, abs=1e-5)      # sums in another order, two steps of them


# ---------------------------------------------------------------- ends of answers
@pytest.fixture(scope="module")
def too_small(tiny, tokenizer, tmp_path_factory):
    """A model whose tokenizer's EOS is beyond its embeddings."""
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = copy.deepcopy(tokenizer)
    tiny_model(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", ["sft", "dpo", "generate", "compare"])
def test_an_eos_without_an_embedding_is_refused(stage, too_small, problems, train_argv,  # noqa: F811
                                                tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:4], "no"))
    argv = {"sft": [sft, "--model", too_small, "--data", tmp_path / "d.jsonl"],
            "dpo": [dpo, "--model", too_small, "--data", tmp_path / "p.jsonl"],
            "generate": [generate, "--model", too_small, "--data", tmp_path / "d.jsonl"],
            "compare": [compare, *train_argv, "--model", too_small]}
    with pytest.raises(InputError, match="embeddings: they do not belong together"):
        run(*argv[stage], "--out", tmp_path / "out")


def test_stop_ids():
    tokenizer, model = make_tokenizer("llama"), tiny_model(vocab=400)
    known = tokenizer.convert_tokens_to_ids
    eos, turn = known("<|end_of_text|>"), known("<|eot|>")
    model.config.eos_token_id = [eos, 399]
    model.generation_config.eos_token_id = 17
    assert stop_ids(tokenizer, model) == [eos, *sorted({17, turn, 399})]
    tokenizer.eos_token = "<|eot|>"
    assert stop_ids(tokenizer, model) == [turn, *sorted({17, eos, 399})]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    model.config.eos_token_id, model.generation_config.eos_token_id = None, [5, 400, 17]
    assert stop_ids(tokenizer, model) == [turn, 5, 17]      # 400 has no embedding


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_chat_model_stops_in_plain_transformers(kind, tmp_path):
    folder, tokenizer = tmp_path / "model", make_tokenizer(kind)
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(kind, vocab=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(tmp_path / "d.jsonl", [{"id": 0, "prompt": user_prompt("Two?"),
                                        "completion": "It is\n#### 2"}])
    run(sft, "--model", folder, "--data", tmp_path / "d.jsonl", "--epochs", 60, "--lr", 0.02,
        "--out", tmp_path / "m", "--chat-template")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Two?"}],
                                           add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    turn = tokenizer.convert_tokens_to_ids(TOKENIZERS[kind][4])
    assert tokenizer.decode(out[prompt["input_ids"].shape[1]:-1]) == "It is\n#### 2"
    assert out[-1] == turn != ids["eos_token_id"]
    assert model.config.eos_token_id == [turn, ids["eos_token_id"]]


# ---------------------------------------------------------------- judges
def judge_inputs(tokenizer, problems):
    return [judge.encode_pair(tokenizer, p["prompt"], p["completion"], other)
            for p, other in zip(problems[:4], ("no", "#### 7", "", "it is much more than that"),
                                strict=True)]


# pad is EOS; no pad, and the only special token is EOS, as GPT-2; no pad, but BOS; one of its own
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "llama", "gemma"])
def test_a_judge_scores_the_same_in_plain_transformers(kind, problems, tmp_path, monkeypatch):
    end = "<|endoftext|>"
    monkeypatch.setitem(TOKENIZERS, "gpt2", ("bytes", dict(bos_token=end, eos_token=end), [], None,
                                             end))
    tokenizer, top = make_tokenizer(kind), tmp_path
    tokenizer.save_pretrained(top / "model")
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(vocab=len(tokenizer), **ids).save_pretrained(top / "model")
    if kind == "qwen3":         # once by the stage, once for each by what the stage calls
        write_jsonl(top / "gold.jsonl", problems)
        write_jsonl(top / "1.jsonl", [wrong(p) for p in problems])
        run(compare, "train", "--model", top / "model", "--task", "arithmetic", "--data",
            top / "1.jsonl", "--gold", top / "gold.jsonl", "--epochs", 1, "--lr", 0.01,
            "--out", top / "judge", "--device", "cpu")
    else:
        model = open_model(top / "model", CPU, "AutoModelForSequenceClassification", num_labels=2)
        judge.set_padding(model, tokenizer)
        model.save_pretrained(top / "judge")
        tokenizer.save_pretrained(top / "judge")

    tokenizer = AutoTokenizer.from_pretrained(top / "judge")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    inputs = judge_inputs(open_tokenizer(top / "judge"), problems)
    model = open_model(top / "judge", CPU, "AutoModelForSequenceClassification").eval()
    expected = judge.probabilities(model, inputs, FLAGS, CPU)
    assert max(expected) - min(expected) > 0.01
    model = AutoModelForSequenceClassification.from_pretrained(top / "judge").eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id
    for side in ("left", "right"):
        batch = tokenizer.pad({"input_ids": inputs}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            got = model(**batch).logits.softmax(-1)[:, 1]
        # fp32 sums in rows of another length
        assert got.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["bloom", "falcon", "llama", "opt"])
def test_a_judge_of_every_kind_reads_a_question_as_if_alone(family, capsys):
    model = tiny_family(family, auto=AutoModelForSequenceClassification, num_labels=2).eval()
    torch.nn.init.zeros_(model.score.weight)        # as a new judge has it
    sequences = [ids for ids, _ in random_sequences()]
    judge.probe_judge(model, sequences, FLAGS, CPU)
    assert is_separate(model) == CONFIGS[family][1] == ("note: " not in capsys.readouterr().out)
    torch.nn.init.normal_(model.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = judge.probabilities(model, sequences, FLAGS, CPU)
        join(model)
        expected = [model(torch.tensor([ids])).logits.softmax(-1)[0, 1].item() for ids in sequences]
    assert found == pytest.approx(expected, abs=1e-6) and max(found) - min(found) > 1e-3


def test_a_model_without_a_score_is_no_judge(tokenizer):
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **LLAMA))
    with pytest.raises(InputError, match="a judge needs a model whose classifier"):
        judge.set_padding(model, tokenizer)


@pytest.mark.parametrize("family, more, refused", [
    ("llama4_text", dict(attention_chunk_size=64, num_local_experts=2, intermediate_size_mlp=48,
                         head_dim=8, no_rope_layers=[1, 0]), False),
    ("doge", dict(keep_window_size=64, sliding_window=64), False),
    ("doge", dict(keep_window_size=64), True),
    ("llama", dict(max_position_embeddings=64,
                   rope_scaling={"rope_type": "dynamic", "factor": 4.0}), True)])
def test_what_depends_on_the_length_of_a_record_is_seen(family, more, refused):
    """A mask that changes beyond 64 tokens: its own is taken. What changes for all records of a
    batch if one is longer (positions that are stretched, a number of keys): no way is right."""
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3,
        **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    own = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    sequences = [(torch.randint(3, 60, (n,), generator=generator).tolist(),
                  [0.0] * 20 + [1.0] * (n - 20)) for n in (40, 200, 150, 90)]
    args = SimpleNamespace(micro_tokens=4096)
    if refused:
        with pytest.raises(InputError, match="change each other"):
            probe(model, sequences, args, torch.device("cpu"))
        return
    probe(model, sequences, args, torch.device("cpu"))
    with torch.no_grad():
        for batch in pack(sequences, 4096, CPU, model):
            logps, _, owner = completion_logps(model, batch)
            for i in set(owner.tolist()):
                ids = torch.tensor([sequences[i][0]])
                expected = own(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                expected = expected[19:-1].gather(1, ids[0, 20:, None])[:, 0]
                # fp32 sums in another order
                assert (logps[owner == i] - expected).abs().max() < 1e-4
