"""16 bits compute, 32 bits learn: remainders, exact steps, and what stages hand on."""
import math
import struct

import numpy as np
import pytest
import torch
from conftest import check_resume, preferences, rows, run, tiny_model
from safetensors.torch import load_file, save_file

import compare
import dpo
import sft
from core.models import REMAINDER, open_model
from core.optimizers import (
    apply_gradients,
    make_muon,
    make_optimizers,
    orthogonal,
    restore,
)
from core.precision import exact_step, exact_value, join, keep_exact, set_exact, split
from core.records import InputError, write_jsonl

CPU = torch.device("cpu")


def every_kind_of_value():
    """fp32 values of all exponents and signs, halfway between two bf16, zeros, infinities."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2 ** 32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 2 ** 16, 1000).astype(np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    more = np.array([0.0, -0.0, math.inf, -math.inf, 1e-45, 3.4028235e38], dtype=np.float32)
    values = np.concatenate([values, more])
    return torch.tensor(values[~np.isnan(values)])


def test_split_and_join_are_inverse_to_the_bit():
    values = every_kind_of_value()
    weights, remainder = split(values)
    assert (weights.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(weights, remainder).view(torch.int32), values.view(torch.int32))


def test_the_bf16_weight_is_a_nearest_one():
    values = every_kind_of_value()
    values = values[values.isfinite()]
    ours, torchs = split(values)[0].double(), values.to(torch.bfloat16).double()
    exact = values.double()
    finite = ours.isfinite() & torchs.isfinite()
    assert finite.sum() > 190_000
    assert torch.equal((ours - exact)[finite].abs(), (torchs - exact)[finite].abs())
    ties = torch.tensor([struct.unpack("f", struct.pack("I", b))[0]
                         for b in (0x3F808000, 0xBF808000, 0x3F818000)])
    assert split(ties)[0].tolist() == [1.0078125, -1.0078125, 1.015625]      # away from 0


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "muon", "adamw8bit", "rmsprop8bit"])
def test_steps_are_those_of_fp32(name):
    """The same gradients give the same fp32 values, to the bit, as a model that is kept in fp32."""
    models = [tiny_model(hidden_size=64, vocab=80), tiny_model(hidden_size=64, vocab=80)]
    models[1].to(torch.bfloat16)
    for p32, p16 in zip(models[0].parameters(), models[1].parameters(), strict=True):
        set_exact(p16, p32.data)
    keep_exact(models[1])
    optimizers = [make_optimizers(model, name, 1e-3, CPU) for model in models]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for p32, p16 in zip(*(m.parameters() for m in models), strict=True):
            p16.grad = torch.randn(p32.shape, generator=generator).to(torch.bfloat16)
            p32.grad = p16.grad.float()
        # a norm under which nothing is clipped, and one under which everything is
        norms = [apply_gradients(m, o, 1e-5, max_norm=1e9 if step % 2 else 1.0)
                 for m, o in zip(models, optimizers, strict=True)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)     # fp32 sums, the same order
    for p32, p16 in zip(*(m.parameters() for m in models), strict=True):
        assert p16.dtype == torch.bfloat16 and p16.grad is None
        assert torch.equal(exact_value(p16), p32.data)
        assert torch.equal(p16.data, split(p32.data)[0])


@pytest.mark.parametrize("shape", [(48, 128), (96, 96), (256, 96), (1, 8)])
def test_muon_is_torchs_in_fp32(shape):
    """Its updates are those of torch.optim.Muon up to the latter's bf16, and on a CPU those of
    float64 up to fp32."""
    generator = torch.Generator().manual_seed(0)
    ours, torchs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizers = [make_muon([ours], 0.01), torch.optim.Muon(
        [torchs], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        torchs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # each of the 15 products of a step rounds to 8 bits, 0.4%
    assert (ours - torchs).norm() < 0.03 * torchs.norm()
    assert torch.equal(optimizers[0].state[ours]["momentum_buffer"],
                       optimizers[1].state[torchs]["momentum_buffer"])
    x = torch.randn(shape, generator=generator)
    found, exact = orthogonal(x, torch.float32), x.double()
    exact /= exact.norm()
    for _ in range(5):
        gram = exact @ exact.T
        exact = 3.4445 * exact + (-4.7750 * gram + 2.0315 * gram @ gram) @ exact
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-4 * exact.norm()     # 15 products of 1e-6 each, amplified


def test_a_step_smaller_than_bf16_is_not_lost():
    """1,000 steps of 1e-6 from 0.02, whose bf16 neighbours are 1.2e-4 apart."""
    p = torch.nn.Parameter(torch.full((8,), 0.02, dtype=torch.bfloat16))
    start, scale = p.data.float().clone(), torch.tensor(1.0)
    p.low_bits = torch.zeros(8, dtype=torch.int16)
    optimizer = torch.optim.SGD([p], lr=1e-6)
    for _ in range(1000):
        p.grad = torch.ones(8, dtype=torch.bfloat16)
        exact_step(optimizer, scale)
    # 1,000 roundings of at most 1e-9 each
    assert (exact_value(p) - start + 1e-3).abs().max() < 1e-6
    assert p.data[0] != start[0]


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "muon", "adamw8bit", "rmsprop8bit"])
def test_states_are_restored_in_their_own_type(name):
    model = tiny_model(hidden_size=64, vocab=80).to(torch.bfloat16)
    keep_exact(model)
    optimizer, = make_optimizers(model, name, 1e-3, CPU)[:1]
    for p in model.parameters():
        p.grad = torch.randn(p.shape).to(torch.bfloat16)
    exact_step(optimizer, torch.tensor(1.0))
    before = {p: {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}
              for p, state in optimizer.state.items()}
    saved = optimizer.state_dict()
    again, = make_optimizers(model, name, 1e-3, CPU)[:1]
    restore(again, saved)
    for p, values in before.items():
        for key, value in values.items():
            assert again.state[p][key].dtype == value.dtype, key
            assert torch.equal(again.state[p][key], value), key
    assert any(v.dtype == torch.float32 for values in before.values() for v in values.values())


# ---------------------------------------------------------------- stages
@pytest.fixture()
def data(problems, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", problems[:8])
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:6]))
    return tmp_path


def trained(stage, tiny, data, out, *more):
    """The change of every weight that a stage makes to the tiny model, in fp32; its metrics."""
    file = "p.jsonl" if stage is dpo else "d.jsonl"
    run(stage, "--model", tiny / "model", "--data", data / file, "--out", data / out, *more)
    before, after = (dict(open_model(folder, CPU, dtype=torch.float32).named_parameters())
                     for folder in (tiny / "model", data / out))
    change = torch.cat([(after[n] - before[n]).detach().flatten() for n in before])
    return change, rows(data / out / "metrics.jsonl")


@pytest.mark.parametrize("stage, lr, optimizer", [
    (sft, 1e-5, "adamw8bit"), (dpo, 1e-6, "rmsprop8bit"), (dpo, 1e-6, "adamw")])
def test_small_rates_survive_16_bits(stage, lr, optimizer, tiny, data):
    """At rates whose steps bf16 cannot hold, the change is that of fp32.

    The projection is not 1, because bf16 gradients have 3 digits and Adam-like steps divide by
    their size: a gradient near 0 can turn round. Rounded to bf16 after each step it is below 0.3.
    """
    flags = ["--lr", lr, "--epochs", 20, "--batch-size", 4, "--optimizer", optimizer]
    full, metrics = trained(stage, tiny, data, "full", *flags)
    exact, metrics16 = trained(stage, tiny, data, "exact", *flags, "--dtype", "bfloat16")
    projection = (exact @ full / (full @ full)).item()
    assert 0.9 < projection < 1.1
    assert metrics16[-1]["loss"] == pytest.approx(metrics[-1]["loss"], rel=0.02)     # 3 digits
    weights = load_file(data / "exact/model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert {w.dtype for w in load_file(data / "exact" / REMAINDER).values()} == {torch.int16}


def test_the_next_stage_continues_from_the_exact_values(tiny, data):
    """A second stage that does not learn (rate 1e-30) hands on the same bits."""
    run(sft, "--model", tiny / "model", "--data", data / "d.jsonl", "--lr", 1e-5, "--epochs", 2,
        "--dtype", "bfloat16", "--out", data / "a")
    run(dpo, "--model", data / "a", "--data", data / "p.jsonl", "--lr", 1e-30, "--epochs", 1,
        "--dtype", "bfloat16", "--out", data / "b")
    for name in ("model.safetensors", REMAINDER):
        a, b = load_file(data / "a" / name), load_file(data / "b" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(r.any() for r in load_file(data / "a" / REMAINDER).values())
    exact = open_model(data / "a", CPU, dtype=torch.float32)
    rounded = open_model(data / "a", CPU, dtype=torch.bfloat16)
    differ = [(p - q.float()).abs().max().item()
              for p, q in zip(exact.parameters(), rounded.parameters(), strict=True)]
    assert 0 < max(differ) < 0.01


def test_resume_in_16_bits_is_exact(tiny, data, monkeypatch, capsys):
    argv = ["--model", tiny / "model", "--data", data / "p.jsonl", "--lr", 1e-6, "--epochs", 3,
            "--batch-size", 2, "--dtype", "bfloat16", "--optimizer", "rmsprop8bit"]
    check_resume(monkeypatch, capsys, data, dpo, argv, calls=4)
    assert (data / "cut" / REMAINDER).exists()


def test_a_judge_learns_at_1e_6_in_16_bits(tiny, problems, tmp_path):
    write_jsonl(tmp_path / "gold.jsonl", problems)
    write_jsonl(tmp_path / "1.jsonl",
                [{**p, "completion": f"#### {int(p['reference']) + 1}"} for p in problems])
    changes = []
    for dtype in ("float32", "bfloat16"):
        run(compare, "train", "--model", tiny / "model", "--task", "arithmetic", "--data",
            tmp_path / "1.jsonl", "--gold", tmp_path / "gold.jsonl", "--batch-size", 4,
            "--epochs", 5, "--lr", 1e-6, "--dtype", dtype, "--out", tmp_path / dtype)
        judge = open_model(tmp_path / dtype, CPU, "AutoModelForSequenceClassification",
                           dtype=torch.float32)
        changes.append(dict(judge.named_parameters()))
    full, exact = (c["score.weight"].detach().flatten() for c in changes)     # it starts at 0
    # as above, and of a judge that has only begun to learn
    assert 0.8 < (exact @ full / (full @ full)).item() < 1.2
    base = dict(open_model(tiny / "model", CPU, dtype=torch.float32).named_parameters())
    moved = [sum((p - base[n]).norm() ** 2 for n, p in c.items() if n != "score.weight").sqrt()
             for c in changes]
    assert moved[1].item() == pytest.approx(moved[0].item(), rel=0.3)


def test_broken_remainders_are_refused(tiny, data):
    run(sft, "--model", tiny / "model", "--data", data / "d.jsonl", "--epochs", 1, "--dtype",
        "bfloat16", "--out", data / "a")
    good = load_file(data / "a" / REMAINDER)
    name = max(good, key=lambda k: good[k].numel())
    for bad in (good[name][:1], good[name].float()):
        save_file({**good, name: bad.contiguous()}, data / "a" / REMAINDER)
        with pytest.raises(InputError, match="not the remainders"):
            open_model(data / "a", CPU, dtype=torch.float32)
    (data / "a" / REMAINDER).write_bytes(b"broken")
    with pytest.raises(InputError, match="not the remainders"):
        open_model(data / "a", CPU, dtype=torch.float32)
    open_model(data / "a", CPU, dtype=torch.bfloat16)       # what only reads 16 bits needs none
