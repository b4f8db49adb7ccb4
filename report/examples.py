"""Examples for the report: labels that ILR replaced, pairs that DPO kept, answers that changed.

Texts are a model's: report/tables.py's `plain` makes them harmless. Grades are those of the run's
graded files; only of DPO's pairs, which no stage grades one by one, some are graded here.
"""
from core.records import InputError, dumps, read_json, read_jsonl
from report.collect import graded_files
from report.methods import METHODS, last_of, rounds_of
from report.tables import plain, table
from tasks import TASKS, get_task, may_grade

EACH = 5            # examples of a kind; of DPO's pairs PAIRS
PAIRS = 3
GRADED = 200        # so many of DPO's pairs are graded to find some: a task may take long for it
LONGEST = 300       # characters of a text


def spread(items, n):
    """n of the items (or all), at even distances: the middles of n equal parts."""
    if len(items) <= n:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]


def is_right(grade):
    """Grades are 0, 1 or a probability."""
    return grade > 0.5


def records(path, fields, key=("id",)):
    """The records of a file in order of their ids; [] where it is missing or unfit."""
    try:
        rows = read_jsonl(path, fields, key)
    except InputError:
        return []
    return sorted(rows, key=lambda r: (dumps(r["id"]), r.get("pair", 0)))


def first_of(best, others, n):
    """n of `best`, filled up with some of `others`."""
    some = spread(best, n)
    return some + spread(others, n - len(some))


def problem(record):
    """The text of a problem; of a conversation its last message."""
    prompt = record.get("prompt", "")
    return prompt[-1].get("content", "") if isinstance(prompt, list) else prompt


def in_words(grade):
    return "right" if is_right(grade) else "wrong"


def examples_table(rows):
    """Markdown of rows [{column: text}]; a column that no row has a text for is left out."""
    columns = [c for c in rows[0] if any(row[c] not in (None, "") for row in rows)]
    return table(columns, [[plain("" if row[c] is None else row[c], LONGEST) for c in columns]
                           for row in rows])


def of_kind(what, rows, total):
    """['wrong before, right after: 5 of 87', the table]; [] where there are none."""
    return [f"{what}: {len(rows)} of {total:,}.\n", examples_table(rows)] if rows else []


def with_grade(text, grade):
    """A text that is graded by a probability is shown with it."""
    return text if grade in (0, 1) else f"({grade:.2f}) {text}"


# ---------------------------------------------------------------- labels that ILR replaced
def replacements(data, folder):
    """[{round, id, problem, ..., was, now}] of the labels that ILR replaced in a seed's folder;
    was, now: the grades of the old and of the new label. Rounds without graded labels are left
    out."""
    start = next((p for p in ("noise", "clean", "weak")
                  if (folder / p / "labels.graded.jsonl").exists()), "weak")
    fields, found = ("id", "completion", "correct"), []
    before = records(folder / start / "labels.graded.jsonl", fields)
    for k in range(1, 1 + max(rounds_of(data, "ilr"), default=0)):
        after = records(folder / f"ilr_{k}" / "labels.graded.jsonl", fields)
        old = {r["id"]: r for r in before}
        found += [{**r, "round": k, "old": old[r["id"]]["completion"],
                   "was": old[r["id"]]["correct"], "now": r["correct"]}
                  for r in after if r.get("accepted") and r["id"] in old]
        before = after
    return found


def labels_part(data, folder):
    rows = replacements(data, folder)
    if not rows:
        return []
    right = [r for r in rows if is_right(r["now"]) and not is_right(r["was"])]
    spoilt = [r for r in rows if is_right(r["was"]) and not is_right(r["now"])]
    still = [r for r in rows if not is_right(r["was"]) and not is_right(r["now"])]
    text = ["### Labels that ILR replaced\n",
            f"Of {len(rows):,} replacements in all rounds, {len(right):,} made a wrong label right "
            f"and {len(spoilt):,} a right one wrong; {len(still):,} put a wrong label in the place "
            "of a wrong one. prob_b: the judge's probability that the new label is better.\n"]
    for what, chosen, total in (
            ("Replaced rightly (wrong before, right after)", spread(right, EACH), len(right)),
            ("Replaced wrongly (wrong after; those that were right before come first)",
             first_of(spoilt, still, EACH), len(spoilt) + len(still))):
        shown = [{"id": r["id"], "round": r["round"], "problem": problem(r),
                  "reference": r.get("reference"),
                  "old label": f"{in_words(r['was'])}: {with_grade(r['old'], r['was'])}",
                  "new label": with_grade(r["completion"], r["now"]),
                  "prob_b": probability(r, "prob_b")}
                 for r in chosen]
        text += of_kind(what, shown, total)
    return text


def probability(r, field):
    """'0.83', or '' where the record has no such number."""
    return f"{r[field]:.2f}" if isinstance(r.get(field), (int, float)) else ""


# ---------------------------------------------------------------- pairs that DPO kept
def graded_pairs(data, path):
    """Some of the pairs of a file of preferences, with the grades `chosen_is` and `rejected_is` of
    their sides: [] where a grade would cost money or cannot be had here (no reference, no
    database)."""
    name = data["settings"].get("TASK")
    if name not in TASKS or data["settings"].get("GRADE_LABELS") == "0":
        return []
    task = get_task(name)
    rows = records(path, ("id", "prompt", "chosen", "rejected"), ("id", "pair"))
    rows = spread(rows, GRADED)
    sides = [[{**r, "completion": r[side]} for r in rows] for side in ("chosen", "rejected")]
    try:
        if not may_grade(task, *sides):
            return []
        grades = [map(task.grade, side) for side in sides]
        return [{**r, "chosen_is": chosen, "rejected_is": rejected}
                for r, chosen, rejected in zip(rows, *grades, strict=True)]
    except InputError:
        return []


def pair_row(r):
    return {"id": r["id"], "problem": problem(r), "reference": r.get("reference"),
            "chosen": with_grade(r["chosen"], r["chosen_is"]),
            "rejected": f"{in_words(r['rejected_is'])}: "
                        f"{with_grade(r['rejected'], r['rejected_is'])}",
            "prob_chosen": probability(r, "prob_chosen")}


def pairs_part(data, folder):
    """Of DPO's last round."""
    k = max(rounds_of(data, "dpo"), default=0)
    path = folder / f"dpo_{k}" / "preferences.jsonl"
    rows = graded_pairs(data, path) if k else []
    if not rows:
        return []
    right = [r for r in rows if is_right(r["chosen_is"])]
    wrong = [r for r in rows if not is_right(r["chosen_is"])]
    misled = [r for r in wrong if is_right(r["rejected_is"])]
    wrong_too = [r for r in wrong if not is_right(r["rejected_is"])]
    kept = read_json(f"{path}.summary").get("kept", len(rows))
    some = f"{len(rows)} of its {kept:,}" if kept > len(rows) else f"its {len(rows)}"
    return [f"### Pairs that DPO kept, round {k}\n",
            f"Of {some} pairs, graded for this, {len(right)} have a right chosen answer; in "
            f"{len(misled)} the chosen answer is wrong and the rejected one right. prob_chosen: "
            "the judge's probability that the chosen answer is better.\n",
            *of_kind("The chosen answer is right", list(map(pair_row, spread(right, PAIRS))),
                     len(right)),
            *of_kind("The chosen answer is wrong (those whose rejected one is right come first)",
                     list(map(pair_row, first_of(misled, wrong_too, PAIRS))), len(wrong))]


# ---------------------------------------------------------------- answers that changed
def answers_of(folder, point):
    """{id: record} of the graded test answers of a point's first training; {} where there are
    none."""
    path = next((p for p in graded_files(folder) if p.parent.name == point), None)
    rows = records(path, ("id", "completion", "correct")) if path else []
    return {r["id"]: r for r in rows}


def answers_part(data, folder):
    start, text = answers_of(folder, "sft"), []
    for m, (k, point) in last_of(data).items() if start else ():
        now = answers_of(folder, point)
        both = [r for i, r in start.items() if i in now]
        for what, turned in (("from wrong to right", True), ("from right to wrong", False)):
            rows = [r for r in both
                    if is_right(now[r["id"]]["correct"]) == turned != is_right(r["correct"])]
            shown = [{"id": r["id"], "problem": problem(r), "reference": r.get("reference"),
                      "SFT": with_grade(r["completion"], r["correct"]),
                      METHODS[m].NAME: with_grade(now[r["id"]]["completion"],
                                                  now[r["id"]]["correct"])}
                     for r in spread(rows, EACH)]
            text += of_kind(f"{METHODS[m].NAME} (round {k}), {what}", shown, len(rows))
    if text:
        text.insert(0, "### Test answers that a method turned\n")
    return text


# ---------------------------------------------------------------- the section
def section(data):
    """Markdown of `## Examples`, as a list of pieces; [] where the run has none."""
    seed = data["seeds"][0]
    folder = data["run"] / f"seed_{seed}"
    parts = [*labels_part(data, folder), *pairs_part(data, folder), *answers_part(data, folder)]
    if not parts:
        return []
    which = [f"at most {EACH} of each kind (of DPO's pairs {PAIRS}), at even distances in the "
             "order of their ids"]
    if len(data["seeds"]) > 1:
        which.append(f"all of seed {seed}, the first")
    if any(len(retrains) > 1 for by in data["tests"].values() for retrains in by.values()):
        which.append("test answers of a point's first training")
    return ["## Examples\n",
            f"Chosen by rule: {'; '.join(which)}. ⏎ is a line end. Of a text of more than "
            f"{LONGEST} characters the middle is left out: \\[...\\].\n", *parts]
