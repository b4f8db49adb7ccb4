"""Judging: the judge of compare.py against the release's loop, one question a forward pass.

    pip install -r benchmarks/requirements.txt
    python benchmarks/judge_vs_release.py [--size 3M|60M]

Both sides ask the same judge (random weights) about the same real GSM8K pairs, the same token ids,
in both orders. Counted: pairs per second without tokenizing and loading. All scores must agree to
1e-5 before anything is timed.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time

from _bench import (
    add_flags,
    alternate,
    floor,
    model_folder,
    operations,
    preferences,
    problems,
    report,
    settle,
)


def main(args):
    import torch

    from core.judge import encode_pair, probabilities, probe_judge
    from core.models import open_model
    from core.tokens import open_tokenizer
    settle(args)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        folder, title = model_folder(args, folder)
        tokenizer = open_tokenizer(folder)
        torch.manual_seed(0)
        model, plain = (open_model(folder, cpu, "AutoModelForSequenceClassification",
                                   num_labels=2).eval() for _ in range(2))
        # logits of about 1, whatever the width: scores then differ by their rounding only
        torch.nn.init.normal_(model.score.weight, std=model.config.hidden_size ** -0.5)
        plain.score.weight.data.copy_(model.score.weight)
    questions = []
    for p in preferences(problems("train", args.pairs)):
        questions.append(encode_pair(tokenizer, p["prompt"], p["chosen"], p["rejected"]))
        questions.append(encode_pair(tokenizer, p["prompt"], p["rejected"], p["chosen"]))
    packing = argparse.Namespace(micro_tokens=args.micro_tokens)
    probe_judge(model, questions, packing, cpu)
    plain.config.pad_token_id = -1          # one question at a time is read at its last token

    def release():
        found = []
        for ids in questions:
            mask = torch.ones(1, len(ids), dtype=torch.long)
            logits = plain(input_ids=torch.tensor([ids]), attention_mask=mask).logits
            found.append(logits.float().softmax(-1)[0, 1].item())
        return found

    def ours():
        return probabilities(model, questions, packing, cpu)
    with torch.inference_mode():
        worst = max(abs(a - b) for a, b in zip(ours(), release(), strict=True))
        print(f"scores differ by {worst:.1e} at most", file=sys.stderr)
        if worst > 1e-5:
            sys.exit("the two do not compute the same scores: nothing is timed")

        def rate(run):
            start = time.perf_counter()
            run()
            return args.pairs / (time.perf_counter() - start)
        rates = alternate({"ours": lambda: rate(ours),
                           "the release's loop": lambda: rate(release)}, args.repeats)
    lengths = [len(q) for q in questions]
    shared = [len(os.path.commonprefix(questions[k:k + 2])) for k in range(0, len(questions), 2)]
    needed = operations(args.size, lengths, 0, backward=False, shared=shared) / args.pairs
    report(f"judge_{args.size}", f"Judging, {title}",
           "pairs per second, both orders", {"judge": rates},
           f"{args.pairs} pairs of GSM8K answers, {sum(lengths) / len(lengths):.0f} tokens a "
           f"question, --micro-tokens {args.micro_tokens}; all "
           "scores within 1e-5. " + floor(needed, "pair", statistics.median(rates["ours"])))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p, real=True)
    p.add_argument("--pairs", type=int, default=128)
    main(p.parse_args())
