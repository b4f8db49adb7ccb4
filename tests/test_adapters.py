"""Adapters: their formula, their folders in PEFT's format, and what stages do with them."""
import json
import os
import shutil

import pytest
import torch
from conftest import check_resume, preferences, rows, run, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dpo
import generate
import sft
from core import merge
from core.adapters import add_lora, carry_over, read_adapters
from core.models import open_model, save_model
from core.records import InputError, write_json, write_jsonl
from core.sources import ADAPTER_CONFIG, fingerprint

CPU = torch.device("cpu")
# fp32 logits of size 1 from two layers, summed in another order
LOGIT_TOLERANCE = 2e-5
IDS = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(folder, **more):
    with torch.no_grad():
        return open_model(folder, CPU, **more)(input_ids=IDS).logits


@pytest.fixture()
def data(tiny, problems, tmp_path):
    """A base of its own beside the records, so that it can be moved and changed."""
    shutil.copytree(tiny / "model", tmp_path / "base")
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:6]))
    return tmp_path


def train(data, out, *more, model="base", lr=0.01):
    run(sft, "--model", data / model, "--data", data / "d.jsonl", "--lr", lr, "--epochs", 3,
        "--batch-size", 4, "--lora-rank", 4, *more, "--out", data / out)


# ---------------------------------------------------------------- what they compute
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen3"])
def test_the_formula(family, tiny, tokenizer, tmp_path):
    base, merged = (tiny_model(family, vocab=len(tokenizer)) for _ in range(2))
    base.save_pretrained(tmp_path / "base")
    model = open_model(tmp_path / "base", CPU)
    before = model(input_ids=IDS).logits
    add_lora(model, 3)
    assert torch.equal(model(input_ids=IDS).logits, before)          # B = 0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    linear = [name for name, m in merged.named_modules()
              if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert set(trained) == {f"{name}.lora_{x}" for name in linear for x in "AB"}
    assert len(linear) == 14
    weights = dict(merged.named_parameters())
    for name in linear:
        A, B = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"]
        weight = weights[f"{name}.weight"]
        assert A.shape == (3, weight.shape[1]) and B.shape == (weight.shape[0], 3)
        torch.nn.init.normal_(B, std=0.1)
        weight.data += 2 * (B.data @ A.data)
    save_model(model, tokenizer, tmp_path / "m")
    assert (logits(tmp_path / "m") - merged(input_ids=IDS).logits).abs().max() < LOGIT_TOLERANCE
    assert torch.equal(logits(tmp_path / "m"), model(input_ids=IDS).logits)
    assert (before - logits(tmp_path / "m")).abs().max() > 0.1


def test_training_changes_adapters_and_writes_nothing_else(data):
    before = fingerprint(data / "base")
    train(data, "m", "--save-at", 0.5, "--gradient-checkpointing")
    assert fingerprint(data / "base") == before
    files = {p.name for p in (data / "m").iterdir()}
    assert {ADAPTER_CONFIG, "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not {"model.safetensors", "config.json"} & files
    half, end = (load_file(data / f / "adapter_model.safetensors")
                 for f in ("m/checkpoint-50", "m"))
    assert half.keys() == end.keys() and {t.dtype for t in end.values()} == {torch.float32}
    assert all(not torch.equal(half[k], end[k]) for k in end)
    losses = [r["loss"] for r in rows(data / "m/metrics.jsonl")]
    assert losses[-1] < 0.95 * losses[0]


# ---------------------------------------------------------------- their folders
def test_peft_opens_a_folder_and_gives_the_same_logits(data):
    peft = pytest.importorskip("peft", reason="benchmarks/requirements.txt has it")
    train(data, "m")
    base = AutoModelForCausalLM.from_pretrained(data / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, data / "m").eval()
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    assert (logits(data / "m") - theirs).abs().max() < LOGIT_TOLERANCE
    assert (logits(data / "base") - theirs).abs().max() > 0.01
    model.save_pretrained(data / "back")       # and ours opens what it writes
    config = json.loads((data / "back" / ADAPTER_CONFIG).read_text())
    write_json(data / "back" / ADAPTER_CONFIG, {**config, "base_model_name_or_path": "../base"})
    assert torch.equal(logits(data / "back"), logits(data / "m"))


# What vLLM checks before it serves a folder (vllm/lora/peft_helper.py and lora_model.py, read).
def test_a_folder_has_what_vllm_reads(data):
    train(data, "m")
    config = json.loads((data / "m" / ADAPTER_CONFIG).read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert config["bias"] == "none" and not config.get("modules_to_save")
    assert not config.get("use_dora") and not config.get("use_rslora")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj",
                                        "up_proj", "v_proj"]
    for name in load_file(data / "m/adapter_model.safetensors"):
        module = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert name.startswith("base_model.model.model.layers.")
        assert module.rpartition(".")[2] in ("lora_A", "lora_B")
        assert module.split(".")[-2] in config["target_modules"]


def test_a_base_is_known_by_its_weights_wherever_it_lies(data):
    (data / "run").mkdir()
    shutil.move(data / "base", data / "run/base")
    train(data, "run/m", model="run/base")
    expected = logits(data / "run/m")
    shutil.move(data / "run", data / "elsewhere")       # together: the path still leads there
    assert torch.equal(logits(data / "elsewhere/m"), expected)
    os.symlink(data / "elsewhere/m", data / "link")
    assert torch.equal(logits(data / "link"), expected)
    shutil.move(data / "elsewhere/m", data / "m")
    with pytest.raises(InputError, match="its base, .* is not there"):
        logits(data / "m")
    other = tiny_model(seed=7, vocab=24)
    other.save_pretrained(data / "base")
    config = json.loads((data / "m" / ADAPTER_CONFIG).read_text())
    write_json(data / "m" / ADAPTER_CONFIG, {**config, "base_model_name_or_path": "../base"})
    with pytest.raises(InputError, match="made for other weights"):
        logits(data / "m")
    shutil.copytree(data / "elsewhere/base", data / "base", dirs_exist_ok=True)
    assert torch.equal(logits(data / "m"), expected)


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "of a kind that is not read here .*use_dora"),
    ({"use_rslora": True}, "use_rslora"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"lora_alpha": None}, "not adapters as"),
    ({"lora_alpha": float("nan")}, "not adapters as"),
    ({"base_model_name_or_path": None}, "not adapters as"),
    ({"base_model_name_or_path": "."}, "is a folder of adapters too"),
    (None, "not adapters as")])
def test_other_adapters_are_refused(data, change, message):
    train(data, "m")
    config = json.loads((data / "m" / ADAPTER_CONFIG).read_text())
    if change is None:
        (data / "m/adapter_model.safetensors").write_bytes(b"broken")
    else:
        write_json(data / "m" / ADAPTER_CONFIG, {**config, **change})
    with pytest.raises(InputError, match=message):
        logits(data / "m")


def test_tensors_that_are_no_pairs_are_refused(data):
    train(data, "m")
    path = data / "m/adapter_model.safetensors"
    good = load_file(path)
    name = next(k for k in good if "lora_A" in k)
    for bad in ({}, {**good, name: good[name][0]}, {**good, name: good[name][:2]},
                {k: t for k, t in good.items() if k != name}):
        save_file(bad, path)
        with pytest.raises(InputError, match="m: "):
            logits(data / "m")


def test_adapters_of_a_language_model_serve_one_without_a_head(data):
    from core.embeddings import embed
    train(data, "m")
    a, b = (embed(str(data / name), ["1 2"], "cpu")["1 2"] for name in ("base", "m"))
    assert (a - b).abs().max() > 1e-4


def test_a_run_that_takes_over_keeps_the_way_to_the_base(data):
    (data / "a/seed").mkdir(parents=True)
    train(data, "a/m")
    train(data, "a/seed/n", model="a/m")        # trained on: its base is the same
    (data / "deeper/b/seed").mkdir(parents=True)
    for name in ("m", "seed/n"):
        new = data / "deeper/b" / name
        shutil.copytree(data / "a" / name, new)
        carry_over(data / "a" / name / ADAPTER_CONFIG, new / ADAPTER_CONFIG, data / "a")
        assert torch.equal(logits(new), logits(data / "a" / name))
        assert fingerprint(new) == fingerprint(data / "a" / name)
    run(sft, "--model", data / "base", "--data", data / "d.jsonl", "--out", data / "a/full")
    train(data, "a/on_full", model="a/full")    # a base of the same run comes along
    shutil.copytree(data / "a/on_full", data / "deeper/b/on_full")
    carry_over(data / "a/on_full" / ADAPTER_CONFIG, data / "deeper/b/on_full" / ADAPTER_CONFIG,
               data / "a")
    config = json.loads((data / "deeper/b/on_full" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "../full"


# ---------------------------------------------------------------- stages
@pytest.mark.parametrize("more", [[], ["--load-in-4bit"], ["--dtype", "bfloat16"]],
                         ids=["fp32", "4 bits", "bf16"])
def test_dpo_trains_the_adapters_of_sft_on(data, more, capsys):
    train(data, "m", *more)
    argv = ["--data", data / "p.jsonl", "--lr", 1e-4, "--lora-rank", 4, *more]
    run(dpo, "--model", data / "m", *argv, "--out", data / "n")
    metrics = rows(data / "n/metrics.jsonl")
    # the reference is where they stood; ln 2 to the 6 digits of the log
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    before, after = read_adapters(data / "m"), read_adapters(data / "n")
    assert before.base == after.base == str((data / "base").resolve())
    moved = [(after.tensors[k] - t).abs().max().item() for k, t in before.tensors.items()]
    # one step of Adam moves a weight by at most the rate; here the rounds have one step each
    assert 0 < max(moved) < 2.1 * 1e-4 and min(moved) > 0
    run(dpo, "--model", data / "n", "--reference", data / "m", *argv, "--out", data / "o")
    assert rows(data / "o/metrics.jsonl")[0]["loss"] != pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(InputError, match="adapters of rank 4"):
        run(dpo, "--model", data / "m", *argv, "--lora-rank", 8, "--out", data / "p")


def test_small_changes_survive_four_bits(data):
    """What a paper's learning rate changes is less than a step of 4 bits, or of 16."""
    train(data, "m", lr=1e-5)
    change = (logits(data / "m") - logits(data / "base")).abs().max()
    assert 1e-5 < change < 0.01
    four = {"load_in_4bit": True}
    small = (logits(data / "m", **four) - logits(data / "base", **four)).abs().max()
    assert 0.5 * change < small < 2 * change


def test_every_weight_can_be_trained_from_adapters(data):
    """SFT of all weights from a folder of adapters starts at W + 2BA, exactly, in 16 bits too."""
    train(data, "m")
    start = dict(tiny_with_adapters_merged(data).named_parameters())
    for dtype in ("float32", "bfloat16"):
        run(sft, "--model", data / "m", "--data", data / "d.jsonl", "--lr", 1e-30, "--epochs", 1,
            "--dtype", dtype, "--out", data / dtype)
        made = open_model(data / dtype, CPU, dtype=torch.float32)
        for name, p in made.named_parameters():
            # but for weights of 0, which Adam moves by the rate
            assert (p - start[name]).abs().max() < 1e-28, (dtype, name)


def tiny_with_adapters_merged(data):
    model, adapters = open_model(data / "base", CPU), read_adapters(data / "m").tensors
    for name in (k.removesuffix(".lora_A") for k in adapters if k.endswith("A")):
        a, b = adapters[f"{name}.lora_A"], adapters[f"{name}.lora_B"]
        model.get_submodule(name).weight.data += 2.0 * (b @ a)
    return model


def test_merging_is_a_command(data, capsys):
    train(data, "m", lr=1e-4)
    kept = {}
    for dtype in ("float32", "bfloat16"):
        run(merge, "--model", data / "m", "--dtype", dtype, "--out", data / dtype)
        said = capsys.readouterr().out.splitlines()[-1]
        kept[dtype] = float(said.split(": ")[2].split("%")[0])
    assert kept["float32"] == pytest.approx(100, abs=0.1)      # digits that are printed
    merged = AutoModelForCausalLM.from_pretrained(data / "float32")
    assert (merged(input_ids=IDS).logits - logits(data / "m")).abs().max() < LOGIT_TOLERANCE
    assert AutoModelForCausalLM.from_pretrained(data / "bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="exists"):
        run(merge, "--model", data / "m", "--out", data / "float32")


def test_a_model_without_adapters_is_rounded(data):
    run(merge, "--model", data / "base", "--dtype", "bfloat16", "--out", data / "small")
    exact, small = (load_file(data / name / "model.safetensors") for name in ("base", "small"))
    assert all(torch.equal(small[k], exact[k].to(torch.bfloat16)) for k in exact)
    assert AutoModelForCausalLM.from_pretrained(data / "small").dtype == torch.bfloat16
    assert not (data / "small/exact").exists()


def test_answers_are_those_of_the_merged_model(data):
    train(data, "m")
    run(merge, "--model", data / "m", "--dtype", "float32", "--out", data / "merged")
    for name in ("m", "merged"):
        run(generate, "--model", data / name, "--data", data / "d.jsonl", "--max-new-tokens", 12,
            "--out", data / f"{name}.jsonl")
    assert [r["completion"] for r in rows(data / "m.jsonl")] == [
        r["completion"] for r in rows(data / "merged.jsonl")]


def test_resume_with_adapters_that_are_trained_on(data, monkeypatch, capsys):
    train(data, "m")
    argv = ["--model", data / "m", "--data", data / "p.jsonl", "--lora-rank", 4, "--lr", 1e-3,
            "--batch-size", 2]
    check_resume(monkeypatch, capsys, data, dpo, argv, calls=2)


def test_what_adapters_and_four_bits_cover_is_said(tmp_path, tokenizer, capsys):
    """Experts that are one tensor each are no linear layers: they get no adapters."""
    from transformers import AutoConfig
    config = AutoConfig.for_model(
        "mixtral", vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    add_lora(open_model(tmp_path / "moe", CPU), 2)
    said = capsys.readouterr().out
    assert "--lora-rank 2: " in said and "experts" in said
    share = float(said.split(", ")[1].split("%")[0])
    assert 5 < share < 20           # attention: 3,072 of 28,000
    tiny_model(vocab=24).save_pretrained(tmp_path / "dense")
    open_model(tmp_path / "dense", CPU, load_in_4bit=True)
    assert "--load-in-4bit: 14 linear layers, 100.0%" in capsys.readouterr().out
