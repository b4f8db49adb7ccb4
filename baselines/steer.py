"""steer: SFT conditioned on the judge's score (SteerLM, arXiv 2310.05344).

Every text that the judge compared in rounds 1 to k becomes a training record, with the mean of its
scores as an attribute from 0 to 4 in the prompt. A proposal's score is prob_b, that of a label
1 - prob_b. Labels that the judge was never asked about stay plain. Test prompts ask for a 4.

    python baselines/steer.py --run runs/arithmetic/seed_0 --round 2 --task arithmetic \\
        --out labels.jsonl
    python baselines/steer.py --run runs/arithmetic/seed_0 --task arithmetic \\
        --questions runs/arithmetic/seed_0/data/test.jsonl --out questions.jsonl
"""
import math
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import cross_labelling, main
from refine import replaced

NAME = "steer"
WHAT = ("SFT of labels and proposals conditioned on the judge's score, agreed labels without one, "
        "asked for the best at test time (arXiv 2310.05344)")
STYLE = ("#111111", "<", (0, (1, 1)))
ROUND = "questions labels retrain"
NEEDS = "ilr"
LEVELS = 5        # ABLATION: how fine the attribute is


def reads(seed_dir, k, start):
    rounds = [("comparisons", seed_dir / f"ilr_{j}/comparisons.jsonl") for j in range(1, k + 1)]
    return [("labels", start), *rounds]


def ask_for(prompt, quality):
    """A prompt with the attribute that its completion has, or shall have."""
    if isinstance(prompt, list):        # messages: the last is the question
        *before, last = prompt
        return [*before, {**last, "content": ask_for(last["content"], quality)}]
    role = "USER:\n" if prompt.startswith("USER:\n") else ""      # the question begins after it
    return f"{role}Quality: {quality}\n{prompt.removeprefix(role)}"


def make(args, labels, *rounds):
    scores = {}        # id -> text -> its scores, texts in order of appearance
    cut = set()        # (id, text) that a token limit cut off
    for comparisons in rounds:
        for c in comparisons:
            if not c["agree"]:
                texts = scores.setdefault(c["id"], {})
                texts.setdefault(c["completion_a"], []).append(1 - c["prob_b"])
                texts.setdefault(c["completion_b"], []).append(c["prob_b"])
                cut |= {(c["id"], c[f"completion_{side}"]) for side in "ab"
                        if c.get(f"truncated_{side}")}
    rows = []
    for r in labels:
        if r["id"] not in scores:
            rows.append(r)
        for k, (text, found) in enumerate(scores.get(r["id"], {}).items()):
            quality = min(LEVELS - 1, math.floor(LEVELS * sum(found) / len(found)))
            rows.append(replaced(r, text, (r["id"], text) in cut, id=f"{r['id']} text {k}",
                                 prompt=ask_for(r["prompt"], quality)))
    return rows


def questions(records):
    return [{**r, "prompt": ask_for(r["prompt"], LEVELS - 1)} for r in records]


def price(k):
    return [*cross_labelling(k), f"steer_{k}/model_1"]


if __name__ == "__main__":
    main(__file__)
