"""What finished runs say together: means over seeds and over runs, lines through points, tables.

A seed is a dict with `run`, the number of its run. A run counts as one pair of base models.
"""
import sys
from pathlib import Path

from _bench import about

from report.statistics import mean_interval

DRAWS, FEWEST = 2000, 5      # of the bootstrap; of fewer runs too many draws are one run's


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def dig(found, *keys):
    """found[key][key]..., or None where it ends."""
    for key in keys:
        found = found.get(key) if found else None
    return found


def over(seeds, pick, scale=1):
    """{seeds, runs: (mean, half width or None, number), per_seed} of pick(seed) times `scale`,
    or None where no seed has it."""
    by_run = {}
    for s in seeds:
        if (value := pick(s)) is not None:
            by_run.setdefault(s["run"], []).append(scale * value)
    if not by_run:
        return None
    values = [v for of_run in by_run.values() for v in of_run]
    means = [mean(of_run) for of_run in by_run.values()]
    return {"seeds": (*mean_interval(values), len(values)),
            "runs": (*mean_interval(means), len(means)), "per_seed": values}


def at(seeds, *keys, scale=1):
    """`over` of what stands at these keys of a seed."""
    return over(seeds, lambda s: dig(s, *keys), scale)


def fit(seeds, pick, within=False):
    """{slope, correlation: (value, low or None, high or None), points} of the least-squares line
    through the (x, y) that pick(seed) lists; None for fewer than three points, or where the line
    is not defined. within: of each seed less its means."""
    import numpy as np
    runs = {}
    for s in seeds:
        if points := pick(s):
            points = np.array(points, float)
            runs.setdefault(s["run"], []).append(points - points.mean(0) * within)

    def line(groups):
        x, y = np.concatenate(groups).T
        x, y = x - x.mean(), y - y.mean()
        with np.errstate(invalid="ignore", divide="ignore"):
            return x @ y / (x @ x), x @ y / np.sqrt((x @ x) * (y @ y))
    runs, rng, ends = list(runs.values()), np.random.default_rng(0), [(None, None)] * 2
    every = [g for run in runs for g in run]
    if sum(map(len, every)) < 3:
        return None
    found = [float(v) for v in line(every)]
    if not np.isfinite(found).all():
        return None
    if len(runs) >= FEWEST:
        drawn = [line([g for k in rng.integers(len(runs), size=len(runs)) for g in runs[k]])
                 for _ in range(DRAWS)]
        ends = np.nanpercentile(drawn, (2.5, 97.5), axis=0).T.tolist()
    return {"slope": (found[0], *ends[0]), "correlation": (found[1], *ends[1]),
            "points": sum(map(len, every))}


def rows(names, *columns):
    """{words: [column(key) of each column]} of {key: words}, without rows that have nothing."""
    found = {words: [column(key) for column in columns] for key, words in names.items()}
    return {words: row for words, row in found.items() if any(row)}


def cells(found, digits):
    """The two cells of `over`, seeds and runs, or of `fit`, slope and correlation."""
    if not found:
        return ["", ""]
    if "slope" in found:
        return [f"{v:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")
                for v, low, high in (found["slope"], found["correlation"])]
    return [f"{v:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")
            for v, half, _ in (found["seeds"], found["runs"])]


def table(columns, found, digits=1):
    """Lines of Markdown of {row: [`over` or `fit`, ...]}; each takes two of the columns."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for words, row in found.items():
        lines.append(f"| {words} | " + " | ".join(c for one in row for c in cells(one, digits))
                     + " |")
    return [*lines, ""]


def doubled(*names):
    return [f"{name}, {kind}" for name in names for kind in ("seeds", "base pairs")]


# ---------------------------------------------------------------- which runs, which command
def below_runs(path):
    """A path from its folder `runs` on, else its last two parts: what no machine's path is in."""
    parts = Path(path).resolve().parts
    return "/".join(parts[parts.index("runs"):] if "runs" in parts else parts[-2:])


def where():
    """`about()`, its command without the paths of this machine."""
    words = [below_runs(w) if Path(w).is_absolute() else w for w in sys.argv]
    return {**about(), "command": " ".join(["python", *words])}
