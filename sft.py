"""Supervised finetuning: prompt/completion records -> a finetuned causal language model.

    python sft.py --model mistralai/Mistral-7B-v0.1 --data labels.jsonl --out runs/sft
    python sft.py --init-config strong.json --tokenizer tok --data corpus.jsonl --out base

Trains every weight (or adapters: --lora-rank) of a model, or of random weights (--init-config).
Computes in bf16 on CUDA and in fp32 on a CPU; what is learned is kept in fp32 either way. The loss
is the mean negative log-likelihood of all completion tokens of an optimizer batch, so the size of
the micro-batches changes nothing. Records are packed into rows without cross-talk; logits are
computed only where there is a label. Writes a `save_pretrained` folder (adapters: a PEFT folder)
with `metrics.jsonl`, a row per optimizer step. If killed, the same command continues and ends with
the same bytes (on a CPU). `torchrun --nproc-per-node 8 sft.py ...` shards the model over 8 GPUs and
sees the same optimizer batches.

Unlike the paper's release: token ids are those of generation (BOS + prompt, completion + EOS),
the halves depend on (seed, round, id) and not on the order of rows, batches are packed, and
labels that the task cannot parse are counted aloud. Answers that a token limit cut off are never
learned as finished ones.
"""
import json
import math
from pathlib import Path

from core.adapters import add_lora
from core.cli import amount, make_parser, positive, run_stage, short, whole
from core.distributed import home, shard, summed, world
from core.memory import attempts, check_memory
from core.models import open_model, pick_device, pick_dtype, save_model, what_trains
from core.optimizers import apply_gradients, cosine_lr, make_optimizers
from core.packing import completion_logps, pack
from core.precision import exact_in
from core.probe import probe
from core.records import InputError, complete, half_of, read_jsonl
from core.tokens import encode_record, open_tokenizer, set_stops
from core.training import (
    Training,
    add_lm_flags,
    add_training_flags,
    check_lm_flags,
    checkpoint_steps,
)
from core.unfinished import partial_path
from tasks import get_task, parsable, unparsed


def select_records(args):
    """The records to train on: of the asked half, those that the task can parse and that were not
    cut off."""
    records = half = read_jsonl(args.data, ("id", "prompt", "completion"))
    for r in records:
        if r.get("label") is not None:
            raise InputError(f"{r.place}: has a `label`, as unpaired preferences (KTO) have, on "
                             "which no stage trains: keep what is good, without the label")
    if args.half:
        half = [r for r in records if half_of(args.seed, args.round, r["id"]) == args.half]
    parsed = parsable(args.task, half, "completion", "labels cannot be parsed and are left "
                      "out") if args.task else half
    kept = complete(parsed, "truncated", "labels were cut off at a token limit and are left out")
    if not kept:
        raise InputError(f"{args.data}: none of its {len(records)} records is left to train on: "
                         f"{len(records) - len(half)} are of the other half, "
                         f"{len(half) - len(parsed)} cannot be parsed, {len(parsed)} were cut off"
                         + (f": {unparsed(args.task, half)}" if half and not parsed else ""))
    if not (args.prompt_weight or any(r["completion"] for r in kept)):
        raise InputError(f"{args.data}: every completion is empty: nothing to learn")
    return kept


def encode_records(args, tokenizer, records):
    """[(token ids, loss weight of each token)] of the records that fit --max-length."""
    found = [encode_record(tokenizer, r, args.prompt_weight) for r in records]
    fit = [parts for parts in found if all(len(ids) <= args.max_length for ids, _ in parts)]
    # a sequence's first token is never a target: without BOS and prompt, EOS alone teaches nothing
    sequences = [s for parts in fit for s in parts if any(s[1][1:])]
    if len(fit) < len(records):
        print(f"{len(records) - len(fit)} of {len(records)} records are longer than "
              f"--max-length {args.max_length} and left out")
    if not sequences:
        raise InputError(f"{args.data}: no record fits --max-length {args.max_length} and has a "
                         "token to learn")
    if any("messages" in r for r in records):
        print(f"every answer in `messages` is trained: {len(fit)} conversations, "
              f"{len(sequences)} sequences")
    return sequences


def new_model(init_config, device, dtype):
    """A model with random weights, drawn in fp32. InputError if the file is no model config."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM
    try:
        config = AutoConfig.for_model(**json.loads(Path(init_config).read_text("utf-8-sig")))
    except (OSError, ValueError, TypeError, StrictDataclassError) as e:
        raise InputError(f"{init_config}: not the JSON of a model config "
                         f"({str(e).splitlines()[0]})") from None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(home(device))
    model.compute_dtype = dtype
    if world() == 1:
        exact_in(model, dtype)
    return model


def check(args):
    if bool(args.model) == bool(args.init_config) or bool(args.init_config) != bool(args.tokenizer):
        raise InputError("give either --model, or --init-config together with --tokenizer")
    check_lm_flags(args)
    if args.task:
        get_task(args.task)


def main(args):
    check(args)
    inputs = [p for p in (args.data, args.model, args.init_config, args.tokenizer) if p]
    folder = partial_path(__file__, args.out, vars(args), inputs)
    records = select_records(args)

    import numpy as np
    import torch
    from tqdm import tqdm
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    tokenizer = open_tokenizer(args.model or args.tokenizer, args.chat_template)
    sequences = encode_records(args, tokenizer, records)
    if args.model:
        model = open_model(args.model, device, load_in_4bit=args.load_in_4bit, shards=True,
                           dtype=dtype, trains=what_trains(args))
    else:
        model = new_model(args.init_config, device, dtype)
    if args.lora_rank:
        add_lora(model, args.lora_rank)
    shard(model, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()

    set_stops(model, tokenizer)
    probe(model, sequences, args, device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, device)
    check_memory(model, optimizers, args, device, sequences)
    training = Training(folder, model, optimizers, args.state_every)
    steps_per_epoch = math.ceil(len(sequences) / args.batch_size)
    total, done = steps_per_epoch * args.epochs, training.state.get("step", 0)
    checkpoints = checkpoint_steps(total, args.save_at)

    bar = tqdm(total=total, initial=done, desc=f"sft {short(args.out)}", unit="step",
               mininterval=1)
    for epoch in range(done // steps_per_epoch, args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(sequences))
        for k in range(done % steps_per_epoch, steps_per_epoch):
            batch = [sequences[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
            weight = sum(sum(w[1:]) for _, w in batch)
            for attempt in attempts(model, args):   # again, in smaller parts, if memory runs out
                with attempt:
                    # None: frees what a failed try has computed
                    loss, logps, micro_loss = 0.0, None, None
                    for micro in pack(batch, args.micro_tokens, device, model):
                        logps, weights, _ = completion_logps(model, micro)
                        # ABLATION: the SFT loss
                        # divided by the whole batch's weight, so that micro-batches add up exactly
                        micro_loss = -(logps * weights).sum() / weight
                        micro_loss.backward()
                        loss += micro_loss.item()
            loss = summed(loss, model)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done + 1}: lower --lr, or "
                                         "look for broken records")
            lr = args.lr * cosine_lr(done, total, args.warmup)
            norm = apply_gradients(model, optimizers, lr)
            done += 1
            training.log(step=done, epoch=epoch, loss=loss, lr=lr, grad_norm=norm,
                         tokens=sum(len(ids) for ids, _ in batch))
            for name, step in checkpoints.items():
                if step == done:
                    save_model(model, tokenizer, folder / name)
            training.save_state(done)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    bar.close()
    save_model(model, tokenizer, folder)
    training.finish(args.out)
    print(f"{args.out}: {len(sequences)} records, {args.epochs} epochs, {total} steps")


def parser():
    p = make_parser(__doc__, prog="sft.py")
    p.add_argument("--model", help="folder or hub name of the model to finetune")
    p.add_argument("--init-config", help="JSON model config: start from random weights instead")
    p.add_argument("--tokenizer", help="folder of the tokenizer, with --init-config")
    p.add_argument("--data", required=True, help="records with prompt and completion, or messages")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--task", help="leave out completions that this task cannot parse")
    p.add_argument("--half", type=int, choices=[1, 2],
                   help="train on one cross-labelling half only")
    p.add_argument("--round", type=whole, default=0, help="refinement round, for --half")
    p.add_argument("--prompt-weight", type=amount, default=0.0,
                   help="loss weight of prompt tokens (pretraining)")
    p.add_argument("--max-length", type=positive, default=2048,
                   help="tokens; longer records are left out and counted")
    add_lm_flags(p)
    add_training_flags(p, lr=1e-5, batch_size=32, epochs=2)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
