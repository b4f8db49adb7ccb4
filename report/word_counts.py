"""How long a run's texts are in words, and which side of its pairs the judge preferred.

A word is what white space separates: it needs no tokenizer and fits solutions, SQL and free text.
In the arithmetic task a calculation is one word, and the line of the answer two.

Which side of a pair is right is known where the task grades a comparison's texts at no cost: not
where grading asks an endpoint or runs queries. Lines that cannot be read are passed over.
"""
import json
from collections import Counter

from report.collect import graded_files, seed_folders
from report.methods import METHODS, method_and_round
from tasks import TASKS, get_task


# ---------------------------------------------------------------- what is read
def rows(*paths):
    """The JSON objects of these files, one after the other; a file that is not there has none."""
    for path in paths:
        whole = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in whole.split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def text(row, field):
    """The text of a field, which may be a list of one message; None where there is none."""
    value = row.get(field)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else None


def words(row, field):
    value = text(row, field)
    return None if value is None else len(value.split())


def mean(values):
    """The mean of the values that are there; None of none."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def completions(*paths):
    """Mean words of the completions in these files."""
    return mean(words(row, "completion") for row in rows(*paths))


def cheap_grade(settings):
    """The function that grades a record of the run's task, if that costs nothing; else None."""
    name = settings.get("TASK")
    task = get_task(name) if name in TASKS else None
    if task is None or getattr(task, "COSTLY", False) or hasattr(task, "warm"):
        return None
    return task.grade


def graded(grade, row, known):
    """The grades of A and B, (None, None) where they cannot be had. known: those of before."""
    found = []
    for side in ("completion_a", "completion_b") if grade else ():
        record = {**row, "completion": text(row, side)}
        key = str(row.get("id")), str(row.get("reference")), record["completion"]
        if key not in known:
            try:
                known[key] = grade(record)
            except Exception:       # a task's own code, and a record that may lack anything
                known[key] = None
        found.append(known[key])
    return (None, None) if None in found or not found else found


def judged(comparisons, grade):
    """Counts and sums over the pairs that the judge decided, a Counter of

    decided, preferred, other     pairs; words of the side that it prefers, and of the other
    differ, longer                pairs with two lengths; those where it prefers the longer
    one_right, right, wrong       pairs with a better side by `grade`; words of it, of the other
    right_longer, right_shorter   those where the better is the longer, the shorter
    found_longer, found_shorter   and of these, those where the judge prefers the better
    """
    sums, known = Counter(), {}
    for row in comparisons:
        prob = row.get("prob_b")
        if type(prob) not in (int, float) or prob == 0.5 or not 0 <= prob <= 1:
            continue                # where the two agree it is null
        a, b = words(row, "completion_a"), words(row, "completion_b")
        if None in (a, b):
            continue
        says_b = prob > 0.5
        sums.update(decided=1, preferred=b if says_b else a, other=a if says_b else b)
        if a != b:
            sums.update(differ=1, longer=int(says_b == (b > a)))
        x, y = graded(grade, row, known)
        if x != y:
            sums.update(one_right=1, right=b if y > x else a, wrong=a if y > x else b)
            if a != b:
                kind = "longer" if (b > a) == (y > x) else "shorter"
                sums.update({f"right_{kind}": 1, f"found_{kind}": int(says_b == (y > x))})
    return sums


def measure_point(folder, grade):
    """{what: mean words} of a point's folder; "judge" is what `judged` counts."""
    pairs = list(rows(folder / "preferences.jsonl"))
    judge = judged(rows(folder / "comparisons.jsonl"), grade)

    def side(name, count):
        return judge[name] / judge[count] if judge[count] else None
    return {"labels": completions(folder / "labels.jsonl"),
            "proposals": completions(*sorted(folder.glob("proposals_*.jsonl"))),
            "preferred": side("preferred", "decided"), "other": side("other", "decided"),
            "right": side("right", "one_right"), "wrong": side("wrong", "one_right"),
            "chosen": mean(words(p, "chosen") for p in pairs),
            "rejected": mean(words(p, "rejected") for p in pairs), "judge": judge}


def rounds_in(folders):
    """{method: [its rounds that have a folder, in order]} of the METHODS."""
    names = {path.name for folder in folders for path in folder.iterdir()}
    points = sorted(filter(None, map(method_and_round, names)))
    found = {m: [k for name, k in points if name == m] for m in METHODS}
    return {m: rounds for m, rounds in found.items() if rounds}


def measure(data):
    """{"rounds": of `rounds_in`, point: {seed: what `measure_point` found, and "answers"}}. The
    point "references" has the demonstrations of the problems to label, and of those to answer."""
    seeds, grade = seed_folders(data["run"]), cheap_grade(data["settings"])
    methods = rounds_in(seeds.values())
    points = ["weak", "sft", "gold", *(f"{m}_{k}" for m, ks in methods.items() for k in ks)]
    found = {"rounds": methods, **{point: {} for point in ("references", *points)}}
    for seed, folder in seeds.items():
        answers = {}
        for path in graded_files(folder):
            answers.setdefault(path.parent.name, []).append(completions(path))
        for point in points:
            found[point][seed] = {**measure_point(folder / point, grade),
                                  "answers": mean(answers.get(point, []))}
        unlab, asked = (completions(folder / f"data/{name}.jsonl")
                        for name in ("unlab", data["settings"].get("EVAL", "test")))
        found["references"][seed] = {"labels": unlab, "answers": asked}
        found["gold"][seed]["labels"] = unlab
        # the weak model writes what SFT learns, unless a setting makes something else of it
        starts = [completions(folder / f"{p}/labels.jsonl") for p in ("noise", "clean")]
        starts.append(found["weak"][seed].pop("labels"))
        found["sft"][seed]["labels"] = next((n for n in starts if n is not None), None)
    return found


def lengths_of(data):
    """`measure` of a run, once."""
    if "lengths" not in data:
        data["lengths"] = measure(data)
    return data["lengths"]


def over(by_seed, what, minus=None):
    """The mean over the seeds that have it, of one number or of one minus another; or None."""
    both = [(found.get(what), found.get(minus) if minus else 0) for found in by_seed.values()]
    return mean(a - b for a, b in both if None not in (a, b))
