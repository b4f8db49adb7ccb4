"""What benchmarks/why.py measures of one seed of a run: lengths, errors, labels and accuracies.

A length is the number of lines that are neither empty nor the answer (####): the calculations, in
the default task.
"""
import re

from _seeds import mean

from core.records import InputError, read_json, read_jsonl
from report.collect import seed_folders
from tasks import TASKS, get_task, may_grade

STARTS = ("noise", "clean", "weak")         # whose labels SFT trains on: the first that is there
CHANGES = ("wrong to right", "right to wrong", "wrong to wrong", "right to right")
# how a label is wrong: the first that holds, by its calculations and the reference solution's
KINDS = ("cannot be parsed", "too few steps", "too many steps", "wrong arithmetic",
         "another number or operation")


# ---------------------------------------------------------------- reading a seed
def open_run(path):
    """(name of the task, EVAL, {seed: folder}) of a run. InputError for what is none."""
    settings, seeds = read_json(path / "config.json").get("settings", {}), seed_folders(path)
    if settings.get("TASK") not in TASKS or not seeds:
        raise InputError(f"{path}: no run folder: expected a config.json and folders seed_*")
    return settings["TASK"], settings.get("EVAL", "test"), seeds


def read(path, *fields):
    return read_jsonl(path, fields, ()) if path.exists() else []


def rounds(folder, method):
    """[(round, folder)] of a method, in order."""
    found = [(p.name.rpartition("_")[2], p) for p in folder.glob(f"{method}_*")]
    return sorted((int(k), p) for k, p in found if k.isdigit() and p.name == f"{method}_{k}")


def labels_of(folder, method):
    """[(point, folder of its labels)] of SFT, which is round 0, and of a method's rounds."""
    start = next((s for s in STARTS if (folder / s / "labels.jsonl").exists()), "weak")
    return [("sft", folder / start), *((p.name, p) for _, p in rounds(folder, method))]


def asked(folder, method):
    """[(record, A, B, prob_b)] of what the judge was asked in all rounds of a method."""
    fields = ("id", "completion_a", "completion_b", "agree", "prob_b")
    return [(c, c["completion_a"], c["completion_b"], c["prob_b"])
            for _, at in rounds(folder, method)
            for c in read(at / "comparisons.jsonl", *fields) if not c["agree"]]


def replaced(folder, method):
    """[(record, old label, new label, prob_b or None)] of the labels that a method replaced."""
    (_, start), *later = labels_of(folder, method)
    found, before = [], read(start / "labels.jsonl", "id", "completion")
    for _, at in later:
        old = {r["id"]: r["completion"] for r in before}
        before = read(at / "labels.jsonl", "id", "completion", "accepted")
        found += [(r, old[r["id"]], r["completion"], r.get("prob_b")) for r in before
                  if r["accepted"] and r["id"] in old]
    return found


def grades(task, pairs):
    """[(whether the first text is right, whether the second is)] of (record, text, text, ...);
    [] where the task may not grade them."""
    sides = [[{**p[0], "completion": p[k]} for p in pairs] for k in (1, 2)]
    if not pairs or not may_grade(task, *sides):
        return []
    return [tuple(task.grade(r) > 0.5 for r in both) for both in zip(*sides, strict=True)]


# ---------------------------------------------------------------- what is measured of a seed
def calculations(text):
    lines = map(str.strip, text.split("\n"))
    return [line for line in lines if line and not line.startswith("####")]


def length(text):
    return len(calculations(text))


def preference(task, pairs):
    """Shares, by name, of those of `asked` whose sides differ in length."""
    one, rest = [], []          # one right side: (judge prefers the longer, the longer is right)
    for (_, a, b, p), (right_a, right_b) in zip(pairs, grades(task, pairs), strict=False):
        if length(a) != length(b):
            b_longer = length(b) > length(a)
            longer = 0.5 if p == 0.5 else float((p > 0.5) == b_longer)
            if right_a == right_b:
                rest.append(longer)
            else:
                one.append((longer, right_b == b_longer))
    if_longer = mean(p for p, right in one if right)
    if_shorter = mean(1 - p for p, right in one if not right)
    return {"prefers": mean(p for p, _ in one), "right": mean(right for _, right in one),
            "excess": mean(p - right for p, right in one),
            "if_longer": if_longer, "if_shorter": if_shorter,
            "lean": less(if_shorter, if_longer), "rest": mean(rest), "pairs": (len(one), len(rest))}


def lines_and_accuracy(folder, questions):
    """{lines and accuracy: {point: mean}} of the first training's answers; among the lines also
    those of the references, and of what DPO chose and rejected in all rounds."""
    found = {"lines": {}, "accuracy": {}}

    def count(name, rows, field="completion"):
        if rows:
            found["lines"][name] = mean(length(r[field]) for r in rows)
    count("references", read(questions, "completion"))
    for point in [folder / "sft", *(p for m in ("dpo", "ilr") for _, p in rounds(folder, m))]:
        if rows := read(point / "eval_1.graded.jsonl", "completion", "correct"):
            count(point.name, rows)
            found["accuracy"][point.name] = 100 * mean(r["correct"] for r in rows)
    pairs = [r for _, p in rounds(folder, "dpo")
             for r in read(p / "preferences.jsonl", "prompt", "chosen", "rejected")]
    count("chosen", pairs, "chosen")
    count("rejected", pairs, "rejected")
    return found


def error_kind(task, text, solution):
    """Which of KINDS an arithmetic label is that is known to be wrong."""
    steps, more = calculations(text), length(text) - length(solution)
    if not task.is_well_formed(text) or more:
        return KINDS[2 if more > 0 else 1] if task.is_well_formed(text) else KINDS[0]
    for line in steps:
        match = re.fullmatch(r"(\d{1,9})([-+*/])(\d{1,9})=(\d{1,9})", line)
        a, b, c = (int(match[k]) for k in (1, 3, 4)) if match else (0, 0, 1)
        found = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}
        if not match or found[match[2]] != c:
            return KINDS[3]
    last = steps[-1].rpartition("=")[2] if steps else None      # the answer must be its result
    return KINDS[4] if steps and task.final_answer(text) == int(last) else KINDS[3]


def tally(task, name, pairs, solutions):
    """Of the labels replaced, or that may be, (record, old, new, prob_b or None): {n, changes:
    {change: share}, wrong: share whose new label is wrong, kinds: {kind of new label: count},
    errors: {kind: share of the wrong new labels}, scores: {kind: mean prob_b}, longer: {right,
    wrong: share longer than the old label}}."""
    words, changes, kinds, scores, longer = ("wrong", "right"), [], [], {}, {}
    for (r, old, new, score), both in zip(pairs, grades(task, pairs), strict=False):
        changes.append(" to ".join(words[right] for right in both))
        kind = "right" if both[1] else "wrong"
        longer.setdefault(kind, []).append(length(new) > length(old))
        if kind == "wrong" and name == "arithmetic" and r["id"] in solutions:
            kind = error_kind(task, new, solutions[r["id"]])
        kinds.append(kind)
        if score is not None:
            scores.setdefault(kind, []).append(score)
    return {"n": len(changes),
            "changes": {c: mean(x == c for x in changes) for c in CHANGES},
            "wrong": mean(c.endswith("wrong") for c in changes),
            "kinds": {k: kinds.count(k) for k in sorted(set(kinds))},
            "errors": {k: mean(x == k for x in kinds if x in KINDS) for k in KINDS},
            "scores": {k: mean(v) for k, v in sorted(scores.items())},
            "longer": {k: mean(v) for k, v in sorted(longer.items())}}


def carried(folder):
    """{point: (labels right, test problems right)} in percent, of the first training."""
    found = {}
    for name, at in [*labels_of(folder, "ilr"), *labels_of(folder, "naive"), ("gold", None)]:
        labels = read(at / "labels.graded.jsonl", "correct") if at else [{"correct": 1}]
        tests = read(folder / name / "eval_1.graded.jsonl", "correct")
        if labels and tests:
            found[name] = tuple(100 * mean(r["correct"] for r in rows) for rows in (labels, tests))
    return found


def less(a, b):
    """a - b, number by number of nested dicts; None where one of them is None or lacks it."""
    if isinstance(a, dict):
        return {key: less(value, b.get(key)) for key, value in a.items()}
    return None if None in (a, b) else a - b


def moved(folder, found):
    """Of DPO: {lines, accuracy: change from SFT to the last round, taught: lines of chosen less
    rejected} of what `lines_and_accuracy` found."""
    last = next((p.name for _, p in reversed(rounds(folder, "dpo"))), "")
    changes = {what: less(points.get(last), points.get("sft")) for what, points in found.items()}
    return {**changes, "taught": less(*(found["lines"].get(k) for k in ("chosen", "rejected")))}


def judged_right(folder, method):
    """The share of the pairs with one right side, of all rounds of a method, that its judge was
    right on; None where it was asked about none."""
    found = [read_json(at / "comparisons.jsonl.summary") for _, at in rounds(folder, method)]
    counts = [(s["accuracy"] * s["decisive"], s["decisive"]) for s in found if s.get("decisive")]
    return sum(right for right, _ in counts) / sum(n for _, n in counts) if counts else None


def gains(accuracy, labels_and_tests):
    """{"method other": difference in test accuracy, in points} in the last round that ILR has. The
    arguments are of `lines_and_accuracy` and `carried`."""
    k = max((int(p.rpartition("_")[2]) for p in labels_and_tests if p.startswith("ilr_")),
            default=0)
    tests = {**accuracy, **{p: y for p, (_, y) in labels_and_tests.items()}}
    at = {"sft": "sft", **{m: f"{m}_{k}" for m in ("ilr", "dpo", "naive")}}
    return {f"{a} {b}": tests[at[a]] - tests[at[b]]
            for a, b in (("ilr", "sft"), ("ilr", "dpo"), ("ilr", "naive"), ("dpo", "sft"))
            if at[a] in tests and at[b] in tests}


def measure(run, path):
    """Everything that one run says: a dict for each seed. run: the number that it gets."""
    name, questions, seeds = open_run(path)
    task = get_task(name)
    for seed, folder in seeds.items():
        unlab = read(folder / "data/unlab.jsonl", "id", "completion")
        solutions = {r["id"]: r["completion"] for r in unlab}
        asked_by = {m: asked(folder, m) for m in ("ilr", "dpo")}
        labels = {"ilr": replaced(folder, "ilr"), "chance": asked_by["ilr"],
                  "naive": replaced(folder, "naive")}
        found = lines_and_accuracy(folder, folder / f"data/{questions}.jsonl")
        tallies = {s: tally(task, name, pairs, solutions) for s, pairs in labels.items()}
        ilr, chance = tallies["ilr"], tallies["chance"]
        later = {"moved": moved(folder, found), "carried": carried(folder)}
        yield {"run": run, "seed": seed, **found, **later,
               "judge": {m: preference(task, pairs) for m, pairs in asked_by.items()},
               "labels": {**tallies, "less": {k: less(ilr[k], chance[k])
                                              for k in ("changes", "wrong", "longer")}},
               "accepted": {k: ilr["kinds"].get(k, 0) / n for k, n in chance["kinds"].items()},
               "judged_right": {m: judged_right(folder, m) for m in ("ilr", "dpo")},
               "gains": gains(found["accuracy"], later["carried"])}
