"""dpo.py's losses: against formulas in float64, finite differences and TRL; in a whole training, however it is cut into micro-batches."""
import math

import pytest
import torch
from conftest import assert_same_gradients, check_resume, first_gradients, rows, run
from safetensors.torch import load_file
from test_dpo import NAMES, argv, brute_logps, pairs  # noqa: F401  (two are fixtures)

import dpo
import sft
from tasks import InputError, write_json

NOISY = ("cdpo", "rdpo")


def expected_losses(loss, policy, reference, lengths, beta, noise):
    """Each loss as its paper writes it, with probabilities; policy, reference, lengths: (N, 2) of chosen and rejected."""
    ratios = policy - reference
    h = beta * (ratios[:, 0] - ratios[:, 1])
    right, wrong = -(1 / (1 + (-h).exp())).log(), -(1 / (1 + h.exp())).log()     # cross-entropies of "chosen is better" and of its opposite
    mean = ratios / lengths
    p = (policy / lengths).exp()
    odds = p / (1 - p)
    return {"sigmoid": right, "cdpo": (1 - noise) * right + noise * wrong, "rdpo": ((1 - noise) * right - noise * wrong) / (1 - 2 * noise),
            "ipo": (mean[:, 0] - mean[:, 1] - 0.5 / beta).square(), "hinge": torch.where(h < 1, 1 - h, 0 * h),
            "asft": -(odds[:, 0] / (1 + odds[:, 0])).log() - (1 / (1 + odds[:, 1])).log()}[loss]


def drawn(dtype=torch.float64):
    """50 pairs with |h| of up to 20 at beta 0.3: policy, reference, lengths."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-40 + 20 * torch.randn(50, 2, generator=generator, dtype=torch.float64).clamp(-1.9, 1.9) for _ in range(2))
    return policy.to(dtype), reference.to(dtype), torch.randint(5, 60, (50, 2), generator=generator).to(dtype)


def ours(loss, policy, reference, lengths, beta=0.3, noise=0.2):
    return dpo.dpo_loss(*policy.T, *reference.T, beta, loss, noise, *lengths.T)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_formulas(loss):
    policy, reference, lengths = drawn()
    expected = expected_losses(loss, policy, reference, lengths, 0.3, 0.2)
    losses, chosen, rejected = ours(loss, policy, reference, lengths)
    assert losses.shape == (50,) and expected.std() > 0.05 and (losses - expected).abs().max() < 1e-12 * expected.abs().max()
    assert torch.equal(chosen, 0.3 * (policy - reference)[:, 0]) and torch.equal(rejected, 0.3 * (policy - reference)[:, 1])
    # inputs of about 80 have an fp32 spacing of 8e-6, which beta, the share of a token or 1 / (1 - 2E) make no larger
    assert (ours(loss, *drawn(torch.float32))[0] - expected).abs().max() < 2e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_gradients_are_finite_differences(loss):
    policy, reference, lengths = drawn()
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(loss, x, reference, lengths)[0], policy, eps=1e-6, atol=1e-7, rtol=1e-6)
    gradient, = torch.autograd.grad(ours(loss, policy, reference, lengths)[0].sum(), policy)
    other, = torch.autograd.grad(expected_losses(loss, policy, reference, lengths, 0.3, 0.2).sum(), policy)
    assert gradient.abs().max() > 0.01 and (gradient - other).abs().max() < 1e-12 * other.abs().max()


def test_what_the_losses_have_in_common():
    policy, reference, lengths = drawn()
    plain, swapped = ours("sigmoid", policy, reference, lengths)[0], [x.flip(1) for x in (policy, reference, lengths)]
    assert torch.equal(dpo.dpo_loss(*policy.T, *reference.T, 0.3)[0], plain)      # the default
    for loss in NOISY:
        assert torch.equal(ours(loss, policy, reference, lengths, noise=0.0)[0], plain)
    # what rdpo is for: with a fifth of the pairs the wrong way round, its mean is DPO's on the right ones; cdpo's is not
    robust, smoothed = (0.8 * ours(loss, policy, reference, lengths)[0] + 0.2 * ours(loss, *swapped)[0] for loss in ("rdpo", "cdpo"))
    assert (robust - plain).abs().max() < 1e-12 and (smoothed - plain).abs().max() > 0.5
    assert torch.equal(ours("asft", policy, 0 * reference, lengths)[0], ours("asft", policy, reference, lengths, beta=9.0)[0])


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_extremes_are_finite(loss):
    """Log ratios of 1e5 either way; for asft, whose p cannot exceed 1, rejected completions of probability 0 and of 1."""
    policy, reference = torch.tensor([[-1e5, 0.0], [0.0, -1e5], [0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, -1e5], [-1e5, 0.0], [0.0, 0.0]])
    losses, _, _ = ours(loss, policy, reference, torch.full((3, 2), 10.0))
    gradient, = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert losses[0] > 100 and (loss != "asft" or losses[2].item() == pytest.approx(-math.log(1e-7)))


# ---------------------------------------------------------------- in a training
def flags(loss, tiny):
    """As another model's reference gives h another value than 0."""
    return ["--loss", loss, *(["--noise", 0.2] if loss in NOISY else []), *([] if loss == "asft" else ["--beta", 0.02, "--reference", tiny / "other"])]


@pytest.mark.parametrize("loss, nll", [*((loss, 0) for loss in dpo.LOSSES[1:]), ("sigmoid", 0.7), ("asft", 0.7)])
def test_gradient_and_metrics_of_the_full_batch(argv, tiny, tokenizer, pairs, tmp_path, monkeypatch, loss, nll):  # noqa: F811
    argv = [*argv, "--batch-size", 10, "--epochs", 1, *flags(loss, tiny), *(["--nll-weight", nll] if nll else [])]
    found = [first_gradients(monkeypatch, dpo, *argv, "--out", tmp_path / name, *cut) for name, cut in (
        ("large", []), ("middle", ["--micro-tokens", 400, "--row-tokens", 150]), ("small", ["--micro-tokens", 1, "--row-tokens", 1]))]
    model, policy = brute_logps(tiny / "model", tokenizer, pairs)
    reference = 0 * policy.detach() if loss == "asft" else brute_logps(tiny / "other", tokenizer, pairs)[1].detach()
    lengths = torch.tensor([[len(sft.encode_completion(tokenizer, p[side])) for side in ("chosen", "rejected")] for p in pairs])
    likelihood = -policy[:, 0].sum() / lengths[:, 0].sum()
    total = expected_losses(loss, policy, reference, lengths, 0.02, 0.2).mean() + nll * likelihood
    total.backward()
    for gradients in found:
        assert_same_gradients(gradients, {n: p.grad for n, p in model.named_parameters()}, 1e-4)      # tolerances as in test_dpo.py
    for name in ("large", "middle", "small"):
        row = rows(tmp_path / name / "metrics.jsonl")[0]
        assert list(row)[list(row).index("loss"):] == [*NAMES, *(["nll_loss"] if nll else [])]
        assert row["loss"] == pytest.approx(total.item(), rel=1e-5, abs=5e-4) and row["logps/chosen"] == pytest.approx(policy[:, 0].mean().item(), abs=5e-4)
        beta = 0.1 if loss == "asft" else 0.02
        assert row["rewards/chosen"] == pytest.approx(beta * (policy - reference)[:, 0].mean().item(), abs=5e-4)
        assert not nll or row["nll_loss"] == pytest.approx(likelihood.item(), abs=5e-4)


@pytest.mark.parametrize("loss", dpo.LOSSES)
@pytest.mark.parametrize("nll", [0, 1])
def test_training_lowers_the_loss(argv, tmp_path, loss, nll, monkeypatch):  # noqa: F811
    if loss == "asft":
        monkeypatch.setattr(dpo, "reference_logps", None)      # is not asked
    more = ["--noise", 0.1] if loss in NOISY else []
    run(dpo, *argv, "--out", tmp_path / "m", "--batch-size", 10, "--epochs", 8, "--lr", 1e-3, "--loss", loss, "--nll-weight", nll, *more)
    log = rows(tmp_path / "m/metrics.jsonl")
    assert len(log) == 8 and log[-1]["loss"] < log[0]["loss"] - 0.01 and log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert not nll or log[-1]["nll_loss"] < log[0]["nll_loss"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir() if p.suffix == ".jsonl") == ["metrics.jsonl"]


def test_options_reach_the_loss(argv, tiny, tmp_path):  # noqa: F811
    """Every loss and noise rate makes another model; a judge of 87.5% stands for a noise rate of an eighth."""
    write_json(tmp_path / "judge/judge.json", {"held_out_accuracy": 0.875})
    found = {}
    for name, more in {"sigmoid": [], "nll": ["--nll-weight", 0.1], **{loss: ["--loss", loss] for loss in ("ipo", "hinge", "asft")},
                       **{f"{loss} {how}": ["--loss", loss, f"--{how}", value] for loss in NOISY for how, value in
                          (("noise", 0.125), ("judge", tmp_path / "judge"))}, "cdpo less": ["--loss", "cdpo", "--noise", 0.2]}.items():
        run(dpo, *argv, "--out", tmp_path / name, "--epochs", 2, "--lr", 1e-3, "--batch-size", 3, *more)
        found[name] = load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy().tobytes()
    assert all(found[f"{loss} noise"] == found.pop(f"{loss} judge") for loss in NOISY)
    assert len(set(found.values())) == len(found) == 8


@pytest.mark.parametrize("accuracy", [0.5, 0.3, 0, 7, math.nan, None, "high", [1]])
@pytest.mark.parametrize("loss", NOISY)
def test_a_judge_without_a_noise_rate(tmp_path, loss, accuracy):
    (tmp_path / "judge.json").write_text(f'{{"held_out_accuracy": {accuracy!r}}}'.replace("'", '"').replace("None", "null").replace("nan", "NaN"))
    args = dpo.parser().parse_args(["--model", "x", "--data", "x", "--out", "x", "--loss", loss, "--judge", str(tmp_path)])
    with pytest.raises(InputError, match="no better than a coin" if isinstance(accuracy, (int, float)) else "not a folder that `compare.py train`"):
        dpo.noise_rate(args)


def test_interrupted_training_without_a_reference(argv, tmp_path, monkeypatch, capsys):  # noqa: F811
    check_resume(monkeypatch, capsys, tmp_path, dpo, [*argv, "--batch-size", 4, "--lr", 1e-3, "--loss", "asft", "--nll-weight", 0.5], 4)


# ---------------------------------------------------------------- against TRL (benchmarks/requirements.txt), where it is installed
@pytest.mark.parametrize("loss, nll, theirs", [      # cdpo is what TRL's optimal transport (aot) is for one pair a pass
    ("sigmoid", 0, {"loss_type": ["sigmoid"]}), ("rdpo", 0, {"loss_type": ["robust"], "label_smoothing": 0.2}), ("ipo", 0, {"loss_type": ["ipo"]}),
    ("hinge", 0, {"loss_type": ["hinge"]}), ("cdpo", 0, {"loss_type": ["aot"], "label_smoothing": 0.2, "per_device_train_batch_size": 1}),
    ("sigmoid", 0.7, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]})])
def test_first_step_is_trls(argv, tiny, tokenizer, pairs, tmp_path, monkeypatch, loss, nll, theirs):  # noqa: F811
    trl = pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset
    from transformers import TrainerCallback
    seen = {}

    class SameTokens(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    config = trl.DPOConfig(output_dir=str(tmp_path / "trl"), max_steps=1, max_length=None, beta=0.02, gradient_checkpointing=False, bf16=False, use_cpu=True,
                           logging_steps=1, max_grad_norm=0.0, report_to=[], save_strategy="no", **{"per_device_train_batch_size": 10, **theirs},
                           gradient_accumulation_steps=10 // theirs.get("per_device_train_batch_size", 10))
    dataset = Dataset.from_list([{"prompt_ids": sft.encode_prompt(tokenizer, p["prompt"]),
                                  **{f"{side}_ids": sft.encode_completion(tokenizer, p[side]) for side in ("chosen", "rejected")}} for p in pairs])
    policy, reference = (sft.open_model(tiny / name, torch.device("cpu")) for name in ("model", "other"))
    trainer = SameTokens(model=policy, ref_model=reference, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch()])
    trainer.train()
    logged = trainer.state.log_history[0]
    mine = first_gradients(monkeypatch, dpo, *argv, "--batch-size", 10, "--epochs", 1, "--out", tmp_path / "m", *flags(loss, tiny), "--nll-weight", nll)
    row = rows(tmp_path / "m/metrics.jsonl")[0]
    print(f"\n{loss} {nll}: loss {row['loss']:.6f}, TRL's {logged['loss']:.6f}")
    for name in NAMES:
        assert row[name] == pytest.approx(logged[name], rel=1e-5, abs=5e-4), name
    assert_same_gradients(mine, seen, 1e-4)
