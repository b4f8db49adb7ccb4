"""The stages on a CUDA device, in bf16 with their 8-bit optimizers. Skipped without one.

    PYTHONPATH=tests python -m pytest -p pretend_cuda tests/test_gpu.py     # a pretended one
"""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Interrupted, interrupt_after, preferences, rows, run, tiny_model
from safetensors.torch import load_file

import compare
import dpo
import generate
import sft
from core.attention import separate
from core.models import REMAINDER, open_model, pick_device
from core.optimizers import apply_gradients, make_optimizers
from core.packing import completion_logps, pack
from core.precision import exact_value, join, set_exact, split
from core.records import write_jsonl
from core.tokens import encode_completion, encode_prompt
from core.training import Training

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A random Llama. Layers have 4,096 weights, because bitsandbytes keeps 32-bit state for
    smaller ones; widths are multiples of 64, which its 4-bit kernels work on."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(vocab=len(tokenizer), tie_word_embeddings=True, hidden_size=64,
               intermediate_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture()
def data(problems, tmp_path):
    """Demonstrations and preference pairs of the same 4 problems."""
    write_jsonl(tmp_path / "d.jsonl", problems[:4])
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:4]))
    return tmp_path


def logps(model, tokenizer, problems):
    """(6,) fp32 on the CPU: log-probabilities of completions, summed over their tokens."""
    sequences = []
    for r in problems[:6]:
        p, c = encode_prompt(tokenizer, r["prompt"]), encode_completion(tokenizer, r["completion"])
        sequences.append((p + c, [0.0] * len(p) + [1.0] * len(c)))
    values = torch.zeros(6)
    with torch.no_grad():
        for batch in pack(sequences, 400, model.device, model):
            found, _, owner = completion_logps(model, batch)
            values.index_add_(0, owner.cpu(), found.cpu())
    return values


def change(folder, base):
    """What a training has changed of its base: all weights in one fp32 vector."""
    before, after = (dict(open_model(path, CPU, dtype=torch.float32).named_parameters())
                     for path in (base, folder))
    return torch.cat([(p - before[name]).detach().flatten() for name, p in after.items()])


# ---------------------------------------------------------------- numbers
def test_the_same_log_probabilities_as_on_the_cpu(base, tokenizer, problems):
    found = {}
    for device, dtype in ((CPU, torch.float32), (CUDA, torch.float32), (CUDA, torch.bfloat16)):
        model = open_model(base, device, dtype=dtype)
        found[device.type, dtype] = [logps(model, tokenizer, problems)]
        assert separate(model)
        found[device.type, dtype].append(logps(model, tokenizer, problems))
    first = found["cpu", torch.float32][0]
    # sums over about 60 tokens of size 300: fp32 without TF32 to 1e-3, bf16 to 3 digits
    for x in found["cpu", torch.float32] + found["cuda", torch.float32]:
        assert (x - first).abs().max() < 1e-3
    for x in found["cuda", torch.bfloat16]:
        assert ((x - first).abs() / first.abs()).max() < 0.03


def test_attention_without_cudnn():
    """cuDNN's attention has given NaN gradients under a mask (pytorch issue 196678)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    device = pick_device(None)
    assert device.type == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
    generator = torch.Generator().manual_seed(0)
    for length in (1, 17, 63, 64, 65, 129, 200, 513):
        x = torch.randn(3, 2, 2, length, 64, generator=generator).to(torch.bfloat16)
        mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
        mask[1, :, length // 2:, :length // 2] = False      # a second sequence in the row
        results = []
        for where, dtype in ((CPU, torch.float32), (device, torch.bfloat16)):
            qkv = x.to(where, dtype).requires_grad_()
            out = torch.nn.functional.scaled_dot_product_attention(*qkv, mask.to(where))
            out.square().sum().backward()
            results.append(torch.cat([out.detach()[None], qkv.grad]).float().cpu())
        # bf16 carries 3 digits, and a gradient is a sum over up to 513 rounded terms
        assert (results[1] - results[0]).norm() < 0.03 * results[0].norm(), length


def test_exact_values_are_the_same_bits_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator)
    values[:1000] = (values[:1000].view(torch.int32) & ~0xffff | 0x8000).view(torch.float32)  # ties
    here, there = split(values), split(values.to(CUDA))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    assert torch.equal(join(*there).cpu(), values)
    p = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16, device=CUDA))
    set_exact(p, values.to(CUDA))
    assert p.low_bits.device == p.device and torch.equal(exact_value(p).cpu(), values)


# Share of the change by which card and CPU may differ. fp32: weights of 0.4 are stored to 3e-8,
# 0.3% of an update of 1e-5. 8 bits: a state between two codes may become either. Muon
# orthogonalises in bf16.
@pytest.mark.parametrize("name, tolerance", [("adamw", 0.01), ("rmsprop", 0.01), ("muon", 0.1),
                                             ("adamw8bit", 0.05), ("rmsprop8bit", 0.05)])
def test_exact_updates_are_those_of_the_cpu(base, name, tolerance):
    found = []
    for device in (CPU, CUDA):
        model = open_model(base, device, dtype=torch.bfloat16, trains="weights")
        before = [exact_value(p).cpu() for p in model.parameters()]
        optimizers = make_optimizers(model, name, 1e-5, device)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            apply_gradients(model, optimizers, 1e-5)
        found.append(torch.cat([(exact_value(p).cpu() - b).flatten()
                                for p, b in zip(model.parameters(), before, strict=True)]))
    cpu, card = found
    assert cpu.norm() > 1e-6 * len(cpu) ** 0.5
    assert (card - cpu).norm() < tolerance * cpu.norm()


def test_small_updates_are_kept(base, data):
    """DPO at 1e-6 changes what it does in fp32 on the CPU, and hardly a weight's 16 bits."""
    argv = ["--model", base, "--data", data / "p.jsonl", "--epochs", 6, "--lr", 1e-6]
    run(dpo, *argv, "--optimizer", "rmsprop8bit", "--out", data / "card")
    run(dpo, *argv, "--optimizer", "rmsprop", "--device", "cpu", "--out", data / "cpu")
    card, cpu = (change(data / name, base) for name in ("card", "cpu"))
    # the signs of the smallest gradients are lost in bf16, and RMSprop scales them up
    assert 0.8 < (card @ cpu / (cpu @ cpu)).item() < 1.2
    before, after = (open_model(path, CPU, dtype=torch.bfloat16).parameters()
                     for path in (base, data / "card"))
    moved = [(p != q).flatten() for p, q in zip(before, after, strict=True)]
    assert torch.cat(moved).float().mean() < 0.1


def test_answers_in_fp32_are_those_of_the_cpu(base, data):
    """Logits differ by 1e-6: that two of the 24 are as close as this is rare enough."""
    for name, how in {"greedy": [], "beams": ["--num-beams", 3],
                      "sampled": ["--temperature", 0.7, "--num-samples", 2]}.items():
        for device in ("cpu", "cuda"):
            run(generate, "--model", base, "--data", data / "d.jsonl", "--max-new-tokens", 16, *how,
                "--dtype", "float32", "--device", device, "--out", data / f"{name}.{device}")
        cpu, cuda = ((data / f"{name}.{device}").read_bytes() for device in ("cpu", "cuda"))
        assert cpu == cuda, name


# ---------------------------------------------------------------- stages
@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"], ["--lora-rank", "4"],
                                  ["--lora-rank", "4", "--load-in-4bit"]], ids=" ".join)
def test_training_and_answers(base, data, more, tokenizer, problems):
    run(sft, "--model", base, "--data", data / "d.jsonl", "--epochs", 12, "--lr", 0.01, *more,
        "--out", data / "m")
    losses = [r["loss"] for r in rows(data / "m/metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    four = {"load_in_4bit": True} if "--load-in-4bit" in more else {}
    if "--lora-rank" in more:
        adapters = load_file(data / "m/adapter_model.safetensors")
        assert {t.dtype for t in adapters.values()} == {torch.float32} and len(adapters) == 28
        assert not (data / "m/model.safetensors").exists()
    else:
        assert {t.dtype for t in load_file(data / "m" / REMAINDER).values()} == {torch.int16}
    # what was trained on the card says the same on the CPU: to 0.05 a token, as bf16 rounds; in 4
    # bits a weight between two codes may become either
    card, cpu = (logps(open_model(data / "m", device, dtype=torch.bfloat16, **four), tokenizer,
                       problems) for device in (CUDA, CPU))
    assert ((card - cpu).abs() < 0.05 * 60 + (0.1 * cpu.abs() if four else 0)).all()
    for how in ([], ["--num-beams", 2], ["--temperature", 0.7, "--num-samples", 2]):
        run(generate, "--model", data / "m", "--data", data / "d.jsonl", "--max-new-tokens", 16,
            *(["--load-in-4bit"] if four else []), *how, "--out", data / f"o{len(how)}.jsonl")
    run(dpo, "--model", data / "m", "--data", data / "p.jsonl", "--epochs", 3, "--lr", 1e-3, *more,
        "--optimizer", "rmsprop8bit", "--out", data / "n")
    metrics = rows(data / "n/metrics.jsonl")
    # log-probabilities of 60 tokens, in 3 digits, may be off by a few tenths, times beta = 0.1
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=0.05)
    assert metrics[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]], ids=" ".join)
def test_resume(base, data, more, monkeypatch, capsys):
    """Optimizers, remainders and adapters come back onto the card. The order of sums is not fixed
    there, so losses are equal in 2 digits only."""
    argv = ["--model", base, "--data", data / "d.jsonl", "--epochs", 6, "--lr", 1e-3, *more,
            "--state-every", 0]
    run(sft, *argv, "--out", data / "whole")
    with monkeypatch.context() as m:
        interrupt_after(m, Training, "log", 3)
        with pytest.raises(Interrupted):
            run(sft, *argv, "--out", data / "cut")
    run(sft, *argv, "--out", data / "cut")
    assert "continuing after step 3" in capsys.readouterr().out
    whole, cut = ([r["loss"] for r in rows(data / name / "metrics.jsonl")]
                  for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, rel=0.01) and cut[-1] < cut[0]


def test_judge(base, problems, tmp_path):
    write_jsonl(tmp_path / "gold.jsonl", problems)
    write_jsonl(tmp_path / "1.jsonl",
                [{**p, "completion": f"#### {int(p['reference']) + 1}"} for p in problems])
    run(compare, "train", "--model", base, "--task", "arithmetic", "--data", tmp_path / "1.jsonl",
        "--gold", tmp_path / "gold.jsonl", "--batch-size", 8, "--lr", 1e-3, "--epochs", 2, "--out",
        tmp_path / "judge")
    for device in ("cuda", "cpu"):
        run(compare, "score", "--judge", tmp_path / "judge", "--task", "arithmetic", "--a",
            tmp_path / "gold.jsonl", "--b", tmp_path / "1.jsonl", "--device", device, "--out",
            tmp_path / f"{device}.jsonl")
    card, cpu = ([c["prob_b"] for c in rows(tmp_path / f"{device}.jsonl")]
                 for device in ("cuda", "cpu"))
    # fp32 on the CPU: a logit in 3 digits is a probability to a few hundredths
    assert card == pytest.approx(cpu, abs=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes(base, problems, tmp_path):
    """Sharded by NCCL in bf16, losses are equal but for the order of the sums; answers are the same
    bytes."""
    def start(*argv):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "2", *map(str, argv)], cwd=ROOT, check=True)
    write_jsonl(tmp_path / "d.jsonl", problems)
    train = ["--model", base, "--data", tmp_path / "d.jsonl", "--epochs", 4, "--lr", 1e-3,
             "--batch-size", 6]
    start("sft.py", *train, "--out", tmp_path / "two")
    run(sft, *train, "--optimizer", "adamw", "--out", tmp_path / "one")
    two, one = ([r["loss"] for r in rows(tmp_path / f"{name}/metrics.jsonl")]
                for name in ("two", "one"))
    assert two == pytest.approx(one, rel=0.02)      # bf16 carries 3 digits
    start("sft.py", *train, "--lora-rank", 4, "--gradient-checkpointing", "--out",
          tmp_path / "lora")
    for more in ([], ["--load-in-4bit"]):
        answer = ["--model", tmp_path / "lora", "--data", tmp_path / "d.jsonl", "--max-new-tokens",
                  16, "--batch-size", 3, *more]
        start("generate.py", *answer, "--out", tmp_path / f"two{len(more)}.jsonl")
        run(generate, *answer, "--out", tmp_path / f"one{len(more)}.jsonl")
        two, one = (tmp_path / f"{name}{len(more)}.jsonl" for name in ("two", "one"))
        assert two.read_bytes() == one.read_bytes()
