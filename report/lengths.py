"""Lengths of labels, choices and answers by round, and whether DPO follows its judge: the figure
and the section.

`data` is what `collect` of report/collect.py returns; `draw` adds the key "lengths" to it.
"""
from collections import Counter

from report.curves import without_blanks
from report.figures import canvas, line_style, save
from report.methods import METHODS
from report.statistics import mean_interval, over_seeds
from report.word_counts import lengths_of, mean, over


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
        right = data["tests"].get(point)
        if any(v is not None for v in means):
            lines.append([name, *("" if v is None else f"{v:.2f}" for v in means),
                          signed([a - b for a, b in pairs if None not in (a, b)], 2),
                          f"{over_seeds(right)[0]:.1f}" if right else ""])
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
