"""Grade completions; a run folder -> the paper-style table and figures.

    python evaluate.py grade --task arithmetic --data answers.jsonl [--out graded.jsonl]     # prints accuracy, 95% interval
    python evaluate.py pick --task arithmetic --data s1.jsonl s2.jsonl --models m1 m2 --accuracy 0.5 --out labeler
    python evaluate.py report runs/arithmetic                                           # report.md, report.json, 2 figures
    python evaluate.py config runs/x TASK=arithmetic ROUNDS=3 ...                       # run_ilr.sh: write or check config.json

The report reads graded answers, summaries and times of every seed that is there; a number that a run has not produced is
left blank. Intervals: over seeds, Student's t on the seeds' means (each the mean of its retrains); for one seed, Wilson's
interval over problems, which knows nothing of other seeds and retrains.
"""
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path

from tasks import (TASKS, InputError, get_task, make_parser, read_jsonl, refuse_existing, run_stage, share, warm, write_json, write_jsonl,
                   write_text)

MAY_GROW = ("ROUNDS", "SEEDS", "METHODS", "RETRAINS")     # settings that add work and change none
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom (standard table); beyond 30 the normal's 1.96.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


# ---------------------------------------------------------------- statistics
def wilson(mean, n):
    """95% interval (low, high) of a proportion `mean` of n problems (Wilson 1927)."""
    z = 1.959964
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(values):
    """(mean, half width of Student's 95% interval) of independent values; the half width is None for fewer than two."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, (T975[n - 2] if n - 2 < len(T975) else 1.96) * sd / math.sqrt(n)


# ---------------------------------------------------------------- grade
def grade(args):
    task = get_task(args.task)
    if args.out:
        refuse_existing(args.out)
    rule = getattr(task, "grade_release", None) if args.exact_release else task.grade
    if not rule:
        raise InputError(f"--exact-release: the release has no task {args.task}")
    records = read_jsonl(args.data, ("id", "completion", "reference"), ("id", "sample"))
    warm(task, records)
    graded = [{**r, "correct": rule(r)} for r in records]
    if args.out:
        write_jsonl(args.out, graded)
    mean = sum(r["correct"] for r in graded) / len(graded)
    low, high = wilson(mean, len(graded))
    by_category = {}
    for r in graded:
        by_category.setdefault(str(r.get("category") or ""), []).append(r["correct"])
    print(f"{args.data}: {getattr(task, 'METRIC', 'accuracy')} {mean:.1%} of {len(graded)}, 95% interval {low:.1%} to {high:.1%}"
          + "".join(f"; {name} {sum(v) / len(v):.1%} of {len(v)}" for name, v in sorted(by_category.items()) if name))


def pick(args):
    """Link --out to the model whose samples' accuracy is nearest to the asked one: supervision as unreliable as asked for,
    whatever the hardware or the base model make of a training run."""
    task = get_task(args.task)
    refuse_existing(args.out)
    if len(args.data) != len(args.models):
        raise InputError(f"--data has {len(args.data)} files for {len(args.models)} --models")
    for model in args.models:
        if not Path(model).is_dir():
            raise InputError(f"--models {model}: no such folder")
    shares = []
    for path in args.data:
        records = read_jsonl(path, ("id", "completion", "reference"), ("id", "sample"))
        warm(task, records)
        shares.append(sum(map(task.grade, records)) / len(records))
    model = args.models[min(range(len(shares)), key=lambda i: abs(shares[i] - args.accuracy))]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(os.path.relpath(Path(model).resolve(), out.parent.resolve()))
    print(f"{args.out}: {model}, of samples {', '.join(f'{s:.1%}' for s in shares)} correct the nearest to {args.accuracy:.0%}")


# ---------------------------------------------------------------- config
def config(args):
    """Write config.json, or refuse a folder whose config differs, naming the difference."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    sources = sorted([*here.glob("*.py"), *here.glob("tasks/*.py"), here / "run_ilr.sh"])
    now = {"settings": dict(s.partition("=")[::2] for s in args.settings),
           "code": hashlib.sha256(b"".join(p.read_bytes() for p in sources if p.name != "evaluate.py")).hexdigest()[:12],
           "commit": git.stdout.strip() or None,
           "versions": {"python": platform.python_version(), **{
               name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}}}
    path = Path(args.run) / "config.json"
    if path.exists() and any(Path(args.run).glob("seed_*/*/*")):        # else nothing was made under the old settings
        flat = [{**c.get("settings", {}), "code": c.get("code"), **c.get("versions", {})} for c in (load_json(path), now)]
        changed = [f"{k} was {flat[0].get(k)!r}, is {flat[1].get(k)!r}" for k in {**flat[0], **flat[1]}
                   if flat[0].get(k) != flat[1].get(k) and k not in MAY_GROW]
        if changed:
            raise InputError(f"{args.run} was begun under another configuration: {'; '.join(changed)}. "
                             "Set OUT to a new folder, or restore what changed")
    write_json(path, now)


# ---------------------------------------------------------------- report: what a run folder says
def correct_share(path):
    rows = read_jsonl(path, ("correct",), ())
    return sum(r["correct"] for r in rows) / len(rows), len(rows)


def load_json(path):
    """The object in a JSON file, {} where there is none."""
    try:
        value = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def collect(run):
    """What the files of a run say: `tests` and `labels` as {point: {seed: [share correct of each retrain]}}, summaries and
    the number of problems in a test file."""
    tests, labels, comparisons, refinements, judges, n_test = {}, {}, {}, {}, {}, 0
    seeds = sorted((p for p in run.glob("seed_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    for folder in seeds:
        seed = int(folder.name[5:])
        for path in sorted(folder.glob("*/eval_*.graded.jsonl"), key=lambda p: int(p.name.split("_")[1].split(".")[0])):
            right, n_test = correct_share(path)
            tests.setdefault(path.parent.name, {}).setdefault(seed, []).append(right)
        for path in folder.glob("*/labels.graded.jsonl"):
            labels.setdefault(path.parent.name, {})[seed] = [correct_share(path)[0]]
        for path in folder.glob("*/comparisons.jsonl.summary"):
            comparisons.setdefault(path.parent.name, {})[seed] = load_json(path)
        for pattern in ("labels", "preferences"):
            for path in folder.glob(f"*/{pattern}.jsonl.summary"):
                refinements.setdefault(path.parent.name, {})[seed] = load_json(path)
        if (folder / "judge/model/judge.json").exists():
            judges[seed] = load_json(folder / "judge/model/judge.json")
    return dict(seeds=[int(p.name[5:]) for p in seeds], tests=tests, labels=labels, comparisons=comparisons,
                refinements=refinements, judges=judges, n_test=n_test)


def points_of(data, method):
    """The points of a method in order, {round: name}: the SFT start is round 0."""
    rounds = {int(p.rpartition("_")[2]): p for p in data["tests"] if p.rpartition("_")[0] == method}
    return dict(sorted({**({0: "sft"} if "sft" in data["tests"] else {}), **rounds}.items()))


def labels_of(data, methods):
    """{method: {round: {seed: [share correct]}}} of the methods that refine labels; round 0 is what SFT trains on."""
    start = data["labels"].get("clean") or data["labels"].get("weak", {})
    return {m: {0: start, **{k: data["labels"][p] for k, p in points_of(data, m).items() if p in data["labels"]}}
            for m in [m for m in methods if m != "dpo"] or ["ilr"]} if start else {}


def methods_of(data):
    return sorted({p.rpartition("_")[0] for p in data["tests"] if p.rpartition("_")[2].isdigit()},
                  key=lambda m: (m != "ilr", m))


def seed_means(by_seed):
    """{seed: mean of its retrains}: retrains share their data, so only seeds count as independent."""
    return {seed: sum(shares) / len(shares) for seed, shares in by_seed.items()}


def over_seeds(by_seed):
    """`mean_interval` of the seeds' means, in percent."""
    return mean_interval([100 * v for v in seed_means(by_seed).values()])


def cell(by_seed, n=0):
    """'72.7 ± 2.1' in percent from {seed: [shares]}; one seed: Wilson's interval over n problems."""
    mean, half = over_seeds(by_seed)
    if half is not None:
        return f"{mean:.1f} ± {half:.1f}"
    if not n:
        return f"{mean:.1f}"
    low, high = wilson(mean / 100, n)
    return f"{mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def paired(tests, a, b):
    """Difference a - b of two points per seed, in points: ("mean ± half width", "per seed", mean, whether
    the interval excludes 0, None for a single seed); None where no seed has both."""
    first, second = seed_means(tests.get(a, {})), seed_means(tests.get(b, {}))
    differences = [100 * (first[s] - second[s]) for s in first if s in second]
    if not differences:
        return None
    mean, half = mean_interval(differences)
    return (f"{mean:+.1f}" + (f" ± {half:.1f}" if half is not None else ""), ", ".join(f"{d:+.1f}" for d in differences), mean,
            None if half is None else abs(mean) > half)


def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def average(by_seed, key, percent=True):
    values = [s[key] for s in by_seed.values() if s.get(key) is not None]
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f}" if percent else f"{mean:,.0f}"


def metric_of(settings):
    return getattr(get_task(settings["TASK"]), "METRIC", "accuracy") if settings.get("TASK") in TASKS else "accuracy"


def write_report(run, data, times, settings):
    tests, n, seeds = data["tests"], data["n_test"], data["seeds"]
    methods = methods_of(data)
    most = max((max(points_of(data, m)) for m in methods), default=0)
    metric = metric_of(settings)
    retrains = max((len(v) for by_seed in tests.values() for v in by_seed.values()), default=0)
    interval = ("± is Student's 95% interval over the seeds" if len(seeds) > 1 else
                "brackets: Wilson's 95% interval over problems, blind to seeds and retrains")
    text = [f"# {settings.get('TASK', run.name)}: ILR and DPO under unreliable supervision\n",
            f"{len(seeds)} seed(s): {', '.join(map(str, seeds))}. {metric.capitalize()} in percent on {n:,} "
            f"{settings.get('EVAL', 'test')} problems a seed, mean of up to {retrains} retrains a point; {interval}.\n"]
    verdicts = {None: "", True: " The interval excludes 0.", False: " The interval includes 0: not established."}
    last = {m: list(points_of(data, m).values())[-1] for m in methods}
    for m in methods:
        if found := paired(tests, last[m], "sft"):
            text.append(f"- {m.upper()} after round {last[m].rpartition('_')[2]} minus SFT: **{found[0]}** points.{verdicts[found[3]]} "
                        f"Per seed: {found[1]}.")
    if "dpo" in methods and "sft" in tests and retrains > 1:
        start = {"start": {seed: shares[:1] for seed, shares in tests["sft"].items()}}
        if found := paired({**tests, **start}, last["dpo"], "start"):
            text.append(f"- DPO starts from SFT's first training: its last round minus that one alone {found[0]} points.")
    if {"ilr", "dpo"} <= set(methods):
        gains = {p: paired(tests, p, "sft") for k, p in points_of(data, "dpo").items() if k}
        best = max(gains, key=lambda p: gains[p][2] if gains[p] else -math.inf)
        for p, what in ((last["dpo"], "its last round"), (best, f"its best round on these problems, {best[4:]}, a choice in DPO's favor")):
            if found := paired(tests, last["ilr"], p):
                text.append(f"- ILR's last round minus DPO's ({what}): {found[0]} points.{verdicts[found[3]]}")
    text += [f"\n## {metric.capitalize()} by round\n",
             table(["method", "SFT", *(f"round {k}" for k in range(1, most + 1))],
                   [[m.upper(), *(cell(tests[p], n) if (p := points_of(data, m).get(k)) else "" for k in range(most + 1))]
                    for m in methods]),
             table(["beside it", metric], [[name, cell(tests[p], n)] for p, name in (
                 ("weak", "weak model alone"), ("gold", "ceiling: SFT on gold labels of the same problems")) if p in tests]),
             f"![{metric} per round](test_accuracy.png)\n"]
    if series := labels_of(data, methods):
        text += ["## Label accuracy by round\n",
                 table(["", *(f"round {k}" for k in range(1 + max(map(max, series.values()))))],
                       [[f"{m.upper()}'s labels", *(cell(by_seed) for _, by_seed in sorted(rounds.items()))] for m, rounds in series.items()]),
                 "![label accuracy per round](label_accuracy.png)\n"]
    text += ["## The judge\n", *([f"On held-out pairs of its own kind: accuracy {average(data['judges'], 'held_out_accuracy')}%, "
                                  f"order-flip rate {average(data['judges'], 'held_out_flip_rate')}%.\n"] if data["judges"] else []),
             "On the pairs it was really asked about:\n",
             table(["", "comparisons asked", "accuracy on pairs with one right side (%)", "order-flip rate (%)",
                    "position bias (%)", "replaced labels / pairs kept", "share of all (%)", "share of disagreements (%)",
                    "precision of replacement (%)"],
                   [[p, average(c, "asked", False), average(c, "accuracy"), average(c, "flip_rate"),
                     average(c, "position_bias"),
                     *(average(data["refinements"].get(p, {}), k, k != "kept") for k in
                       ("kept", "share_of_all", "share_of_asked", "precision"))]
                    for m in methods for p in points_of(data, m).values() for c in [data["comparisons"].get(p, {})] if c])]
    total = {}
    for m in methods:
        rounds = [data["comparisons"][p] for p in points_of(data, m).values() if p in data["comparisons"]]
        total[m] = sum(s["asked"] for c in rounds for s in c.values()) / max(1, len(seeds))
    text.append("Comparisons used per seed, all rounds: " + ", ".join(f"{m.upper()} {v:,.0f}" for m, v in total.items()) + ".\n")
    text += ["## Seconds per stage\n", "Wall time as it was, mean over seeds; stages of two lanes run side by side.\n",
             table(["stage", "seconds"], [[k, f"{sum(v) / len(v):.0f}"] for k, v in times.items()])]
    write_text(run / "report.md", "\n".join(text))


# ---------------------------------------------------------------- report: figures
STYLES = {"ilr": ("#1f5fa8", "o", "-"), "dpo": ("#c2571a", "s", "--")}
STYLES_ELSE = "#3a7d44", "^", "-."


def draw(path, title, ylabel, series, lines):
    """One figure: series (name, style, {round: {seed: [values]}}), horizontal lines (name, value), percent."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for k, (name, (color, marker, dash), rounds) in enumerate(series):
        means, halves, shift = [], [], 0.05 * (2 * k + 1 - len(series))       # side by side, so that no bar hides another
        for x, by_seed in sorted(rounds.items()):
            per_seed = [100 * v for v in seed_means(by_seed).values()]
            mean, half = over_seeds(by_seed)
            means.append(mean)
            halves.append(half or 0)
            axes.plot([x + shift + 0.04] * len(per_seed), per_seed, marker, color=color, ms=3, alpha=0.45, mew=0)
        axes.errorbar([x + shift for x in sorted(rounds)], means, halves, label=name, color=color, marker=marker, ls=dash, capsize=3, lw=1.8)
    for (name, value), (dash, shade) in zip(lines, ((":", "0.35"), ("-.", "0.55"))):
        axes.axhline(value, color=shade, ls=dash, lw=1.2, label=name)
    axes.set_xticks(range(1 + max((k for _, _, rounds in series for k in rounds), default=0)))
    axes.set(xlabel="round (0: before any refinement)", ylabel=ylabel, title=title)
    axes.grid(axis="y", alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(max(-2, min(low, high - 10)), min(102, max(high, low + 10)))      # never finer than a point can be
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path.with_suffix(".writing.png"), dpi=150, metadata={"Software": None})
    plt.close(figure)
    path.with_suffix(".writing.png").replace(path)


def report(args):
    run = Path(args.run)
    data = collect(run)
    if not data["tests"]:
        raise InputError(f"{run}: no graded answers in {run}/seed_*/*/: has a run finished a stage there?")
    times = {}
    for row in read_jsonl(run / "times.jsonl", ("stage", "seconds"), ()) if (run / "times.jsonl").exists() else []:
        times.setdefault(row["stage"].partition("/")[2] if row["stage"].startswith("seed_") else row["stage"], []).append(row["seconds"])
    settings = load_json(run / "config.json").get("settings", {})
    seeds = f"mean, 95% interval of {len(data['seeds'])} seeds" if len(data["seeds"]) > 1 else f"seed {data['seeds'][0]}"
    methods = methods_of(data)
    split, metric = settings.get("EVAL", "test"), metric_of(settings)
    draw(run / "test_accuracy.png", f"{split.capitalize()} {metric} per round ({seeds})", f"{split} {metric} (%)",
         [(m.upper(), STYLES.get(m, STYLES_ELSE), {k: data["tests"][p] for k, p in points_of(data, m).items()}) for m in methods]
         or [("SFT", STYLES["ilr"], {0: data["tests"]["sft"]} if "sft" in data["tests"] else {})],
         [(name, over_seeds(data["tests"][p])[0]) for p, name in (("weak", "weak model alone"), ("gold", "ceiling (gold labels)")) if p in data["tests"]])
    if series := labels_of(data, methods):
        draw(run / "label_accuracy.png", f"Correct training labels per round ({seeds})", "label accuracy (%)",
             [(f"{m.upper()}'s labels", STYLES.get(m, STYLES_ELSE), rounds) for m, rounds in series.items()], [])
    write_report(run, data, times, settings)
    write_json(run / "report.json", {k: data[k] for k in ("seeds", "n_test", "tests", "labels", "judges", "comparisons", "refinements")})
    print((run / "report.md").read_text().partition("## Label")[0])
    print(f"{run}/report.md, report.json, test_accuracy.png" + (", label_accuracy.png" if series else ""))


def main(args):
    {"grade": grade, "pick": pick, "report": report, "config": config}[args.command](args)


def parser():
    p = make_parser(__doc__, prog="evaluate.py")
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("grade", help="accuracy of a file of completions")
    g.add_argument("--task", required=True)
    g.add_argument("--data", required=True, help="records with id, completion, reference")
    g.add_argument("--out", help="also write the records with `correct`")
    g.add_argument("--exact-release", action="store_true", help="by the raw rule of the paper's release")
    k = commands.add_parser("pick", help="the model whose samples are nearest to an accuracy")
    k.add_argument("--task", required=True)
    k.add_argument("--data", required=True, nargs="+", help="samples with id, completion, reference, a file for each of --models")
    k.add_argument("--models", required=True, nargs="+")
    k.add_argument("--accuracy", required=True, type=share, help="a share")
    k.add_argument("--out", required=True, help="link to the model's folder")
    r = commands.add_parser("report", help="a run folder -> report.md, report.json and figures")
    r.add_argument("run", metavar="RUN_DIR")
    c = commands.add_parser("config", help="write or check RUN_DIR/config.json")
    c.add_argument("run", metavar="RUN_DIR")
    c.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
