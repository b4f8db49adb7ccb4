"""both-orders: ILR, but a label is replaced only where the judge says so in both orders.

The comparisons are ILR's. A proposal is accepted if the judge prefers it as B (prob_b_ab > 0.5) and
as A (prob_b_ba < 0.5), and if it is among the highest prob_b, with ILR's cap. Labels that ILR has
replaced and this method has not are left alone in later rounds: those comparisons are about others.

    python baselines/both_orders.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out labels.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import cross_labelling, main
from refine import accepted_ids, proposals_of, refine

NAME = "both-orders"
WHAT = "ILR that replaces a label only where the judge says so in both orders"
STYLE = ("#6fbf4b", "d", (0, (8, 2, 2, 2)))
ROUND = "labels grade retrain"
NEEDS = "ilr"


def reads(seed_dir, k, start):
    rounds = [("comparisons", seed_dir / f"ilr_{j}/comparisons.jsonl") for j in range(1, k + 1)]
    return [("labels", start), *rounds]


def make(args, labels, *rounds):
    for k, comparisons in enumerate(rounds, 1):
        now = {r["id"]: r["completion"] for r in labels}
        judged = []
        for c in comparisons:
            if not c["agree"]:
                both = c["prob_b_ab"] > 0.5 > c["prob_b_ba"]
                if not both or now.get(c["id"]) != c["completion_a"]:
                    c = {**c, "prob_b": 0.0}        # counts for the cap, and is refused
            judged.append(c)
        accepted = accepted_ids(judged, args.alpha)
        proposals = {r["id"]: (r["completion"], r.get("truncated"), None) for r in labels}
        proposals.update(proposals_of(comparisons))
        labels = refine(labels, proposals, accepted, k)
    return labels


def price(k):
    return [*cross_labelling(k), f"both-orders_{k}/model_1"]


if __name__ == "__main__":
    main(__file__)
