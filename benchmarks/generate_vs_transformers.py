"""Generation: generate.py's decoding against `transformers` generate and generate_batch, on real GSM8K prompts.

    pip install -r benchmarks/requirements.txt && python benchmarks/generate_vs_transformers.py [--size 3M|60M]

The model is finetuned here on GSM8K (3M: ten minutes), so that its answers end as real ones do, at different lengths; --model takes one
that is. Same prompts, same batches, the longest prompts first; greedy, and six samples a prompt at temperature 0.7. Counted: answers
per second, tokenizing and loading aside. generate_batch, slow on a CPU, and the six samples have every --every-th prompt only. First, the greedy tokens of all sides must be the same, but for ties: where two logits differ by less than 1e-4, the sides may part.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _bench import add_flags, alternate, floor, make_model, memory_rate, operations, problems, report, settle


def finetuned(top, size):
    import sft
    from tasks import write_jsonl
    weights = make_model(top / "base", size)
    write_jsonl(top / "train.jsonl", problems("train", 8000))
    sft.main(sft.parser().parse_args(["--model", str(top / "base"), "--data", str(top / "train.jsonl"), "--out", str(top / "model"), "--epochs", "3",
                                      "--lr", "2e-3", "--optimizer", "muon", "--row-tokens", "1", "--micro-tokens", "1024"]))
    return top / "model"


def main(args):
    import torch
    import generate
    from transformers import ContinuousBatchingConfig, GenerationConfig
    settle(args)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or finetuned(Path(folder), args.size)
        tokenizer, model = generate.open_tokenizer(path), generate.open_model(path, torch.device("cpu")).eval()
    weights = sum(p.numel() for p in model.parameters())
    eos = tokenizer.eos_token_id
    prompts = sorted((generate.encode_prompt(tokenizer, r["prompt"]) for r in problems("test", args.prompts)), key=lambda p: -len(p))

    def batches(samples, size=args.batch_size):
        jobs = [(i, s) for i in range(0, len(prompts), 1 if samples == 1 else args.every) for s in range(samples)]
        return [jobs[k:k + size] for k in range(0, len(jobs), size)]

    def ours(samples):
        out = {}
        for batch in batches(samples):
            uniforms = None if samples == 1 else torch.tensor([generate.sample_uniforms(0, i, s, args.new).tolist() for i, s in batch])
            texts, _ = generate.decode(model, [prompts[i] for i, _ in batch], eos, args.new, 0.7, uniforms)
            out.update(zip(batch, texts))
        return out

    def theirs(samples):
        out = {}
        for batch in batches(samples):
            ids = [prompts[i] for i, _ in batch]
            width = max(map(len, ids))
            found = model.generate(input_ids=torch.tensor([[eos] * (width - len(p)) + p for p in ids]),
                                   attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in ids]),
                                   generation_config=GenerationConfig(max_new_tokens=args.new, do_sample=samples > 1, temperature=0.7 if samples > 1 else None,
                                                                      top_k=0, eos_token_id=eos, pad_token_id=eos))
            out.update(zip(batch, generate.strip_eos([row + [eos] for row in found[:, width:].tolist()], eos)[0]))
        return out

    def continuous(samples):
        jobs = [(i, s) for i in range(0, len(prompts), args.every) for s in range(samples)]
        found = model.generate_batch(inputs=[prompts[i] for i, _ in jobs], generation_config=GenerationConfig(
            max_new_tokens=args.new, do_sample=samples > 1, temperature=0.7 if samples > 1 else None, eos_token_id=eos, pad_token_id=eos),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=args.blocks, max_batch_tokens=args.batch_tokens))
        rows = [found[k].generated_tokens for k in sorted(found, key=lambda k: int(k.rpartition("_")[2]))]
        return dict(zip(jobs, generate.strip_eos([row + [eos] for row in rows], eos)[0]))

    def rate(run, samples):
        start = time.perf_counter()
        return len(run(samples)) / (time.perf_counter() - start)

    sides, tables = {"ours": ours, "transformers generate": theirs, "transformers generate_batch": continuous}, {}
    with torch.no_grad():
        answers = ours(1)
        for name, run in list(sides.items())[1:]:
            found = run(1)
            parted = sum(not same_but_for_ties(model, prompts[i], answers[i, s], found[i, s]) for i, s in found)
            print(f"{name}: {sum(answers[job] != found[job] for job in found)} of {len(found)} answers differ, {parted} not by a tie", file=sys.stderr)
            if parted:
                sys.exit(f"{name} does not generate what we generate: nothing is timed")
        for samples, what in ((1, "greedy"), (6, "six samples a prompt")):
            tables[what] = alternate({name: lambda run=run: rate(run, samples) for name, run in sides.items()}, args.repeats)
            sides.pop("transformers generate_batch", None)       # ten times slower on a CPU: once is enough
    lengths = {i: len(answers[i, 0]) + 1 for i in range(len(prompts))}
    c, contexts = model.config, [len(prompts[i]) + k for i, n in lengths.items() for k in range(n)]
    read = 4 * (sum(contexts) * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim + weights * sum(
        max(lengths[i] for i, _ in batch) for batch in batches(1)))
    needed = operations(args.size, [len(prompts[i]) + n for i, n in lengths.items()], sum(lengths.values()), backward=False)
    report(f"generate_{args.size}", f"Generation, Llama of {weights / 1e6:.1f}M weights", "answers per second", tables,
           f"{args.prompts} GSM8K prompts, batches of {args.batch_size}, at most {args.new} tokens; greedy answers have {statistics.mean(lengths.values()):.0f} tokens on "
           f"average, {sum(n > args.new for n in lengths.values())} reach the limit. Greedy: {floor(needed / len(prompts), 'answer', statistics.median(tables['greedy']['ours']))} "
           f"To read each weight once a step and each key and value once a token would take {read / memory_rate() / len(prompts) * statistics.median(tables['greedy']['ours']):.0%} of the time.")


def same_but_for_ties(model, prompt, ours, theirs):
    import torch
    if ours == theirs:
        return True
    at = next((k for k, (x, y) in enumerate(zip(ours, theirs)) if x != y), min(len(ours), len(theirs)))
    logits = model(input_ids=torch.tensor([prompt + ours[:at]])).logits[0, -1]
    best = logits.topk(2).values
    return bool(best[0] - best[1] < 1e-4)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    p.add_argument("--model", help="folder of a finetuned model, instead of finetuning one")
    p.add_argument("--prompts", type=int, default=1000)
    p.add_argument("--every", type=int, default=8, help="generate_batch, and six samples: every Nth prompt only")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--blocks", type=int, default=1024, help="cache blocks of generate_batch")
    p.add_argument("--batch-tokens", type=int, default=256, help="tokens of a generate_batch step")
    p.add_argument("--new", type=int, default=256, help="new tokens at most")
    main(p.parse_args())
