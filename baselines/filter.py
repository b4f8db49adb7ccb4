"""filter: drop the labels that the judge rejects, and add nothing.

It keeps ILR's labels of round k, less those that ILR replaced in any round up to k. The difference
to ILR says what the proposals are worth beyond finding the bad labels.

    python baselines/filter.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out labels.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import cross_labelling, main

NAME = "filter"
WHAT = "labels that the judge rejects are dropped, nothing is added"
STYLE = ("#5ab4c5", "P", (0, (2, 1)))
ROUND = "labels grade retrain"
NEEDS = "ilr"


def reads(seed_dir, k, start):
    return [("refined", seed_dir / f"ilr_{k}/labels.jsonl")]


def make(args, labels):
    return [r for r in labels if r["source"] != "proposal"]


def price(k):
    return [*cross_labelling(k), f"filter_{k}/model_1"]


if __name__ == "__main__":
    main(__file__)
