"""Direct preference optimization: preference pairs -> a finetuned causal language model.

    python dpo.py --model runs/sft --data preferences.jsonl --out runs/dpo_1
    python dpo.py --model runs/dpo_1 --reference runs/sft --data preferences.jsonl --out runs/dpo_2
    python dpo.py --loss rdpo --judge runs/judge --model runs/sft --data preferences.jsonl \\
        --out runs/rdpo

The reference is the policy as it starts, or --reference. Its log-probabilities are computed once,
before training, so there is never a second model in memory. Chosen and rejected share one packed
forward pass. Metrics carry TRL's names. Writes a folder as sft.py does; adapters are trained on.
If killed, the same command continues and ends with the same bytes (on a CPU). Under torchrun,
model and pairs are shared among all processes. Losses are in the table LOSSES; adding one is
adding a function and its row.

Unlike the paper's release: a loop of its own instead of TRL's trainer, and the two judge prompts
behind a pair really differ.
"""
import math
from collections import namedtuple

from core.adapters import add_lora
from core.cli import amount, bounded, make_parser, positive, rate, run_stage, short
from core.distributed import shard, summed
from core.judge import held_out_error
from core.memory import attempts, check_memory
from core.models import open_model, pick_device, pick_dtype, save_model, what_trains
from core.optimizers import apply_gradients, cosine_lr, make_optimizers
from core.pairs import Pairs, encode_pairs, pair_batches, reference_logps, sequence_logps
from core.probe import probe
from core.records import InputError, complete, read_jsonl
from core.tokens import open_tokenizer, set_stops
from core.training import (
    Training,
    add_lm_flags,
    add_training_flags,
    check_lm_flags,
    checkpoint_steps,
)
from core.unfinished import partial_path
from tasks import get_task, parsable


# ---------------------------------------------------------------- the losses
def log_sigmoid(x):
    from torch.nn.functional import logsigmoid
    return logsigmoid(x)


def sigmoid(pairs, beta):
    """-log sigmoid(h): DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    return -log_sigmoid(pairs.h(beta))


def cdpo(pairs, beta, noise):
    """-(1 - E) log sigmoid(h) - E log sigmoid(-h), E = noise: smoothed labels (Mitchell 2023,
    ericmitchell.ai/cdpo.pdf, equation 3)."""
    h = pairs.h(beta)
    return -(1 - noise) * log_sigmoid(h) - noise * log_sigmoid(-h)


def rdpo(pairs, beta, noise):
    """(-(1 - E) log sigmoid(h) + E log sigmoid(-h)) / (1 - 2E), E = noise.

    If a share E of the pairs is the wrong way round, its expectation is the sigmoid loss of the
    right pairs (Chowdhury et al. 2024, arXiv 2403.00409)."""
    h = pairs.h(beta)
    return (-(1 - noise) * log_sigmoid(h) + noise * log_sigmoid(-h)) / (1 - 2 * noise)


def ipo(pairs, beta):
    """(log ratio per token of chosen - of rejected - 1 / (2 beta))^2 (Azar et al. 2023, arXiv
    2310.12036, equation 17; beta is its tau). The paper sums over tokens; TRL averages, and says
    that the paper's authors did: so here."""
    chosen, rejected = pairs.ratios()
    chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(pairs, beta):
    """max(0, 1 - h): the margin of SLiC (Zhao et al. 2023, arXiv 2305.10425) on log ratios, as in
    TRL; SLiC itself has no reference."""
    return (1 - pairs.h(beta)).relu()


def asft(pairs):
    """-log p(chosen) - log(1 - p(rejected)), p = exp(log-probability per token): the alignment
    term of ASFT (Wang et al. 2024, arXiv 2409.10571, in the form of arXiv 2502.01237, section
    3.1.1), -log sigmoid of the chosen log odds and of minus the rejected log odds. The paper adds
    the NLL of chosen (--nll-weight). 1 - p counts as at least 1e-7, below which fp32 only rounds.
    """
    wrong = -(pairs.policy_rejected / pairs.rejected_tokens).expm1()
    return -pairs.policy_chosen / pairs.chosen_tokens - wrong.clamp(min=1e-7).log()


def simpo(pairs, beta, gamma):
    """-log sigmoid(beta / |chosen| log p(chosen) - beta / |rejected| log p(rejected) - gamma), |x|
    the number of tokens: SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6). No reference."""
    chosen = beta * (pairs.policy_chosen / pairs.chosen_tokens)
    rejected = beta * (pairs.policy_rejected / pairs.rejected_tokens)
    return -log_sigmoid(chosen - rejected - gamma)


class Loss(namedtuple("Loss", "function reference beta noise extra",
                      defaults=(True, 0.1, False, {}))):
    """A loss, function(pairs, ...) -> (B,), and what it needs.

    reference: whether it reads the reference's log-probabilities. beta: the default of --beta;
    None if it reads none. noise: whether it reads a noise rate. extra: {name: default} of further
    numbers, each of which becomes a flag. The function gets beta, noise and extra by name.
    """


# ABLATION: the preference loss
LOSSES = {
    "sigmoid": Loss(sigmoid),
    "cdpo": Loss(cdpo, noise=True),
    "rdpo": Loss(rdpo, noise=True),
    "ipo": Loss(ipo),
    "hinge": Loss(hinge),
    "asft": Loss(asft, reference=False, beta=None),
    "simpo": Loss(simpo, reference=False, beta=2.0, extra={"gamma": 0.5}),
}
EXTRA = sorted({name for loss in LOSSES.values() for name in loss.extra})


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
             reference_rejected_logps, beta, loss="sigmoid", noise=0.0, chosen_tokens=1,
             rejected_tokens=1, **extra):
    """(losses (B,), chosen_rewards (B,), rejected_rewards (B,)) of a batch; shapes as in Pairs.

    Rewards are beta * log ratio, summed over tokens whatever the loss, without gradient; without
    a reference (0) they are beta * log-probability.
    """
    row = LOSSES[loss]
    pairs = Pairs(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                  reference_rejected_logps, chosen_tokens, rejected_tokens)
    needs = {**row.extra, **extra}
    if row.beta is not None:
        needs["beta"] = beta
    if row.noise:
        needs["noise"] = noise
    chosen, rejected = pairs.ratios()
    return row.function(pairs, **needs), beta * chosen.detach(), beta * rejected.detach()


def noise_rate(args):
    """--noise, else the share of its held-out pairs that --judge got wrong; 0 if it is not read."""
    if not LOSSES[args.loss].noise:
        return 0.0
    return held_out_error(args.judge) if args.noise is None else args.noise


# ---------------------------------------------------------------- the stage
def open_for_training(path, args, device, tokenizer, sides):
    """--model or --reference, tried on `sides`, the sequences of all pairs. A policy that has not
    been trained yet is its own reference: new adapters are 0, others have not moved."""
    model = open_model(path, device, load_in_4bit=args.load_in_4bit, shards=True,
                       dtype=pick_dtype(args.dtype, device), trains=what_trains(args))
    if args.lora_rank and path == args.model:
        add_lora(model, args.lora_rank)
    shard(model, device)
    set_stops(model, tokenizer)
    probe(model, sides, args, device)
    return model


def select_records(args):
    """The pairs to train on: those whose chosen completion the task can parse, as in the release,
    and that was not cut off."""
    pairs = read_jsonl(args.data, ("id", "prompt", "chosen", "rejected"), ("id", "pair"))
    parsed = parsable(args.task, pairs, "chosen", "chosen completions cannot be parsed: their "
                      "pairs are left out") if args.task else pairs
    if not parsed:
        raise InputError(f"{args.data}: none of its {len(pairs)} chosen completions can be parsed")
    kept = complete(parsed, "chosen_truncated", "chosen completions were cut off at a token limit: "
                    "their pairs are left out")
    if not kept:
        raise InputError(f"{args.data}: all of its {len(parsed)} chosen completions that can be "
                         "used were cut off: raise --max-new-tokens of generate.py")
    return kept


def check(args):
    loss = LOSSES[args.loss]
    reads = {"beta": loss.beta is not None, "reference": loss.reference, "noise": loss.noise,
             **{name: name in loss.extra for name in EXTRA}}
    for flag, is_read in reads.items():
        if getattr(args, flag) is not None and not is_read:
            raise InputError(f"--{flag} has no effect with --loss {args.loss}")
    if args.task:
        get_task(args.task)
    if loss.noise and args.noise is None and args.judge is None:
        raise InputError(f"--loss {args.loss} needs a noise rate: give either --noise or --judge")
    check_lm_flags(args)


def main(args):
    check(args)
    loss, noise = LOSSES[args.loss], noise_rate(args)
    beta = args.beta or loss.beta or 0.1
    given = {name: getattr(args, name) for name in loss.extra}
    extra = {name: value for name, value in given.items() if value is not None}
    judge = args.judge if loss.noise else None
    inputs = [p for p in (args.data, args.model, args.reference, judge) if p]
    folder = partial_path(__file__, args.out, vars(args), inputs)
    records = select_records(args)

    import numpy as np
    import torch
    from tqdm import tqdm
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.model, args.chat_template)
    pairs = encode_pairs(args, tokenizer, records)
    sides = [side for pair in pairs for side in pair]
    if noise:
        print(f"noise rate: {noise:.3g}" + (f" ({args.judge})" if args.noise is None else ""))
    # (N, 2): completion tokens of chosen and rejected; their log-probabilities under the reference
    lengths = torch.tensor([[sum(weights[1:]) for _, weights in pair] for pair in pairs],
                           device=device)
    model = open_for_training(args.reference or args.model, args, device, tokenizer, sides)
    if loss.reference:
        reference = reference_logps(model, pairs, args, device, folder / "reference.jsonl")
        reference = reference.to(device)
    else:
        reference = torch.zeros_like(lengths)
    if args.reference:
        del model
        model = open_for_training(args.model, args, device, tokenizer, sides)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizers = make_optimizers(model, args.optimizer, args.lr, device)
    check_memory(model, optimizers, args, device, sides, 2)
    tokens_of = [sum(len(ids) for ids, _ in pair) for pair in pairs]
    training = Training(folder, model, optimizers, args.state_every)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total, done = steps_per_epoch * args.epochs, training.state.get("step", 0)
    checkpoints = checkpoint_steps(total, args.save_at)

    bar = tqdm(total=total, initial=done, desc=f"dpo {short(args.out)}", unit="step",
               mininterval=1)
    for epoch in range(done // steps_per_epoch, args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs))
        for k in range(done % steps_per_epoch, steps_per_epoch):
            batch = order[k * args.batch_size:(k + 1) * args.batch_size]
            n = len(batch)
            chosen_tokens = lengths[torch.as_tensor(batch, device=device), 0].sum()
            for attempt in attempts(model, args):   # again, in smaller parts, if memory runs out
                with attempt:
                    # None: frees what a failed try has computed
                    logps = policy_chosen = policy_rejected = losses = nll = None
                    metrics = torch.zeros(8, device=device)
                    for indices, micro in pair_batches([pairs[i] for i in batch], args, device,
                                                       model):
                        logps = sequence_logps(model, micro, 2 * n).reshape(n, 2)[indices]
                        policy_chosen, policy_rejected = logps.T
                        here = torch.as_tensor(batch[indices], device=device)
                        losses, chosen, rejected = dpo_loss(
                            policy_chosen, policy_rejected, *reference[here].T, beta, args.loss,
                            noise, *lengths[here].T, **extra)
                        # its mean over the pairs is the NLL per chosen token of the whole batch
                        nll = -policy_chosen * n / chosen_tokens
                        if args.nll_weight:
                            losses = losses + args.nll_weight * nll
                        (losses.sum() / n).backward()
                        with torch.no_grad():
                            margins = chosen - rejected
                            metrics += torch.stack([x.float().sum() / n for x in (
                                losses, chosen, rejected, margins > 0, margins, policy_chosen,
                                policy_rejected, nll)])
            names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
                     "rewards/margins", "logps/chosen", "logps/rejected"]
            if args.nll_weight:
                names.append("nll_loss")
            row = dict(zip(names, summed(metrics, model).tolist(), strict=False))
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {done + 1}: lower "
                                         "--lr or --beta")
            lr = args.lr * cosine_lr(done, total, args.warmup)
            norm = apply_gradients(model, optimizers, lr)
            done += 1
            training.log(step=done, epoch=epoch, lr=lr, grad_norm=norm,
                         tokens=sum(tokens_of[i] for i in batch), **row)
            for name, step in checkpoints.items():
                if step == done:
                    save_model(model, tokenizer, folder / name)
            training.save_state(done)
            bar.set_postfix(loss=f"{row['loss']:.3f}",
                            accuracy=f"{row['rewards/accuracies']:.2f}", refresh=False)
            bar.update()
    bar.close()
    save_model(model, tokenizer, folder)
    (folder / "reference.jsonl").unlink(missing_ok=True)
    training.finish(args.out, read_tokens=sum(tokens_of) if loss.reference else 0)
    print(f"{args.out}: {len(pairs)} pairs, {args.epochs} epochs, {total} steps")


def parser():
    p = make_parser(__doc__, prog="dpo.py")
    p.add_argument("--model", required=True, help="folder or hub name of the policy to start from")
    p.add_argument("--reference", help="folder or hub name of the reference (default: --model)")
    p.add_argument("--data", required=True, help="records with prompt, chosen, rejected")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--task", help="leave out pairs whose chosen completion it cannot parse")
    p.add_argument("--loss", default="sigmoid", choices=list(LOSSES),
                   help="preference loss; each one's equation is at its function")
    p.add_argument("--beta", type=rate, help="strength of the pull towards the reference "
                   "(default: the loss's own, 0.1 for DPO)")
    noisy = " and ".join(name for name, loss in LOSSES.items() if loss.noise)
    p.add_argument("--noise", type=bounded(float, 0, math.nextafter(0.5, 0), "a share below 0.5"),
                   help=f"for {noisy}: share of the pairs that are the wrong way round")
    p.add_argument("--judge", help="folder of a trained judge, whose held-out error is the noise "
                   "rate of losses that need one, without --noise; the others do not read it")
    for name in EXTRA:
        defaults = [f"{loss.extra[name]:g} for {k}" for k, loss in LOSSES.items()
                    if name in loss.extra]
        p.add_argument(f"--{name}", type=amount, help="default: " + ", ".join(defaults))
    p.add_argument("--nll-weight", type=amount, default=0.0,
                   help="weight of the negative log-likelihood of the chosen completions, a mean "
                   "over the tokens of the whole batch, as TRL's sft loss")
    p.add_argument("--max-length", type=positive, default=2048,
                   help="tokens of prompt and completion; longer pairs are left out")
    add_lm_flags(p)
    add_training_flags(p, lr=1e-6, batch_size=32, epochs=2)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
