"""Supervised finetuning: prompt/completion records -> a finetuned causal language model.

    python sft.py --model mistralai/Mistral-7B-v0.1 --data labels.jsonl --out runs/sft
    python sft.py --init-config strong.json --tokenizer tok --data corpus.jsonl --out base   # from scratch

Every weight is trained (or adapters: --lora-rank), in bf16 on CUDA and fp32 on CPU. The loss is the mean negative
log-likelihood of the completion tokens of the whole optimizer batch, so the micro-batch size changes nothing. Records are
packed into rows without cross-talk, and logits are computed only where there is a label. Writes a `save_pretrained` folder
with `metrics.jsonl` (a row per optimizer step). Killed and started again, the same command continues and ends with the same
bytes (CPU). `torchrun --nproc-per-node 8 sft.py ...` shards it over 8 GPUs and sees the same optimizer batches.

Unlike the paper's release: token ids are those of generation (BOS + prompt, completion + EOS), halves depend on
(seed, round, id) and not on row order, batches are packed, and labels the task cannot parse are counted aloud.
"""
import json
import math
import os
import time
from pathlib import Path

from tasks import (InputError, amount, dumps, get_task, half_of, make_parser, partial_path, positive, rate, read_jsonl, run_stage,
                   share, short, whole, write_json, write_text)
from tasks._memory import attempts, check_memory
from tasks._models import add_lora, count_weights, encode_completion, encode_prompt, open_model, open_tokenizer, pick_device, save_model
from tasks._parallel import first, full, gathered, home, inside_forward, most, own_share, placed, rank, shard, summed, world


# ---------------------------------------------------------------- shared by trainers, sampler and judge
def pack(sequences, row_tokens, micro_tokens, device="cpu", model=None):
    """Sequences -> micro-batches of packed rows (first fit, longest first). At least one; without sequences it is padding. Where
    `model` is sharded, those of this process's share of the sequences, and padding until all processes have as many.

    sequences: list of (token ids, loss weight of each token as a target; the first token's is ignored).
    Rows hold up to `row_tokens` tokens (or one longer sequence), micro-batches up to `micro_tokens` (or one row).
    Yields dicts of (rows, length) tensors: input_ids, position_ids (int64, restarting at 0 with every sequence, which is
    what keeps packed sequences apart), weights (fp32: loss weight of predicting the next token), and owner
    (int64: index into `sequences`, -1 for padding).
    """
    import torch
    rows, free = [], []
    for i in own_share(sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0])), model):
        n = len(sequences[i][0])
        r = next((r for r, room in enumerate(free) if room >= n), len(rows))
        if r == len(rows):
            rows.append([])
            free.append(max(row_tokens, n))
        rows[r].append(i)
        free[r] -= n
    lengths = [sum(len(sequences[i][0]) for i in row) for row in rows]
    cuts = [0]
    while cuts[-1] < len(rows):
        end = cuts[-1] + 1
        while end < len(rows) and max(lengths[cuts[-1]:end + 1]) * (end + 1 - cuts[-1]) <= micro_tokens:
            end += 1
        cuts.append(end)
    for _ in range(len(cuts), most(max(2, len(cuts)), model)):
        rows.append([])
        lengths.append(1)
        cuts.append(len(rows))
    for start, end in zip(cuts, cuts[1:]):
        shape = (end - start, max(lengths[start:end]))
        input_ids, owner = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
        position_ids, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for r, row in enumerate(rows[start:end]):
            at = 0
            for i in row:
                ids, w = sequences[i]
                span = slice(at, at + len(ids))
                input_ids[r, span], owner[r, span] = torch.tensor(ids), i
                position_ids[r, span] = torch.arange(len(ids))
                weights[r, at:at + len(ids) - 1] = torch.tensor(w[1:], dtype=torch.float)
                at += len(ids)
            # the padding of a single sequence counts on: where no row has two, transformers needs no mask, causality suffices
            position_ids[r, at:] = torch.arange(shape[1] - at) + (at if len(row) == 1 else 0)
        yield {k: v.to(device, non_blocking=True) for k, v in
               dict(input_ids=input_ids, position_ids=position_ids, weights=weights, owner=owner).items()}


def hidden_states(model, batch):
    """(rows, length, width) last hidden states. No attention mask and no cache: only then do the restarting
    position_ids keep packed sequences apart (transformers builds the block-diagonal causal mask from them)."""
    return model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                            use_cache=False).last_hidden_state


@inside_forward
def completion_logps(model, batch):
    """Log-probability of every token whose loss weight is not 0: (logps fp32 (N,), weights (N,), owner (N,)).

    log softmax(logits)[target], logits only at these N positions, in fp32; Gemma 2's soft-capping included.
    """
    import torch
    rows, columns = batch["weights"].nonzero(as_tuple=True)
    targets = batch["input_ids"][rows, columns + 1]
    logits = model.get_output_embeddings()(hidden_states(model, batch)[rows, columns]).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    logps = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    assert logps.shape == rows.shape
    return logps, batch["weights"][rows, columns], batch["owner"][rows, columns]


def cosine_lr(step, total, warmup):
    """Share of the peak learning rate at `step` (0-based): linear warm-up over `warmup` of the run, cosine to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def checkpoint_steps(total, save_every):
    """{folder name: step after which it is saved} of the checkpoints at every `save_every`-th part of `total` steps, without the end."""
    return {f"checkpoint-{round(100 * k * save_every)}": max(1, round(total * k * save_every))
            for k in range(1, math.ceil(1 / save_every - 1e-9))} if save_every else {}


def make_optimizers(model, name, lr, device):
    """The optimizers that `name` stands for, as a list (Muon needs a second one for what is no matrix).

    auto is 8-bit AdamW on CUDA and fused AdamW elsewhere, where 8-bit costs time and saves nothing that matters, and with several
    processes, whose sharded tensors bitsandbytes cannot read. No weight decay. 8-bit optimizers keep 32-bit state for
    embeddings, as their authors advise.
    """
    import torch
    name = ("adamw8bit" if device.type == "cuda" and world() == 1 else "adamw") if name == "auto" else name
    if world() > 1 and name.endswith("8bit"):
        raise InputError(f"--optimizer {name}: 8-bit optimizers cannot read the sharded tensors of several processes; "
                         f"{name.removesuffix('8bit')} keeps its state in the weights' type")
    params = [p for p in model.parameters() if p.requires_grad]
    print(f"optimizer: {name}, lr {lr:g}, {sum(p.numel() for p in params):,} weights in {params[0].dtype} on {device}"
          + (f", sharded over {world()} processes" if world() > 1 else ""))
    first = []
    if name == "muon":
        inner = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
        first = [torch.optim.Muon([p for p in params if id(p) in inner], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        params = [p for p in params if id(p) not in inner]
    if name in ("adamw", "muon"):
        return first + ([torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)] if params else [])
    if name == "rmsprop":
        return [torch.optim.RMSprop(params, lr=lr)]
    import bitsandbytes as bnb
    bnb.optim.GlobalOptimManager.get_instance().register_module_override(
        model.get_input_embeddings(), "weight", {"optim_bits": 32})
    if name == "rmsprop8bit":
        return [bnb.optim.RMSprop8bit(params, lr=lr)]
    return [bnb.optim.AdamW8bit(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def apply_gradients(model, optimizers, lr, max_norm=1.0):
    """Clip by the global norm, set the learning rate, step, clear. Returns the norm before clipping."""
    import torch
    norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower --lr, or look for broken records in the data")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


class Training:
    """The unfinished folder of a training run: its metrics and its last resumable state.

    `state` is what was restored, {} at the start. All randomness of a run comes from (seed, epoch), so weights,
    optimizers and the step number are all there is to restore; torch's generator is kept too, for edited scripts.
    Weights and optimizers are kept whole, so any number of processes continues; the first writes.
    """

    def __init__(self, folder, model, optimizers, seconds):
        import torch
        self.folder, self.model, self.optimizers, self.seconds = folder, model, optimizers, seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.state, self.saved_at = {}, time.monotonic()
        kept = []
        if (folder / "state.pt").exists():
            self.state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=world() > 1)
            if self.state["kinds"] != [type(o).__name__ for o in optimizers]:
                raise InputError(f"{folder}: begun with {' and '.join(self.state['kinds'])}, by one process: give that --optimizer, or delete the folder")
            weights = dict(model.named_parameters())
            model.load_state_dict({name: placed(value, weights[name]) for name, value in self.state.pop("model").items()}, strict=False)
            for optimizer, saved in zip(optimizers, self.state.pop("optimizers")):
                for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                    if i in saved["state"]:
                        saved["state"][i] = {key: placed(value, p) for key, value in saved["state"][i].items()}
                optimizer.load_state_dict(saved)
            torch.set_rng_state(self.state.pop("rng"))
            kept = (folder / "metrics.jsonl").read_text().splitlines()[:self.state["rows"]]
            print(f"continuing after step {self.state['step']}")
        self.rows = len(kept)
        first(lambda: write_text(folder / "metrics.jsonl", "".join(line + "\n" for line in kept)))     # whole, whenever killed
        self.metrics = open(os.devnull if rank() else folder / "metrics.jsonl", "a", encoding="utf-8")

    def log(self, **row):
        self.metrics.write(dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        self.rows += 1

    def save_state(self, step, always=False, **more):
        """Write the resumable state if `seconds` have passed since the last one."""
        import torch
        if not always and first(lambda: time.monotonic() - self.saved_at < self.seconds):
            return
        self.metrics.flush()
        trained = {name: p.data for name, p in self.model.named_parameters() if p.requires_grad}
        state = gathered({"model": trained, "optimizers": [o.state_dict() for o in self.optimizers]})
        if rank() == 0:
            torch.save({**state, "kinds": [type(o).__name__ for o in self.optimizers], "rng": torch.get_rng_state(), "step": step,
                        "rows": self.rows, **more}, self.folder / "state.writing")
            (self.folder / "state.writing").replace(self.folder / "state.pt")
        self.saved_at = time.monotonic()

    def finish(self, out, read_tokens=0):
        """Write price.json: weights of the model, weights trained, tokens trained on, tokens only read. Give the folder its name."""
        self.metrics.close()
        first(lambda: self._finish(out, read_tokens))

    def _finish(self, out, read_tokens):
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        write_json(self.folder / "price.json", {"weights": count_weights(self.model), "trained_weights": count_weights(self.model, trained=True),
                                                "trained_tokens": sum(row.get("tokens", 0) for row in rows), "read_tokens": read_tokens})
        (self.folder / "state.pt").unlink(missing_ok=True)
        (self.folder / "state.writing").unlink(missing_ok=True)
        self.folder.rename(out)


def add_training_flags(p, lr, batch_size, epochs):
    p.add_argument("--lr", type=rate, default=lr, help="peak learning rate")
    p.add_argument("--epochs", type=positive, default=epochs, help="passes over the data")
    p.add_argument("--batch-size", type=positive, default=batch_size, help="records per optimizer step")
    p.add_argument("--optimizer", default="auto", choices=["auto", "adamw", "adamw8bit", "rmsprop", "rmsprop8bit", "muon"],
                   help="auto: adamw8bit on CUDA, fused adamw on CPU and with several processes")
    p.add_argument("--warmup", type=share, default=0.05, help="share of the steps with a rising learning rate")
    p.add_argument("--row-tokens", type=positive, default=2048, help="tokens per packed row; 1 packs nothing: rows of like length, "
                   "without an attention mask, are faster on a CPU")
    p.add_argument("--micro-tokens", type=positive, default=4096, help="tokens per forward pass; lower it to save memory")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")
    p.add_argument("--chat-template", action="store_true", help="prompts in the model's own chat format instead of plain text")
    p.add_argument("--state-every", type=amount, default=300, help="seconds between resumable states")
    p.add_argument("--seed", type=whole, default=0, help="of the order of the data, which is the file's, shuffled")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")


def add_lora_flags(p):
    p.add_argument("--lora-rank", type=whole, default=0, help="train adapters of this rank, merged on saving (0: every weight)")
    p.add_argument("--load-in-4bit", action="store_true", help="with --lora-rank: keep the frozen weights in 4 bits (NF4)")


# ---------------------------------------------------------------- the stage
def select_records(args):
    """The records to train on: well-formed ones of the asked half."""
    records = read_jsonl(args.data, ("id", "prompt", "completion"))
    total = len(records)
    if args.half:
        records = [r for r in records if half_of(args.seed, args.round, r["id"]) == args.half]
    if args.task:
        task, before = get_task(args.task), len(records)
        records = [r for r in records if task.is_well_formed(r["completion"])]
        print(f"{before - len(records)} of {before} labels cannot be parsed and are left out")
    if not records:
        raise InputError(f"{args.data}: none of its {total} records is left to train on")
    return records


def main(args):
    if bool(args.model) == bool(args.init_config) or bool(args.init_config) != bool(args.tokenizer):
        raise InputError("give either --model, or --init-config together with --tokenizer")
    if args.load_in_4bit and not (args.lora_rank and args.model):
        raise InputError("--load-in-4bit goes with --model and --lora-rank: weights in 4 bits cannot be trained")
    folder = partial_path(args.out, vars(args), [p for p in (args.data, args.model, args.init_config, args.tokenizer) if p])
    records = select_records(args)

    import numpy as np
    import torch
    from tqdm import tqdm
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.model or args.tokenizer, args.chat_template)
    if args.model:
        model = open_model(args.model, device, load_in_4bit=args.load_in_4bit, shards=True)
    else:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM
        try:
            config = AutoConfig.for_model(**json.loads(Path(args.init_config).read_text()))
        except (OSError, ValueError, TypeError, StrictDataclassError) as e:
            raise InputError(f"{args.init_config}: not the JSON of a model config ({str(e).splitlines()[0]})") from None
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(home(device))
    if args.lora_rank:
        add_lora(model, args.lora_rank)
    shard(model, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()

    encoded = [(encode_prompt(tokenizer, r["prompt"]), encode_completion(tokenizer, r["completion"])) for r in records]
    sequences = [(p + c, [args.prompt_weight] * len(p) + [1.0] * len(c)) for p, c in encoded if len(p) + len(c) <= args.max_length]
    if len(sequences) < len(records):
        print(f"{len(records) - len(sequences)} of {len(records)} records are longer than --max-length {args.max_length} and left out")
    if not sequences:
        raise InputError(f"{args.data}: no record fits --max-length {args.max_length}")

    optimizers = make_optimizers(model, args.optimizer, args.lr, device)
    check_memory(model, optimizers, args, device, sum(sum(w > 0 for w in s[1]) for s in sequences) / sum(len(s[0]) for s in sequences))
    training = Training(folder, model, optimizers, args.state_every)
    steps_per_epoch = math.ceil(len(sequences) / args.batch_size)
    total = steps_per_epoch * args.epochs
    checkpoints = checkpoint_steps(total, args.save_every)
    done = training.state.get("step", 0)

    bar = tqdm(total=total, initial=done, desc=f"sft {short(args.out)}", unit="step", mininterval=1)
    for epoch in range(done // steps_per_epoch, args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(sequences))
        for k in range(done % steps_per_epoch, steps_per_epoch):
            batch = [sequences[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
            weight = sum(sum(w[1:]) for _, w in batch)
            for attempt in attempts(model, args):       # again with smaller micro-batches when memory runs out
                with attempt:
                    loss, logps, micro_loss = 0.0, None, None       # lets go of what a try that failed has computed
                    for micro in pack(batch, args.row_tokens, args.micro_tokens, device, model):
                        logps, weights, _ = completion_logps(model, micro)
                        # ABLATION: the SFT loss; dividing by the whole batch's weight makes micro-batches add up exactly
                        micro_loss = -(logps * weights).sum() / weight
                        micro_loss.backward()
                        loss += micro_loss.item()
            loss = summed(loss, model)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done + 1}: lower --lr, or look for broken records")
            lr = args.lr * cosine_lr(done, total, args.warmup)
            norm = apply_gradients(model, optimizers, lr)
            done += 1
            training.log(step=done, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, tokens=sum(len(ids) for ids, _ in batch))
            for name in (name for name, step in checkpoints.items() if step == done):
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
    p.add_argument("--data", required=True, help="records with id, prompt, completion")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--task", help="leave out completions that this task cannot parse")
    p.add_argument("--half", type=int, choices=[1, 2], help="train on one cross-labelling half only")
    p.add_argument("--round", type=whole, default=0, help="refinement round, for --half")
    p.add_argument("--save-every", type=share, default=0, help="also keep checkpoints at these fractions of the run, e.g. 0.1")
    p.add_argument("--prompt-weight", type=amount, default=0.0, help="loss weight of prompt tokens (pretraining)")
    p.add_argument("--max-length", type=positive, default=2048, help="tokens; longer records are left out and counted")
    add_lora_flags(p)
    add_training_flags(p, lr=1e-5, batch_size=32, epochs=2)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
