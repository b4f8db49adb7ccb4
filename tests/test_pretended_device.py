"""Every stage that runs a model, on a pretended CUDA device (pretend_cuda.py) in bf16; and planted
mistakes, each of which it must find."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import ROOT, check_resume, everything, preferences, run, tiny_model
from pretend_cuda import pretended_card
from transformers.models.llama.modeling_llama import LlamaMLP

import compare
import dpo
import generate
import sft
from core import decoding, judge, merge, models, optimizers, pairs
from core.records import InputError, write_jsonl

STAGES = {"sft": sft, "dpo": dpo, "compare": compare, "generate": generate, "merge": merge}
TRAIN = "--epochs 2 --batch-size 2 --lr 1e-3"
SFT = f"sft --model base --data few.jsonl {TRAIN}"
DPO = f"dpo --model base --data pairs.jsonl {TRAIN} --optimizer rmsprop8bit"
ANSWER = "generate --data few.jsonl --max-new-tokens 8 --model"
SCORE = "compare score --judge judge --a right.jsonl --b wrong.jsonl --task"
RUNS = {
    "sft": SFT,
    "sft with checkpointing": f"{SFT} --gradient-checkpointing",
    "sft of adapters": f"{SFT} --lora-rank 4 --gradient-checkpointing",
    "sft on 4 bits": f"{SFT} --lora-rank 4 --load-in-4bit",
    "sft of all from adapters": SFT.replace("base", "lora"),
    "sft from random weights":
        f"sft --init-config base/config.json --tokenizer base --data few.jsonl {TRAIN}",
    "sft with fused adamw": f"{SFT} --optimizer adamw",
    "sft with muon": f"{SFT} --optimizer muon",
    "dpo": DPO,
    "dpo with a reference": f"{DPO} --reference other --nll-weight 0.1",
    "dpo of new adapters": f"{DPO} --lora-rank 4",
    "dpo of sft's adapters": f"{DPO.replace('base', 'lora')} --lora-rank 4",
    "dpo on 4 bits": f"{DPO.replace('base', 'lora')} --lora-rank 4 --load-in-4bit",
    "greedy": f"{ANSWER} base",
    "sampled": f"{ANSWER} lora --temperature 0.7 --num-samples 2",
    "beams": f"{ANSWER} lora --num-beams 2",
    "greedy in 4 bits": f"{ANSWER} lora --load-in-4bit",
    "judge": "compare train --model base --task arithmetic --data wrong.jsonl --gold right.jsonl "
             "--lr 1e-3 --epochs 1",
    "score": f"{SCORE} arithmetic",
    "score by embeddings": f"{SCORE} saferpaca --embedder base",
    "merge": "merge --model lora",
}
ON_CPU = ["--device", "cpu", "--dtype", "bfloat16"]


def start(command, out, *more):
    stage, *argv = command.split()
    out.parent.mkdir(parents=True, exist_ok=True)
    run(STAGES[stage], *argv, *more, "--out", out)


def start_on_cpu(command, out):
    """What is the default on a card, on the CPU."""
    trains = command.startswith(("sft", "compare train")) and "--optimizer" not in command
    start(command, out, *ON_CPU, *(["--optimizer", "adamw8bit"] if trains else []))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, problems):
    """Models and records. Layers of 4,096 weights: bitsandbytes has 32-bit state for smaller ones.
    """
    top = tmp_path_factory.mktemp("card")
    for seed, name in enumerate(("base", "other")):
        tiny_model(seed=seed, vocab=len(tokenizer), tie_word_embeddings=True, hidden_size=64,
                   intermediate_size=64, num_hidden_layers=1).save_pretrained(top / name)
        tokenizer.save_pretrained(top / name)
    write_jsonl(top / "right.jsonl", problems[:10])
    write_jsonl(top / "wrong.jsonl", [{**p, "completion": f"#### {int(p['reference']) + 1}"}
                                      for p in problems[:10]])
    write_jsonl(top / "few.jsonl", problems[:4])
    write_jsonl(top / "pairs.jsonl", preferences(problems[:4]))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(top)
        start_on_cpu(RUNS["sft of adapters"], top / "lora")
        start_on_cpu(RUNS["judge"], top / "judge")
    return top


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_does_on_the_card_what_it_does_on_a_cpu(name, tmp_path, monkeypatch):
    orthogonal = optimizers.orthogonal      # in fp32 on a CPU
    monkeypatch.setattr(optimizers, "orthogonal", lambda x, dtype: orthogonal(x, torch.bfloat16))
    with pretended_card():
        start(RUNS[name], tmp_path / "card/out")
    start_on_cpu(RUNS[name], tmp_path / "cpu/out")
    card, cpu = everything(tmp_path / "card"), everything(tmp_path / "cpu")
    assert [path for path in {**card, **cpu} if card.get(path) != cpu.get(path)] == []


@pytest.mark.parametrize("name", ["sft", "sft with fused adamw", "dpo on 4 bits"])
def test_resume_on_the_card(name, tmp_path, monkeypatch, capsys):
    stage, *argv = RUNS[name].split()
    with pretended_card():
        check_resume(monkeypatch, capsys, tmp_path, STAGES[stage], argv, calls=2)


# ---------------------------------------------------------------- planted mistakes
def cpu_tensors(batch, *names):
    return {key: x.cpu() if key in names and torch.is_tensor(x) else x for key, x in batch.items()}


def parameters_on_cpu(model, name):
    for key, p in model.named_parameters():
        if name in key:
            p.data = p.data.cpu()
    return model


def remainders_on_cpu(model):
    for p in model.parameters():
        p.low_bits = p.low_bits.cpu()
    return model


def statistics_on_cpu(model):
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.weight.quant_state.absmax = module.weight.quant_state.absmax.cpu()
    return model


def cache_on_cpu(cache):
    for layer in cache.layers:
        layer.update = lambda key, value, *args, update=layer.update, **kwargs: update(
            key.cpu(), value.cpu(), *args, **kwargs)
    return cache


def gradient_on_cpu(logps, weights, owner):
    logps.register_hook(lambda gradient: gradient * torch.ones(gradient.shape))
    return logps, weights, owner


def recomputed_on_cpu(forward, layer, x):
    recomputes = torch._C._current_graph_task_id() >= 0     # within a backward pass
    return forward(layer, x + torch.zeros(x.shape if recomputes else (), dtype=x.dtype))


class Stays(torch.Tensor):
    """A tensor that stays where it is."""

    def to(self, *args, **more):
        moved = args and isinstance(args[0], torch.device)
        return self if moved else super().to(*args, **more)


# what is on the CPU: (run that meets it, module or class, its function, what stands in its place)
MISTAKES = {
    "a batch": ("sft", sft, "pack", lambda f, *args: (
        cpu_tensors(batch, *batch) for batch in f(*args))),
    "positions": ("dpo", pairs, "pack", lambda f, *args: (
        cpu_tensors(batch, "position_ids") for batch in f(*args))),
    "loss weights": ("sft", sft, "completion_logps", lambda f, *args: (
        lambda logps, weights, owner: (logps, weights.cpu(), owner))(*f(*args))),
    "an index for tensors of the card": ("dpo", pairs, "completion_logps", lambda f, *args: (
        lambda logps, weights, owner: (logps, weights, owner.cpu()))(*f(*args))),
    "a tensor that the card indexes": ("sampled", generate, "decode", lambda f, *args: f(
        *args[:-1], args[-1].cpu())),
    "a tensor under a mask of the card": ("judge", judge, "hidden_states", lambda f, *args: f(
        *args).cpu()),
    "numpy of a tensor of the card": ("dpo", dpo, "summed", lambda f, x, model: torch.from_numpy(
        x.numpy())),
    "scalars in a stack": ("dpo", dpo, "dpo_loss", lambda f, *args, **more: (
        lambda losses, chosen, rejected: (losses, chosen.cpu(), rejected.cpu()))(
            *f(*args, **more))),
    "sampling noise": ("sampled", decoding, "choose_tokens", lambda f, logits, t, noise=None: f(
        logits, t, None if noise is None else noise.cpu())),
    "a generator of sampling noise": ("sampled", decoding, "choose_tokens", lambda f, logits, *args:
        logits.float().softmax(-1).multinomial(1, generator=torch.Generator())[:, 0]),
    "a cache": ("greedy", decoding, "roomy_cache", lambda f, *args: cache_on_cpu(f(*args))),
    "inputs of an embedder": ("score by embeddings", torch.nn.utils.rnn, "pad_sequence",
        lambda f, *args, **more: f(*args, **more).as_subclass(Stays)),
    "remainders": ("sft", sft, "open_model", lambda f, *args, **more: remainders_on_cpu(
        f(*args, **more))),
    "a zeroed head": ("judge", judge, "set_exact", lambda f, p, values: setattr(
        p, "data", values.to(p.dtype).cpu())),
    "a judge's head": ("score", judge, "open_model", lambda f, *args, **more: parameters_on_cpu(
        f(*args, **more), "score")),
    "adapters": ("sft of adapters", sft, "add_lora", lambda f, model, rank: (
        f(model, rank), parameters_on_cpu(model, "lora_"))),
    "adapters that were saved": ("greedy in 4 bits", models, "put_adapters", lambda f, model, *args:
        (f(model, *args), parameters_on_cpu(model, "lora_B"))),
    "statistics of 4-bit weights": ("sft on 4 bits", sft, "open_model", lambda f, *args, **more: (
        statistics_on_cpu(f(*args, **more)))),
    "an optimizer's state": ("sft", bnb.optim.optimizer.Optimizer8bit, "get_state_buffer",
                             lambda f, *args, **more: f(*args, **more).cpu()),
    "a tensor, in a backward pass": ("sft with checkpointing", sft, "completion_logps",
                                     lambda f, *args: gradient_on_cpu(*f(*args))),
    "a tensor, in a layer that is recomputed": ("sft with checkpointing", LlamaMLP, "forward",
                                                recomputed_on_cpu),
    "nothing, but no kernel takes bf16 gradients with 32-bit state": (
        "dpo", optimizers, "exact_step", lambda f, optimizer, scale: optimizer.step()),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name, tmp_path, monkeypatch):
    command, owner, function, wrong = MISTAKES[name]
    right = getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda *args, **more: wrong(right, *args, **more))
    start_on_cpu(RUNS[command], tmp_path / "cpu/out")       # where it is no mistake
    words = "same device|convert cuda:0|'cuda' device type|combination not supported"
    with pytest.raises((RuntimeError, InputError), match=words), pretended_card():
        start(RUNS[command], tmp_path / "card/out")


def test_what_a_card_takes_is_not_refused():
    with pretended_card():
        x, here = torch.arange(3.0, device="cuda"), torch.ones(3)
        assert (x.device.type, x.view(3, 1).is_cuda, here.device.type) == ("cuda", True, "cpu")
        assert (x * here[0] + here.sum()).is_cuda           # scalars
        assert x[here.long()].is_cuda and x[here > 0].is_cuda       # indices and masks
        here.copy_(x)
        x.copy_(here)
        assert x.cpu().numpy().tolist() == here.tolist() == x.tolist()
        assert here.to(x).is_cuda and not here.is_cuda and torch.zeros_like(x, device="cpu").is_cpu
        assert torch.as_tensor(x, device="cpu").is_cpu and x.is_cuda
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available() and x.device.type == "cpu"


def test_a_mistake_that_the_program_survives_is_found():
    with pytest.raises(AssertionError, match="same device"), pretended_card():
        try:
            torch.ones(3, device="cuda") + torch.ones(3)
        except RuntimeError:
            pass


# ---------------------------------------------------------------- before a real card is there
def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    models.pick_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with pretended_card():
        assert models.pick_device(None).type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("sign", ["/dev/nvidia0", "nvidia-smi"])
def test_a_gpu_that_torch_cannot_use_is_mentioned(sign, monkeypatch, capsys):
    signs = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)       # "" hides a GPU on purpose
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in signs else None)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in signs)
    models.pick_device(None)
    assert capsys.readouterr().out == ""
    signs.append(sign)
    models.pick_device("cpu")       # asked for: nothing to say
    assert capsys.readouterr().out == ""
    assert models.pick_device(None).type == "cpu"
    assert capsys.readouterr().out.startswith("note: this machine has a GPU")


@pytest.mark.slow
def test_the_tests_of_a_real_card():
    """So that on a real one they fail for what it does."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "pretend_cuda",
                           "tests/test_gpu.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": "tests"})
    assert done.returncode == 0, done.stdout
    assert " passed, 1 skipped" in done.stdout      # two processes need two cards
