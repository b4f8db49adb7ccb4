"""Why: five measured answers from finished run folders, which are only read.

    python benchmarks/why.py RUN [RUN ...] --out benchmarks/results/why

1 does the judge prefer longer answers?  2 does DPO follow it?  3 what are ILR's wrong
replacements?  4 how far do labels' gains carry to the test problems?  5 do the methods' gains
follow the judge's accuracy?  _why.py measures.

A run counts as one pair of base models. ± is Student's 95% interval, over the seeds or over the
means of the runs. That of a slope or correlation is of a bootstrap that draws whole runs (2,000
times; percentiles), where there are five or more. What the runs do not have is left out. Writes
OUT.md, OUT.json and OUT.png.
"""
import sys
import textwrap
from pathlib import Path

from _bench import ROOT, in_words, save
from _seeds import at, below_runs, dig, doubled, fit, mean, over, rows, table, where
from _why import CHANGES, KINDS, measure

from core.cli import make_parser, run_stage
from report import figures
from report.methods import METHODS

PAIRS = {"prefers": "one right side: the judge prefers the longer",
         "right": "one right side: the longer is the right one",
         "excess": "difference of these two",
         "if_longer": "the judge is right where the longer is right",
         "if_shorter": "the judge is right where the shorter is right",
         "lean": "the second of these two less the first",
         "rest": "none or both right: the judge prefers the longer"}
SOURCES = {"ilr": "ILR", "chance": "all asked about", "naive": "naive"}


# ---------------------------------------------------------------- the five answers: {row: columns}
def judged(seeds):
    return rows(PAIRS, *(lambda key, m=m: at(seeds, "judge", m, key, scale=100)
                         for m in ("ilr", "dpo")))


def lengths(seeds):
    first = ["references", "chosen", "rejected", "sft"]
    names = sorted({name for s in seeds for name in s["lines"]} - set(first))
    return rows({name: name for name in first + names}, lambda name: at(seeds, "lines", name),
                lambda name: at(seeds, "accuracy", name))


def followed(seeds):
    """Over the seeds: DPO's change in lines, from SFT to its last round, against what should have
    brought it, and its change in accuracy against that in lines."""
    def against(y, *x):
        def point(s):
            xy = dig(s, *x), dig(s, "moved", y)
            return [] if None in xy else [xy]
        return [fit(seeds, point)]
    found = {"change in lines against lines of chosen less rejected":
             against("lines", "moved", "taught")}
    for key in ("excess", "rest"):
        found[f"change in lines against DPO's row \"{PAIRS[key]}\""] = against("lines", "judge",
                                                                              "dpo", key)
    found["change in accuracy against change in lines"] = against("accuracy", "moved", "lines")
    return {words: row for words, row in found.items() if any(row)}


def changes(seeds):
    names = {**{("changes", c): c for c in CHANGES}, ("wrong",): "the new label is wrong",
             ("longer", "wrong"): "longer than the old label, of wrong new ones",
             ("longer", "right"): "longer than the old label, of right new ones"}
    return rows(names, *(lambda keys, source=source: at(seeds, "labels", source, *keys, scale=100)
                         for source in (*SOURCES, "less")))


def kinds(seeds):
    return rows({k: k for k in (*KINDS, "right")},
                *(lambda kind, m=m: at(seeds, "labels", m, "errors", kind, scale=100)
                  for m in SOURCES),
                lambda kind: at(seeds, "labels", "chance", "scores", kind, scale=100),
                lambda kind: at(seeds, "accepted", kind, scale=100))


def points_of(s, methods):
    """[(labels right, test problems right)] of a seed: SFT, gold, all rounds of the methods."""
    return [xy for name, xy in s["carried"].items() if name.partition("_")[0] in methods]


def lines_through(seeds):
    found = {}
    for words, methods in (("SFT, ILR, naive", "sft ilr naive"), ("SFT, ILR", "sft ilr"),
                           ("SFT, naive", "sft naive"), ("SFT, ILR, naive, gold",
                                                         "sft ilr naive gold")):
        for within in (True, False):
            found[f"{words}: {'within seeds' if within else 'all seeds together'}"] = [
                fit(seeds, lambda s, m=methods: points_of(s, m.split()), within)]
    return {words: row for words, row in found.items() if any(row)}


def at_equal_labels(seeds):
    """ILR's points less naive's, in test accuracy: as they are, and less what the slope within
    seeds makes of the difference of their labels."""
    def gap(slope):
        def of(s):
            sides = [points_of(s, [m]) for m in ("ilr", "naive")]
            if not all(sides):
                return None
            (x, y), (x_naive, y_naive) = ([mean(v) for v in zip(*side, strict=True)]
                                          for side in sides)
            return y - y_naive - slope * (x - x_naive)
        return [over(seeds, of)]
    slope = fit(seeds, lambda s: points_of(s, ("sft", "ilr", "naive")), within=True)
    found = {"ILR less naive, mean of the rounds": gap(0)}
    if slope:
        found["the same at equal label accuracy"] = gap(slope["slope"][0])
    return {words: row for words, row in found.items() if any(row)}


GAINS = {"ilr sft": "ILR less SFT", "ilr dpo": "ILR less DPO", "ilr naive": "ILR less naive",
         "dpo sft": "DPO less SFT"}


def against_judge(seeds, gain):
    """`fit` of a gain to the judge's accuracy on the pairs that the gaining method asked about."""
    def point(s):
        xy = dig(s, "judged_right", gain.partition(" ")[0]), dig(s, "gains", gain)
        return [] if None in xy else [(100 * xy[0], xy[1])]
    return [fit(seeds, point)]


def by_judge(seeds):
    found = {words: against_judge(seeds, gain) for gain, words in GAINS.items()}
    return {words: row for words, row in found.items() if any(row)}


# ---------------------------------------------------------------- the figure
def dot(axes, x, found, method):
    """Mean and interval over the seeds, and the seeds themselves beside it, at x."""
    color, shape, _ = METHODS[method].STYLE
    if len(found["per_seed"]) > 1:
        axes.plot([x + 0.07] * len(found["per_seed"]), found["per_seed"], shape, color=color,
                  ms=3, alpha=0.5, mew=0)
    return axes.errorbar([x], found["seeds"][0], found["seeds"][1], color=color, marker=shape,
                         capsize=3, lw=1.4, ls="")


def draw_judge(axes, seeds, handles):
    ticks = {"prefers": "one right:\nthe judge\nprefers it", "right": "one right:\nit is right",
             "rest": "none or both\nright: the judge\nprefers it"}
    for x, key in enumerate(ticks):
        for shift, m in ((-0.12, "ilr"), (0.12, "dpo")):
            if found := at(seeds, "judge", m, key, scale=100):
                handles[METHODS[m].NAME] = dot(axes, x + shift, found, m)
    axes.axhline(50, color="0.35", ls=":", lw=1.2)
    axes.set_xticks(range(len(ticks)), ticks.values())
    axes.set(ylabel="% of the pairs that differ in length", ylim=(-2, 102),
             title="1  The longer side of what the judge is asked")


def draw_dpo(axes, seeds, handles):
    color, shape, _ = METHODS["dpo"].STYLE
    for s in seeds:
        x, y, gain = (s["moved"].get(name) for name in ("taught", "lines", "accuracy"))
        if None not in (x, y):
            name = "DPO, accuracy rose" if gain > 0 else "DPO, accuracy did not rise"
            handles[name], = axes.plot(x, y, shape, color=color, mew=1.4, ms=7,
                                       mfc=color if gain > 0 else "white")
    for line in (axes.axhline, axes.axvline):
        line(0, color="0.35", ls=":", lw=1.2)
    axes.set(xlabel="lines of chosen less rejected", ylabel="lines of answers, DPO less SFT",
             title="2  The length that DPO is taught, and what it does")


def draw_changes(axes, seeds, handles):
    shades = {"ilr": (METHODS["ilr"].STYLE[0], ""), "chance": ("0.75", "//"),
              "naive": (METHODS["naive"].STYLE[0], "..")}
    for k, (source, (color, hatch)) in enumerate(shades.items()):
        for x, change in enumerate(CHANGES):
            if found := at(seeds, "labels", source, "changes", change, scale=100):
                value, half, _ = found["seeds"]
                handles[f"{SOURCES[source]} (bars)"] = axes.bar(
                    x + 0.27 * (k - 1), value, 0.25, yerr=half, capsize=2, color=color,
                    hatch=hatch, edgecolor="white", ecolor="black")
    axes.set_xticks(range(len(CHANGES)), [c.replace(" to ", "\nto ") for c in CHANGES])
    axes.set(ylabel="% of the replacements", ylim=(0, None),
             title="3  What a replacement does to a label")


def draw_carried(axes, seeds, handles):
    styles = {"SFT": {"marker": "o", "mfc": "white", "color": "black"},
              "gold labels": {"marker": "*", "color": "black"},
              **{METHODS[m].NAME: {"marker": METHODS[m].STYLE[1], "color": METHODS[m].STYLE[0],
                                   "mew": 0, "alpha": 0.8} for m in ("ilr", "naive")}}
    for (name, style), m in zip(styles.items(), ("sft", "gold", "ilr", "naive"), strict=True):
        if xy := [v for s in seeds for k, v in s["carried"].items() if k.partition("_")[0] == m]:
            handles[name], = axes.plot(*zip(*xy, strict=True), ls="", ms=6, **style)
    handles["test right = labels right"] = axes.axline((60, 60), slope=1, color="0.35", ls=":")
    axes.set(xlabel="labels right (%)", ylabel="test problems right (%)",
             title="4  From labels to test problems")


def draw_gains(axes, seeds, handles):
    for m, color, shape, fill in (("dpo", "0.1", "o", "0.1"), ("naive", "0.1", "^", "white")):
        xy = [(100 * s["judged_right"]["ilr"], s["gains"][f"ilr {m}"]) for s in seeds
              if f"ilr {m}" in s["gains"] and s["judged_right"]["ilr"] is not None]
        if xy:
            handles[f"ILR less {METHODS[m].NAME}"], = axes.plot(
                *zip(*xy, strict=True), shape, color=color, mfc=fill, ms=6)
    axes.axhline(0, color="0.35", ls=":", lw=1.2)
    axes.set(xlabel="judge right on ILR's pairs (%)", ylabel="points in the last round",
             title="5  ILR's lead, and its judge")


@figures.as_shipped()
def draw(seeds, path):
    from matplotlib.figure import Figure
    figure, handles = Figure(layout="constrained", figsize=(10.5, 12.5)), {}
    figure.suptitle(f"Why: {len(seeds)} seeds; bars are means and their 95% intervals", fontsize=12)
    panels = (draw_judge, draw_dpo, draw_changes, draw_carried, draw_gains)
    *all_axes, empty = figure.subplots(3, 2).flat
    empty.remove()
    for axes, panel in zip(all_axes, panels, strict=True):
        panel(axes, seeds, handles)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.title.set_fontsize(11)
    figures.save(figure, path, handles)


# ---------------------------------------------------------------- the page
def page(seeds, runs):
    """(text, {question: {row: columns}})."""
    linear = [f"{what} (95%)" for what in ("slope", "correlation")]
    parts = (
        ("1 Does the judge prefer longer answers?",
         "% of the pairs that differ in length. Last row: 50 is no preference.",
         doubled("ILR's pairs", "DPO's pairs"), judged(seeds), 1),
        ("2 Does DPO follow it?", "Mean lines, and % right. Chosen and rejected: of all rounds.",
         doubled("lines", "accuracy"), lengths(seeds), 2),
        ("2 Over the seeds", "DPO's last round less SFT.", linear, followed(seeds), 2),
        ("3 What does a replacement do?", "%. All asked about: what replacing by chance, where "
         "label and proposal disagree, would do. Naive replaces any label, also by its equal.",
         doubled(*SOURCES.values(), "ILR less all asked about"), changes(seeds), 1),
        ("3 What is wrong with the wrong new labels?", "%. The first that holds, against the "
         "reference solution: " + "; ".join(KINDS) + ". Wrong arithmetic: as many steps, one of "
         "which, or the answer, is not its result.",
         doubled(*SOURCES.values(), "judge's mean score", "accepted of those asked about"),
         kinds(seeds), 1),
        ("4 Test accuracy against label accuracy", "Points per point, of the first training.",
         linear, lines_through(seeds), 2),
        ("4 ILR's test accuracy less naive's", "Points; the slope counts as known.",
         doubled("difference"),
         at_equal_labels(seeds), 1),
        ("5 Do gains follow the judge?", "Points in the last round for each point of the judge's "
         "accuracy on the pairs with one right side that ILR (DPO less SFT: DPO) asked about.",
         linear, by_judge(seeds), 2))
    lines = [f"Seeds: {len(seeds)}; pairs of base models: {len(runs)}. ± is 95%: of seeds, over",
             "all of them as if they were independent; of base pairs, over the pairs' means.", ""]
    for title, note, columns, found, digits in parts:
        if found:
            lines += [textwrap.fill(f"**{title}** {note}", 100), "", *table(columns, found, digits)]
    return "\n".join(lines), {title: found for title, _, _, found, _ in parts}


def main(args):
    runs = list(dict.fromkeys(Path(run).resolve() for run in args.runs))
    seeds = []
    for k, run in enumerate(runs):
        seeds += measure(k, run)
        print(f"{run}: read", file=sys.stderr)
    text, found = page(seeds, runs)
    text += f"\n{in_words(where())}"
    print(text)
    out = Path(args.out).resolve()
    save(out, text, {"about": where(), "runs": [below_runs(run) for run in runs], "found": found,
                     "seeds": seeds}, indent=1)
    draw(seeds, out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    p = make_parser(__doc__, prog="why.py")
    p.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders")
    p.add_argument("--out", default=str(ROOT / "benchmarks/results/why"),
                   help="names of the results, without .md, .json and .png")
    run_stage(p, main)
