"""Labels and comparisons -> new labels; or scored samples -> preference pairs for DPO. Needs neither torch nor a GPU.

    python refine.py --labels labels_0.jsonl --comparisons c.jsonl --task arithmetic --out labels_1.jsonl        # ILR
    python refine.py --method naive --labels l.jsonl --proposals p1.jsonl p2.jsonl --task arithmetic --out l2.jsonl
    python refine.py --method pairs --comparisons scored_samples.jsonl --task arithmetic --out preferences.jsonl # for dpo.py

ilr     of the n disagreements accept the k = (n-1) - floor((1-alpha)(n-1)) proposals with the highest prob_b (ties in
        order of id), and of these only prob_b > 0.5: with distinct scores the release's max(0.5, quantile(1-alpha))
oracle  accept every proposal with prob_b > 0.5 (comparisons by `compare.py score --judge oracle`); no cap
naive   replace a random share alpha of all labels, no judge
clean   drop the labels that are wrong by their references (the paper's clean start; no comparisons)
pairs   keep the share alpha of all pairs with the largest |prob_b - 0.5|; ties in an order drawn from the seed

But for clean, the labels file keeps one row per problem, always. References are read for the summary line only.
Unlike the paper's release: acceptance is by rank, so that ties do not turn everything down, and the summary reports the
replaced share of the disagreements and of all labels.
"""
import math
import random
from fractions import Fraction

from tasks import (InputError, dumps, get_task, make_parser, may_grade, read_jsonl, refuse_existing, run_stage, share, warm, whole,
                   write_json, write_jsonl)

JUDGED = "id", "pair", "prompt", "completion_a", "completion_b", "agree", "prob_b_ab", "prob_b_ba", "prob_b"


def accept_count(n, alpha):
    """k = (n-1) - floor((1-alpha)(n-1)): how many of n distinct values exceed their (1-alpha) quantile (numpy's linear
    rule). alpha counts as the decimal it is written as, so that 0.15 of 20 is exactly 3."""
    return max(0, n - 1 - math.floor((1 - Fraction(str(alpha))) * (n - 1)))


def accepted_ids(comparisons, alpha):
    """The ids whose proposals ILR accepts (the paper, section 4.1), out of those that disagree."""
    asked = [c for c in comparisons if not c["agree"]]
    ranked = sorted(asked, key=lambda c: (-c["prob_b"], dumps(c["id"])))
    return {c["id"] for c in ranked[:accept_count(len(asked), alpha)] if c["prob_b"] > 0.5}


def refine(labels, proposals, accepted, round_):
    """New labels: the proposal where its id is accepted, else the label, in the labels' order.

    proposals: {id: (completion, prob_b or None)}.
    """
    rows = []
    for label in labels:
        completion, prob_b = proposals[label["id"]]
        if label["id"] in accepted:
            label = {**label, "completion": completion, "source": "proposal", "round": round_}
        rows.append({**label, "accepted": label["id"] in accepted, "prob_b": prob_b})
    return rows


def preference_pairs(comparisons, alpha, seed):
    """The floor(alpha N) of N pairs that the judge is surest of, as {id, prompt, chosen, rejected, prob_chosen};
    pairs at exactly 0.5 (equal texts, or an oracle's both-right and both-wrong) have no chosen side and are never kept."""
    decided = [c for c in comparisons if not c["agree"] and c["prob_b"] != 0.5]
    decided.sort(key=lambda c: dumps([c["id"], c["pair"]]))
    random.Random(dumps([seed, "pairs"])).shuffle(decided)
    decided.sort(key=lambda c: -abs(c["prob_b"] - 0.5))
    pairs = []
    for c in decided[:math.floor(Fraction(str(alpha)) * len(comparisons))]:
        b = c["prob_b"] > 0.5
        chosen, rejected = (c["completion_b"], c["completion_a"]) if b else (c["completion_a"], c["completion_b"])
        pairs.append({"id": c["id"], "pair": c["pair"], "prompt": c["prompt"], "chosen": chosen, "rejected": rejected,
                      "prob_chosen": c["prob_b"] if b else 1 - c["prob_b"],
                      **{k: v for k, v in c.items() if k not in JUDGED}})
    return sorted(pairs, key=lambda p: (dumps(p["id"]), p["pair"]))


def measure(task, before, after):
    """What a refinement did: how many labels were replaced and, where references exist, what that was worth."""
    asked = sum(r["prob_b"] is not None for r in after)
    replaced = [(a, b) for a, b in zip(before, after) if b["accepted"]]
    result = {"kept": len(replaced), "share_of_all": len(replaced) / len(after),
              "asked": asked, "share_of_asked": len(replaced) / asked if asked else None}
    if may_grade(task, before, after):
        better = sum(task.grade(b) > task.grade(a) for a, b in replaced)
        worse = sum(task.grade(b) < task.grade(a) for a, b in replaced)
        result.update(correct_before=sum(map(task.grade, before)) / len(before),
                      correct_after=sum(map(task.grade, after)) / len(after),
                      became_right=better, became_wrong=worse, precision=better / len(replaced) if replaced else None)
    return result


def in_words(result, total):
    text = f"{result['kept']} of {total} labels replaced ({result['share_of_all']:.1%} of all"
    if result["asked"]:
        text += f", {result['share_of_asked']:.1%} of the {result['asked']} disagreements"
    text += ")"
    if "correct_before" in result:
        text += (f"; correct {result['correct_before']:.1%} -> {result['correct_after']:.1%}; {result['became_right']} became "
                 f"right, {result['became_wrong']} became wrong")
        if result["kept"]:
            text += f", precision {result['precision']:.1%}"
    return text


def main(args):
    task = get_task(args.task)
    refuse_existing(args.out)
    if args.method == "pairs":
        fields = ("id", "pair", "prompt", "completion_a", "completion_b", "agree", "prob_b")
        comparisons = read_jsonl(need(args, "comparisons"), fields, ("id", "pair"))
        pairs = preference_pairs(comparisons, args.max_replace, args.seed)
        if not pairs:
            raise InputError(f"{args.comparisons}: the judge prefers neither side in any of the {len(comparisons)} pairs")
        result = {"kept": len(pairs), "share_of_all": len(pairs) / len(comparisons)}
        text = f"{args.out}: {len(pairs)} of {len(comparisons)} pairs kept ({len(pairs) / len(comparisons):.1%})"
        sides = [[{**p, "completion": p[k]} for p in pairs] for k in ("chosen", "rejected")]
        if may_grade(task, *sides):
            grades = [(task.grade(c), task.grade(r)) for c, r in zip(*sides)]
            chosen, rejected = (sum(side) / len(pairs) for side in zip(*grades))
            result.update(chosen_correct=chosen, rejected_correct=rejected, precision=sum(c > r for c, r in grades) / len(pairs))
            text += f"; chosen correct {chosen:.1%}, rejected correct {rejected:.1%}"
        write_json(f"{args.out}.summary", result)
        write_jsonl(args.out, pairs)
        return print(text)

    labels = read_jsonl(need(args, "labels"), ("id", "prompt", "completion", *(["reference"] if args.method == "clean" else [])))
    if args.method == "clean":
        warm(task, labels)
        right = [r for r in labels if task.grade(r) > 0.5]
        if not right:
            raise InputError(f"{args.labels}: none of its {len(labels)} labels is right")
        write_jsonl(args.out, right)
        return print(f"{args.out}: the {len(right)} of {len(labels)} labels that are right")
    if args.method == "naive":
        proposals = {r["id"]: (r["completion"], None) for path in need(args, "proposals") for r in read_jsonl(path, ("id", "completion"))}
        ids = sorted((r["id"] for r in labels), key=dumps)
        accepted = set(random.Random(dumps([args.seed, args.round, "naive"])).sample(
            ids, math.floor(Fraction(str(args.max_replace)) * len(ids))))
    else:
        comparisons = read_jsonl(need(args, "comparisons"), ("id", "completion_a", "completion_b", "agree", "prob_b"))
        now = {r["id"]: r["completion"] for r in labels}
        for c in comparisons:
            if c["id"] not in now:
                raise InputError(f"{args.comparisons}: id {c['id']} is not in {args.labels}")
            if now[c["id"]] != c["completion_a"]:
                raise InputError(f"{args.comparisons}: completion_a of id {c['id']} is not the label in {args.labels}")
        proposals = {c["id"]: (c["completion_b"], c["prob_b"]) for c in comparisons}
        if args.method == "oracle":
            accepted = {c["id"] for c in comparisons if not c["agree"] and c["prob_b"] > 0.5}
        else:
            # ABLATION: which proposals replace their label
            accepted = accepted_ids(comparisons, args.max_replace)
    missing = [r["id"] for r in labels if r["id"] not in proposals]
    if missing:
        raise InputError(f"{' '.join(args.proposals or [args.comparisons])}: id {missing[0]} of {args.labels} is missing")
    new = refine(labels, proposals, accepted, args.round)
    result = measure(task, labels, new)
    write_json(f"{args.out}.summary", result)
    write_jsonl(args.out, new)
    print(f"{args.out}: {in_words(result, len(new))}")


def need(args, name):
    if not getattr(args, name):
        raise InputError(f"--method {args.method} needs --{name}")
    return getattr(args, name)


def parser():
    p = make_parser(__doc__, prog="refine.py")
    p.add_argument("--method", default="ilr", choices=["ilr", "oracle", "naive", "clean", "pairs"], help="see above")
    p.add_argument("--labels", help="present labels, one per problem")
    p.add_argument("--comparisons", help="what `compare.py score` wrote")
    p.add_argument("--proposals", nargs="+", help="proposed completions, for naive")
    p.add_argument("--task", required=True, help="whose grade the summary uses")
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--max-replace", type=share, default=0.15, help="alpha, a share")
    p.add_argument("--round", type=whole, default=1, help="written into the labels that are replaced")
    p.add_argument("--seed", type=whole, default=0, help="of the random choices of naive and pairs")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
