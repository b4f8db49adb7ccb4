"""Generation: decoding of generate.py against `transformers` generate and generate_batch.

    pip install -r benchmarks/requirements.txt
    python benchmarks/generate_vs_transformers.py [--size 3M|60M]

The model is finetuned here on GSM8K (3M: ten minutes), so that its answers end as real ones do, at
different lengths; --model takes a finetuned one. All sides answer the same real GSM8K prompts in
the same batches, the longest prompts first: greedily, with six samples a prompt at temperature 0.7,
and by four beams, which generate_batch has not. Counted: answers per second without tokenizing and
loading. generate_batch, which is slow on a CPU, samples and beams have every --every-th prompt
only.

All sides must generate the same greedy tokens before anything is timed. They may part at a tie,
where two logits differ by less than 1e-4. Of the beams' answers one in 50 may differ.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _bench import (
    add_flags,
    alternate,
    floor,
    make_model,
    memory_rate,
    operations,
    problems,
    report,
    run_main,
    settle,
)

GREEDY, SAMPLED, BEAMS = "greedy", "six samples a prompt", "4 beams"


def finetuned(top, size):
    import sft
    from core.records import write_jsonl
    make_model(top / "base", size)
    write_jsonl(top / "train.jsonl", problems("train", 8000))
    run_main(sft, "--model", top / "base", "--data", top / "train.jsonl", "--out", top / "model",
             "--epochs", 3, "--lr", 2e-3, "--optimizer", "muon", "--micro-tokens", 1024)
    return top / "model"


class Sides:
    """The three ways to answer `prompts`. Each takes GREEDY, SAMPLED or BEAMS, and returns
    {(index of the prompt, sample): token ids without EOS}."""

    def __init__(self, model, eos, prompts, args):
        self.model, self.eos, self.prompts, self.args = model, eos, prompts, args

    def jobs(self, how, every):
        return [(i, s) for i in range(0, len(self.prompts), every)
                for s in range(6 if how == SAMPLED else 1)]

    def batches(self, how):
        jobs = self.jobs(how, 1 if how == GREEDY else self.args.every)
        size = self.args.batch_size
        return [jobs[k:k + size] for k in range(0, len(jobs), size)]

    def config(self, how, **more):
        from transformers import GenerationConfig
        sampled = how == SAMPLED
        return GenerationConfig(
            max_new_tokens=self.args.new, do_sample=sampled, temperature=0.7 if sampled else None,
            num_beams=4 if how == BEAMS else 1,
            eos_token_id=self.eos, pad_token_id=self.eos, **more)

    def stripped(self, rows):
        from core.decoding import strip_eos
        return strip_eos([row + [self.eos] for row in rows], [self.eos])[0]

    def ours(self, how):
        import torch

        from core.decoding import decode, decode_beams, sample_uniforms
        out, new = {}, self.args.new
        for batch in self.batches(how):
            uniforms = None
            if how == SAMPLED:
                noise = [sample_uniforms(0, i, s, new).tolist() for i, s in batch]
                uniforms = torch.tensor(noise, device=self.model.device)
            prompts = [self.prompts[i] for i, _ in batch]
            texts, _ = (decode_beams(self.model, prompts, [self.eos], new, 4) if how == BEAMS else
                        decode(self.model, prompts, [self.eos], new, 0.7, uniforms))
            out.update(zip(batch, texts, strict=True))
        return out

    def generate(self, how):
        from core.decoding import padded
        out = {}
        for batch in self.batches(how):
            ids, mask = padded([self.prompts[i] for i, _ in batch], self.model.device)
            found = self.model.generate(input_ids=ids, attention_mask=mask,
                                        generation_config=self.config(how, top_k=0))
            texts = self.stripped(found[:, ids.shape[1]:].tolist())
            out.update(zip(batch, texts, strict=True))
        return out

    def generate_batch(self, how):
        from transformers import ContinuousBatchingConfig
        jobs = self.jobs(how, self.args.every)
        found = self.model.generate_batch(
            inputs=[self.prompts[i] for i, _ in jobs], generation_config=self.config(how),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=self.args.blocks, max_batch_tokens=self.args.batch_tokens))
        in_order = sorted(found, key=lambda name: int(name.rpartition("_")[2]))
        texts = self.stripped([found[name].generated_tokens for name in in_order])
        return dict(zip(jobs, texts, strict=True))


def same_but_for_ties(model, prompt, ours, theirs):
    """Whether two greedy answers are the same up to a place where the two best logits tie."""
    import torch
    if ours == theirs:
        return True
    differing = (k for k, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y)
    at = next(differing, min(len(ours), len(theirs)))
    logits = model(input_ids=torch.tensor([prompt + ours[:at]])).logits[0, -1]
    best = logits.topk(2).values
    return bool(best[0] - best[1] < 1e-4)


def check(model, prompts, answers, name, found):
    """Exit unless the greedy answers `found` of a side are ours."""
    differing = sum(answers[job] != found[job] for job in found)
    parted = sum(not same_but_for_ties(model, prompts[i], answers[i, s], found[i, s])
                 for i, s in found)
    print(f"{name}: {differing} of {len(found)} answers differ, {parted} not by a tie",
          file=sys.stderr)
    if parted:
        sys.exit(f"{name} does not generate what we generate: nothing is timed")


def check_beams(ours, theirs):
    """Exit if more than one in 50 answers differ: rounding decides between beams that tie."""
    differing = sum(ours[job] != theirs[job] for job in ours)
    print(f"4 beams: {differing} of {len(ours)} answers differ", file=sys.stderr)
    if 50 * differing > len(ours):
        sys.exit("beams do not generate what transformers' own generate: nothing is timed")


def bytes_read(model, prompts, lengths, batches):
    """Bytes to read each fp32 weight once a step and each key and value once a token."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters())
    steps = sum(max(lengths[i] for i, _ in batch) for batch in batches)
    contexts = sum(len(prompts[i]) + k for i, n in lengths.items() for k in range(n))
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim     # values of a token
    return 4 * (contexts * cached + weights * steps)


def main(args):
    import torch

    from core.models import open_model
    from core.tokens import encode_prompt, open_tokenizer
    settle(args)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or finetuned(Path(folder), args.size)
        tokenizer, model = open_tokenizer(path), open_model(path, torch.device("cpu")).eval()
    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in problems("test", args.prompts)]
    prompts.sort(key=lambda p: -len(p))
    ways = Sides(model, tokenizer.eos_token_id, prompts, args)
    sides = {"ours": ways.ours, "transformers generate": ways.generate,
             "transformers generate_batch": ways.generate_batch}

    def rate(run, how):
        start = time.perf_counter()
        return len(run(how)) / (time.perf_counter() - start)
    tables = {}
    with torch.no_grad():
        answers = ways.ours(GREEDY)
        for name, run in list(sides.items())[1:]:
            check(model, prompts, answers, name, run(GREEDY))
        check_beams(ways.ours(BEAMS), ways.generate(BEAMS))
        for how in (GREEDY, SAMPLED, BEAMS):
            runs = {name: lambda run=run, how=how: rate(run, how) for name, run in sides.items()}
            tables[how] = alternate(runs, args.repeats)
            # ten times slower on a CPU: once is enough
            sides.pop("transformers generate_batch", None)

    weights = sum(p.numel() for p in model.parameters())
    lengths = {i: len(answers[i, 0]) + 1 for i in range(len(prompts))}
    speed = statistics.median(tables[GREEDY]["ours"])
    needed = operations(args.size, [len(prompts[i]) + n for i, n in lengths.items()],
                        sum(lengths.values()), backward=False)
    read = bytes_read(model, prompts, lengths, ways.batches(GREEDY)) / memory_rate() / len(prompts)
    report(f"generate_{args.size}", f"Generation, Llama of {weights / 1e6:.1f}M weights",
           "answers per second", tables,
           f"{args.prompts} GSM8K prompts, batches of {args.batch_size}, at most {args.new} "
           f"tokens; greedy answers have {statistics.mean(lengths.values()):.0f} tokens on "
           f"average, {sum(n > args.new for n in lengths.values())} reach the limit. Greedy: "
           f"{floor(needed / len(prompts), 'answer', speed)} To read each weight once a step and "
           f"each key and value once a token would take {read * speed:.0%} of the time.")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    p.add_argument("--model", help="folder of a finetuned model, instead of finetuning one")
    p.add_argument("--prompts", type=int, default=1000)
    p.add_argument("--every", type=int, default=8,
                   help="generate_batch, six samples and beams: every Nth prompt only")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--blocks", type=int, default=1024, help="cache blocks of generate_batch")
    p.add_argument("--batch-tokens", type=int, default=256,
                   help="tokens of a generate_batch step")
    p.add_argument("--new", type=int, default=256, help="new tokens at most")
    main(p.parse_args())
