"""The tables of runs side by side, as Markdown: a column for each run. report/side.py has the
numbers. In percent, differences in points."""
from report.claims import nothing_differs
from report.methods import METHODS, labels_name, labels_of, methods_of, points_of, rounds_of
from report.side import are_draws, point_name
from report.statistics import over_seeds, widest
from report.tables import cell, percent, plain, round_headings, some, table

BESIDE = {"weak": "weak model alone", "gold": "ceiling: SFT on gold labels"}


def names(runs):
    return [plain(run["name"]) for run in runs]


def filled(rows):
    """The rows that have a cell beside their name."""
    return [row for row in rows if any(row[1:])]


# ---------------------------------------------------------------- differences
def interval(mean, half):
    return "" if half is None else f"{mean - half:+.1f} to {mean + half:+.1f}"


def own(found):
    """A run's own difference and interval, the wider ends of what `paired` found."""
    if nothing_differs(found):
        return "+0.0 (graded alike)"
    low, high = widest(found)
    return f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def bold(text, found):
    return f"**{text}**" if found["established"] else text


def differences_table(runs, contrasts):
    """A row for each contrast; beside runs that are draws their mean and both half widths."""
    draws, rows = are_draws(runs), []
    for c in contrasts:
        cells = [c["runs"].get(run["name"]) for run in runs]
        if draws:
            row = [f"{f['mean']:+.1f}" if f else "" for f in cells]
            halves = ["" if c[k] is None else f"± {c[k]:.1f}" for k in ("within", "over")]
            row += [some(bold(f"{c['mean']:+.1f}", c), c["runs"], runs, "runs"), *halves]
        else:
            row = [bold(own(f), f) if f else "" for f in cells]
        rows.append([c["title"], *row])
    return table(["points", *names(runs), *["mean", "other seeds", "other base models"] * draws],
                 rows)


def equal_table(runs, contrast):
    """Which point of DPO each run's contrast at equal comparisons has, and what was asked for."""
    found = [(run, contrast["runs"].get(run["name"], {}).get("points")) for run in runs]
    rows = [["DPO's point", *(point_name(two[1]) if two else "" for _, two in found)]]
    for k, name in enumerate(("ILR", "DPO")):
        asked = [two and (0 if two[k] == "sft" else run["price"][two[k]]["asked"])
                 for run, two in found]
        rows.append([f"comparisons, {name}", *("" if n is None else f"{n:,.0f}" for n in asked)])
    return table(["", *names(runs)], rows)


def against_table(first, run, found):
    """One run against the first. found: of `against`."""
    rows = []
    for point, f in found.items():
        alike = nothing_differs(f)
        intervals = ["" if alike or not f[k] else "{:+.1f} to {:+.1f}".format(*f[k])
                     for k in ("bootstrap", "student")]
        rows.append([plain(point_name(point)), ", ".join(map(str, f["seeds"])),
                     f"{f['first']:.1f}", f"{f['accuracy']:.1f}",
                     "graded alike" if alike else bold(f"{f['mean']:+.1f}", f), *intervals])
    return table(["", "seeds", *names([first, run]), "difference", "bootstrap", "Student's t"],
                 rows)


# ---------------------------------------------------------------- levels
def number(value):
    return "" if value is None else f"{value:.1f}"


def mean_of(run, point):
    """A run's accuracy at a point in percent, the mean over its seeds; None where it has none."""
    return over_seeds(run["tests"][point])[0] if point in run["tests"] else None


def over_runs(runs, point):
    """A cell: mean over the runs that have the point, ± Student's 95% interval over them."""
    means = {run["name"]: mean_of(run, point) for run in runs}
    found = {name: [mean / 100] for name, mean in means.items() if mean is not None}
    return some(cell(found), found, runs, "runs") if found else ""


def all_methods(runs):
    return [m for m in METHODS if any(m in methods_of(run) for run in runs)]


def all_points(runs):
    """({name of a method: {round: its point in any run}}, the last round). Round 0 is SFT, which
    stands alone where no method has a point."""
    points = {METHODS[m].NAME: {k: p for run in runs for k, p in points_of(run, m).items()}
              for m in all_methods(runs)} or {"SFT": {0: "sft"}}
    return points, max(k for of_method in points.values() for k in of_method)


def mean_table(runs):
    """Accuracy of each method by round, over runs that are draws."""
    points, last = all_points(runs)
    rows = [[name, *(over_runs(runs, of_method[k]) if k in of_method else ""
                     for k in range(last + 1))] for name, of_method in points.items()]
    return table(["method", "SFT", *round_headings(1, last)], rows)


def beside_table(runs):
    rows = filled([[name, over_runs(runs, point)] for point, name in BESIDE.items()])
    return table(["beside it", runs[0]["metric"]], rows) if rows else ""


def runs_table(runs):
    """Accuracy of each method of each run by round, with the run's own interval."""
    points, last = all_points(runs)
    rows = [[name, plain(run["name"]),
             *(cell(run["tests"][of_method[k]], run["n_test"])
               if of_method.get(k) in run["tests"] else "" for k in range(last + 1))]
            for name, of_method in points.items() for run in runs]
    return table(["method", "run", "SFT", *round_headings(1, last)], rows)


def levels_table(runs):
    """Accuracy of each run, the rounds of a method in one cell."""
    def cells(of_method):
        for run in runs:
            means = [mean_of(run, point) for k, point in sorted(of_method.items()) if k]
            some = any(mean is not None for mean in means)
            yield ", ".join(number(mean) or "–" for mean in means) if some else ""

    points, _ = all_points(runs)
    alone = {point: [name, *(number(mean_of(run, point)) for run in runs)]
             for point, name in {**BESIDE, "sft": "SFT"}.items()}
    rows = [alone["weak"], alone["sft"], *([name, *cells(p)] for name, p in points.items()),
            alone["gold"]]
    return table(["", *names(runs)], filled(rows))


def supervision_table(runs):
    """Labels' accuracy by round, the judge's on what it was asked, and DPO's learning rate; ''
    where nothing is known."""
    labels, methods, rows = [labels_of(run) for run in runs], all_methods(runs), []
    for m in METHODS:
        if any(m in of_run for of_run in labels):
            most = max((of_run.get(m, {0: None}) for of_run in labels), key=len)
            rows.append([f"accuracy, {labels_name(m, most)}",
                         *(", ".join(number(over_seeds(v)[0]) for v in of_run.get(m, {}).values())
                           for of_run in labels)])
    rows.append(["judge's accuracy, held-out pairs",
                 *(percent(run["judges"], "held_out_accuracy") for run in runs)])
    for m in ("ilr", "dpo"):
        asked = [[percent(run["comparisons"].get(p, {}), "accuracy")
                  for p in rounds_of(run, m).values()] for run in runs]
        rows.append([f"judge's accuracy, {METHODS[m].NAME}'s pairs",
                     *(", ".join(a or "–" for a in of_run) if any(of_run) else ""
                       for of_run in asked)])
    if "dpo" in methods:
        rows.append(["DPO_LR", *(plain(run["settings"].get("DPO_LR", "")) for run in runs)])
    return table(["", *names(runs)], filled(rows)) if filled(rows) else ""
