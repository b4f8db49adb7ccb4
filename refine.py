"""Labels and comparisons -> new labels; or scored samples -> preference pairs for DPO. Needs neither torch nor a GPU.

    python refine.py --labels labels_0.jsonl --comparisons c.jsonl --task arithmetic --out labels_1.jsonl        # ILR
    python refine.py --method naive --labels l.jsonl --proposals p1.jsonl p2.jsonl --task arithmetic --out l2.jsonl
    python refine.py --method pairs --comparisons scored_samples.jsonl --task arithmetic --out preferences.jsonl # for dpo.py

ilr     of the n disagreements accept the k = (n-1) - floor((1-alpha)(n-1)) proposals with the highest prob_b (ties in
        order of id), and of these only prob_b > 0.5: with distinct scores the release's max(0.5, quantile(1-alpha))
oracle  accept every proposal with prob_b > 0.5 (comparisons by `compare.py score --judge oracle`); no cap
naive   replace a random share alpha of all labels, no judge
clean   drop the labels that are wrong by their references (the paper's clean start; no comparisons)
noise   demonstrations of which a given share (--share) is wrong, in place of the weak model's: references (--proposals), and for the rest
        another one's completion (symmetric) or the wrong answer that the weak model gave in --labels (systematic)
pairs   keep the share alpha of all pairs with the largest |prob_b - 0.5|; ties in an order drawn from the seed

Baselines on the same comparisons, from the files that ILR and DPO leave:
filter  labels as ILR left them (--labels ilr_k/labels.jsonl), less those that were ever replaced; nothing is added
rft     --labels the first ones, and beside them every proposal that ILR accepted (--proposals ilr_1/labels.jsonl ...;
        rejection-sampling finetuning, arXiv 2308.01825)
steer   labels and proposals, each with the judge's score for it in the prompt (--comparisons ilr_1/comparisons.jsonl ...; SteerLM,
        arXiv 2310.05344); without --comparisons, every prompt of --labels asks for the best
chosen  what `pairs` would keep, as labels: the chosen completions
spin    pairs label over own sample (--proposals samples.jsonl; arXiv 2401.01335)
vote    the answer that most of several samples (--proposals) of each problem of --labels agree on; ties: the first sampled

But for clean and the baselines, the labels file keeps one row per problem, always. References are read for the summary line only,
and by clean and noise.
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
    decided.sort(key=lambda c: dumps([c["id"], c.get("pair", 0)]))
    random.Random(dumps([seed, "pairs"])).shuffle(decided)
    decided.sort(key=lambda c: -abs(c["prob_b"] - 0.5))
    pairs = []
    for c in decided[:math.floor(Fraction(str(alpha)) * len(comparisons))]:
        b = c["prob_b"] > 0.5
        chosen, rejected = (c["completion_b"], c["completion_a"]) if b else (c["completion_a"], c["completion_b"])
        pairs.append({"id": c["id"], "pair": c.get("pair", 0), "prompt": c["prompt"], "chosen": chosen, "rejected": rejected,
                      "prob_chosen": c["prob_b"] if b else 1 - c["prob_b"],
                      **{k: v for k, v in c.items() if k not in JUDGED}})
    return sorted(pairs, key=lambda p: (dumps(p["id"]), p["pair"]))


def misread(comparisons, reading, seed):
    """The same comparisons as DPO would see them with another reading of the judge, to measure what a reading is worth.

    same: both prompts in one order, as the release's experiments/dpo.py builds them: P(B) and P(A) of one fp32 softmax, averaged,
          are 0.5 up to rounding, and what is not above 0.5 means A.
    coin: a random probability that knows nothing of the pair.
    """
    import numpy as np
    rows = []
    for c in comparisons:
        if not c["agree"] and reading == "same":
            p = min(max(c["prob_b_ab"], 1e-30), 1 - 1e-16)
            logit = np.float32(math.log(p) - math.log1p(-p))
            prob_b = float(np.mean([1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(logit))], dtype=np.float32))
            c = {**c, "prob_b": prob_b if prob_b != 0.5 else math.nextafter(0.5, 0)}
        elif not c["agree"]:
            c = {**c, "prob_b": random.Random(dumps([seed, "coin", c["id"], c["completion_a"], c["completion_b"]])).random()}
        rows.append(c)
    return rows


def filtered(labels):
    """ILR's labels less those that it ever replaced: what the judge rejected is dropped."""
    return [r for r in labels if r["source"] != "proposal"]


def with_accepted(labels, rounds):
    """labels, and beside them what ILR accepted in each of `rounds` (its labels files), each text once a problem."""
    rows, seen = list(labels), {(r["id"], r["completion"]) for r in labels}
    for k, refined in enumerate(rounds, 1):
        for r in refined:
            if r["accepted"] and (r["id"], r["completion"]) not in seen:
                seen.add((r["id"], r["completion"]))
                rows.append({**r, "id": f"{r['id']} accepted in {k}"})
    return rows


def ask_for(prompt, quality):
    """A prompt with an attribute from 0 to 4 that its completion has, or shall have."""
    role = "USER:\n" if prompt.startswith("USER:\n") else ""       # of tasks.user_prompt: the question begins after it
    return f"{role}Quality: {quality}\n{prompt.removeprefix(role)}"


def steered(labels, rounds):
    """Training records of attribute-conditioned SFT: every text that the judge compared, with the mean of its scores in fifths (a label's
    is 1 - prob_b, a proposal's prob_b) as the prompt's attribute; and plain, the labels that it was never asked about."""
    scores = {}
    for c in (c for comparisons in rounds for c in comparisons if not c["agree"]):
        for text, score in ((c["completion_a"], 1 - c["prob_b"]), (c["completion_b"], c["prob_b"])):
            scores.setdefault(c["id"], {}).setdefault(text, []).append(score)
    rows = []
    for r in labels:
        rows += [r] if r["id"] not in scores else [
            {**r, "id": f"{r['id']} text {k}", "completion": text, "prompt": ask_for(r["prompt"], min(4, math.floor(5 * sum(s) / len(s))))}
            for k, (text, s) in enumerate(scores[r["id"]].items())]
    return rows


def own_samples(labels, samples):
    """SPIN's preference pairs: the demonstration over each of the policy's own samples that differs from it."""
    label_of = {r["id"]: r for r in labels}
    return [{"id": r["id"], "pair": r.get("sample", 0), "prompt": r["prompt"], "chosen": label_of[r["id"]]["completion"], "rejected": r["completion"]}
            for file in samples for r in file if r["id"] in label_of and r["completion"] != label_of[r["id"]]["completion"]]


def vote(task, labels, samples):
    """Each problem of `labels` with the completion most of its samples agree with; `votes`: how many. Ties: the first sampled."""
    if not hasattr(task, "agree"):
        raise InputError("--method vote: this task has no rule for when two answers agree")
    warm(task, *samples)
    candidates = {}
    for r in (r for file in samples for r in file):
        groups = candidates.setdefault(r["id"], [])
        same = next((group for group in groups if task.agree(group[0], r)), None)
        same.append(r) if same else groups.append([r])
    best = {id_: max(groups, key=len) for id_, groups in candidates.items()}
    return [{**r, "completion": best[r["id"]][0]["completion"], "source": "vote", "votes": len(best[r["id"]])} for r in labels]


def noisy(task, labels, gold, wrong_share, kind, seed):
    """Demonstrations with a given error: the references {id: completion} of `labels`, but for round(wrong_share n) of them, drawn from
    the seed. Those get any other one's that is wrong for them (symmetric label noise), or keep the wrong answer, one that can be parsed,
    which the weak model gave them (systematic: like problems err alike). Raises InputError where there are not so many errors to be had."""
    order, k = [r["id"] for r in labels], round(wrong_share * len(labels))
    random.Random(dumps([seed, "noise"])).shuffle(order)
    new = {r["id"]: {**r, "completion": gold[r["id"]], "source": "gold"} for r in labels}
    if kind == "systematic":
        warm(task, labels)
        wrong = {r["id"]: r for r in labels if task.is_well_formed(r["completion"]) and task.grade(r) <= 0.5}
        if len(wrong) < k:
            raise InputError(f"{len(wrong)} of {len(labels)} labels are wrong, fewer than {wrong_share:.1%}: no systematic noise of that share (labels "
                             "that cannot be parsed do not count: SFT leaves them out)")
        new.update({i: wrong[i] for i in [i for i in order if i in wrong][:k]})
    else:
        rng = random.Random(dumps([seed, "noise", "giver"]))
        for i in order[:k]:
            tries = ({**new[i], "completion": gold[rng.choice(order)], "source": "noise"} for _ in range(100))
            new[i] = next((r for r in tries if r["completion"] != gold[i] and not (may_grade(task, [r]) and task.grade(r) > 0.5)), None)
            if new[i] is None:       # two problems may have the same answer: then the other's is no error
                raise InputError(f"the {len(labels)} references are too few, or too alike, to be each other's errors")
    return list(new.values())


def measure(task, before, after, proposed):
    """What a refinement did: how many labels were replaced and, where references exist, what that was worth.

    proposed: the labels with their proposals as completions. fixable: labels whose proposal, where a judge was asked,
    is better. precision: of the labels replaced, the share that became better; recall: of the fixable, the same.
    """
    asked = sum(r["prob_b"] is not None for r in after)
    replaced = [(a, b) for a, b in zip(before, after) if b["accepted"]]
    result = {"kept": len(replaced), "share_of_all": len(replaced) / len(after),
              "asked": asked, "share_of_asked": len(replaced) / asked if asked else None}
    disagreeing = [(a, b) for a, b, r in zip(before, proposed, after) if r["prob_b"] is not None or not asked]     # naive asks nothing
    if may_grade(task, before, after, [b for _, b in disagreeing]):
        better = sum(task.grade(b) > task.grade(a) for a, b in replaced)
        worse = sum(task.grade(b) < task.grade(a) for a, b in replaced)
        fixable = sum(task.grade(b) > task.grade(a) for a, b in disagreeing)
        result.update(correct_before=sum(map(task.grade, before)) / len(before),
                      correct_after=sum(map(task.grade, after)) / len(after),
                      became_right=better, became_wrong=worse, fixable=fixable,
                      precision=better / len(replaced) if replaced else None, recall=better / fixable if fixable else None)
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
        if result["fixable"]:
            text += f", recall {result['recall']:.1%}"
    return text


def main(args):
    task = get_task(args.task)
    refuse_existing(args.out)
    args.comparisons, *more = args.comparisons or [None]
    if more and args.method != "steer":
        raise InputError(f"--method {args.method} reads one file of --comparisons, not {1 + len(more)}")
    if args.reading != "both" and args.method not in ("pairs", "chosen"):
        raise InputError(f"--reading has no effect with --method {args.method}")
    if args.method in ("pairs", "chosen"):
        fields = ("id", "prompt", "completion_a", "completion_b", "agree", "prob_b", *(["prob_b_ab"] if args.reading == "same" else []))
        comparisons = read_jsonl(need(args, "comparisons"), fields, ("id", "pair"))
        if args.reading != "both":
            comparisons = misread(comparisons, args.reading, args.seed)
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
        write_jsonl(args.out, pairs if args.method == "pairs" else [
            {**p, "id": f"{p['id']} pair {p['pair']}", "completion": p["chosen"]} for p in pairs])
        return print(text)

    labels = read_jsonl(need(args, "labels"), ("id", "prompt", "completion", *{"clean": ["reference"], "filter": ["source"]}.get(args.method, ())))
    if args.method in ("filter", "rft", "steer", "spin", "vote"):
        if args.method == "filter":
            new = filtered(labels)
        elif args.method == "rft":
            new = with_accepted(labels, [read_jsonl(path, ("id", "prompt", "completion", "accepted")) for path in need(args, "proposals")])
        elif args.method == "steer" and args.comparisons:
            new = steered(labels, [read_jsonl(path, ("id", "completion_a", "completion_b", "agree", "prob_b")) for path in (args.comparisons, *more)])
        elif args.method == "steer":
            new = [{**r, "prompt": ask_for(r["prompt"], 4)} for r in labels]
        else:
            samples = [read_jsonl(path, ("id", "completion"), ("id", "sample")) for path in need(args, "proposals")]
            missing = {r["id"] for r in labels} - {r["id"] for file in samples for r in file}
            if missing:
                raise InputError(f"{' '.join(args.proposals)}: id {min(missing, key=dumps)} of {args.labels} is missing")
            new = vote(task, labels, samples) if args.method == "vote" else own_samples(labels, samples)
        if not new:
            raise InputError(f"{args.labels}: --method {args.method} leaves nothing of its {len(labels)} records")
        write_jsonl(args.out, new)
        return print(f"{args.out}: {len(new)} records from {len(labels)}")
    if args.method == "clean":
        warm(task, labels)
        right = [r for r in labels if task.grade(r) > 0.5]
        if not right:
            raise InputError(f"{args.labels}: none of its {len(labels)} labels is right")
        write_jsonl(args.out, right)
        return print(f"{args.out}: the {len(right)} of {len(labels)} labels that are right")
    if args.method == "noise":
        gold = {r["id"]: r["completion"] for path in need(args, "proposals") for r in read_jsonl(path, ("id", "completion"))}
        if missing := [r["id"] for r in labels if r["id"] not in gold]:
            raise InputError(f"{' '.join(args.proposals)}: id {missing[0]} of {args.labels} is missing")
        write_jsonl(args.out, noisy(task, labels, gold, args.share, args.kind, args.seed))
        return print(f"{args.out}: {len(labels)} labels, {args.share:.1%} of them with {args.kind} noise")
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
    result = measure(task, labels, new, [{**r, "completion": proposals[r["id"]][0]} for r in labels])
    write_json(f"{args.out}.summary", result)
    write_jsonl(args.out, new)
    print(f"{args.out}: {in_words(result, len(new))}")


def need(args, name):
    if not getattr(args, name):
        raise InputError(f"--method {args.method} needs --{name}")
    return getattr(args, name)


def parser():
    p = make_parser(__doc__, prog="refine.py")
    p.add_argument("--method", default="ilr", choices=["ilr", "oracle", "naive", "clean", "noise", "pairs", "filter", "rft", "steer", "chosen",
                                                             "spin", "vote"], help="see above")
    p.add_argument("--labels", help="present labels, one per problem")
    p.add_argument("--comparisons", nargs="+", help="what `compare.py score` wrote (steer: of several rounds)")
    p.add_argument("--proposals", nargs="+", help="proposed completions (naive), references (noise), samples (spin, vote), ILR's labels of every round (rft)")
    p.add_argument("--task", required=True, help="whose grade the summary uses")
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--max-replace", type=share, default=0.15, help="alpha, a share")
    p.add_argument("--reading", default="both", choices=["both", "same", "coin"], help="pairs: the judge's two orders averaged; as the release "
                   "reads them, both in one order; a coin")
    p.add_argument("--share", type=share, default=0, help="noise: how many of the labels are wrong")
    p.add_argument("--kind", default="symmetric", choices=["symmetric", "systematic"], help="noise: wrong by chance, or as the weak model errs")
    p.add_argument("--round", type=whole, default=1, help="written into the labels that are replaced")
    p.add_argument("--seed", type=whole, default=0, help="of the random choices of naive, noise and pairs")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
