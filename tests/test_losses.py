"""dpo.py's losses: against formulas in float64, finite differences and TRL; in a whole training,
however its batches are cut into micro-batches."""
import json
import math

import pytest
import torch
from conftest import assert_same_gradients, check_resume, first_gradients, rows, run
from safetensors.torch import load_file
from test_dpo import NAMES, argv, brute_logps, pairs  # noqa: F401  (two are fixtures)

import dpo
from core.models import open_model
from core.records import InputError, write_json
from core.tokens import encode_completion, encode_prompt

BETA, NOISE, GAMMA = 0.3, 0.2, 0.7
NOISY = ("cdpo", "rdpo")


# ---------------------------------------------------------------- each loss as its paper writes it
# With probabilities; policy, reference, lengths: (N, 2) of chosen and rejected.
def right(h):
    """The cross-entropy of "chosen is better"; right(-h) is that of the opposite."""
    return -(1 / (1 + (-h).exp())).log()


def h_of(policy, reference, beta):
    rewards = beta * (policy - reference)
    return rewards[:, 0] - rewards[:, 1]


def sigmoid(policy, reference, lengths, beta, noise, gamma):
    return right(h_of(policy, reference, beta))


def cdpo(policy, reference, lengths, beta, noise, gamma):
    h = h_of(policy, reference, beta)
    return (1 - noise) * right(h) + noise * right(-h)


def rdpo(policy, reference, lengths, beta, noise, gamma):
    h = h_of(policy, reference, beta)
    return ((1 - noise) * right(h) - noise * right(-h)) / (1 - 2 * noise)


def ipo(policy, reference, lengths, beta, noise, gamma):
    mean = (policy - reference) / lengths
    return (mean[:, 0] - mean[:, 1] - 0.5 / beta).square()


def hinge(policy, reference, lengths, beta, noise, gamma):
    h = h_of(policy, reference, beta)
    return torch.where(h < 1, 1 - h, 0 * h)


def asft(policy, reference, lengths, beta, noise, gamma):
    p = (policy / lengths).exp()
    odds = p / (1 - p)
    return -(odds[:, 0] / (1 + odds[:, 0])).log() - (1 / (1 + odds[:, 1])).log()


def simpo(policy, reference, lengths, beta, noise, gamma):
    """-log of the Bradley-Terry probability with the target margin gamma (SimPO, equations 3 to
    6): exp(chosen) / (exp(chosen) + exp(rejected + gamma)) of length-normalised rewards."""
    rewards = beta / lengths * policy
    chosen, rejected = rewards[:, 0].exp(), (rewards[:, 1] + gamma).exp()
    return -(chosen / (chosen + rejected)).log()


# a loss that somebody adds to dpo.LOSSES needs no line here; with one, it is tested too
FORMULAS = {f.__name__: f for f in (sigmoid, cdpo, rdpo, ipo, hinge, asft, simpo)}
FREE = ("asft", "simpo")        # without a reference


def drawn(dtype=torch.float64):
    """50 pairs with |h| of up to 20 at beta 0.3: policy, reference, lengths."""
    generator = torch.Generator().manual_seed(0)

    def logps():
        normal = torch.randn(50, 2, generator=generator, dtype=torch.float64)
        return (-40 + 20 * normal.clamp(-1.9, 1.9)).to(dtype)
    policy, reference = logps(), logps()
    return policy, reference, torch.randint(5, 60, (50, 2), generator=generator).to(dtype)


def expected(loss, policy, reference, lengths):
    return FORMULAS[loss](policy, reference, lengths, BETA, NOISE, GAMMA)


def ours(loss, policy, reference, lengths, beta=BETA, noise=NOISE):
    extra = {"gamma": GAMMA} if loss == "simpo" else {}
    return dpo.dpo_loss(*policy.T, *reference.T, beta, loss, noise, *lengths.T, **extra)


@pytest.mark.parametrize("loss", FORMULAS)
def test_formulas(loss):
    policy, reference, lengths = drawn()
    formula = expected(loss, policy, reference, lengths)
    losses, chosen, rejected = ours(loss, policy, reference, lengths)
    assert losses.shape == (50,) and formula.std() > 0.05
    assert (losses - formula).abs().max() < 1e-12 * formula.abs().max()
    rewards = 0.3 * (policy - reference)
    assert torch.equal(chosen, rewards[:, 0]) and torch.equal(rejected, rewards[:, 1])
    # inputs of about 80 have an fp32 spacing of 8e-6, which beta, the share of a token or
    # 1 / (1 - 2E) make no larger
    in_fp32 = ours(loss, *drawn(torch.float32))[0]
    assert (in_fp32 - formula).abs().max() < 2e-5 * max(1, formula.abs().max())


@pytest.mark.parametrize("loss", FORMULAS)
def test_gradients_are_finite_differences(loss):
    policy, reference, lengths = drawn()
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(loss, x, reference, lengths)[0], policy,
                                    eps=1e-6, atol=1e-7, rtol=1e-6)
    gradient, = torch.autograd.grad(ours(loss, policy, reference, lengths)[0].sum(), policy)
    other, = torch.autograd.grad(expected(loss, policy, reference, lengths).sum(), policy)
    assert gradient.abs().max() > 0.01
    assert (gradient - other).abs().max() < 1e-12 * other.abs().max()


def test_what_the_losses_have_in_common():
    policy, reference, lengths = drawn()
    plain = ours("sigmoid", policy, reference, lengths)[0]
    swapped = [x.flip(1) for x in (policy, reference, lengths)]
    assert torch.equal(dpo.dpo_loss(*policy.T, *reference.T, 0.3)[0], plain)      # the default
    for loss in NOISY:
        assert torch.equal(ours(loss, policy, reference, lengths, noise=0.0)[0], plain)
    # what rdpo is for: with a fifth of the pairs the wrong way round, its mean is that of DPO on
    # the right ones; cdpo's is not
    robust, smoothed = (0.8 * ours(loss, policy, reference, lengths)[0]
                        + 0.2 * ours(loss, *swapped)[0] for loss in ("rdpo", "cdpo"))
    assert (robust - plain).abs().max() < 1e-12 and (smoothed - plain).abs().max() > 0.5
    for loss in FREE:
        without = ours(loss, policy, 0 * reference, lengths)[0]
        assert torch.equal(without, ours(loss, policy, reference, lengths)[0])
    no_beta = ours("asft", policy, reference, lengths, beta=9.0)[0]
    assert torch.equal(ours("asft", policy, reference, lengths)[0], no_beta)


def test_simpo_by_hand():
    """Log-probabilities -8 of 4 tokens and -18 of 6, beta 2: 2 * -2 - 2 * -3 - 0.5 = 1.5, and
    -log sigmoid(1.5) = log(1 + exp(-1.5)) = 0.201413."""
    values = [torch.tensor([x]) for x in (-8.0, -18.0, 0.0, 0.0)]
    lengths = {"chosen_tokens": torch.tensor([4.0]), "rejected_tokens": torch.tensor([6.0])}
    found = dpo.dpo_loss(*values, 2.0, "simpo", **lengths)      # gamma is 0.5 if it is not given
    assert [x.item() for x in found] == pytest.approx([0.201413, -16, -36], abs=1e-6)
    other = dpo.dpo_loss(*values, 2.0, "simpo", **lengths, gamma=2.0)[0]
    assert other.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", FORMULAS)
def test_extremes_are_finite(loss):
    """Log ratios of 1e5 either way; for asft, whose p cannot exceed 1, rejected completions of
    probability 0 and of 1."""
    policy = torch.tensor([[-1e5, 0.0], [0.0, -1e5], [0.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[0.0, -1e5], [-1e5, 0.0], [0.0, 0.0]])
    losses, _, _ = ours(loss, policy, reference, torch.full((3, 2), 10.0))
    gradient, = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and gradient.isfinite().all() and losses[0] > 100
    assert loss != "asft" or losses[2].item() == pytest.approx(-math.log(1e-7))


# ---------------------------------------------------------------- flags
def arguments(*more):
    argv = ["--model", "x", "--data", "x", "--out", "x", *map(str, more)]  # noqa: F811
    return dpo.parser().parse_args(argv)


def test_flags_follow_from_the_table():
    """Whatever losses there are: a flag that a loss does not read is refused by name, before
    anything is read."""
    flags = {"beta": 0.5, "noise": 0.2, "reference": "y", **dict.fromkeys(dpo.EXTRA, 0.5)}
    for name, loss in dpo.LOSSES.items():
        needed = ["--noise", 0.1] if loss.noise else []
        dpo.check(arguments("--loss", name, *needed))
        read = {"beta": loss.beta is not None, "noise": loss.noise, "reference": loss.reference}
        for flag, value in flags.items():
            args = arguments("--loss", name, *needed, f"--{flag}", value)
            if read.get(flag, flag in loss.extra):
                dpo.check(args)
                continue
            with pytest.raises(InputError, match=f"--{flag} has no effect with --loss {name}"):
                dpo.check(args)
    unread = {("simpo", "reference"), ("asft", "beta"), ("sigmoid", "gamma"), ("ipo", "noise")}
    for name, flag in unread:
        with pytest.raises(InputError, match=f"--{flag} has no effect with --loss {name}"):
            dpo.main(arguments("--loss", name, f"--{flag}", flags[flag]))


@pytest.mark.parametrize("loss", NOISY)
def test_a_noise_rate_is_needed(loss):
    with pytest.raises(InputError, match=f"--loss {loss} needs a noise rate: give either "
                       "--noise or --judge"):
        dpo.check(arguments("--loss", loss))
    both = arguments("--loss", loss, "--noise", 0.1, "--judge", "nowhere")
    dpo.check(both)
    assert dpo.noise_rate(both) == 0.1      # and the judge is not looked at


def test_the_judge_is_read_by_losses_that_need_it():
    """--judge may always be given: it says where a noise rate would come from."""
    args = arguments("--loss", "sigmoid", "--judge", "nowhere")
    dpo.check(args)
    assert dpo.noise_rate(args) == 0.0


@pytest.mark.parametrize("accuracy", [0.5, 0.3, 0, 7, math.nan, None, "high", [1]])
@pytest.mark.parametrize("loss", NOISY)
def test_a_judge_without_a_noise_rate(tmp_path, loss, accuracy):
    (tmp_path / "judge.json").write_text(json.dumps({"held_out_accuracy": accuracy}))
    number = isinstance(accuracy, (int, float))
    message = "no better than a coin" if number else "not a folder that `compare.py train`"
    with pytest.raises(InputError, match=message):
        dpo.noise_rate(arguments("--loss", loss, "--judge", tmp_path))


# ---------------------------------------------------------------- in a training
def flags_of(loss, tiny):
    """As another model's reference gives h another value than 0."""
    more = {"asft": [], "simpo": ["--beta", 0.3, "--gamma", GAMMA]}
    noise = ["--noise", NOISE] if loss in NOISY else []
    return ["--loss", loss, *noise,
            *more.get(loss, ["--beta", 0.02, "--reference", tiny / "other"])]


CASES = [*((loss, 0) for loss in FORMULAS if loss != "sigmoid"), ("sigmoid", 0.7), ("asft", 0.7)]


@pytest.mark.parametrize("loss, nll", CASES)
def test_gradient_and_metrics_of_the_full_batch(argv, tiny, tokenizer, pairs,  # noqa: F811
                                                tmp_path, monkeypatch, loss, nll):
    argv = [*argv, "--batch-size", 10, "--epochs", 1, *flags_of(loss, tiny)]
    argv += ["--nll-weight", nll] if nll else []
    cuts = {"large": [], "middle": ["--micro-tokens", 400], "small": ["--micro-tokens", 1]}
    found = [first_gradients(monkeypatch, dpo, *argv, "--out", tmp_path / name, *cut)
             for name, cut in cuts.items()]
    model, policy = brute_logps(tiny / "model", tokenizer, pairs)
    reference = 0 * policy.detach()
    if loss not in FREE:
        reference = brute_logps(tiny / "other", tokenizer, pairs)[1].detach()
    lengths = torch.tensor([[len(encode_completion(tokenizer, p[side]))
                             for side in ("chosen", "rejected")] for p in pairs])
    likelihood = -policy[:, 0].sum() / lengths[:, 0].sum()
    beta = {"asft": 0.1, "simpo": 0.3}.get(loss, 0.02)
    losses = FORMULAS[loss](policy, reference, lengths, beta, NOISE, GAMMA)
    total = losses.mean() + nll * likelihood
    total.backward()
    brute = {n: p.grad for n, p in model.named_parameters()}
    for gradients in found:
        assert_same_gradients(gradients, brute, 1e-4)       # tolerances as in test_dpo.py
    for name in cuts:
        row = rows(tmp_path / name / "metrics.jsonl")[0]
        metrics = [*NAMES, "nll_loss"] if nll else NAMES
        assert list(row)[list(row).index("loss"):] == metrics
        assert row["loss"] == pytest.approx(total.item(), rel=1e-5, abs=5e-4)
        chosen = policy[:, 0].mean().item()
        assert row["logps/chosen"] == pytest.approx(chosen, abs=5e-4)
        reward = beta * (policy - reference)[:, 0].mean().item()
        assert row["rewards/chosen"] == pytest.approx(reward, abs=5e-4)
        assert not nll or row["nll_loss"] == pytest.approx(likelihood.item(), abs=5e-4)


@pytest.mark.parametrize("loss", FORMULAS)
@pytest.mark.parametrize("nll", [0, 1])
def test_training_lowers_the_loss(argv, tmp_path, loss, nll, monkeypatch):  # noqa: F811
    if loss in FREE:
        monkeypatch.setattr(dpo, "reference_logps", None)      # is not asked
    more = ["--noise", 0.1] if dpo.LOSSES[loss].noise else []
    run(dpo, *argv, "--out", tmp_path / "m", "--batch-size", 10, "--epochs", 8, "--lr", 1e-3,
        "--loss", loss, "--nll-weight", nll, *more)
    log = rows(tmp_path / "m/metrics.jsonl")
    assert len(log) == 8 and log[-1]["loss"] < log[0]["loss"] - 0.01
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert not nll or log[-1]["nll_loss"] < log[0]["nll_loss"]
    assert [p.name for p in (tmp_path / "m").glob("*.jsonl")] == ["metrics.jsonl"]
    if loss in FREE:
        assert json.loads((tmp_path / "m/price.json").read_text())["read_tokens"] == 0


def test_options_reach_the_loss(argv, tiny, tmp_path):  # noqa: F811
    """Every loss, noise rate and margin makes another model; a judge of 87.5% stands for a noise
    rate of an eighth; the default of gamma is the paper's and TRL's."""
    write_json(tmp_path / "trained/judge.json", {"held_out_accuracy": 0.875})
    options = {"sigmoid": [], "nll": ["--nll-weight", 0.1],
               "judge": ["--judge", tmp_path / "trained"],
               **{loss: ["--loss", loss] for loss in ("ipo", "hinge", "asft", "simpo")},
               "simpo same": ["--loss", "simpo", "--gamma", 0.5, "--beta", 2],
               "simpo other": ["--loss", "simpo", "--gamma", 1],
               "cdpo less": ["--loss", "cdpo", "--noise", 0.2]}
    for loss in NOISY:
        options[f"{loss} noise"] = ["--loss", loss, "--noise", 0.125]
        options[f"{loss} judge"] = ["--loss", loss, "--judge", tmp_path / "trained"]
    found = {}
    for name, more in options.items():
        run(dpo, *argv, "--out", tmp_path / name, "--epochs", 2, "--lr", 1e-3, "--batch-size", 3,
            *more)
        weights = load_file(tmp_path / name / "model.safetensors")
        found[name] = weights["model.layers.0.mlp.up_proj.weight"].numpy().tobytes()
    assert all(found[f"{loss} noise"] == found.pop(f"{loss} judge") for loss in NOISY)
    assert found["sigmoid"] == found.pop("judge") and found["simpo"] == found.pop("simpo same")
    assert len(set(found.values())) == len(found) == 10


def test_interrupted_training_without_a_reference(argv, tmp_path, monkeypatch,  # noqa: F811
                                                  capsys):
    check_resume(monkeypatch, capsys, tmp_path, dpo,
                 [*argv, "--batch-size", 4, "--lr", 1e-3, "--loss", "asft", "--nll-weight", 0.5], 4)


# ---------------------------------------------------------------- against TRL
# where it is installed (benchmarks/requirements.txt); cdpo is what TRL's optimal transport (aot)
# is for one pair a pass
THEIRS = [
    ("sigmoid", 0, {"loss_type": ["sigmoid"]}),
    ("rdpo", 0, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    ("ipo", 0, {"loss_type": ["ipo"]}),
    ("hinge", 0, {"loss_type": ["hinge"]}),
    ("cdpo", 0, {"loss_type": ["aot"], "label_smoothing": 0.2, "per_device_train_batch_size": 1}),
    ("sigmoid", 0.7, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]})]


@pytest.mark.parametrize("loss, nll, theirs", THEIRS)
def test_first_step_is_trls(argv, tiny, tokenizer, pairs, tmp_path, monkeypatch,  # noqa: F811
                            loss, nll, theirs):
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
    settings = {"per_device_train_batch_size": 10, **theirs}
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, max_length=None, beta=0.02, bf16=False,
        gradient_checkpointing=False, use_cpu=True, logging_steps=1, max_grad_norm=0.0,
        report_to=[], save_strategy="no", **settings,
        gradient_accumulation_steps=10 // settings["per_device_train_batch_size"])
    dataset = Dataset.from_list([{
        "prompt_ids": encode_prompt(tokenizer, p["prompt"]),
        "chosen_ids": encode_completion(tokenizer, p["chosen"]),
        "rejected_ids": encode_completion(tokenizer, p["rejected"])} for p in pairs])
    policy, reference = (open_model(tiny / name, torch.device("cpu"))
                         for name in ("model", "other"))
    trainer = SameTokens(model=policy, ref_model=reference, args=config, train_dataset=dataset,
                         processing_class=tokenizer, callbacks=[Watch()])
    trainer.train()
    logged = trainer.state.log_history[0]
    mine = first_gradients(monkeypatch, dpo, *argv, "--batch-size", 10, "--epochs", 1, "--out",
                           tmp_path / "m", *flags_of(loss, tiny), "--nll-weight", nll)
    row = rows(tmp_path / "m/metrics.jsonl")[0]
    print(f"\n{loss} {nll}: loss {row['loss']:.6f}, TRL's {logged['loss']:.6f}")
    for name in NAMES:
        assert row[name] == pytest.approx(logged[name], rel=1e-5, abs=5e-4), name
    assert_same_gradients(mine, seen, 1e-4)
