"""A tool: demonstrations of which a given share is wrong, in place of the weak model's labels.

The labels become references, but for round(share * n) of them, drawn from the seed. Those get
  symmetric   another problem's reference that is wrong for them
  systematic  the wrong answer that the weak model gave them, one that the task can parse: like
              problems err alike

    python baselines/label_noise.py --labels weak/labels.jsonl --proposals data/unlab.jsonl \\
        --task arithmetic --share 0.3 --out noise/labels.jsonl
"""
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.cli import make_parser, run_stage, share, whole
from core.records import InputError, dumps, read_by_id, read_jsonl, same_prompt, write_jsonl
from core.unfinished import refuse_existing
from refine import replaced
from tasks import get_task, may_grade, warm

TRIES = 100


def noisy(task, labels, gold, wrong_share, kind, seed):
    """One demonstration per label, in their order: gold {id: reference completion}, but for
    round(wrong_share n) of them. Raises InputError where there are too few errors to be had."""
    order, k = [r["id"] for r in labels], round(wrong_share * len(labels))
    random.Random(dumps([seed, "noise"])).shuffle(order)
    new = {r["id"]: replaced(r, gold[r["id"]], False, source="gold") for r in labels}
    if kind == "systematic":
        wrong = errors_of(task, labels)
        if len(wrong) < k:
            raise InputError(
                f"{len(wrong)} of {len(labels)} labels are wrong, fewer than {wrong_share:.1%}: no "
                "systematic noise of that share (labels that cannot be parsed, or were cut off, do "
                "not count: SFT leaves them out)")
        new.update({i: wrong[i] for i in [i for i in order if i in wrong][:k]})
        return list(new.values())
    rng = random.Random(dumps([seed, "noise", "giver"]))
    for i in order[:k]:
        new[i] = another(task, new[i], gold, order, rng)
        if new[i] is None:
            raise InputError(f"the {len(labels)} references are too few, or too alike, to be each "
                             "other's errors")
    return list(new.values())


def errors_of(task, labels):
    """{id: label} of the labels that SFT trains on, parsed and complete, and that are wrong."""
    warm(task, labels)
    return {r["id"]: r for r in labels if not r.get("truncated")
            and task.is_well_formed(r["completion"]) and task.grade(r) <= 0.5}


def another(task, record, gold, ids, rng):
    """The record with another problem's reference that is wrong for it; None after TRIES draws."""
    for _ in range(TRIES):
        r = {**record, "completion": gold[rng.choice(ids)], "source": "noise"}
        if r["completion"] == gold[r["id"]]:
            continue
        right = may_grade(task, [r]) and task.grade(r) > 0.5      # two problems share an answer
        if not right:
            return r
    return None


def check(args):
    """Refuse what cannot work, judging by the arguments alone."""
    get_task(args.task)


def main(args):
    check(args)
    refuse_existing(args.out)
    labels = read_jsonl(args.labels, ("id", "prompt", "completion"))
    records = read_by_id(args.proposals, ("id", "completion"))
    missing = [r["id"] for r in labels if r["id"] not in records]
    if missing:
        raise InputError(f"{' '.join(args.proposals)}: id {missing[0]} of {args.labels} is missing")
    for r in labels:
        same_prompt(r, records[r["id"]])
    gold = {i: r["completion"] for i, r in records.items()}
    new = noisy(get_task(args.task), labels, gold, args.share, args.kind, args.seed)
    write_jsonl(args.out, new)
    print(f"{args.out}: {len(labels)} labels, {args.share:.1%} of them with {args.kind} noise")


def parser():
    p = make_parser(__doc__, prog="baselines/label_noise.py")
    p.add_argument("--labels", required=True, help="the weak model's labels, one per problem")
    p.add_argument("--proposals", required=True, nargs="+", help="the references of the problems")
    p.add_argument("--task", required=True, help="whose grade says what is wrong")
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--share", type=share, default=0, help="how many of the labels are wrong")
    p.add_argument("--kind", default="symmetric", choices=["symmetric", "systematic"],
                   help="wrong by chance, or as the weak model errs")
    p.add_argument("--seed", type=whole, default=0, help="of the random choices")
    p.set_defaults(method="label-noise")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
