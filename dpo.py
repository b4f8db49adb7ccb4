"""Direct preference optimization: preference pairs -> a finetuned causal language model.

    python dpo.py --model runs/sft --data preferences.jsonl --out runs/dpo_1
    python dpo.py --model runs/dpo_1 --reference runs/sft --data preferences.jsonl --out runs/dpo_2   # keeps the first reference
    python dpo.py --loss rdpo --judge runs/judge --model runs/sft --data preferences.jsonl --out runs/rdpo   # another loss, see dpo_loss

The reference is the policy as it starts (or --reference). Its log-probabilities are computed once, before training, so
there is never a second model in memory. Chosen and rejected share one packed forward pass. Metrics carry TRL's names.
Writes a `save_pretrained` folder with `metrics.jsonl`. Killed and started again, it continues and ends the same. Under
torchrun model and pairs are dealt out over all processes.

Unlike the paper's release: a loop of its own instead of TRL's trainer, and pairs whose two judge prompts really differ.
"""
import json
import math
from pathlib import Path

from sft import Training, add_lora_flags, add_training_flags, apply_gradients, checkpoint_steps, completion_logps, cosine_lr, make_optimizers, pack
from tasks import BatchLog, InputError, amount, bounded, make_parser, partial_path, positive, rate, read_jsonl, run_stage, share, short
from tasks._memory import attempts, check_memory
from tasks._models import add_lora, encode_completion, encode_prompt, open_model, open_tokenizer, pick_device, save_model
from tasks._parallel import deal, most, own_share, shard, summed


LOSSES = ["sigmoid", "cdpo", "rdpo", "ipo", "hinge", "asft"]


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta, loss="sigmoid", noise=0.0,
             chosen_tokens=1, rejected_tokens=1):
    """The loss of each pair. h = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)), E = noise:

    sigmoid  -log sigmoid(h): DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7)
    cdpo     -(1 - E) log sigmoid(h) - E log sigmoid(-h): smoothed labels (Mitchell 2023, ericmitchell.ai/cdpo.pdf, equation 3)
    rdpo     (-(1 - E) log sigmoid(h) + E log sigmoid(-h)) / (1 - 2E): where a share E of the pairs is the wrong way round, its
             expectation is the sigmoid loss of the right pairs (Chowdhury et al. 2024, arXiv 2403.00409)
    ipo      (chosen log ratio per token - rejected log ratio per token - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036,
             equation 17, beta being its tau). The paper sums over tokens; TRL averages, and says that its authors did: so here
    hinge    max(0, 1 - h): SLiC's margin (Zhao et al. 2023, arXiv 2305.10425) on log ratios, as in TRL; SLiC has no reference
    asft     -log p(chosen) - log(1 - p(rejected)), p = exp(log-probability per token): the alignment term of ASFT (Wang et al.
             2024, arXiv 2409.10571, in the form of arXiv 2502.01237, section 3.1.1), which is -log sigmoid of the chosen log odds
             and of minus the rejected. No reference, no beta; the paper adds the NLL of chosen (--nll-weight). 1 - p counts as
             at least 1e-7, below which fp32 has nothing but rounding

    The logps: fp32 (B,), log-probabilities of whole completions in nats, summed over tokens, EOS included; the tokens: (B,),
    how many those are. Returns (losses (B,), chosen_rewards (B,), rejected_rewards (B,)); rewards are beta * log ratio, summed over
    tokens whatever the loss, without gradient; with asft, main's reference is 0, and they are beta * log-probability.
    """
    from torch.nn.functional import logsigmoid
    chosen, rejected = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    h = beta * (chosen - rejected)
    # ABLATION: the preference loss
    losses = {
        "sigmoid": lambda: -logsigmoid(h),
        "cdpo": lambda: -(1 - noise) * logsigmoid(h) - noise * logsigmoid(-h),
        "rdpo": lambda: (-(1 - noise) * logsigmoid(h) + noise * logsigmoid(-h)) / (1 - 2 * noise),
        "ipo": lambda: (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta)) ** 2,
        "hinge": lambda: (1 - h).relu(),
        "asft": lambda: -policy_chosen_logps / chosen_tokens - (-(policy_rejected_logps / rejected_tokens).expm1()).clamp(min=1e-7).log(),
    }[loss]()
    return losses, beta * chosen.detach(), beta * rejected.detach()


def noise_rate(args):
    """E of cdpo and rdpo: --noise, or the share of its held-out pairs that --judge got wrong; 0 for the other losses, which do not
    read it. Raises InputError for flags that the loss does not read either, and for a judge that is no better than a coin."""
    noisy, asft = args.loss in ("cdpo", "rdpo"), args.loss == "asft"
    for flag, unread in (("noise", not noisy), ("judge", not noisy), ("beta", asft), ("reference", asft)):
        if unread and getattr(args, flag) is not None:
            raise InputError(f"--{flag} has no effect with --loss {args.loss}")
    if not noisy:
        return 0.0
    if (args.noise is None) == (args.judge is None):
        raise InputError(f"--loss {args.loss} needs a noise rate: give either --noise or --judge")
    if args.noise is not None:
        return args.noise
    try:
        accuracy = float(json.loads((Path(args.judge) / "judge.json").read_text())["held_out_accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--judge {args.judge}: not a folder that `compare.py train` wrote") from None
    if not 0.5 < accuracy <= 1:
        raise InputError(f"--judge {args.judge}: right on {accuracy:.1%} of its held-out pairs, no better than a coin: no noise rate for {args.loss}")
    return 1 - accuracy


def sequence_logps(model, batch, count):
    """(count,) fp32: summed log-probability of the completion of each packed sequence; 0 for those not in this batch."""
    import torch
    logps, _, owner = completion_logps(model, batch)
    return torch.zeros(count, device=logps.device).index_add(0, owner, logps)


def pair_batches(pairs, args, device, model=None, dealt_out=False):
    """Pack pairs (chosen sequence, rejected sequence), longest first, so that a pair never straddles two micro-batches. A sharded model's
    processes get equally many micro-batches, some of padding; of their own pairs, or of a share of common ones (dealt_out).

    Yields (list of indices into pairs, micro-batch) whose sequences are chosen 0..n-1, then rejected n..2n-1.
    """
    tokens_of = [len(chosen[0]) + len(rejected[0]) for chosen, rejected in pairs]
    order, groups = own_share(sorted(range(len(pairs)), key=lambda i: -tokens_of[i]), model if dealt_out else None), []
    while order:
        end, tokens = 1, tokens_of[order[0]]
        while end < len(order) and tokens + tokens_of[order[end]] <= args.micro_tokens:
            tokens += tokens_of[order[end]]
            end += 1
        groups.append(order[:end])
        order = order[end:]
    for indices in groups + [[]] * (most(len(groups), model) - len(groups)):
        sequences = [pairs[i][side] for side in (0, 1) for i in indices]
        # one forward pass whatever the packing: rows that do not fill up may exceed the budget by their padding
        batch, = pack(sequences, min(args.row_tokens, args.micro_tokens), math.inf, device)
        yield indices, batch


def reference_logps(model, pairs, args, device, path):
    """(N, 2) fp32 log-probabilities of chosen and rejected under the reference, appended to `path` as they come, block by block."""
    import torch
    from tqdm import tqdm
    size = 64
    log = BatchLog(path, [1] * math.ceil(len(pairs) / size))
    bar = tqdm(total=len(log.results) or math.ceil(len(pairs) / size), desc="reference", unit="batch", mininterval=1, leave=False)
    model.eval()

    def logps_of(block):
        found = {}
        for indices, batch in pair_batches(block, args, device, model):
            logps = sequence_logps(model, batch, 2 * len(indices)).tolist()
            found.update(zip(indices, zip(logps[:len(indices)], logps[len(indices):])))
        return [found[i] for i in range(len(block))]
    with torch.no_grad():
        for found in deal([pairs[k:k + size] for k in range(log.batches_done * size, len(pairs), size)], logps_of, idle=[]):
            log.append([found])
            bar.update()
    bar.close()
    model.train()
    return torch.tensor([pair for block in log.results for pair in block])


def main(args):
    if args.load_in_4bit and not args.lora_rank:
        raise InputError("--load-in-4bit goes with --lora-rank: weights in 4 bits cannot be trained")
    noise, beta = noise_rate(args), args.beta or 0.1
    folder = partial_path(args.out, vars(args), [p for p in (args.data, args.model, args.reference, args.judge) if p])
    records = read_jsonl(args.data, ("id", "prompt", "chosen", "rejected"), ("id", "pair"))

    import numpy as np
    import torch
    from tqdm import tqdm
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.model, args.chat_template)
    pairs = []
    for r in records:
        prompt = encode_prompt(tokenizer, r["prompt"])
        sides = [encode_completion(tokenizer, r[k]) for k in ("chosen", "rejected")]
        if len(prompt) + max(map(len, sides)) <= args.max_length:
            pairs.append([(prompt + side, [0.0] * len(prompt) + [1.0] * len(side)) for side in sides])
    if len(pairs) < len(records):
        print(f"{len(records) - len(pairs)} of {len(records)} pairs are longer than --max-length {args.max_length} and left out")
    if not pairs:
        raise InputError(f"{args.data}: no pair fits --max-length {args.max_length}")

    if noise:
        print(f"noise rate: {noise:.3g}" + (f" ({args.judge})" if args.judge else ""))
    # (N, 2): completion tokens of chosen and rejected, and their log-probabilities under the reference, which asft does without
    lengths = torch.tensor([[sum(weights[1:]) for _, weights in pair] for pair in pairs], device=device)

    def opened(path):
        model = open_model(path, device, load_in_4bit=args.load_in_4bit, shards=True)
        if args.lora_rank and path == args.model:       # new adapters are 0: the reference does not change
            add_lora(model, args.lora_rank)
        shard(model, device)
        return model
    model = opened(args.reference or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    reference = (torch.zeros_like(lengths) if args.loss == "asft" else
                 reference_logps(model, pairs, args, device, folder / "reference.jsonl").to(device))
    if args.reference:
        del model
        model = opened(args.model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizers = make_optimizers(model, args.optimizer, args.lr, device)
    tokens_of = [sum(len(ids) for ids, _ in pair) for pair in pairs]
    check_memory(model, optimizers, args, device, sum(sum(w) for pair in pairs for _, w in pair) / sum(tokens_of))
    training = Training(folder, model, optimizers, args.state_every)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total, done = steps_per_epoch * args.epochs, training.state.get("step", 0)
    checkpoints = checkpoint_steps(total, args.save_every)

    bar = tqdm(total=total, initial=done, desc=f"dpo {short(args.out)}", unit="step", mininterval=1)
    for epoch in range(done // steps_per_epoch, args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs))
        for k in range(done % steps_per_epoch, steps_per_epoch):
            chosen_ones = order[k * args.batch_size:(k + 1) * args.batch_size]
            for attempt in attempts(model, args):       # again with smaller micro-batches when memory runs out
                with attempt:
                    logps = policy_chosen = policy_rejected = losses = nll = None      # lets go of what a try that failed has computed
                    n, metrics = len(chosen_ones), torch.zeros(8, device=device)
                    chosen_tokens = lengths[torch.as_tensor(chosen_ones, device=device), 0].sum()
                    for indices, micro in pair_batches([pairs[i] for i in chosen_ones], args, device, model, dealt_out=True):
                        logps = sequence_logps(model, micro, 2 * len(indices))
                        policy_chosen, policy_rejected = logps[:len(indices)], logps[len(indices):]
                        here = torch.as_tensor(chosen_ones[indices], device=device)
                        losses, rewards_chosen, rewards_rejected = dpo_loss(
                            policy_chosen, policy_rejected, *reference[here].T, beta, args.loss, noise, *lengths[here].T)
                        # its mean over the batch's pairs is the NLL of the whole batch's chosen tokens, whatever the micro-batches
                        nll = -policy_chosen * n / chosen_tokens
                        if args.nll_weight:
                            losses = losses + args.nll_weight * nll
                        (losses.sum() / n).backward()
                        with torch.no_grad():
                            margins = rewards_chosen - rewards_rejected
                            metrics += torch.stack([x.float().sum() / n for x in (
                                losses, rewards_chosen, rewards_rejected, margins > 0, margins, policy_chosen, policy_rejected, nll)])
            names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                     "logps/chosen", "logps/rejected", *(["nll_loss"] if args.nll_weight else []))
            row = dict(zip(names, summed(metrics, model).tolist()))
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {done + 1}: lower --lr or --beta")
            lr = args.lr * cosine_lr(done, total, args.warmup)
            norm = apply_gradients(model, optimizers, lr)
            done += 1
            training.log(step=done, epoch=epoch, lr=lr, grad_norm=norm, tokens=sum(tokens_of[i] for i in chosen_ones), **row)
            for name in (name for name, step in checkpoints.items() if step == done):
                save_model(model, tokenizer, folder / name)
            training.save_state(done)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['rewards/accuracies']:.2f}", refresh=False)
            bar.update()
    bar.close()
    save_model(model, tokenizer, folder)
    (folder / "reference.jsonl").unlink(missing_ok=True)
    training.finish(args.out, read_tokens=0 if args.loss == "asft" else sum(tokens_of))
    print(f"{args.out}: {len(pairs)} pairs, {args.epochs} epochs, {total} steps")


def parser():
    p = make_parser(__doc__, prog="dpo.py")
    p.add_argument("--model", required=True, help="folder or hub name of the policy to start from")
    p.add_argument("--reference", help="folder or hub name of the reference model (default: --model)")
    p.add_argument("--data", required=True, help="records with id, prompt, chosen, rejected")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--loss", default="sigmoid", choices=LOSSES, help="preference loss; each one's equation is in dpo_loss")
    p.add_argument("--beta", type=rate, help="strength of the pull towards the reference (default: 0.1)")
    p.add_argument("--noise", type=bounded(float, 0, math.nextafter(0.5, 0), "a share below 0.5"), help="for cdpo and rdpo: share of the pairs "
                   "that are the wrong way round")
    p.add_argument("--judge", help="instead of --noise: folder of a trained judge, whose held-out errors are that share")
    p.add_argument("--nll-weight", type=amount, default=0.0, help="weight of the negative log-likelihood of the chosen completions, a mean over "
                   "the tokens of the whole batch, as TRL's sft loss")
    p.add_argument("--save-every", type=share, default=0, help="also keep checkpoints at these fractions of the run, e.g. 0.1")
    p.add_argument("--max-length", type=positive, default=2048, help="tokens of prompt and completion; longer pairs are left out")
    add_lora_flags(p)
    add_training_flags(p, lr=1e-6, batch_size=32, epochs=2)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
