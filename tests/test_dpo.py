"""dpo.py: the loss and its gradient, packed pairs, the reference, metrics, continuing."""
import itertools
import json
import math

import pytest
import torch
from conftest import (
    assert_same_gradients,
    check_resume,
    everything,
    first_gradients,
    preferences,
    rows,
    run,
)
from safetensors.torch import load_file

import dpo
from core.attention import separate
from core.models import open_model
from core.pairs import pair_batches, sequence_logps
from core.records import InputError, write_jsonl
from core.tokens import encode_completion, encode_prompt

NAMES = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
         "logps/chosen", "logps/rejected"]


@pytest.fixture(scope="module")
def pairs():
    """10 preferences: the right completion over one of another length, two of them for one id."""
    from tasks import arithmetic
    solved = [arithmetic.record("train", 0, i, p) for i,
              p in enumerate(arithmetic.problems("train", 10, 1))]
    return [{"id": "same" if i < 2 else r["id"], "pair": i, "prompt": r["prompt"],
             "chosen": r["completion"],
             "rejected": f"{i}+1=2\n" * (i % 4) + "#### 0"} for i, r in enumerate(solved)]


@pytest.fixture()
def argv(tiny, pairs, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", pairs)
    return ["--model", tiny / "model", "--data", tmp_path / "p.jsonl"]


def brute_logps(folder, tokenizer, pairs):
    """(N, 2) float64 log-probabilities of whole completions, with gradient: each sequence alone,
    token by token."""
    model = open_model(folder, torch.device("cpu")).double()
    out = []
    for p in pairs:
        for side in ("chosen", "rejected"):
            prompt, completion = (tokenizer(p[k], add_special_tokens=False).input_ids
                                  for k in ("prompt", side))
            ids = [tokenizer.bos_token_id, *prompt, *completion, tokenizer.eos_token_id]
            logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            out.append(sum(logps[t - 1, ids[t]] for t in range(len(prompt) + 1, len(ids))))
    return model, torch.stack(out).view(-1, 2)


def test_dpo_loss_is_equation_7():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50) * 20 - 40, torch.randn(2, 50) * 20 - 40
    policy.requires_grad_()
    losses, chosen, rejected = dpo.dpo_loss(policy[0], policy[1], reference[0], reference[1], 0.3)
    ours = torch.autograd.grad(losses.sum(), policy)[0]
    p, q = policy.detach().double().requires_grad_(), reference.double()
    h = 0.3 * ((p[0] - q[0]) - (p[1] - q[1]))
    # -log sigmoid(h), written out; |h| < 60, so float64 does not overflow
    expected = (1 + (-h).exp()).log()
    gradient, = torch.autograd.grad(expected.sum(), p)
    # inputs of about 100 have an fp32 spacing of 8e-6, beta is 0.3 and four of them are added
    assert (losses - expected).abs().max() < 2e-5 and (ours - gradient).abs().max() < 2e-5
    assert (chosen - 0.3 * (p[0] - q[0])).abs().max() < 2e-5
    assert (rejected - 0.3 * (p[1] - q[1])).abs().max() < 2e-5
    assert not chosen.requires_grad and not rejected.requires_grad
    # by hand: log ratios 2 and -1, beta 0.1: -log sigmoid(0.3) = 0.554355 (TRL's sigmoid loss,
    # without label smoothing)
    one = dpo.dpo_loss(*(torch.tensor([x]) for x in (-8.0, -13.0, -10.0, -12.0)), 0.1)
    # six digits; fp32
    assert [x.item() for x in one] == pytest.approx([0.554355, 0.2, -0.1], abs=1e-6)
    large = dpo.dpo_loss(*(torch.tensor([x]) for x in (-1e5, 0.0, 0.0, -1e5)), 1.0)
    assert math.isfinite(large[0].item())       # no overflow


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 4, "--lr", 0.02]], ids=["full", "lora"])
def test_first_step_is_ln_2_and_metrics_are_trls(argv, tmp_path, lora):
    run(dpo, *argv, "--out", tmp_path / "m", "--batch-size", 4, "--epochs", 2, "--lr", 1e-3, *lora)
    log = rows(tmp_path / "m/metrics.jsonl")
    assert len(log) == 6 and all(list(r) == ["step", "epoch", "lr", "grad_norm", "tokens", *NAMES]
                                 for r in log)
    # policy = reference up to the packing: log-probabilities of about 300 in fp32, times beta 0.1
    # and slope 1/2
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=2e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert log[0][name] == pytest.approx(0, abs=5e-5)
    assert log[-1]["loss"] < 0.6 and log[-1]["rewards/margins"] > 0.1
    assert log[-1]["rewards/accuracies"] == 1.0
    for r in log:    # rounded to 6 digits
        assert r["rewards/margins"] == pytest.approx(r["rewards/chosen"] - r["rewards/rejected"],
                                                     abs=3e-6)


def test_pairs_beside_each_other_have_the_logps_of_each_alone(tiny, tokenizer, pairs):
    model = open_model(tiny / "model", torch.device("cpu")).eval()
    sequences = []
    for p in pairs:
        prompt = encode_prompt(tokenizer, p["prompt"])
        sides = [encode_completion(tokenizer, p[k]) for k in ("chosen", "rejected")]
        sequences.append([(prompt + s, [0.0] * len(prompt) + [1.0] * len(s)) for s in sides])
    expected = brute_logps(tiny / "model", tokenizer, pairs)[1]
    for one_row, micro_tokens in itertools.product((False, True), (4096, 300, 1)):
        assert not one_row or separate(model)
        args = dpo.parser().parse_args(["--model", "x", "--data", "x", "--out", "x",
                                        "--micro-tokens", str(micro_tokens)])
        found, where, tokens = torch.zeros(20), [], 0
        for indices, batch in pair_batches(sequences, args, "cpu", model):
            found += sequence_logps(model, batch, 20).detach()
            where += indices
            tokens += (batch["owner"] >= 0).sum().item()
        found = found.reshape(10, 2)
        saved = sum(len(encode_prompt(tokenizer, p["prompt"])) - 1 for p in pairs)
        assert tokens == sum(len(s) for p in sequences for s, _ in p) - saved * one_row
        assert sorted(where) == list(range(10))
        # sums of up to 60 fp32 log-probabilities of about 7 each: 1e-6 an addend, fp32 spacing of
        # the sum 3e-5
        assert (found - expected).abs().max() < 5e-4
    assert expected.std() > 10


@pytest.mark.parametrize("other_reference", [False, True])
def test_gradient_and_metrics_of_the_full_batch(argv, tiny, tokenizer, pairs, tmp_path,
                                                monkeypatch, other_reference):
    argv = [*argv, "--batch-size", 10, "--epochs", 1, "--beta", 0.02,
            *(["--reference", tiny / "other"] if other_reference else [])]
    large = first_gradients(monkeypatch, dpo, *argv, "--out", tmp_path / "large")
    small = first_gradients(monkeypatch, dpo, *argv, "--out", tmp_path / "small",
                            "--micro-tokens", 1)
    middle = first_gradients(monkeypatch, dpo, *argv, "--out", tmp_path / "middle",
                             "--micro-tokens", 400)
    model, policy = brute_logps(tiny / "model", tokenizer, pairs)
    folder = tiny / ("other" if other_reference else "model")
    reference = brute_logps(folder, tokenizer, pairs)[1].detach()
    rewards = 0.02 * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    loss = (1 + (-margins).exp()).log().mean()
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for got in (large, small, middle):
        # the factor sigmoid(-margin) carries the error of the sums above
        assert_same_gradients(got, expected, 1e-4)
    row = rows(tmp_path / "large/metrics.jsonl")[0]
    values = [loss, *rewards.mean(0), (margins > 0).double().mean(), margins.mean(),
              *policy.mean(0)]
    for name, value in zip(NAMES, values, strict=True):
        # against itself, the sign of a zero margin is rounding
        if name != "rewards/accuracies" or other_reference:
            # the log-probabilities' tolerance, see above
            assert row[name] == pytest.approx(value.item(), abs=5e-4), name
    assert (margins.abs().mean() > 0.1) == other_reference


def test_options_reach_the_training(argv, tiny, tmp_path):
    """Another reference or beta gives another model; by default the reference is the policy."""
    models = {}
    options = {"base": [], "same": ["--reference", tiny / "model"],
               "other": ["--reference", tiny / "other"], "beta": ["--beta", 0.5]}
    for name, more in options.items():
        run(dpo, *argv, "--out", tmp_path / name, "--epochs", 1, "--lr", 1e-3, "--batch-size", 3,
            *more)
        weights = load_file(tmp_path / name / "model.safetensors")
        models[name] = weights["model.layers.0.mlp.up_proj.weight"]
    assert (models["base"] == models["same"]).all()
    assert all((models["base"] != models[k]).any() for k in ("other", "beta"))


def test_long_pairs_are_left_out_whole(argv, tokenizer, pairs, tmp_path, capsys):
    lengths = [len(encode_prompt(tokenizer, p["prompt"]))
               + max(len(encode_completion(tokenizer, p[k])) for k in ("chosen", "rejected"))
               for p in pairs]
    limit = sorted(lengths)[6]
    run(dpo, *argv, "--out", tmp_path / "m", "--epochs", 1, "--batch-size", 1, "--max-length",
        limit)
    assert len(rows(tmp_path / "m/metrics.jsonl")) == sum(n <= limit for n in lengths) < 10
    assert f"{sum(n > limit for n in lengths)} of 10 pairs are longer" in capsys.readouterr().out


def test_checkpoints_are_models_of_their_step(argv, tmp_path):
    """Half of a run of 8 steps is the model after 4 of them, which is not that of the end."""
    argv = [*argv, "--batch-size", 5, "--epochs", 4, "--lr", 1e-3]
    run(dpo, *argv, "--save-at", 0.5, "--out", tmp_path / "m")
    run(dpo, *argv, "--out", tmp_path / "plain")
    half, end, plain = (load_file(tmp_path / p / "model.safetensors")
                        for p in ("m/checkpoint-50", "m", "plain"))
    assert all((end[n] == plain[n]).all() for n in end)
    assert any((half[n] != end[n]).any() for n in end)
    assert [p.name for p in (tmp_path / "m").glob("checkpoint-*")] == ["checkpoint-50"]
    assert (tmp_path / "m/checkpoint-50/tokenizer.json").exists()
    price = json.loads((tmp_path / "m/price.json").read_text())
    tokens = sum(r["tokens"] for r in rows(tmp_path / "m/metrics.jsonl"))
    assert price["trained_tokens"] == 4 * price["read_tokens"] == tokens


@pytest.mark.parametrize("calls", [1, 4])
def test_interrupted_training_continues_byte_for_byte(argv, tmp_path, monkeypatch, capsys, calls):
    check_resume(monkeypatch, capsys, tmp_path, dpo,
                 [*argv, "--batch-size", 4, "--lr", 1e-3, "--optimizer", "rmsprop8bit"], calls)


def test_pairs_whose_chosen_completion_cannot_be_parsed_are_left_out(tiny, problems, tmp_path,
                                                                     capsys):
    """As in the release, and counted; what is rejected may be anything."""
    good = preferences(problems[:4], "no number")
    bad = [{**p, "chosen": "no number", "rejected": "#### 1"} for p in preferences(problems[4:7])]
    write_jsonl(tmp_path / "all.jsonl", good + bad)
    write_jsonl(tmp_path / "good.jsonl", good)
    write_jsonl(tmp_path / "bad.jsonl", bad)
    argv = ["--model", tiny / "model", "--lr", 1e-3]
    run(dpo, *argv, "--data", tmp_path / "all.jsonl", "--task", "arithmetic", "--out",
        tmp_path / "a")
    said = "3 of 7 chosen completions cannot be parsed: their pairs are left out"
    assert said in capsys.readouterr().out
    run(dpo, *argv, "--data", tmp_path / "good.jsonl", "--out", tmp_path / "b")
    a, b = (everything(tmp_path / name) for name in "ab")
    assert a == b
    with pytest.raises(InputError, match="none of its 3 chosen completions can be parsed"):
        run(dpo, *argv, "--data", tmp_path / "bad.jsonl", "--task", "arithmetic", "--out",
            tmp_path / "c")
