"""SPIN, self-play finetuning (arXiv 2401.01335): DPO of the label over the policy's own sample.

No judge: the demonstration is always the chosen side, and a sample that differs from it the
rejected one. Every round samples from the policy that the round before left.

    python baselines/spin.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out preferences.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import main
from core.records import marks

NAME = "SPIN"
WHAT = "DPO of the demonstration over the policy's own sample, no comparisons (arXiv 2401.01335)"
STYLE = ("#e08fb4", ">", (0, (5, 4)))
ROUND = "sample pairs prefer-unjudged"
SAMPLES = 1
NEEDS = ""


def reads(seed_dir, k, start):
    return [("labels", start), ("samples", seed_dir / f"spin_{k}/samples.jsonl")]


def make(args, labels, samples):
    label_of = {r["id"]: r for r in labels}
    pairs = []
    for r in samples:
        label = label_of.get(r["id"], r)
        if r["completion"] != label["completion"]:
            pairs.append({"id": r["id"], "pair": r.get("sample", 0), "prompt": r["prompt"],
                          "chosen": label["completion"], "rejected": r["completion"],
                          **marks(chosen_truncated=label.get("truncated"),
                                  rejected_truncated=r.get("truncated"))})
    return pairs


def price(k):
    return [f"spin_{j}/{file}" for j in range(1, k + 1) for file in ("samples.jsonl", "model_1")]


if __name__ == "__main__":
    main(__file__)
