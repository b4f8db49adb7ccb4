"""The figures of several runs side by side; numbers in percent or percentage points."""
from report.claims import nothing_differs
from report.figures import as_shipped, canvas, line_style, save
from report.methods import METHODS, methods_of, points_of
from report.side import are_draws, point_name
from report.statistics import mean_interval, over_seeds, widest

PANELS = 5      # of accuracy.png: more would be too narrow
# Markers of runs, in order; after the last one they repeat.
RUN_MARKERS = ("D", "o", "^", "s", "v", "P", "X", "<", ">", "*")


def marker_of(k):
    return RUN_MARKERS[k % len(RUN_MARKERS)]


def shown(name):
    """A run's name as text: matplotlib reads formulas between dollars, and leaves what begins with
    an underscore out of legends."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")


def accuracy(path, title, ylabel, panels, several):
    """panels: (name, method, {run: {round: percent}}), a panel for each method; thin lines are the
    runs. several: whether a thick line for their mean is drawn, with Student's interval over three
    runs or more: over two it would hide all else."""
    figure, axes = canvas(len(panels), title)
    handles = {}
    last = max(k for *_, lines in panels for rounds in lines.values() for k in rounds)
    for a, (name, method, lines) in zip(axes, panels, strict=True):
        color = METHODS[method].STYLE[0]
        for k, (run, rounds) in enumerate(lines.items()):
            style = {"color": "0.45", "lw": 0.8} if several else {"color": color, "lw": 1.4}
            style |= {"marker": marker_of(k), "ms": 4, "mfc": "white",
                      "ls": "-" if several or not k else "--"}
            a.plot(list(rounds), list(rounds.values()), **style)
            handles[run], = a.plot([], [], **{**style, "color": "0.3"})
        if several:
            at = {k: [rounds[k] for rounds in lines.values() if k in rounds]
                  for k in range(last + 1)}
            # a mean over some of the runs would move because they are others
            means = {k: mean_interval(values) for k, values in at.items()
                     if len(values) == len(lines)}
            halves = [half if half and len(at[k]) > 2 else 0 for k, (_, half) in means.items()]
            a.errorbar(list(means), [mean for mean, _ in means.values()], halves,
                       **{**line_style(method), "lw": 2.6, "marker": ""}, elinewidth=1.2,
                       capsize=3 if any(halves) else 0, zorder=4)
        a.set_title(name, fontsize=10)
        a.set(xlabel="round", xticks=range(last + 1))
    low, high = (end(a.get_ylim()[k] for a in axes) for k, end in enumerate((min, max)))
    room = 0.03 * (high - low)
    for a in axes:      # at least 10 points high, and no more than percentages need
        a.set_ylim(max(-2, min(low - room, high - 10)), min(102, max(high + room, low + 10)))
    axes[0].set_ylabel(ylabel)
    save(figure, path, handles)


def by_row(axes, names, xlabel, means):
    """Axes with a row for each name, the first on top, and a line at 0. Intervals of two seeds or
    runs may be so wide that nothing else could be seen: they leave the frame."""
    axes.axvline(0, color="0.35", ls=":", lw=1.2)
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.grid(visible=False, axis="y")
    far, (low, high) = max(5, 4 * max(map(abs, means))), axes.get_xlim()
    axes.set_xlim(max(low, -far), min(high, far))
    outside = " (some intervals end outside)" if low < -far or high > far else ""
    axes.set(xlabel=xlabel + outside)


def gains(path, title, xlabel, rows, shipped):
    """rows: (name, mean, within, over, {run: mean}), the first on top; half widths or None.
    shipped: name of the run whose base models are those of bases/, or None."""
    figure, (axes,) = canvas(1, title, 7.4, 1.9 + 0.45 * len(rows))
    handles = {}
    for y, (_, mean, within, over, runs) in enumerate(reversed(rows)):
        if over is not None:
            handles["mean, 95% for other base models"] = axes.errorbar(
                [mean], [y], xerr=[over], color="0.1", lw=3, marker="")
        if within is not None:
            handles["95% for other seeds only"] = axes.errorbar(
                [mean], [y + 0.2], xerr=[within], color="0.4", lw=1.1, capsize=2.5, marker="")
        axes.plot([mean], [y], "o", color="0.1", ms=6, zorder=4)
        for run, value in runs.items():
            mark = {"marker": "D", "mfc": "white", "ms": 5} if run == shipped else {
                "marker": "|", "ms": 7}
            name = "the shipped pair" if run == shipped else "a run's mean"
            handles[name], = axes.plot([value], [y - 0.27], ls="", color="0.3", **mark)
    by_row(axes, [name for name, *_ in rows], xlabel,
           [value for _, mean, _, _, runs in rows for value in (mean, *runs.values())])
    save(figure, path, handles)


def differences(path, title, xlabel, rows):
    """rows: (name of a point, {run: (mean, low, high)}), the first on top."""
    runs = list(dict.fromkeys(run for _, found in rows for run in found))
    figure, (axes,) = canvas(1, title, 7, 1.9 + 0.3 * len(rows))
    handles = {}
    for y, (_, found) in enumerate(reversed(rows)):
        for run, (mean, low, high) in found.items():
            k = runs.index(run)
            shift = 0.6 / len(runs) * ((len(runs) - 1) / 2 - k)
            handles[run] = axes.errorbar([mean], [y + shift], xerr=[[mean - low], [high - mean]],
                                         color=str(0.1 + 0.5 * k / len(runs)), marker=marker_of(k),
                                         ms=5, capsize=3, lw=1.3)
    by_row(axes, [name for name, _ in rows], xlabel,
           [mean for _, found in rows for mean, _, _ in found.values()])
    save(figure, path, handles if len(runs) > 1 else {})


# ---------------------------------------------------------------- what the runs have to draw
def accuracy_panels(runs):
    """The panels of `accuracy`."""
    panels = []
    for m in METHODS:
        lines = {}
        for run in runs:
            if m in methods_of(run):
                lines[shown(run["name"])] = {k: over_seeds(run["tests"][p])[0]
                                             for k, p in points_of(run, m).items()}
        if lines:
            panels.append((METHODS[m].NAME, m, lines))
    return panels


@as_shipped()
def draw(folder, runs, contrasts, versus):
    """Draw what there is data for into a folder (Path). contrasts: of `all_contrasts`; versus:
    {run: what `against` found}. Returns the names of the files."""
    draws, drawn = are_draws(runs), []
    what = f"{runs[0]['settings'].get('EVAL') or 'test'} {runs[0]['metric']}"

    def figure(draws_it, name, *rest):
        draws_it(folder / name, *rest)
        drawn.append(name)

    if panels := accuracy_panels(runs)[:PANELS]:
        lines = "mean of the seeds"
        if draws:
            lines = "thick: mean" + ", 95% for other base models" * (len(runs) > 2)
        figure(accuracy, "accuracy.png", f"{what.capitalize()} by round ({lines})", f"{what} (%)",
               panels, draws)
    if draws and contrasts:
        shipped = next((run["name"] for run in runs if run["settings"].get("BASE_SEED") == "0"
                        and not run["settings"].get("STRONG_MODEL")), None)
        rows = [(c["title"], c["mean"], c["within"], c["over"],
                 {run: f["mean"] for run, f in c["runs"].items()}) for c in contrasts]
        figure(gains, "gains.png", f"Differences over {len(runs)} runs", f"points of {what}", rows,
               shipped)
    points = dict.fromkeys(p for found in versus.values() for p in found
                           if not nothing_differs(found[p]))
    rows = [(point_name(p), {shown(run): (found[p]["mean"], *widest(found[p]))
                             for run, found in versus.items() if p in found}) for p in points]
    if rows:
        names = [shown(run["name"]) for run in runs]
        title = f"Difference from {names[0]}"
        if len(runs) == 2:
            title = f"{names[1]} minus {names[0]}"
        figure(differences, "differences.png", f"{title} (95% interval)", f"points of {what}", rows)
    return drawn
