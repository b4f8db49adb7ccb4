"""SFT-chosen: SFT on the chosen completions of DPO's pairs, without the rejected ones.

It trains on what DPO trains on, from SFT's model on. The difference to DPO says what the loss does.

    python baselines/sft_chosen.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out labels.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import main
from core.records import marks
from refine import preference_pairs

NAME = "SFT-chosen"
WHAT = "SFT on what the judge chose of DPO's pairs, from SFT's model on"
STYLE = ("#8c1d40", "v", (0, (6, 1, 1, 1, 1, 1)))
ROUND = "labels finetune"
NEEDS = "dpo"


def reads(seed_dir, k, start):
    return [("comparisons", seed_dir / f"dpo_{k}/comparisons.jsonl")]


def make(args, comparisons):
    pairs = preference_pairs(comparisons, args.dpo_alpha, args.seed)
    return [{**p, "id": f"{p['id']} pair {p['pair']}", "completion": p["chosen"],
             **marks(truncated=p.get("chosen_truncated"))} for p in pairs]


def price(k):
    paths = []
    for j in range(1, k + 1):
        paths += [f"dpo_{j}/samples.jsonl", f"dpo_{j}/comparisons.jsonl"]
        if j < k:        # DPO's policy of this round draws the samples of the next
            paths.append(f"dpo_{j}/model_1")
        paths.append(f"sft-chosen_{j}/model_1")
    return paths


if __name__ == "__main__":
    main(__file__)
