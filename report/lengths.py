"""How long a run's texts are, by round and method, and whether the judge prefers the longer side.

The unit is the word, what white space separates: it needs no tokenizer and fits solutions, SQL and
free text. In the arithmetic task a calculation is one word, and the line of the answer two.

Which side of a pair is right is known where the task grades a comparison's texts at no cost: not
where grading asks an endpoint or runs queries. Lines that cannot be read are passed over.

`data` is what `collect` of report/collect.py returns; `draw` adds the key "lengths" to it.
"""
import json
from collections import Counter

from report.collect import graded_files, seed_folders
from report.curves import without_blanks
from report.figures import canvas, line_style, save
from report.methods import METHODS, method_and_round
from report.statistics import mean_interval
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


# ---------------------------------------------------------------- the figure
def draw_lines(axes, found, what, handles, filled=True):
    """A line for each method that has the number; what: the arguments of `over`."""
    start = over(found["sft"], *what)
    for m, rounds in found["rounds"].items():
        points = {k: over(found[f"{m}_{k}"], *what) for k in rounds}
        if any(v is not None for v in points.values()):
            points = {k: v for k, v in ({0: start} | points).items() if v is not None}
            style = line_style(m) if filled else {**line_style(m), "ls": ":", "mfc": "white"}
            line, = axes.plot(list(points), list(points.values()), **style)
            handles.setdefault(METHODS[m].NAME, line)
    axes.set_xticks(range(max((max(ks) for ks in found["rounds"].values()), default=0) + 1))
    axes.margins(0.06, 0.1)


def draw(data):
    """Draw lengths.png into the run folder, inside `as_shipped`. Returns the names of the files."""
    from matplotlib.lines import Line2D
    found, n = lengths_of(data), len(data["seeds"])
    points = [found[f"{m}_{k}"] for m, rounds in found["rounds"].items() for k in rounds]
    answers, choices = (any(over(point, what) is not None for point in points)
                        for what in ("answers", "preferred"))
    if not answers and not choices:
        return []
    who = f"mean of {n} seeds" if n > 1 else f"seed {data['seeds'][0]}"
    figure, axes = canvas(answers + choices, f"Lengths in words ({who})")
    handles = {}
    if answers:
        draw_lines(axes[0], found, ("answers",), handles)
        if reference := over(found["references"], "answers"):
            handles["references"] = axes[0].axhline(reference, color="0.35", ls=":", lw=1.2)
        low, high = axes[0].get_ylim()
        middle = (low + high) / 2       # at least a tenth of the length high: no steps of nothing
        half = max(high - low, middle / 10) / 2
        axes[0].set(xlabel="round (0: SFT)", ylabel="words an answer",
                    ylim=(middle - half, middle + half))
        axes[0].set_title(f"{data['settings'].get('EVAL', 'test')} answers", fontsize=10)
    if choices:
        draw_lines(axes[-1], found, ("preferred", "other"), handles)
        handles["the judge's choice"] = Line2D([], [], color="0.2", marker="o")
        if any(over(point, "right") is not None for point in points):
            draw_lines(axes[-1], found, ("right", "wrong"), handles, filled=False)
            handles["the right side"] = Line2D([], [], color="0.2", marker="o", ls=":", mfc="white")
        axes[-1].axhline(0, color="0.35", lw=0.8)
        axes[-1].set(xlabel="round", ylabel="words more than the other side")
        axes[-1].set_title("pairs that the judge decided", fontsize=10)
    save(figure, data["run"] / "lengths.png", handles)
    return ["lengths.png"]


# ---------------------------------------------------------------- the section
COLUMNS = {"labels": "labels", "proposals": "proposals", "preferred": "judge's choice",
           "other": "the other", "chosen": "DPO's chosen", "rejected": "DPO's rejected",
           "answers": "answers"}
JUDGE = ["pairs", "it prefers the longer", "pairs with one right side", "the right is the longer",
         "it is right if that is the longer", "if that is the shorter", "lean to the longer"]


def signed(values, digits):
    """'+0.31 ± 0.12', with Student's interval, of the seeds' values; '' of none."""
    values = [v for v in values if v is not None]
    middle, half = mean_interval(values) if values else (None, None)
    width = "" if half is None else f" ± {half:.{digits}f}"
    return "" if middle is None else f"{middle:+z.{digits}f}{width}"


def length_table(data, found):
    """A row for each point, in words: means over seeds."""
    names = {"references": "references", "weak": "weak model alone", "sft": "SFT",
             "gold": "SFT on gold labels", **{f"{m}_{k}": f"{METHODS[m].NAME}, round {k}"
                                              for m, ks in found["rounds"].items() for k in ks}}
    lines = []
    for point, name in names.items():
        pairs = [(here["answers"], found["sft"][seed]["answers"])
                 for seed, here in found[point].items() if point != "sft"]
        means = [over(found[point], what) for what in COLUMNS]
        right = mean(sum(s) / len(s) for s in data["tests"].get(point, {}).values())
        if any(v is not None for v in means):
            lines.append([name, *("" if v is None else f"{v:.2f}" for v in means),
                          signed([a - b for a, b in pairs if None not in (a, b)], 2),
                          "" if right is None else f"{100 * right:.1f}"])
    return without_blanks(["", *COLUMNS.values(), "answers minus SFT's", data["metric"]], lines)


def shares(judge):
    """Of one `judged`, in percent, None where it has no pair for it: [the longer is preferred, the
    right is the longer, the right is found where it is the longer, where it is the shorter, and
    the difference of these two]."""
    def percent(part, *whole):
        n = sum(judge[name] for name in whole)
        return 100 * judge[part] / n if n else None
    if_longer, if_shorter = (percent(f"found_{x}", f"right_{x}") for x in ("longer", "shorter"))
    lean = None if None in (if_longer, if_shorter) else if_longer - if_shorter
    return [percent("longer", "differ"), percent("right_longer", "right_longer", "right_shorter"),
            if_longer, if_shorter, lean]


def together(found, points, seed):
    """`judged` of several points of a seed, added up."""
    return sum((found[point][seed]["judge"] for point in points), Counter())


def judge_table(found):
    """The judge's preference by length for each method's rounds and all of them; '' of none."""
    lines = []
    for m, rounds in found["rounds"].items():
        names = {f"round {k}": [f"{m}_{k}"] for k in rounds}
        for name, points in {**names, "all rounds": [f"{m}_{k}" for k in rounds]}.items():
            sums = [together(found, points, seed) for seed in found["sft"]]
            if not any(judge["differ"] for judge in sums):
                continue
            prefers, right, *found_right, lean = zip(*map(shares, sums), strict=True)
            percents = [mean(values) for values in (prefers, right, *found_right)]
            prefers, *telling = ("" if v is None else f"{v:.1f}" for v in percents)
            counts = [mean(judge["differ"] for judge in sums),
                      mean(judge["right_longer"] + judge["right_shorter"] for judge in sums)]
            pairs, one_right = (f"{n:,.0f}" if n else "" for n in counts)
            lines.append([f"{METHODS[m].NAME}, {name}", pairs, prefers, one_right, *telling,
                          signed(lean, 1)])
    return without_blanks(["", *JUDGE], lines) if lines else ""


def follow_table(found):
    """A row for each seed: how its judge leans, and how much longer DPO and ILR then answer."""
    header, lines = ["seed"], [[str(seed)] for seed in found["sft"]]
    for m in ("dpo", "ilr"):
        rounds = found["rounds"].get(m, [])
        header += [f"lean on {METHODS[m].NAME}'s pairs",
                   *(f"{METHODS[m].NAME}, round {k}" for k in rounds)]
        for line, seed in zip(lines, found["sft"], strict=True):
            lean = shares(together(found, [f"{m}_{k}" for k in rounds], seed))[-1]
            start = found["sft"][seed]["answers"]
            ends = [found[f"{m}_{k}"][seed]["answers"] for k in rounds]
            line += [signed([lean], 1), *(signed([end - start], 2) if None not in (end, start)
                                          else "" for end in ends)]
    return without_blanks(header, lines)


def section(data, drawn):
    """The Markdown pieces of the section; drawn: names of the figures. [] where lengths.png is not
    among them."""
    if "lengths.png" not in drawn:
        return []
    found, several = lengths_of(data), len(data["seeds"]) > 1
    here = ("; here a calculation is one, and the line of the answer two"
            if data["settings"].get("TASK") == "arithmetic" else "")
    text = ["## Lengths\n", "![lengths of answers and of the judge's choices](lengths.png)\n",
            length_table(data, found),
            f"Mean words over seeds{here}{'; ±: Student, 95%, over seeds' if several else ''}. "
            "A word is what white space separates. Judge's choice: the side that it prefers, of "
            "the pairs that it decided; in the figure, beside the right side of those that have "
            "one. References: of the problems to label, and of those to answer.\n"]
    if judge := judge_table(found):
        text += ["### Does the judge prefer the longer side, and does DPO follow it\n", judge,
                 "In percent of the pairs that the judge decided and whose sides differ in length; "
                 "their number is a seed's. Lean to the longer: in points, how much more often it "
                 "finds the right side where that is the longer than where it is the shorter. "
                 "Errors that do not depend on length give 0.\n", follow_table(found),
                 "The lean of each seed's judge over all rounds, in points; and how many words "
                 "longer than SFT's the answers of each round are.\n"]
    return text
