"""DPO-labels: DPO on ILR's own pairs, label against proposal.

It reads the comparisons of ILR's round k where DPO reads those of the policy's samples. The
difference to ILR says whether the comparisons are better used to replace labels or to prefer.

    python baselines/dpo_labels.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out preferences.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import cross_labelling, main
from refine import preference_pairs

NAME = "DPO-labels"
WHAT = "DPO on ILR's own pairs, label against proposal"
STYLE = ("#c9a227", "D", ":")
ROUND = "pairs prefer"
NEEDS = "ilr"


def reads(seed_dir, k, start):
    return [("comparisons", seed_dir / f"ilr_{k}/comparisons.jsonl")]


def make(args, comparisons):
    return preference_pairs(comparisons, args.dpo_alpha, args.seed)


def price(k):
    paths = []
    for j in range(1, k + 1):
        paths += [*cross_labelling(j, first=j), f"dpo-labels_{j}/model_1"]
    return paths


if __name__ == "__main__":
    main(__file__)
