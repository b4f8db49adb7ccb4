"""DPO-coin: DPO that tosses a coin in place of the judge.

prob_b of each pair is a random number that depends on the seed, the id and the two texts only. The
run still asks the judge, as for DPO, but its answers are not read and not in the price.

    python baselines/dpo_coin.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out preferences.jsonl
"""
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import main
from core.records import dumps
from refine import preference_pairs

NAME = "DPO-coin"
WHAT = "DPO that tosses a coin in place of the judge"
STYLE = ("#b5b56a", "h", (0, (1, 4)))
ROUND = "sample judge pairs prefer-unjudged"
NEEDS = ""


def reads(seed_dir, k, start):
    return [("comparisons", seed_dir / f"dpo-coin_{k}/comparisons.jsonl")]


def toss(comparisons, seed):
    """The comparisons with a prob_b that knows nothing of the pair."""
    rows = []
    for c in comparisons:
        if not c["agree"]:
            about = [seed, "coin", c["id"], c["completion_a"], c["completion_b"]]
            c = {**c, "prob_b": random.Random(dumps(about)).random()}
        rows.append(c)
    return rows


def make(args, comparisons):
    return preference_pairs(toss(comparisons, args.seed), args.dpo_alpha, args.seed)


def price(k):
    files = ("samples.jsonl", "model_1")
    return [f"dpo-coin_{j}/{file}" for j in range(1, k + 1) for file in files]


if __name__ == "__main__":
    main(__file__)
