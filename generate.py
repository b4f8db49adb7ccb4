"""A model and prompts -> completions.

    python generate.py --model runs/sft --data problems.jsonl --out answers.jsonl                    # greedy
    python generate.py --model runs/sft --data problems.jsonl --out samples.jsonl --temperature 0.7 --num-samples 6
    python generate.py --model m1 m2 --data a.jsonl b.jsonl --out oa.jsonl ob.jsonl                  # one process, several models

Input records keep all their fields; `completion` is replaced (stop at EOS, or `truncated` where the token limit cut it
off) and `source` set; with --num-samples above 1 there is one record per sample, numbered by `sample`. Batches are formed
in one fixed order (longest prompt first) and appended as they finish: killed and started again, the same command
continues at the first incomplete batch. Under torchrun each process answers its share of the batches, with the same bytes at the end.

Unlike the paper's release: beams are asked for by name, never implied by a temperature of 0, and the noise of a sample
comes from (seed, id, sample), so that, up to rounding of logits, an answer does not depend on its neighbours.
"""
import hashlib
import os
from pathlib import Path

from tasks import (BatchLog, InputError, amount, dumps, half_of, make_parser, partial_path, positive, read_jsonl, run_stage, short,
                   whole, write_json, write_jsonl)
from tasks._memory import lacks_memory
from tasks._models import count_weights, encode_prompt, open_model, open_tokenizer, pick_device
from tasks._parallel import deal, first, rank


def sample_uniforms(seed, id_, sample, count):
    """(count,) float32 in [0, 1): the noise of one sample, a function of (seed, id, sample) and nothing else."""
    import numpy as np
    digest = hashlib.sha256(dumps([seed, id_, sample]).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little"))).random(count, dtype=np.float32)


def choose_tokens(logits, temperature, uniforms=None):
    """Next tokens (B,) from logits (B, V): argmax, or with `uniforms` (B,) the inverse of softmax(logits/T)'s CDF."""
    import torch
    if uniforms is None:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # The last sum is 1 up to rounding: scaling by it keeps the index below V.
    return torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def roomy_cache(model, tokens):
    """A DynamicCache whose full-attention layers write into memory for `tokens` tokens, allocated once: transformers' own
    copies the whole cache at every token, a third of the time of a small model."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        room = None

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start, new = self.get_seq_length(), (key_states, value_states)
            end = start + key_states.shape[-2]
            if self.room is None:       # the first tokens, or other rows than before
                self.room = [x.new_empty(*x.shape[:2], tokens, x.shape[-1]) for x in new]
                if start:
                    self.room[0][:, :, :start], self.room[1][:, :, :start] = self.keys, self.values
            for room, x in zip(self.room, new):
                room[:, :, start:end] = x
            self.keys, self.values = (room[:, :, :end] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self.room = None

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def decode(model, prompts, eos, max_new_tokens, temperature=0.0, uniforms=None):
    """Greedy or sampled continuations of a batch of prompts, each a list of token ids without EOS.

    prompts: lists of token ids, left-padded here; uniforms: (B, max_new_tokens) fp32, the noise of each row, or None
    for greedy. Returns (completions, truncated): lists of B. A prompt that stands in the batch several times is read once.
    Rows that are finished leave the batch once they are a quarter of it. Runs at most max_new_tokens forward passes.
    """
    import torch
    device, width = model.device, max(map(len, prompts))
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    input_ids, mask = torch.zeros(len(row_of), width, dtype=torch.long), torch.zeros(len(row_of), width, dtype=torch.long)
    for prompt, row in row_of.items():
        input_ids[row, width - len(prompt):] = torch.tensor(prompt)
        mask[row, width - len(prompt):] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    alive = torch.arange(len(prompts), device=device)          # which row of the output a row of the batch is
    tokens = torch.full((len(prompts), max_new_tokens), eos, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with torch.inference_mode():
        out = model(input_ids=input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    past_key_values=roomy_cache(model, width + max_new_tokens), use_cache=True, logits_to_keep=1)
        if not out.logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite: its weights are broken")
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
        logits, mask, cache = out.logits[rows, -1], mask[rows], out.past_key_values
        if len(row_of) < len(prompts):
            cache.batch_select_indices(rows)
        for step in range(max_new_tokens):
            # ABLATION: the sampling rule
            chosen = choose_tokens(logits, temperature, None if uniforms is None else uniforms[alive, step])
            tokens[alive[~finished], step] = chosen[~finished]
            finished = finished | (chosen == eos)
            if finished.all() or step + 1 == max_new_tokens:
                break
            if finished.float().mean() >= 0.25:
                keep = (~finished).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, chosen, mask, finished = alive[keep], chosen[keep], mask[keep], finished[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = model(input_ids=chosen[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                           past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return strip_eos(tokens.tolist(), eos)


def decode_beams(model, prompts, eos, max_new_tokens, num_beams):
    """Beam search by transformers, as the paper's release has it. Same arguments and result as `decode`, and like `decode`
    deaf to what the model's folder says of sampling, penalties and lengths."""
    import torch
    from transformers import GenerationConfig
    width = max(map(len, prompts))
    input_ids = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    model.generation_config = GenerationConfig(num_beams=num_beams, do_sample=False, max_new_tokens=max_new_tokens,
                                               eos_token_id=eos, pad_token_id=eos)
    with torch.inference_mode():
        out = model.generate(input_ids=input_ids, attention_mask=mask)
    rows = out[:, width:].tolist()
    return strip_eos([row + [eos] * (max_new_tokens - len(row)) for row in rows], eos)


def strip_eos(rows, eos):
    """(token ids before the first EOS of each row, whether a row has none)"""
    ends = [row.index(eos) if eos in row else len(row) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)], [end == len(row) for row, end in zip(rows, ends)]


def generate_file(args, model_path, data, out, half):
    """Answer every record of one file (or of one half of it) with one model."""
    settings = {**vars(args), "model": model_path, "data": data, "out": out, "half": half}
    folder = partial_path(out, settings, [data, model_path])
    records = read_jsonl(data, ("id", "prompt"))
    if half:
        records = [r for r in records if half_of(args.seed, args.round, r["id"]) == half]
    if args.limit:
        records = records[:args.limit]
    if not records:
        raise InputError(f"{data}: none of its records is in half {half}")

    import torch
    from tqdm import tqdm
    device = pick_device(args.device)
    tokenizer = open_tokenizer(model_path, args.chat_template)
    model = open_model(model_path, device, load_in_4bit=args.load_in_4bit).eval()
    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in records]
    for r, prompt in zip(records, prompts):
        if not prompt:
            raise InputError(f"{data}: the prompt of {r['id']} is empty, and the tokenizer has no BOS token to start from")
        if len(prompt) > args.max_prompt_tokens:
            raise InputError(f"{data}: the prompt of {r['id']} has {len(prompt)} tokens; raise --max-prompt-tokens")
    jobs = sorted(((i, s) for i in range(len(records)) for s in range(args.num_samples)),
                  key=lambda job: (-len(prompts[job[0]]), job))
    batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]

    def answer(batch):
        ids = [prompts[i] for i, _ in batch]
        try:
            if args.num_beams > 1:
                return decode_beams(model, ids, tokenizer.eos_token_id, args.max_new_tokens, args.num_beams)
            uniforms = None if args.temperature == 0 else torch.tensor(
                [sample_uniforms([args.seed, args.round] if args.round else args.seed, records[i]["id"], s, args.max_new_tokens).tolist()
                 for i, s in batch], device=device)
            return decode(model, ids, tokenizer.eos_token_id, args.max_new_tokens, args.temperature, uniforms)
        except RuntimeError as e:
            if not lacks_memory(e) or len(batch) == 1:
                raise
        torch.cuda.empty_cache()        # too many for the memory: half of them, then the other half
        return [a + b for a, b in zip(answer(batch[:len(batch) // 2]), answer(batch[len(batch) // 2:]))]

    def answer_texts(batch):
        answers = answer(batch)
        texts = tokenizer.batch_decode(answers[0], skip_special_tokens=True)
        return [[i, s, text, cut, len(ids) + (not cut)] for (i, s), text, ids, cut in zip(batch, texts, *answers)]

    log = BatchLog(folder, [len(b) for b in batches])
    with tqdm(total=len(jobs), initial=len(log.results), desc=f"generate {short(out)}", unit="answer", mininterval=1) as bar:
        for answered in deal(batches[log.batches_done:], answer_texts):
            log.append(answered)
            bar.update(len(answered))
    if rank():
        return

    write_json(f"{out}.price", {"weights": count_weights(model),
                                "generated_tokens": args.num_beams * sum(r[4] for r in log.results),      # through the model
                                "read_tokens": sum(len(prompts[i]) for batch in batches for i in {i for i, _ in batch})})
    write_jsonl(out, [{**records[i], "completion": text, "source": args.source,
                       **({"sample": s} if args.num_samples > 1 else {}), "truncated": cut}
                      for i, s, text, cut, _ in sorted(log.results)])
    folder.unlink()
    print(f"{out}: {len(log.results)} completions of {len(records)} prompts, {sum(r[3] for r in log.results)} cut off "
          f"at {args.max_new_tokens} tokens")


def main(args):
    given = {"--model": args.model, "--data": args.data, "--half": args.half or [None]}
    for name, values in given.items():
        if len(values) not in (1, len(args.out)):
            raise InputError(f"{name} has {len(values)} values; give one for all, or one for each of the {len(args.out)} of --out")
    if len({os.path.realpath(out) for out in args.out}) < len(args.out):
        raise InputError("--out names one file twice")
    if args.num_samples > 1 and args.temperature == 0:
        raise InputError("--num-samples above 1 needs a --temperature above 0: greedy samples are all equal")
    if args.num_beams > 1 and args.temperature > 0:
        raise InputError("--num-beams above 1 goes with --temperature 0")
    for k, out in enumerate(args.out):
        if len(args.out) > 1 and first(lambda: Path(out).exists()):        # one answer for all: the first may have written it by then
            print(f"{out} exists and is left as it is")
        else:
            generate_file(args, *(values[k % len(values)] for values in (args.model, args.data)), out,
                          given["--half"][k % len(given["--half"])])


def parser():
    p = make_parser(__doc__, prog="generate.py")
    p.add_argument("--model", required=True, nargs="+", help="folders or hub names")
    p.add_argument("--data", required=True, nargs="+", help="records with id, prompt")
    p.add_argument("--out", required=True, nargs="+", help="files to write")
    p.add_argument("--temperature", type=amount, default=0.0, help="0 is greedy")
    p.add_argument("--num-samples", type=positive, default=1, help="completions per prompt")
    p.add_argument("--num-beams", type=positive, default=1, help="beam search with this many beams")
    p.add_argument("--max-new-tokens", type=positive, default=256, help="a longer answer is cut off")
    p.add_argument("--max-prompt-tokens", type=positive, default=4096, help="a longer prompt is an error")
    p.add_argument("--batch-size", type=positive, default=256, help="rows decoded together")
    p.add_argument("--seed", type=whole, default=0, help="of the sampling noise, and of the halves")
    p.add_argument("--half", type=int, nargs="+", choices=[1, 2], help="answer the records of one cross-labelling half only")
    p.add_argument("--round", type=whole, default=0, help="refinement round: another one has other halves and other noise")
    p.add_argument("--source", default="model", help="what the records' `source` says")
    p.add_argument("--limit", type=whole, default=0, help="only the first N records (0: all)")
    p.add_argument("--load-in-4bit", action="store_true", help="the model's linear layers in 4 bits (NF4), to save memory")
    p.add_argument("--chat-template", action="store_true", help="prompts in the model's own chat format instead of plain text")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
