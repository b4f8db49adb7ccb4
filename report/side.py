"""Several runs side by side on one page: `evaluate.py report RUN1 RUN2 ... --out DIR`.

Runs on different pairs of base models are draws of such pairs. The page has means over the runs,
with one interval for other seeds on the same base models and one for other base models. Runs that
share their base models are no draws, but an ablation: each stands on its own, and against the
first run on the seeds and problems that both have. The runs' folders are read, never written.

`runs` is a list of what `read_runs` returns. Differences are in percentage points.
"""
import os
import re
from pathlib import Path

from core.records import InputError, read_jsonl
from report.claims import contrasts, name_of, points_to_compare
from report.collect import collect, graded_files
from report.methods import METHODS, methods_of, rounds_of
from report.prices import prices, within
from report.statistics import over_seeds, paired, pooled

# The settings that say which base models a run has.
BASES = ("BASE_SEED", "WEAK_MODEL", "STRONG_MODEL", "PRETRAIN", "PRETRAIN_WEAK", "PRETRAINING")


# ---------------------------------------------------------------- reading
def names_of(paths):
    """Names that tell runs apart: the ends of their paths without what all have at the end.
    runs/pair_0/test and runs/pair_1/test are pair_0 and pair_1."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    while len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    depth = next(d for d in range(1, 1 + max(map(len, parts)))
                 if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def read_runs(paths):
    """What `collect` makes of each run (Paths), with its `name`, `commit`, `versions` and `price`.

    Raises InputError for a run that is given twice, a folder that is none, runs that cannot stand
    side by side, and where nothing is graded at all."""
    real = [path.resolve() for path in paths]
    for k, path in enumerate(paths):
        if real.index(real[k]) < k:
            raise InputError(f"{path}: the same run twice")
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no run folder: it has no config.json")
    runs = []
    for path, name in zip(paths, names_of(paths), strict=True):
        data = collect(path)
        config = data["config"]
        runs.append({**data, "name": name, "commit": config.get("commit") or "",
                     "versions": config.get("versions", {}), "price": prices(data)})
    for key, default in (("TASK", ""), ("EVAL", "test")):
        values = [run["settings"].get(key) or default for run in runs]
        for path, value in zip(paths, values, strict=True):
            if value != values[0]:
                raise InputError(f"{path}: {key} is {value}, but {values[0]} in {paths[0]}: such "
                                 "runs cannot stand side by side")
    if not any(run["tests"] for run in runs):
        raise InputError(f"{paths[0]}: no graded answers, there or in the other runs: has a run "
                         "finished a stage?")
    return runs


def folder_for(paths, out):
    """The folder of the page (Path): `out`, or beside the first of two runs. Raises InputError
    where that is no folder, or belongs to a run."""
    names = [name.replace("/", "_") for name in names_of(paths)]
    first = Path(os.path.abspath(paths[0]))
    folder = Path(out) if out else first.parent / "+".join(names)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: expected a folder")
    at = folder.resolve()
    inside = next((path for path in paths if path.resolve() in (at, *at.parents)), None)
    if inside or any(folder.glob("seed_*")):
        raise InputError(f"--out {folder}: that is the folder of a run ({inside or folder}), which "
                         "has a report of its own")
    return folder


def shortened(value):
    """A setting without the folders of this machine: an absolute path keeps its last part."""
    return re.sub(r"(^|[\s=])/(?:[^\s/]+/)+", r"\1…/", str(value))


def differing(runs):
    """{setting or library: [its value in each run]} of those that differ, but for the seeds."""
    found = {}
    for kind in ("settings", "versions"):
        for key in dict.fromkeys(key for run in runs for key in run[kind]):
            values = [run[kind].get(key, "") for run in runs]
            if key != "SEEDS" and len(set(values)) > 1:
                found[key] = [shortened(value) for value in values]
    return found


def are_draws(runs):
    """Whether every run has base models of its own."""
    return len({tuple(run["settings"].get(key) for key in BASES) for run in runs}) == len(runs)


def together(runs):
    """All runs as one `data` of (run, seed) in place of seeds, to choose points from: only rounds
    that every run is to have."""
    planned = [run["settings"].get("ROUNDS", "") for run in runs]
    limit = min((int(n) for n in planned if n.isdigit()), default=None)
    # one run whose labels the weak model did not write is enough to leave that finding out
    unlike = [run for run in runs if run["settings"].get("LABEL_NOISE")
              or run["settings"].get("CLEAN_START") == "1"]
    found = {"tests": {}, "answers": {}, "settings": (unlike or runs)[0]["settings"]}
    for run in runs:
        for kind in ("tests", "answers"):
            for point, by_seed in run[kind].items():
                k = point.rpartition("_")[2]
                if limit is None or not k.isdigit() or int(k) <= limit:
                    of_runs = found[kind].setdefault(point, {})
                    of_runs.update({(run["name"], seed): v for seed, v in by_seed.items()})
    return found


# ---------------------------------------------------------------- comparing
def point_name(point):
    """`name_of`, for every point of a run."""
    return "SFT on gold labels" if point == "gold" else name_of(point)


def title_of(a, b):
    """'ILR minus DPO, round 3' of two points."""
    names = name_of(a), name_of(b)
    ends = [name.partition(" (round ")[2].rstrip(")") for name in names]
    short = [name.partition(" (round ")[0] for name in names]
    if ends[0] and ends[1] in (ends[0], ""):
        return f"{short[0]} minus {short[1]}, round {ends[0]}"
    return " minus ".join(names)


def contrast(runs, title, points):
    """A contrast: {title, runs: {name: {points, per_seed: {seed: difference}, mean, bootstrap,
    student, established}}, mean, within, over, established}. points: of each run, (a point, the
    other) or None. A run that lacks one of them is absent; None where all do."""
    found = {}
    for run, two in zip(runs, points, strict=True):
        try:
            difference = two and paired(run["answers"], *two)
        except InputError as e:
            raise InputError(f"{run['name']}: {e}") from None
        if difference:
            a, b = (run["answers"][point] for point in two)
            seeds = [seed for seed in a if seed in b]
            per_seed = dict(zip(seeds, difference["per_seed"], strict=True))
            found[run["name"]] = {**difference, "per_seed": per_seed, "points": list(two)}
    if not found:
        return None
    over = pooled([list(f["per_seed"].values()) for f in found.values()])
    if not are_draws(runs):     # a mean over them is none over base models
        over = {"mean": None, "within": None, "over": None, "established": False}
    return {"title": title, "runs": found, **over}


def all_contrasts(runs):
    """([(finding, contrast, better)] of the paper's findings, [contrast] of SFT with the weak
    model, of every method with SFT and of ILR with every other, the contrast of ILR with DPO for
    no more comparisons or None). Compared is the last round that both have in some run."""
    data = together(runs)
    methods = methods_of(data)

    def of_all(a, b):
        return contrast(runs, title_of(a, b), [(a, b)] * len(runs))

    found = [(finding, of_all(a, b), better) for finding, a, b, better in contrasts(data)]
    wanted = [("sft", "weak"), *((m, "sft") for m in methods),
              *(("ilr", m) for m in methods if m != "ilr" and "ilr" in methods)]
    points = [points_to_compare(data, a, b) for a, b in wanted]
    every = [of_all(*two) for two in points if two]
    equal = contrast(runs, "ILR minus DPO, no more comparisons", equal_points(runs, data))
    return [row for row in found if row[1]], [c for c in every if c], equal


def equal_points(runs, data):
    """[(ILR's last round, DPO's last that asked for no more comparisons; where none did, SFT) or
    None where a price or a point is missing, of each run]. data: of `together`."""
    last = max(rounds_of(data, "ilr"), default=0)
    found = []
    for run in runs:
        point, points = rounds_of(run, "ilr").get(last), None
        if point and rounds_of(run, "dpo"):
            k = within(run, run["price"], "dpo", "asked", run["price"][point]["asked"])
            points = None if k is None else (point, f"dpo_{k}" if k else "sft")
        found.append(points)
    return found


# ---------------------------------------------------------------- the others against the first
def same_problems(run, first, seed):
    """Whether the test problems of a seed that have the same ids are the same texts in both runs.
    Read is the first graded file: all points of a seed answer the same problems."""
    texts = []
    for data in (run, first):
        files = graded_files(data["run"] / f"seed_{seed}")[:1]
        texts.append({r["id"]: (r.get("prompt"), r.get("reference"))
                      for path in files for r in read_jsonl(path)})
    return all(texts[0][i] == texts[1][i] for i in texts[0].keys() & texts[1].keys())


def against(run, first):
    """{point: {first, accuracy (percent, over the seeds that both have), and what `paired` finds
    of this run minus the first}} of the points that both have on the same problems."""
    found = {}
    common = [seed for seed in first["seeds"] if seed in run["seeds"]
              and same_problems(run, first, seed)]
    order = ["weak", "sft", *(p for m in METHODS for p in rounds_of(first, m).values()), "gold"]
    for point in dict.fromkeys([*order, *first["answers"]]):
        both = [s for s in common if s in run["answers"].get(point, {})
                and s in first["answers"].get(point, {})]
        sides = {name: {s: data["answers"][point][s] for s in both}
                 for name, data in (("run", run), ("first", first)) if both}
        try:
            difference = paired(sides, "run", "first")
        except InputError:      # other problems: another TEST
            continue
        if difference:
            accuracies = {name: over_seeds({s: data["tests"][point][s] for s in both})[0]
                          for name, data in (("accuracy", run), ("first", first))}
            found[point] = {"seeds": both, **accuracies, **difference}
    return found


def numbers(runs, found, every, equal, versus):
    """What report.json holds: names in place of paths. The arguments are of `all_contrasts`, and
    {run: what `against` found}."""
    kept = ("name", "commit", "seeds", "n_test", "tests", "labels")
    return {"runs": [{k: run[k] for k in kept} for run in runs], "differ": differing(runs),
            "own_base_models": are_draws(runs),
            "findings": [{"finding": finding, "better": better, **c}
                         for finding, c, better in found],
            "contrasts": every, "equal_comparisons": equal, "against_first": versus}
