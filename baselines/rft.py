"""RFT, rejection-sampling finetuning (arXiv 2308.01825): accepted proposals beside the labels.

The first labels stay, and every proposal that ILR accepted in rounds 1 to k is added as one more
record of its problem; equal texts of a problem are kept once.

    python baselines/rft.py --run runs/arithmetic/seed_0 --round 2 --task arithmetic \\
        --out labels.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import cross_labelling, main

NAME = "RFT"
WHAT = ("accepted proposals stand beside the labels instead of replacing them "
        "(arXiv 2308.01825)")
STYLE = ("#5b3a8c", "X", (0, (7, 2)))
ROUND = "labels retrain"
NEEDS = "ilr"


def reads(seed_dir, k, start):
    refined = [("refined", seed_dir / f"ilr_{j}/labels.jsonl") for j in range(1, k + 1)]
    return [("labels", start), *refined]


def make(args, labels, *rounds):
    rows, seen = list(labels), {(r["id"], r["completion"]) for r in labels}
    for k, refined in enumerate(rounds, 1):
        for r in refined:
            if r["accepted"] and (r["id"], r["completion"]) not in seen:
                seen.add((r["id"], r["completion"]))
                rows.append({**r, "id": f"{r['id']} accepted in {k}"})
    return rows


def price(k):
    return [*cross_labelling(k), f"rft_{k}/model_1"]


if __name__ == "__main__":
    main(__file__)
