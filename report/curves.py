"""Training curves of a run's models: one figure, curves.png, and its section of the page.

A model's curve is MODEL/metrics.jsonl, a row for each optimizer step. Unfinished models, which lie
in hidden folders, and folders of methods that this checkout does not have are left out. Lines that
cannot be read and values that are no number are passed over.

`data` is what `collect` of report/collect.py returns; `draw` adds the key "curves" to it.
"""
import math

from report import word_counts
from report.collect import seed_folders
from report.figures import canvas, save
from report.methods import METHODS, method_and_round
from report.tables import table

COLUMNS = {"loss": "loss", "stop_loss": "stopping loss", "rewards/margins": "margin",
           "rewards/accuracies": "accuracy"}
WINDOW = 0.1        # of a training's steps: the width of the running mean
GREY, GOLD = "#444444", "#999999"


# ---------------------------------------------------------------- what is read
def number(value):
    return type(value) in (int, float) and abs(value) < 1e300      # an int may be past all floats


def read_curve(path):
    """{column: [(step, value)]} of a metrics.jsonl, for the COLUMNS that have a value."""
    curve = {}
    for row in word_counts.rows(path):
        for column in COLUMNS if number(row.get("step")) else ():
            if number(row.get(column)):
                curve.setdefault(column, []).append((row["step"], row[column]))
    return curve


def trainings(run):
    """{(point, kind): {seed: [a curve of each training]}} of the finished models; kind is "model",
    "half" (ILR's half-models) or "part" (models that only sample for the judge)."""
    found = {}
    for seed, folder in seed_folders(run).items():
        for path in sorted(folder.glob("*/*/metrics.jsonl")):
            point, model = path.parent.parent.name, path.parent.name
            if model.startswith(".") or path.parent.is_symlink():
                continue                    # unfinished; weak/labeler, which is weak/model
            kind = model.partition("_")[0]
            if kind not in ("model", "half"):
                kind = "part"
            if curve := read_curve(path):
                found.setdefault((point, kind), {}).setdefault(seed, []).append(curve)
    return found


def curves_of(data):
    """`trainings` of a run, read once."""
    if "curves" not in data:
        data["curves"] = trainings(data["run"])
    return data["curves"]


def rounds(curves, method, kind):
    """{round: {seed: curves}} of a method's models of one kind."""
    found = {}
    for (point, its_kind), by_seed in curves.items():
        name, k = method_and_round(point) or ("", 0)
        if name == method and its_kind == kind:
            found[k] = by_seed
    return dict(sorted(found.items()))


def having(by_seed, column):
    """The points [(step, value)] of every training that has the column, seeds in order."""
    return [curve[column] for curves in by_seed.values() for curve in curves if column in curve]


def prefers(method):
    """Whether a method trains on preferences."""
    steps = getattr(METHODS[method], "ROUND", "prefer" if method == "dpo" else "")
    return any(step.startswith("prefer") for step in steps.split())


# ---------------------------------------------------------------- what is computed
def smooth(values):
    """Running mean, centred, over the share WINDOW of the values. At the beginning, where a loss
    falls steeply, the window is narrower on both sides; at the end it is cut off."""
    import numpy as np
    values, half = np.asarray(values, float), int(len(values) * WINDOW / 2)
    sums = np.concatenate([[0.0], values.cumsum()])
    at = np.arange(len(values))
    low = np.maximum(at - half, 0)
    high = np.minimum(at + np.minimum(at, half) + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def mean_curve(lines):
    """(steps, values): the mean of several smoothed lines [(step, value)].

    Lines of different steps are averaged at equal shares of their training, and drawn over those
    shares of their mean length."""
    import numpy as np
    steps = [np.array([s for s, _ in line], float) for line in lines]
    values = [smooth([v for _, v in line]) for line in lines]
    if any(not np.array_equal(s, steps[0]) for s in steps):
        share = np.linspace(0, 1, max(map(len, steps)))
        values = [np.interp(share, np.linspace(0, 1, len(v)), v) for v in values]
        steps = [np.mean([np.interp(share, np.linspace(0, 1, len(s)), s) for s in steps], axis=0)]
    return steps[0], np.mean(values, axis=0)


# ---------------------------------------------------------------- the figure
def shade(color, k, last):
    """The colour of round k of `last`: the method's own in the last one, lighter before."""
    from matplotlib.colors import to_rgb
    share = 1 if last == 1 else 0.35 + 0.65 * (k - 1) / (last - 1)
    return tuple(1 - share * (1 - part) for part in to_rgb(color))


def panel(title, ylabel, lines, points=(), model=""):
    """What one panel shows. lines: [(trainings whose mean is drawn, each [(step, value)], style)];
    points: [(step, value)]; model: "weak" or "strong" for losses of SFT, which are drawn on a
    logarithmic axis, one for all panels of the model."""
    lines = [(trained, style) for trained, style in lines if trained]
    return {"title": title, "ylabel": ylabel, "lines": lines, "points": points, "model": model}


def shared_panels(curves):
    """The panels of the weak model, the judge, and SFT of the strong model."""
    def losses(point, kind="model"):
        return having(curves.get((point, kind), {}), "loss")

    judge = having(curves.get(("judge", "model"), {}), "stop_loss")
    return [
        panel("weak model: SFT", "loss", [
            (losses("weak"), {"color": GREY}),
            (losses("judge", "part"), {"color": GREY, "ls": "-."})], model="weak"),
        # each on its own: judges stop at steps of their own
        panel("judge", "loss", [([line], {"color": GREY, "lw": 1}) for line in losses("judge")],
              [point for line in judge for point in line]),
        panel("strong model: SFT", "loss", [(losses("gold"), {"color": GOLD}),
                                            (losses("sft"), {"ls": "--"})], model="strong")]


def round_lines(curves, method, column):
    """The lines of a method's panel: its half-models by round, dotted, and its models."""
    models, halves = (rounds(curves, method, kind) for kind in ("model", "half"))
    last, color = max([*models, *halves], default=0), METHODS[method].STYLE[0]
    return [(having(found[k], column), {"color": shade(color, k, last), "ls": dash})
            for found, dash in ((halves, ":"), (models, "-")) for k in found]


def panels(curves):
    """Rows of panels. One without anything to draw is left out."""
    sft = having(curves.get(("sft", "model"), {}), "loss"), {"ls": "--", "lw": 0.8}
    flat, preferences = shared_panels(curves), []
    for m, method in METHODS.items():
        if prefers(m):
            preferences.append([panel(f"{method.NAME}: {name}", name, round_lines(curves, m, c))
                                for c, name in COLUMNS.items()])
        elif any(lines for lines, _ in round_lines(curves, m, "loss")):
            flat.append(panel(method.NAME, "loss", [sft, *round_lines(curves, m, "loss")],
                              model="strong"))
    flat = [p for p in flat if p["lines"] or p["points"]]
    count = math.ceil(len(flat) / 3)            # rows of three, or of two
    cuts = [round(len(flat) * k / count) for k in range(count + 1)] if flat else [0]
    rows = [flat[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    rows += [[p for p in row if p["lines"]] for row in preferences]
    return [row for row in rows if row]


def draw_panel(axes, shown):
    """Thin lines are the trainings, thick ones their means; many would hide each other."""
    from matplotlib.ticker import LogLocator
    for lines, style in shown["lines"]:
        style = {"color": "black", "lw": 1.4, **style}
        if len(lines) > 1 and len(shown["lines"]) < 3:
            for line in lines:
                axes.plot(*mean_curve([line]), **{**style, "lw": 0.5, "alpha": 0.6, "ls": "-"})
        axes.plot(*mean_curve(lines), **style)
    if shown["points"]:
        axes.plot(*zip(*shown["points"], strict=True), "o", color="white", mec="black", ms=5,
                  zorder=3)
    axes.set_title(shown["title"], fontsize=10)
    axes.set(xlabel="optimizer step", ylabel=shown["ylabel"])
    axes.grid(axis="y", alpha=0.3)
    if shown["model"] and min(y for line in axes.lines for y in line.get_ydata()) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def legend(rows, last):
    """{name: what is drawn for it} of what the panels have; last: the number of rounds."""
    from matplotlib.lines import Line2D
    named = [k for k in range(1, last + 1) if last < 5 or k in (1, last)]
    handles = {f"round {k}": Line2D([], [], color=shade("black", k, last)) for k in named}
    shown = [p for row in rows for p in row]
    styles = [style for p in shown for _, style in p["lines"]]
    for name, key, value in (("half-models", "ls", ":"), ("SFT", "ls", "--"),
                             ("SFT on gold labels", "color", GOLD),
                             ("judge's weak models", "ls", "-.")):
        if any(style.get(key) == value for style in styles):
            handles[name] = Line2D([], [], **{"color": "black", key: value})
    if any(p["points"] for p in shown):
        handles["judge's stopping loss"] = Line2D([], [], ls="", marker="o", color="white",
                                                  mec="black")
    return handles


def draw(data):
    """Draw curves.png into the run folder, inside `as_shipped`. Returns the names of the files."""
    curves = curves_of(data)
    rows = panels(curves)
    if not rows:
        return []
    seeds = {seed for by_seed in curves.values() for seed in by_seed}
    who = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {min(seeds)}"
    title = f"Training curves ({who}; running means of {WINDOW:.0%} of a training's steps)"
    figure, (axes,) = canvas(1, title, 10.5, 1 + 2.4 * len(rows))
    axes.remove()
    grid, first = figure.add_gridspec(len(rows), 6), {}
    for r, row in enumerate(rows):
        width = 6 // len(row)
        for c, shown in enumerate(row):
            axes = figure.add_subplot(grid[r, c * width:(c + 1) * width],
                                      sharey=first.get(shown["model"]))
            if shown["model"]:
                first.setdefault(shown["model"], axes)
            draw_panel(axes, shown)
    last = max([k for m in METHODS for kind in ("model", "half")
                for k in rounds(curves, m, kind)], default=0)
    save(figure, data["run"] / "curves.png", legend(rows, last))
    return ["curves.png"]


# ---------------------------------------------------------------- the section
def at_end(values):
    """The mean of the last WINDOW of the values."""
    last = values[-max(1, int(len(values) * WINDOW)):]
    return sum(last) / len(last)


# heading, column of a curve, what is taken of its values
SUMMARY = (("loss, first step", "loss", lambda values: values[0]), ("loss, end", "loss", at_end),
           ("margin, end", "rewards/margins", at_end),
           ("accuracy, end", "rewards/accuracies", at_end),
           ("lowest stopping loss", "stop_loss", min))


def cell(found, column, taken):
    """'0.95, –, 0.91': a mean over the trainings of each of these {seed: curves}, a dash where one
    has no such column; '' where none has it."""
    means = []
    for by_seed in found:
        numbers = [taken([v for _, v in line]) for line in having(by_seed, column)]
        means.append(f"{sum(numbers) / len(numbers):.3g}" if numbers else "–")
    return ", ".join(means) if set(means) - {"–"} else ""


def without_blanks(header, rows):
    """`table` without the columns that are empty in all rows."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def summary_table(curves):
    """A row for each kind of model; a column that no model has is left out."""
    kinds = [(name, [curves.get(key, {})]) for name, key in (
        ("weak model", ("weak", "model")), ("judge's weak models", ("judge", "part")),
        ("judge", ("judge", "model")), ("SFT", ("sft", "model")),
        ("SFT on gold labels", ("gold", "model")))]
    for m, method in METHODS.items():
        kinds += [(f"{method.NAME}: half-models", [*rounds(curves, m, "half").values()]),
                  (method.NAME, [*rounds(curves, m, "model").values()])]
    rows = []
    for name, found in kinds:
        if count := sum(len(trained) for by_seed in found for trained in by_seed.values()):
            rows.append([name, count, *(cell(found, *what) for _, *what in SUMMARY)])
    return without_blanks(["", "trainings", *(heading for heading, *_ in SUMMARY)], rows)


def section(data, drawn):
    """The Markdown pieces of the section; drawn: names of the figures. [] where curves.png is not
    among them."""
    if "curves.png" not in drawn:
        return []
    return ["## Training curves\n", "![training curves of every model](curves.png)\n",
            "A thick line is the mean over seeds and retrains (the judge: each on its own), "
            f"smoothed over {WINDOW:.0%} of the steps. Trainings of different lengths are averaged "
            "at equal shares of their training, and drawn over their mean number of steps. Of a "
            "method's rounds, the first is light and the last dark.\n",
            summary_table(curves_of(data)),
            "Means over the trainings, by round where a cell has several. End: the last "
            f"{WINDOW:.0%} of the steps. Accuracy: the share of pairs with a margin above 0.\n"]
