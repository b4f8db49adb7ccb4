"""ensemble: the two half-models of ILR's round 1 vote on every test problem; nothing is refined.

Each half-model draws half of the DPO_SAMPLES answers (the step `halves`). The answer that most of
them agree on wins, by the task's own rule; ties go to the first one sampled.

    python baselines/ensemble.py --run runs/arithmetic/seed_0 --task arithmetic \\
        --questions runs/arithmetic/seed_0/data/test.jsonl --out eval_1.jsonl
"""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import main
from core.records import InputError, marks
from tasks import get_task, warm

NAME = "ensemble"
WHAT = "the two half-models of round 1 vote at test time, no refinement"
STYLE = ("#8f8f8f", "*", (0, (4, 1, 1, 1)))
ROUND = "halves vote"
ROUNDS = 1
NEEDS = "ilr"


def check(args):
    if not hasattr(get_task(args.task), "agree"):
        raise InputError("ensemble: this task has no rule for when two answers agree")


def reads(seed_dir, k, start):
    return [("samples", seed_dir / f"ensemble_1/samples_{h}.jsonl") for h in (1, 2)]


def make(args, problems, *samples):
    task, groups_of = get_task(args.task), {}
    warm(task, *samples)
    for records in samples:
        for r in records:
            groups = groups_of.setdefault(r["id"], [])        # answers that agree are one group
            same = next((group for group in groups if task.agree(group[0], r)), None)
            if same:
                same.append(r)
            else:
                groups.append([r])
    rows = []
    for r in problems:
        best = max(groups_of[r["id"]], key=len)
        rows.append({**r, "completion": best[0]["completion"], "source": "vote",
                     **marks(truncated=best[0].get("truncated")), "votes": len(best)})
    return rows


def price(k):
    return ["ilr_1/half_1", "ilr_1/half_2"]


if __name__ == "__main__":
    main(__file__)
