"""DPO-release: DPO that reads the judge as the paper's release does, both prompts in one order.

The release's experiments/dpo.py builds the two prompts of a pair identically. It averages P(B) and
P(A) of one fp32 softmax, which is 0.5 up to rounding, and takes what is not above 0.5 as A. So
rounding noise chooses. The difference to DPO says what the judge's two orders are worth.

    python baselines/dpo_release.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out preferences.jsonl
"""
import math
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import main
from refine import preference_pairs

NAME = "DPO-release"
WHAT = "DPO that reads the judge as the paper's release does, both of its prompts in one order"
STYLE = ("#7a4a1e", "p", (0, (3, 2, 1, 2)))
ROUND = "sample judge pairs prefer"
NEEDS = ""


def reads(seed_dir, k, start):
    return [("comparisons", seed_dir / f"dpo-release_{k}/comparisons.jsonl")]


def as_released(comparisons):
    """The comparisons with prob_b as the release computes it, never exactly 0.5."""
    import numpy as np
    rows = []
    for c in comparisons:
        if not c["agree"]:
            p = min(max(c["prob_b_ab"], 1e-30), 1 - 1e-16)
            logit = np.float32(math.log(p) - math.log1p(-p))
            both = [1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(logit))]
            prob_b = float(np.mean(both, dtype=np.float32))
            c = {**c, "prob_b": prob_b if prob_b != 0.5 else math.nextafter(0.5, 0)}
        rows.append(c)
    return rows


def make(args, comparisons):
    return preference_pairs(as_released(comparisons), args.dpo_alpha, args.seed)


def price(k):
    files = ("samples.jsonl", "comparisons.jsonl", "model_1")
    return [f"dpo-release_{j}/{file}" for j in range(1, k + 1) for file in files]


if __name__ == "__main__":
    main(__file__)
