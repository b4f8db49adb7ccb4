"""Labels and comparisons -> new labels; or judged samples -> preference pairs for DPO.

    python refine.py --labels labels_0.jsonl --comparisons comparisons.jsonl --task arithmetic \\
        --out labels_1.jsonl
    python refine.py --method naive --labels labels_0.jsonl --proposals p1.jsonl p2.jsonl \\
        --task arithmetic --out labels_1.jsonl
    python refine.py --method pairs --comparisons comparisons.jsonl --task arithmetic \\
        --out preferences.jsonl

The methods of the paper (arXiv 2501.07886). alpha is --max-replace; prob_b is the judge's
probability that the proposal is better than the label:

ilr     of n disagreements, accept the k = (n-1) - floor((1-alpha)(n-1)) proposals with the highest
        prob_b (ties in order of id), and of these only the ones with prob_b > 0.5
oracle  accept every proposal with prob_b > 0.5, without a cap; for comparisons that were made by
        `compare.py score --judge oracle`
naive   replace a random share alpha of all labels; no judge
clean   drop the labels that are wrong by their references (the paper's clean start)
pairs   keep the share alpha of all pairs with the largest |prob_b - 0.5|, for dpo.py; ties in an
        order drawn from the seed

ilr, oracle and naive write one row per problem, always. They read references for the summary only
(OUT.summary and the printed line); clean reads them to choose. No GPU and no torch is needed.

Unlike the paper's release: acceptance is by rank. The release accepts prob_b above
max(0.5, quantile(prob_b, 1 - alpha)), which is the same set when all scores differ, and the empty
set when the scores at the quantile are tied. The summary reports both shares, of the disagreements
and of all labels. Other rules on the same comparisons are files of baselines/.
"""
import math
import random
from fractions import Fraction

from core.cli import make_parser, run_stage, share, whole
from core.records import (
    InputError,
    dumps,
    marks,
    read_by_id,
    read_jsonl,
    same_prompt,
    write_json,
    write_jsonl,
)
from core.unfinished import refuse_existing
from tasks import get_task, may_grade, warm

METHODS = {"ilr": ("labels", "comparisons"), "oracle": ("labels", "comparisons"),
           "naive": ("labels", "proposals"), "clean": ("labels",), "pairs": ("comparisons",)}
JUDGED = ("id", "pair", "prompt", "completion_a", "completion_b", "truncated_a", "truncated_b",
          "agree", "prob_b_ab", "prob_b_ba", "prob_b")


# ---------------------------------------------------------------- which labels are replaced
def accept_count(n, alpha):
    """How many of n distinct values exceed their (1 - alpha) quantile, by numpy's linear rule:
    k = (n-1) - floor((1-alpha)(n-1)). alpha counts as the decimal that it is written as, so that
    0.15 of 20 is exactly 3."""
    return max(0, n - 1 - math.floor((1 - Fraction(str(alpha))) * (n - 1)))


def accepted_ids(comparisons, alpha):
    """The set of ids whose proposal ILR accepts (the paper, section 4.1)."""
    asked = [c for c in comparisons if not c["agree"]]
    ranked = sorted(asked, key=lambda c: (-c["prob_b"], dumps(c["id"])))
    return {c["id"] for c in ranked[:accept_count(len(asked), alpha)] if c["prob_b"] > 0.5}


def tied_at_the_cap(comparisons, accepted):
    """How many proposals were refused at the lowest score that was accepted: only their ids, and
    nothing of the judge's, set them apart."""
    scores = {c["id"]: c["prob_b"] for c in comparisons if not c["agree"]}
    least = min((scores[i] for i in accepted), default=None)
    return sum(p == least for i, p in scores.items() if i not in accepted)


def random_ids(labels, alpha, seed, round_):
    """The set of floor(alpha N) ids of N labels that naive replaces. It depends on the seed, the
    round and the ids, and not on the order of the labels."""
    ids = sorted((r["id"] for r in labels), key=dumps)
    count = math.floor(Fraction(str(alpha)) * len(ids))
    return set(random.Random(dumps([seed, round_, "naive"])).sample(ids, count))


def refine(labels, proposals, accepted, round_):
    """New labels, in the order of the labels: the proposal where its id is accepted, else the
    label. proposals: {id: (completion, whether it was cut off, prob_b or None)} of every label."""
    rows = []
    for label in labels:
        completion, truncated, prob_b = proposals[label["id"]]
        if label["id"] in accepted:
            label = replaced(label, completion, truncated, source="proposal", round=round_)
        rows.append({**label, "accepted": label["id"] in accepted, "prob_b": prob_b})
    return rows


def replaced(label, completion, truncated, **more):
    """A label with another completion; `truncated` says whether the new one was cut off."""
    label = {**label, "completion": completion, **more}
    if truncated or "truncated" in label:
        label["truncated"] = bool(truncated)
    return label


def proposals_of(comparisons):
    """The proposals of `refine`: the B of these comparisons."""
    return {c["id"]: (c["completion_b"], c.get("truncated_b"), c["prob_b"]) for c in comparisons}


# ---------------------------------------------------------------- which pairs are trained on
def preference_pairs(comparisons, alpha, seed):
    """The floor(alpha N) of N pairs that the judge is surest of: a list of {id, pair, prompt,
    chosen, rejected, prob_chosen, further fields of the comparison}, in order of id and pair.

    A pair at exactly 0.5 has no chosen side and is never kept: equal texts, or an oracle's two
    right or two wrong answers.
    """
    decided = [c for c in comparisons if not c["agree"] and c["prob_b"] != 0.5]
    decided.sort(key=lambda c: dumps([c["id"], c.get("pair", 0)]))
    random.Random(dumps([seed, "pairs"])).shuffle(decided)
    decided.sort(key=lambda c: -abs(c["prob_b"] - 0.5))       # stable: ties stay shuffled
    count = math.floor(Fraction(str(alpha)) * len(comparisons))
    pairs = []
    for c in decided[:count]:
        chosen, rejected, prob = "a", "b", 1 - c["prob_b"]
        if c["prob_b"] > 0.5:
            chosen, rejected, prob = rejected, chosen, c["prob_b"]
        cut = marks(chosen_truncated=c.get(f"truncated_{chosen}"),
                    rejected_truncated=c.get(f"truncated_{rejected}"))
        more = {k: v for k, v in c.items() if k not in JUDGED}
        pairs.append({"id": c["id"], "pair": c.get("pair", 0), "prompt": c["prompt"],
                      "chosen": c[f"completion_{chosen}"], "rejected": c[f"completion_{rejected}"],
                      "prob_chosen": prob, **cut, **more})
    return sorted(pairs, key=lambda p: (dumps(p["id"]), p["pair"]))


def why_no_pairs(comparisons, alpha):
    """Why `preference_pairs` keeps none, in words."""
    pairs, asked = f"{len(comparisons)} pairs", [c for c in comparisons if not c["agree"]]
    if not asked:
        return f"both completions are the same in all {pairs}: raise --temperature of generate.py"
    if all(c["prob_b"] == 0.5 for c in asked):
        return (f"the judge prefers neither side in any of the {pairs}: it has learnt nothing "
                "(oracle: both sides are right, or both wrong)")
    return f"--max-replace {alpha} of {pairs} is no whole pair"


# ---------------------------------------------------------------- what it was worth
def measure(task, before, after, proposed):
    """What a refinement did: how many labels were replaced and, where references exist, what that
    was worth. before, after, proposed: labels in one order; `proposed` has the proposals as
    completions.

    fixable: labels whose proposal is better, of those that the judge was asked about (naive: of
    all). precision: of the labels replaced, the share that became better. recall: of the fixable.
    """
    asked = sum(r["prob_b"] is not None for r in after)
    replaced = [(a, b) for a, b in zip(before, after, strict=True) if b["accepted"]]
    result = {"kept": len(replaced), "share_of_all": len(replaced) / len(after),
              "asked": asked, "share_of_asked": len(replaced) / asked if asked else None}
    disagreeing = [(a, b) for a, b, r in zip(before, proposed, after, strict=True)
                   if r["prob_b"] is not None or not asked]
    if may_grade(task, before, after, [b for _, b in disagreeing]):
        better = sum(task.grade(b) > task.grade(a) for a, b in replaced)
        worse = sum(task.grade(b) < task.grade(a) for a, b in replaced)
        fixable = sum(task.grade(b) > task.grade(a) for a, b in disagreeing)
        result.update(correct_before=sum(map(task.grade, before)) / len(before),
                      correct_after=sum(map(task.grade, after)) / len(after),
                      became_right=better, became_wrong=worse, fixable=fixable,
                      precision=better / len(replaced) if replaced else None,
                      recall=better / fixable if fixable else None)
    return result


def in_words(result, total):
    """The result of `measure` for `total` labels, as the line that is printed."""
    text = f"{result['kept']} of {total} labels replaced ({result['share_of_all']:.1%} of all"
    if result["asked"]:
        text += f", {result['share_of_asked']:.1%} of the {result['asked']} disagreements"
    text += ")"
    if "correct_before" in result:
        text += (f"; correct {result['correct_before']:.1%} -> {result['correct_after']:.1%}; "
                 f"{result['became_right']} became right, {result['became_wrong']} became wrong")
        if result["kept"]:
            text += f", precision {result['precision']:.1%}"
        if result["fixable"]:
            text += f", recall {result['recall']:.1%}"
    return text


def measure_pairs(task, pairs, total):
    """(result, the line that is printed) of the pairs kept of `total` comparisons. precision: the
    share of the pairs whose chosen side is better. pairs: records with `chosen` and `rejected`."""
    result = {"kept": len(pairs), "share_of_all": len(pairs) / total}
    text = f"{len(pairs)} of {total} pairs kept ({result['share_of_all']:.1%})"
    sides = [[{**p, "completion": p[side]} for p in pairs] for side in ("chosen", "rejected")]
    if may_grade(task, *sides):
        grades = [(task.grade(c), task.grade(r)) for c, r in zip(*sides, strict=True)]
        chosen, rejected = (sum(side) / len(pairs) for side in zip(*grades, strict=True))
        result.update(chosen_correct=chosen, rejected_correct=rejected,
                      precision=sum(c > r for c, r in grades) / len(pairs))
        text += f"; chosen correct {chosen:.1%}, rejected correct {rejected:.1%}"
    return result, text


# ---------------------------------------------------------------- the program
def write_pairs(task, args):
    fields = ("id", "prompt", "completion_a", "completion_b", "agree", "prob_b")
    comparisons = read_jsonl(args.comparisons[0], fields, ("id", "pair"))
    # ABLATION: which pairs DPO is trained on
    pairs = preference_pairs(comparisons, args.max_replace, args.seed)
    if not pairs:
        raise InputError(f"{args.comparisons[0]}: {why_no_pairs(comparisons, args.max_replace)}")
    result, text = measure_pairs(task, pairs, len(comparisons))
    write_json(f"{args.out}.summary", result)
    write_jsonl(args.out, pairs)
    print(f"{args.out}: {text}")


def write_clean(task, args):
    labels = read_jsonl(args.labels, ("id", "prompt", "completion", "reference"))
    warm(task, labels)
    right = [r for r in labels if task.grade(r) > 0.5]
    if not right:
        raise InputError(f"{args.labels}: none of its {len(labels)} labels is right")
    write_jsonl(args.out, right)
    print(f"{args.out}: the {len(right)} of {len(labels)} labels that are right")


def read_comparisons(path, labels, labels_path):
    """The comparisons of these labels: `completion_a` must be the label. InputError if not."""
    comparisons = read_jsonl(path, ("id", "completion_a", "completion_b", "agree", "prob_b"))
    now = {r["id"]: r for r in labels}
    for c in comparisons:
        if c["id"] not in now:
            raise InputError(f"{path}: id {c['id']} is not in {labels_path}")
        same_prompt(now[c["id"]], c)
        if now[c["id"]]["completion"] != c["completion_a"]:
            raise InputError(f"{path}: completion_a of id {c['id']} is not the label in "
                             f"{labels_path}")
    return comparisons


def write_refined(task, args):
    labels = read_jsonl(args.labels, ("id", "prompt", "completion"))
    if args.method == "naive":
        sources = args.proposals
        records = read_by_id(sources, ("id", "completion"))
        for label in labels:
            same_prompt(label, records.get(label["id"], {}))
        proposals = {i: (r["completion"], r.get("truncated"), None) for i, r in records.items()}
        accepted = random_ids(labels, args.max_replace, args.seed, args.round)
    else:
        sources = args.comparisons
        comparisons = read_comparisons(sources[0], labels, args.labels)
        proposals = proposals_of(comparisons)
        if args.method == "oracle":
            accepted = {c["id"] for c in comparisons if not c["agree"] and c["prob_b"] > 0.5}
        else:
            # ABLATION: which proposals replace their label
            accepted = accepted_ids(comparisons, args.max_replace)
            if tied := tied_at_the_cap(comparisons, accepted):
                print(f"note: {args.out}: {tied} proposals that were refused have the same score "
                      "as one that was accepted: the first ids were taken")
    missing = [r["id"] for r in labels if r["id"] not in proposals]
    if missing:
        raise InputError(f"{' '.join(sources)}: id {missing[0]} of {args.labels} is missing")
    new = refine(labels, proposals, accepted, args.round)
    result = measure(task, labels, new,
                     [{**r, "completion": proposals[r["id"]][0]} for r in labels])
    write_json(f"{args.out}.summary", result)
    write_jsonl(args.out, new)
    if cut := sum(bool(proposals[i][1]) for i in accepted):
        print(f"note: {args.out}: {cut} of the {len(accepted)} proposals accepted were cut off at "
              "a token limit: sft.py leaves them out")
    if not accepted and args.method != "naive":
        why = "the judge prefers none of the proposals that may replace one"
        if not result["asked"]:
            why = "every proposal agrees with its label"
        print(f"note: {args.out}: no label was replaced, {why}: the next training repeats the last")
    print(f"{args.out}: {in_words(result, len(new))}")


def check(args):
    """Refuse what cannot work, judging by the arguments alone."""
    get_task(args.task)
    if args.method == "clean" and not args.task:
        raise InputError("--method clean needs --task, whose grades say what is wrong")
    if args.comparisons and len(args.comparisons) > 1:
        raise InputError(f"--method {args.method} reads one file of --comparisons, not "
                         f"{len(args.comparisons)}")
    for flag in METHODS[args.method]:
        if not getattr(args, flag):
            raise InputError(f"--method {args.method} needs --{flag}")


def main(args):
    check(args)
    task = get_task(args.task)
    refuse_existing(args.out)
    if args.method == "pairs":
        write_pairs(task, args)
    elif args.method == "clean":
        write_clean(task, args)
    else:
        write_refined(task, args)


def parser():
    p = make_parser(__doc__, prog="refine.py")
    p.add_argument("--method", default="ilr", choices=list(METHODS), help="see above")
    p.add_argument("--labels", help="present labels, one per problem")
    p.add_argument("--comparisons", nargs="+", help="what `compare.py score` wrote")
    p.add_argument("--proposals", nargs="+", help="naive: the proposed completions")
    p.add_argument("--task", help="whose grade the summary uses; without it nothing is graded")
    p.add_argument("--out", required=True, help="file to write; OUT.summary stands beside it")
    p.add_argument("--max-replace", type=share, default=0.15, help="alpha, a share")
    p.add_argument("--round", type=whole, default=1, help="written into the labels that are "
                   "replaced")
    p.add_argument("--seed", type=whole, default=0, help="data seed: of the random choices of "
                   "naive and pairs")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
