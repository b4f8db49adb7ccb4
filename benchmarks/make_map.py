"""The map: where ILR wins and where DPO would, by the accuracy of labels and of the judge.

    python benchmarks/make_map.py --labels weak-0.45 --judge 0.8    # one cell
    python benchmarks/make_map.py                       # every cell, one pair after the other
    python benchmarks/make_map.py --draw --trained runs/headline/pair_*/test

A cell is a level of label accuracy and one of a simulated judge's. It has ILR, naive ILR and DPO
for each pair of base models, all cells of a pair on one seed that the headline does not have. DPO's
learning rate is chosen for each cell and pair, on validation problems of that seed. What the judge
does not change is taken over from cell to cell. A run that was cut off goes on. When a pair's cell
is complete, its numbers are put into results/map.json, and while they are there it is not made
again, on any machine. map.md and map.png are made of that file, without run folders.

An interval is Student's over the pairs. A sign is established where it excludes 0 and is of four
pairs or more.
"""
from pathlib import Path

from _bench import ROOT, in_words, save
from _seeds import where
from headline import ROUNDS, best, run, sweep

from core.cli import make_parser, run_stage
from core.records import InputError, read_json, read_jsonl
from report.collect import collect
from report.figures import as_shipped
from report.prices import prices, within
from report.statistics import mean_interval
from report.tables import table

# labels that are right less often to more often: an earlier or later checkpoint's, or references
# among which the weak model's own errors are strewn
LABELS = {"weak-0.3": {"WEAK_ACCURACY": "0.3"},
          "weak-0.45": {"WEAK_ACCURACY": "0.45"},
          "noise-0.2": {"LABEL_NOISE": "0.2", "FLIP_KIND": "systematic"}}
# what a cell has if it does not say otherwise; given to every run, because a run FROM another has
# that run's settings, not the preset's
PLAIN = {"WEAK_ACCURACY": "0.45", "LABEL_NOISE": "", "FLIP_KIND": "symmetric", "JUDGE": "trained",
         "JUDGE_ACCURACY": "0.8"}
JUDGES = ("0.5", "0.65", "0.8", "0.95")     # simulated ones, by their accuracy
TRAINED = PLAIN["JUDGE"]                    # and the one that run_ilr.sh trains
PAIRS = (0, 1, 2, 3)
FEWEST = 4                                  # pairs: of two alike, any interval is narrow
ALL = "all"
COLUMNS = ("label_accuracy", "sft", "ilr", "dpo", "naive", "dpo_equal")
FIRST_SEED = 50                     # pair 0 has 50, pair 1 has 51, ...
LADDER = ("3e-6", "1e-5", "3e-5", "1e-4", "3e-4")      # of DPO's learning rates
TRIED = LADDER[1:4]                 # always; the others where the best is at an end
# larger batches than the default's: the same answers up to rounding, 1.5 times as fast
DECODING = "--max-new-tokens 56 --batch-size 512"
# (title, what gains, what it gains on); dpo_equal: DPO's last round that asks for no more
# comparisons than ILR's last, but at least its first
LAST = [("ILR - DPO", "ilr", "dpo"), ("ILR - naive", "ilr", "naive"), ("DPO - SFT", "dpo", "sft")]
EQUAL = [("ILR - DPO", "ilr", "dpo_equal"), ("ILR - SFT", "ilr", "sft"),
         ("DPO - SFT", "dpo_equal", "sft")]


# ---------------------------------------------------------------- runs
def make(args, labels, judge, pair):
    """The runs of a cell and pair; returns their folder. ilr/ has ILR and naive ILR; dpo_lr_RATE/
    DPO on validation problems; dpo/ DPO on test problems, its models taken over from the best."""
    at = args.work / labels / f"judge-{judge}" / f"pair_{pair}"
    cell = {**PLAIN, **LABELS[labels], "DECODING": DECODING, "BASE_SEED": str(pair),
            "SEEDS": str(FIRST_SEED + pair)}
    if judge != TRAINED:
        cell.update(JUDGE="simulated", JUDGE_ACCURACY=judge)
    # of runs of this pair the nearest: the same labels, else any
    others = [*sorted(args.work.glob(f"{labels}/*/pair_{pair}/ilr/report.json")),
              *sorted(args.work.glob(f"*/*/pair_{pair}/ilr/report.json"))]
    source = {"FROM": str(others[0].parent)} if others else {}
    if not (at / "ilr/report.json").exists():
        run(at / "ilr", EVAL="test", METHODS="ilr naive", ROUNDS=str(ROUNDS), **cell, **source)
    if not (at / "dpo/report.json").exists():
        found, _ = sweep(at, LADDER, TRIED, FROM=str(at / "ilr"), **cell)
        run(at / "dpo", EVAL="test", METHODS="dpo", ROUNDS=str(ROUNDS), DPO_LR=best(found),
            FROM=str(at / f"dpo_lr_{best(found)}"), **cell)
    return at


def numbers(ilr, dpo, seed):
    """What a seed says, in percent: of the run that has ILR and naive ILR, and of the one that has
    DPO. Raises InputError for a run without the last rounds."""
    repairs = collect(ilr)
    runs = {"ilr": repairs, "naive": repairs, "dpo": repairs if dpo == ilr else collect(dpo)}
    last = {m: f"{m}_{ROUNDS}" for m in runs}
    for data in runs.values():
        if data["settings"].get("EVAL", "test") != "test":
            raise InputError(f"{data['run']}: its answers are not to the test problems")
    for m, data in runs.items():
        for point in ("sft", last[m]):
            if seed not in data["tests"].get(point, {}):
                raise InputError(f"{data['run']}: seed {seed} has no graded answers of {point}: is "
                                 "the run complete?")

    def accuracy(method, point):
        return round(100 * runs[method]["tests"][point][seed][0], 2)

    costs = {m: prices(runs[m]) for m in ("ilr", "dpo")}
    asked = {m: costs[m][last[m]]["asked"] for m in costs}
    equal = max(1, within(runs["dpo"], costs["dpo"], "dpo", "asked", asked["ilr"]))
    labels = runs["ilr"]["labels"]
    return {"label_accuracy": round(100 * labels["noise" if "noise" in labels else "weak"][seed][0],
                                    2),
            "judge_ilr": right_on(runs["ilr"], "ilr_1", seed),
            "judge_dpo": right_on(runs["dpo"], "dpo_1", seed),
            "sft": accuracy("ilr", "sft"), **{m: accuracy(m, p) for m, p in last.items()},
            "dpo_equal": accuracy("dpo", f"dpo_{equal}"), "dpo_equal_round": equal,
            "asked_ilr": asked["ilr"], "asked_dpo": asked["dpo"],
            "dpo_lr": runs["dpo"]["settings"]["DPO_LR"],
            "commit": (runs["ilr"]["config"].get("commit") or "")[:7]}


def cpu_seconds(folder):
    """Of all runs in a folder; what they took over from others does not count."""
    rows = [row for path in sorted(folder.glob("*/stages.jsonl"))
            for row in read_jsonl(path, ("stage",), ())]
    return round(sum(row.get("cpu_seconds") or 0 for row in rows
                     if row["stage"] != "whole run" and "from" not in row))


def right_on(data, point, seed):
    """The share of the pairs with one right side on which the judge was right, in percent."""
    share = data["comparisons"].get(point, {}).get(seed, {}).get("accuracy")
    return None if share is None else round(100 * share, 1)


# ---------------------------------------------------------------- the table
def gains(cell, a, b):
    """(mean, half width or None, established) of a - b over the pairs of a cell, in points."""
    values = [found[a] - found[b] for found in cell.values()]
    return *mean_interval(values), established(values)


def established(values):
    """Whether the sign of the mean of differences is, by the rule above."""
    mean, half = mean_interval(values)
    return len(values) >= FEWEST and abs(mean) > half


def cells_of(found):
    """[(labels, judge, the cell)] of the cells that have a run, in order."""
    return [(labels, judge, found["cells"][f"{labels} {judge}"]) for labels in LABELS
            for judge in (*JUDGES, TRAINED) if found["cells"].get(f"{labels} {judge}")]


def trained_seeds(found):
    """{marker: what seeds of trained judges say}: in cells, and in runs that are laid over."""
    cells = [one for _, judge, cell in cells_of(found) if judge == TRAINED
             for one in cell.values()]
    return {marker: [t for t in seeds if t["judge_ilr"] is not None]
            for marker, seeds in (("D", cells), ("o", found["trained"]))}


def mean_of(cells, key):
    values = [one[key] for cell in cells for one in cell.values()]
    return sum(values) / len(values)


def averages(found):
    """[(labels, judge, cell)], one of them ALL: the means over all label levels, or over all
    simulated judges, of each pair that has these cells."""
    rows = []
    for labels, judge in [*((labels, ALL) for labels in LABELS), *((ALL, j) for j in JUDGES),
                          (ALL, ALL)]:
        cells = [found["cells"].get(f"{x} {y}", {})
                 for x in (LABELS if labels == ALL else [labels])
                 for y in (JUDGES if judge == ALL else [judge])]
        pairs = sorted(set.intersection(*map(set, cells)))
        cell = {pair: {key: mean_of([{pair: c[pair]} for c in cells], key) for key in COLUMNS}
                for pair in pairs}
        rows += [(labels, judge, cell)] * bool(cell)
    return rows


def points(values):
    """The mean of differences with its interval in words, bold where the sign is established."""
    mean, half = mean_interval(values)
    text = f"{mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")
    return f"**{text}**" if established(values) else text


def over_a_coin(found):
    """Rows of what ILR and DPO gain over themselves with a judge that is a coin."""
    cells = {(labels, judge): cell for labels, judge, cell in cells_of(found) + averages(found)}
    coin, rows = JUDGES[0], []
    for labels in (*LABELS, ALL):
        for judge in JUDGES[1:]:
            cell, tossed = cells.get((labels, judge), {}), cells.get((labels, coin), {})
            gained = {method: [cell[pair][method] - tossed[pair][method] for pair in sorted(cell)
                               if pair in tossed] for method in ("ilr", "dpo")}
            if gained["ilr"]:
                more = [a - b for a, b in zip(*gained.values(), strict=True)]
                rows.append([labels, judge, len(more), *map(points, (*gained.values(), more))])
    return rows


def as_text(found):
    """map.md."""
    rows = []
    for labels, judge, cell in cells_of(found) + averages(found):
        differences = [points([one[a] - one[b] for one in cell.values()])
                       for _, a, b in (*LAST, EQUAL[0], EQUAL[2])]
        means = [f"{mean_of([cell], key):.1f}" for key in COLUMNS[:5]]
        rows.append([labels, judge, len(cell), *means, *differences])
    headings = ["labels", "judge", "pairs", "labels right", "SFT", "ILR", "DPO", "naive",
                *(name for name, *_ in LAST), "ILR - DPO, equal comparisons",
                "DPO - SFT, equal comparisons"]
    seconds = sum(one["cpu_seconds"] for cell in found["cells"].values() for one in cell.values())
    return "\n".join([
        "# The map\n", table(headings, rows),
        f"Test accuracy in percent after {ROUNDS} rounds, means over pairs of base models; ± is "
        "Student's 95% interval over the pairs, bold where it excludes 0 and is of four or more. "
        "all: each pair's mean over these cells. Equal comparisons: DPO's last round that asks "
        "for no more comparisons than ILR's last, but at least its first. "
        "weak-A: the checkpoint whose samples come nearest to A demonstrates; noise-S: references, "
        "a share S of them replaced by the weak model's own wrong answers. The judge is simulated "
        "and right with the stated probability on pairs with one right side, or the one that "
        "run_ilr.sh trains. DPO's learning rate is chosen for each run on validation problems.\n",
        "What the judge's knowledge adds: accuracy less that of the same method, labels and pair "
        f"with a judge of {JUDGES[0]}, a coin.\n",
        table(["labels", "judge", "pairs", "ILR", "DPO", "ILR's less DPO's"], over_a_coin(found)),
        f"{sum(map(len, found['cells'].values()))} runs, {seconds / 3600:.1f} CPU-hours; what a "
        "run takes over from another is counted once.\n", in_words(found["about"])])


# ---------------------------------------------------------------- the figure
def edges(levels, low, high):
    """Borders of cells around ascending levels, half way between two."""
    between = [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
    return [max(low, 1.5 * levels[0] - levels[1] / 2) if len(levels) > 1 else low, *between,
            min(high, 1.5 * levels[-1] - levels[-2] / 2) if len(levels) > 1 else high]


def panel(axes, found, title, a, b, limit):
    """One difference over both axes. Returns what the colour bar needs."""
    from matplotlib.patches import Rectangle
    levels = list(dict.fromkeys(labels for labels, _, _ in cells_of(found)))
    heights = [mean_of([cell for labels, _, cell in cells_of(found) if labels == level],
                       "label_accuracy") for level in levels]
    x = edges([100 * float(judge) for judge in JUDGES], 42.5, 102.5)
    y = edges(heights, 0, 100)
    colors = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    for labels, judge, cell in cells_of(found):
        if judge == TRAINED:
            continue
        i, j = JUDGES.index(judge), levels.index(labels)
        mean, _, certain = gains(cell, a, b)
        axes.pcolormesh(x[i:i + 2], y[j:j + 2], [[mean]], **colors)
        if not certain:
            axes.add_patch(Rectangle((x[i], y[j]), x[i + 1] - x[i], y[j + 1] - y[j], hatch="////",
                                     fill=False, ec="0.45", lw=0))
        axes.text((x[i] + x[i + 1]) / 2, y[j + 1] - 1.5, f"{mean:+.1f}", ha="center", va="top",
                  fontsize=10, zorder=6, bbox={"fc": "white", "ec": "none", "pad": 1.2})
    for marker, shown in trained_seeds(found).items():
        axes.scatter([t["judge_ilr"] for t in shown], [t["label_accuracy"] for t in shown],
                     c=[t[a] - t[b] for t in shown], marker=marker, ec="black", s=42, zorder=5,
                     **colors)
    axes.set(title=title, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.set_xticks([100 * float(judge) for judge in JUDGES])


@as_shipped()
def draw(found, path):
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained", figsize=(12, 7.4))
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    panels = [(f"{name}, after {ROUNDS} rounds", a, b) for name, a, b in LAST]
    panels += [(f"{name}, equal comparisons" if "dpo_equal" in (a, b)
                else f"{name}, after {ROUNDS} rounds", a, b) for name, a, b in EQUAL]
    sizes = [abs(gains(cell, a, b)[0]) for _, _, cell in cells_of(found) for _, a, b in panels]
    limit = max(5, *sizes)
    for one, (title, a, b) in zip(axes.flat, panels, strict=True):
        panel(one, found, title, a, b, limit)
    for one in axes[1]:
        one.set_xlabel("judge right on pairs with one right side (%)")
    for one in axes[:, 0]:
        one.set_ylabel("labels right (%)")
    figure.colorbar(ScalarMappable(Normalize(-limit, limit), "RdBu"), ax=axes, shrink=0.7,
                    label="points of test accuracy")
    words = {"D": "diamonds: trained judges, a seed each, at their accuracy on ILR's pairs",
             "o": "dots: the headline's, with one rate of DPO for a pair"}
    notes = [words[marker] for marker, shown in trained_seeds(found).items() if shown]
    figure.suptitle("Where ILR wins, and where DPO would (hatched: sign not established"
                    f"{'; '.join(['', *notes])})", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Software": None})


# ---------------------------------------------------------------- command line
def write(args, found):
    if not cells_of(found):
        raise InputError(f"{args.out}.json: no cells yet, so there is nothing to draw")
    found["about"] = where()
    save(args.out.resolve(), as_text(found), found, indent=1)
    draw(found, f"{args.out}.png")


def main(args):
    path = Path(f"{args.out}.json")
    found = {"about": {}, "cells": {}, "trained": [], **read_json(path)}
    for folder in args.trained:
        if not (folder / "config.json").exists():
            raise InputError(f"--trained {folder}: no run folder: it has no config.json")
        for seed in collect(folder)["seeds"]:
            new = {"run": f"{folder.parent.name}/{folder.name}", "seed": seed,
                   **numbers(folder, folder, seed)}
            found["trained"] = [t for t in found["trained"]
                                if (t["run"], t["seed"]) != (new["run"], seed)] + [new]
    for pair in () if args.draw else args.pairs:
        for labels in args.labels or LABELS:
            for judge in args.judge or JUDGES:
                cell = found["cells"].setdefault(f"{labels} {judge}", {})
                if str(pair) in cell:
                    continue
                at = make(args, labels, judge, pair)
                cell[str(pair)] = {**numbers(at / "ilr", at / "dpo", FIRST_SEED + pair),
                                   "cpu_seconds": cpu_seconds(at)}
                write(args, found)
    write(args, found)
    print(as_text(found))


def parser():
    p = make_parser(__doc__, prog="make_map.py")
    p.add_argument("--labels", nargs="+", choices=LABELS, help="default: every level")
    p.add_argument("--judge", nargs="+", choices=(*JUDGES, TRAINED),
                   help="default: every simulated level")
    p.add_argument("--pairs", nargs="+", type=int, default=PAIRS, help="BASE_SEED of each")
    p.add_argument("--work", type=Path, default=ROOT / "runs/map", help="folder of the runs, kept")
    p.add_argument("--trained", type=Path, nargs="+", default=[],
                   help="runs with trained judges, to lay over the figure")
    p.add_argument("--draw", action="store_true", help="make no run, only the table and figure")
    p.add_argument("--out", type=Path, default=ROOT / "results/map",
                   help="names of the results, without .json, .md and .png")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
