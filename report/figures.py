"""The figures of a report: PNG files of 150 dpi that can be told apart in grey.

`by_round`, `gains`, `price` and `judge` draw numbers in percent; `draw` says which numbers of a
run they get. A method's colour, marker and dash are its STYLE.
"""
import contextlib
import logging
import os

from report.methods import METHODS, labels_name, labels_of, methods_of, points_of, rounds_of
from report.statistics import average, over_seeds, reliability, seed_means, widest

MANY = 5        # from so many series on only the means are drawn: intervals would hide each other


@contextlib.contextmanager
def as_shipped():
    """matplotlib with its own defaults: a backend, a matplotlibrc, a style or LaTeX that the user
    has chosen for other figures changes nothing here. Also a decorator."""
    # what it says of a matplotlibrc, of fonts, and of a cache folder that it cannot write
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # a backend that it does not know and a matplotlibrc that it cannot read fail its import
    names = {name: os.environ.get(name) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    try:
        import matplotlib
    finally:
        for name, value in names.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def canvas(panels, title, width=6.4, height=4.6):
    """(figure, its axes), width and height in inches; several panels are 10.5 inches wide."""
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained", figsize=(width if panels == 1 else 10.5, height))
    axes = figure.subplots(1, panels, squeeze=False)
    figure.suptitle(title, fontsize=12)
    for a in axes[0]:
        a.grid(axis="y", alpha=0.3)
    return figure, axes[0]


def save(figure, path, handles):
    """Write the figure with a legend below it. handles: {name: what is drawn for it}."""
    if handles:
        # inches of a line sample, and of a letter of 9 points
        column = 0.7 + 0.065 * max(map(len, handles))
        figure.legend(handles.values(), handles, loc="outside lower center", frameon=False,
                      ncols=int(figure.get_figwidth() / column), fontsize=9, handlelength=3.4)
    unfinished = path.with_name(f".{path.name}.writing")
    figure.savefig(unfinished, dpi=150, metadata={"Software": None}, format="png")
    unfinished.replace(path)


def line_style(method):
    """The STYLE of a method as arguments of matplotlib."""
    color, marker, dash = METHODS[method].STYLE
    return {"color": color, "marker": marker, "ls": dash, "lw": 1.6}


def by_round(path, title, ylabel, series, lines):
    """Means and intervals by round.

    series: (name, method, {round: (mean, half width or None, values of the seeds)}); round 0 is
    the same in all. lines: horizontal lines (name, value). Of MANY series only the means are
    drawn, and a line that is far from them is only named in the legend, with its value.
    """
    few = len(series) < MANY
    figure, (axes,) = canvas(1, title, *((6.4, 4.6) if few else (8, 6)))
    handles = {}
    for k, (name, method, rounds) in enumerate(series):
        # side by side, so that no bar hides another
        shift = min(0.1, 0.7 / len(series)) * (k + 0.5 - len(series) / 2)
        at = {x: x + shift if x else 0 for x in rounds}
        halves = []
        for x, (_, half, seeds) in rounds.items():
            shown = few and half is not None and (x or not k)       # round 0: once
            halves.append(half if shown else 0)
            if shown:
                axes.plot([at[x]] * len(seeds), seeds, METHODS[method].STYLE[1],
                          color=METHODS[method].STYLE[0], ms=3, alpha=0.4, mew=0)
        means = [mean for mean, _, _ in rounds.values()]
        # None: a bar of length 0 would still be one in the legend
        bars = halves if any(halves) else None
        handles[name] = axes.errorbar(at.values(), means, bars, **line_style(method),
                                      elinewidth=1, capsize=2, zorder=3 - 0.1 * k)
    low, high = axes.get_ylim()
    for (name, value), (dash, shade) in zip(lines, ((":", "0.35"), ("-.", "0.55")), strict=False):
        style = {"color": shade, "ls": dash, "lw": 1.2}
        if few or low < value < high:
            handles[name] = axes.axhline(value, **style)
        else:
            handles[f"{name.partition(' (')[0]} {value:.1f}"] = axes.plot([], [], **style)[0]
    last = max(x for _, _, rounds in series for x in rounds)
    axes.set_xticks(range(last + 1))
    axes.set(xlabel="round (0: before any refinement)", ylabel=ylabel)
    low, high = axes.get_ylim()
    # at least 10 points high, and no more than percentages need
    axes.set_ylim(max(-2, min(low, high - 10)), min(102, max(high, low + 10)))
    save(figure, path, handles)


def gains(path, title, xlabel, rows):
    """rows: (name, mean, low, high, values of the seeds), the largest mean on top."""
    figure, (axes,) = canvas(1, title, 7)
    rows = sorted(rows, key=lambda row: row[1])
    for y, (_, mean, low, high, seeds) in enumerate(rows):
        axes.errorbar([mean], [y], xerr=[[mean - low], [high - mean]], color="0.1", marker="o",
                      capsize=3, lw=1.4)
        if len(seeds) > 1:
            axes.plot(seeds, [y - 0.25] * len(seeds), "|", color="0.45", ms=5)
    axes.axvline(0, color="0.35", ls=":", lw=1.2)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.grid(axis="x", alpha=0.3)
    axes.grid(visible=False, axis="y")
    strokes = " (strokes: the seeds)" if len(rows[0][4]) > 1 else ""
    axes.set(xlabel=xlabel + strokes)
    save(figure, path, {})


def price(path, title, ylabel, panels):
    """panels: (xlabel, [(name, method, [(price, accuracy)])]); a line's points are SFT, then the
    rounds."""
    figure, axes = canvas(len(panels), title)
    handles = {}
    for a, (xlabel, lines) in zip(axes, panels, strict=True):
        for name, method, points in lines:
            x, y = zip(*points, strict=True)
            handles[name], = a.plot(x, y, **line_style(method), markevery=slice(1, None))
        sft = lines[0][2][0]
        handles["SFT"], = a.plot(*sft, "o", color="white", mec="black", ms=9, mew=1.5, zorder=5)
        a.set(xlabel=xlabel, ylabel=ylabel)
        a.margins(0.06, 0.08)
        a.ticklabel_format(axis="x", style="sci", scilimits=(-3, 6), useMathText=True)
    save(figure, path, handles)


def judge(path, title, calibration, lines):
    """calibration: (name, method, points of `reliability`), in shares; lines: (name, method,
    whether filled, {round: percent}). A panel without anything to draw is left out. A name that
    is in both panels stands once in the legend."""
    figure, axes = canvas(bool(calibration) + bool(lines), title)
    handles = {}
    if calibration:
        a = axes[0]
        handles["calibrated"], = a.plot([0, 1], [0, 1], color="0.5", lw=1, ls=":")
        for name, method, points in calibration:
            x, y, low, high = zip(*points, strict=True)
            handles[name] = a.errorbar(x, y, [low, high], **line_style(method), capsize=3,
                                       elinewidth=1)
        # a judge may be certain: its points are on the edges
        a.set(xlabel="judge's probability that B is better", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
              ylabel="share of pairs whose B is better")
        a.set_title("calibration (bars: 95%)", fontsize=10)
    if lines:
        a = axes[-1]
        for name, method, filled, rounds in lines:
            style = line_style(method)
            if not filled:
                style.update(ls=":", mfc="white")
            handles[name], = a.plot(list(rounds), list(rounds.values()), **style)
        last = max(x for *_, rounds in lines for x in rounds)
        a.set_xticks(range(1, last + 1))
        a.set(xlabel="round", ylabel="percent")
        a.set_title("its accuracy, and precision of what was replaced or kept", fontsize=10)
        handles["accuracy of a coin"] = a.axhline(50, color="0.35", lw=1.2, ls="-.")
        a.margins(0.05, 0.08)
    save(figure, path, handles)


# ---------------------------------------------------------------- what a run has to draw
def summed(rounds):
    """{round: (mean, half width or None, values of the seeds)} in percent, from {round: shares}."""
    return {k: (*over_seeds(by_seed), [100 * v for v in seed_means(by_seed).values()])
            for k, by_seed in rounds.items()}


def price_panels(data, costs):
    """The panels of `price`. costs: of report/prices.py. A method that lacks a number is left out,
    and so is a panel where nothing costs anything."""
    tests = data["tests"]
    starts = {"asked": 0, "flops": costs.get("sft", {}).get("flops")}
    panels = []
    for column, label in (("asked", "comparisons asked"), ("flops", "FLOPs")):
        lines = []
        for m in methods_of(data) if "sft" in tests else []:
            points = rounds_of(data, m).values()
            spent = [0, *(costs[p][column] for p in points)]
            if starts[column] is None or None in spent:
                continue
            accuracies = [over_seeds(tests[p])[0] for p in ("sft", *points)]
            x = [starts[column] + s for s in spent]
            lines.append((METHODS[m].NAME, m, list(zip(x, accuracies, strict=True))))
        if any(x for *_, line in lines for x, _ in line):
            panels.append((label, lines))
    return panels


def judge_lines(data):
    """(calibration, lines) of `judge`, for the judge that ILR and DPO asked."""
    calibration, lines = [], []
    for m in ("ilr", "dpo"):
        name, points = METHODS[m].NAME, rounds_of(data, m)
        asked = [s for p in points.values() for s in data["comparisons"].get(p, {}).values()]
        if found := reliability(s["calibration"] for s in asked if s.get("calibration")):
            calibration.append((f"{name}: the judge", m, found))
        kept = "labels replaced" if m == "ilr" else "pairs kept"
        for what, kind, key in (("the judge", "comparisons", "accuracy"),
                                (kept, "refinements", "precision")):
            means = {k: average(data[kind].get(p, {}), key) for k, p in points.items()}
            found = {k: round(100 * mean, 1) for k, mean in means.items() if mean is not None}
            if found:
                lines.append((f"{name}: {what}", m, key == "accuracy", found))
    return calibration, lines


@as_shipped()
def draw(data, costs, said):
    """Draw what there is data for. said: the claims. Returns the names of the files."""
    from report import curves, lengths  # here: they import this file
    run, tests, methods, n = data["run"], data["tests"], methods_of(data), len(data["seeds"])
    what = f"{data['settings'].get('EVAL', 'test')} {data['metric']}"
    seeds = f"mean, 95% interval of {n} seeds" if n > 1 else f"seed {data['seeds'][0]}"
    drawn = []

    def figure(draws, name, title, *rest):
        draws(run / name, title, *rest)
        drawn.append(name)

    if methods:
        shown = f"mean of {n} seeds" if n > 1 and len(methods) >= MANY else seeds
        series = [(METHODS[m].NAME, m, summed({k: tests[p] for k, p in points_of(data, m).items()}))
                  for m in methods]
        lines = [(name, over_seeds(tests[p])[0]) for p, name in (
            ("weak", "weak model alone"), ("gold", "ceiling (gold labels)")) if p in tests]
        figure(by_round, "test_accuracy.png", f"{what.capitalize()} per round ({shown})",
               f"{what} (%)", series, lines)
    rows = [(c["a"], c["mean"], *widest(c), c["per_seed"]) for c in said if c["b"] == "SFT"]
    if len(rows) > 2:
        shown = f"{n} seeds: mean, 95% interval" if n > 1 else f"{seeds}: 95% interval"
        figure(gains, "gains.png", f"Gain over SFT ({shown})", f"points of {what}", rows)
    if labels := labels_of(data):
        series = [(labels_name(m, r), m, summed(r)) for m, r in labels.items()]
        figure(by_round, "label_accuracy.png", f"Correct training labels per round ({seeds})",
               "label accuracy (%)", series, [])
    if panels := price_panels(data, costs):
        figure(price, "price.png", f"{what.capitalize()} against price (means, rounds in order)",
               f"{what} (%)", panels)
    calibration, lines = judge_lines(data)
    if calibration or lines:
        figure(judge, "judge.png", "The judge on the pairs that it was asked about", calibration,
               lines)
    return [*drawn, *curves.draw(data), *lengths.draw(data)]
