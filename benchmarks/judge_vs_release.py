"""Judging: compare.py's scoring against the loop of the paper's release, one question a forward pass, on real GSM8K pairs.

    pip install -r benchmarks/requirements.txt && python benchmarks/judge_vs_release.py [--size 3M|60M]

Same judge (random weights), same token ids, both orders. Counted: pairs per second, tokenizing and loading aside, one thread or more for
both. First, all scores must agree to 1e-5.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _bench import add_flags, alternate, floor, make_model, operations, problems, report, settle


def main(args):
    import torch
    import compare
    settle(args)
    with tempfile.TemporaryDirectory() as folder:
        weights = make_model(folder, args.size)
        tokenizer = compare.open_tokenizer(folder)
        torch.manual_seed(0)
        model = compare.open_model(Path(folder), torch.device("cpu"), "AutoModelForSequenceClassification", num_labels=2).eval()
        torch.nn.init.normal_(model.score.weight, std=1.0)
    records = problems("train", args.pairs)
    questions = [compare.encode_pair(tokenizer, r["prompt"], *texts) for r, other in zip(records, records[1:] + records[:1])
                 for texts in ((r["completion"], other["completion"]), (other["completion"], r["completion"]))]
    packing = argparse.Namespace(row_tokens=args.row_tokens, micro_tokens=args.micro_tokens)
    model.config.pad_token_id = -1          # one question at a time is read at its last token

    def release():
        return [model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits.float().softmax(-1)[0, 1].item()
                for ids in questions]

    def ours():
        return compare.probabilities(model, questions, packing, torch.device("cpu"))
    with torch.inference_mode():
        worst = max(abs(a - b) for a, b in zip(ours(), release()))
        print(f"scores differ by {worst:.1e} at most", file=sys.stderr)
        if worst > 1e-5:
            sys.exit("the two do not compute the same scores: nothing is timed")

        def rate(run):
            start = time.perf_counter()
            run()
            return args.pairs / (time.perf_counter() - start)
        rates = alternate({"ours": lambda: rate(ours), "the release's loop": lambda: rate(release)}, args.repeats)
    report(f"judge_{args.size}", f"Judging, Llama of {weights / 1e6:.1f}M weights", "pairs per second, both orders", {"judge": rates},
           f"{args.pairs} pairs of GSM8K answers, {sum(map(len, questions)) / len(questions):.0f} tokens a question, --row-tokens {args.row_tokens} "
           f"--micro-tokens {args.micro_tokens}; all scores within 1e-5. "
           + floor(operations(args.size, [len(q) for q in questions], 0, backward=False) / args.pairs, "pair", statistics.median(rates["ours"])))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    p.add_argument("--pairs", type=int, default=256)
    p.add_argument("--row-tokens", type=int, default=1)
    p.add_argument("--micro-tokens", type=int, default=2048)
    main(p.parse_args())
