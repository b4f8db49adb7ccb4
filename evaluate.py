"""Grade completions; a run folder -> one page like a paper's results section: claims, table, figures, price, caveats.

    python evaluate.py grade --task arithmetic --data answers.jsonl [--out graded.jsonl]     # prints accuracy, 95% interval
    python evaluate.py pick --task arithmetic --data s1.jsonl s2.jsonl --models m1 m2 --accuracy 0.5 --out labeler
    python evaluate.py report runs/arithmetic                                           # report.md, .html, .json, figures
    python evaluate.py config runs/x TASK=arithmetic ROUNDS=3 ...                       # run_ilr.sh: write or check config.json

The report reads graded answers, summaries, prices and times of every seed that is there; a number that a run has not
produced is left blank. Intervals in tables: over seeds, Student's t on the seeds' means (each the mean of its retrains); for
one seed, Wilson's over problems. "A beats B" needs a paired bootstrap over seeds and problems, and Student's t, to exclude 0.
"""
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from tasks import (TASKS, InputError, _figures, get_task, make_parser, read_json, read_jsonl, refuse_existing, run_stage, share, warm,
                   write_json, write_jsonl, write_text)
from tasks._methods import FINDINGS, METHODS, PRICES, labels_of, last_of, methods_of, number, points_of, prices, within
from tasks._statistics import over_seeds, paired, reliability, seed_means, widest, wilson

MAY_GROW = ("ROUNDS", "SEEDS", "METHODS", "RETRAINS")      # settings that add work and change none
REPORTING = ("evaluate.py", "_figures.py", "_methods.py", "_statistics.py")  # sources that only read what a run made


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
           "code": hashlib.sha256(b"".join(p.read_bytes() for p in sources if p.name not in REPORTING)).hexdigest()[:12],
           "commit": git.stdout.strip() or None,
           "versions": {"python": platform.python_version(), **{
               name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}}}
    path = Path(args.run) / "config.json"
    if path.exists() and any(Path(args.run).glob("seed_*/*/*")):        # else nothing was made under the old settings
        flat = [{**c.get("settings", {}), "code": c.get("code"), **c.get("versions", {})} for c in (read_json(path), now)]
        changed = [f"{k} was {flat[0].get(k)!r}, is {flat[1].get(k)!r}" for k in {**flat[0], **flat[1]}
                   if flat[0].get(k) != flat[1].get(k) and k not in MAY_GROW]
        if changed:
            raise InputError(f"{args.run} was begun under another configuration: {'; '.join(changed)}. "
                             "Set OUT to a new folder, or restore what changed")
        for k in [k for k in MAY_GROW if all(k in settings for settings in flat)]:      # a start that asks for less takes nothing back
            values = f"{flat[0][k]} {flat[1][k]}".split()
            now["settings"][k] = " ".join(dict.fromkeys(values)) if k in ("SEEDS", "METHODS") else str(max(map(int, values)))
    write_json(path, now)


# ---------------------------------------------------------------- report: what a run folder says
def collect(run):
    """What the files of a run say: `answers` as {point: {seed: [{id: correct} of each retrain]}}, `tests` and `labels` as
    {point: {seed: [share correct of each retrain]}}, summaries as {point: {seed: summary}}, seconds as {stage: its first time}."""
    answers, labels, comparisons, refinements, seconds = {}, {}, {}, {}, {}
    seeds = dict(sorted((int(p.name[5:]), p) for p in run.glob("seed_*") if p.name[5:].isdigit()))
    for seed, folder in seeds.items():
        for path in sorted(folder.glob("*/eval_*.graded.jsonl"), key=lambda p: (p.parent.name, int(p.name.split("_")[1].split(".")[0]))):
            answers.setdefault(path.parent.name, {}).setdefault(seed, []).append({r["id"]: r["correct"] for r in read_jsonl(path, ("id", "correct"))})
        for path in sorted(folder.glob("*/labels.graded.jsonl")):
            rows = read_jsonl(path, ("correct",), ())
            labels.setdefault(path.parent.name, {})[seed] = [sum(r["correct"] for r in rows) / len(rows)]
        for name, summaries in (("comparisons", comparisons), ("labels", refinements), ("preferences", refinements)):
            for path in sorted(folder.glob(f"*/{name}.jsonl.summary")):
                summaries.setdefault(path.parent.name, {})[seed] = read_json(path)
    for row in read_jsonl(run / "times.jsonl", ("stage", "seconds"), ()) if (run / "times.jsonl").exists() else []:
        seconds.setdefault(row["stage"], row["seconds"])        # of several retrains the first, model_1
    tests = {p: {s: [sum(c.values()) / len(c) for c in retrains] for s, retrains in by_seed.items()} for p, by_seed in answers.items()}
    judges = {seed: judge for seed, folder in seeds.items() if (judge := read_json(folder / "judge/model/judge.json"))}
    settings = read_json(run / "config.json").get("settings", {})
    task = get_task(settings["TASK"]) if settings.get("TASK") in TASKS else None
    return dict(run=run, seeds=list(seeds), answers=answers, tests=tests, labels=labels, comparisons=comparisons,
                refinements=refinements, judges=judges, seconds=seconds, settings=settings, metric=getattr(task, "METRIC", "accuracy"),
                n_test=max((len(c) for by_seed in answers.values() for retrains in by_seed.values() for c in retrains), default=0))


# ---------------------------------------------------------------- report: claims
def claims(data):
    """The comparisons of the report, `paired` and named: last rounds against SFT, ILR's against the others' and DPO's best, DPO's
    against DPO that reads its judge otherwise."""
    last = last_of(data)
    names = {m: f"{METHODS[m][0]} (round {k})" for m, (k, _) in last.items()}
    wanted = [(names[m], last[m][1], "SFT", "sft") for m in last]
    if "ilr" in last:
        wanted += [(names["ilr"], last["ilr"][1], names[m], last[m][1]) for m in last if m != "ilr"]
    if {"ilr", "dpo"} <= set(last):
        best = max((k for k in points_of(data, "dpo") if k), key=lambda k: (over_seeds(data["tests"][f"dpo_{k}"])[0], k))
        if best != last["dpo"][0]:
            wanted.append((names["ilr"], last["ilr"][1], f"DPO (round {best}, its best on these problems, a choice in DPO's favor)", f"dpo_{best}"))
    if "dpo" in last:
        wanted += [(names["dpo"], last["dpo"][1], names[m], last[m][1]) for m in ("dpo-release", "dpo-coin") if m in last]
    return [{"a": a, "b": b, **found} for a, point, b, other in wanted if (found := paired(data["answers"], point, other))]


def sentence(claim):
    """A claim in words: the winner first where it is established, else the difference as it was asked for."""
    sign = -1 if claim["established"] and claim["mean"] < 0 else 1
    a, b = (claim["a"], claim["b"])[::sign]
    what = (f"**{a} beats {b} by {abs(claim['mean']):.1f} points**" if claim["established"] else
            f"{a} against {b}: {claim['mean']:+.1f} points, not established")
    intervals = ", ".join("{} {:+.1f} to {:+.1f}".format(name, *sorted(sign * x for x in claim[key]))
                          for key, name in (("bootstrap", "bootstrap"), ("student", "Student's t")) if claim[key])
    seeds = f"; by seed {', '.join(f'{sign * d:+.1f}' for d in claim['per_seed'])}" if len(claim["per_seed"]) > 1 else ""
    return f"- {what} ({intervals}{seeds})."


def findings(data):
    """[(what a finding says, its difference here, a verdict)] of those that the run can speak about: last rounds, the same
    intervals as the claims'."""
    settings = data.get("settings", {})
    weak = {} if settings.get("LABEL_NOISE") or settings.get("CLEAN_START") == "1" else {"weak": "weak"}     # who else wrote, or sorted, the labels?
    last = {"sft": "sft", **weak, **{m: point for m, (_, point) in last_of(data).items()}}
    rows = []
    for what, a, b, better in FINDINGS:
        if found := a in last and b in last and paired(data["answers"], last[a], last[b]):
            low, high = widest(found)
            rows.append((what, f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f})",
                         ("not established" if better else "no gain established") if not found["established"] else
                         "holds" if better == (found["mean"] > 0) else "does not hold"))
    return rows


# ---------------------------------------------------------------- report: the page
def cell(by_seed, n=0):
    """'72.7 ± 2.1' in percent from {seed: [shares]}; one seed: Wilson's interval over n problems."""
    mean, half = over_seeds(by_seed)
    if half is not None:
        return f"{mean:.1f} ± {half:.1f}"
    if not n:
        return f"{mean:.1f}"
    low, high = wilson(mean / 100, n)
    return f"{mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def average(by_seed, key, percent=True, error=False):
    """A summary's number, mean over the seeds that have it; error: 1 minus it."""
    values = [1 - s[key] if error else s[key] for s in by_seed.values() if s.get(key) is not None]
    mean = sum(values) / max(1, len(values))
    return "" if not values else f"{100 * mean:.1f}" if percent else f"{mean:,.0f}"


def supervision(data):
    """The table "How unreliable was the supervision": a row per seed and their mean; several numbers in a cell: by round."""
    labels = {s: {"correct": share} for s, (share,) in labels_of(data).get("ilr", {}).get(0, {}).items()}
    columns = [("label error", [labels], "correct", True), ("judge error, held-out pairs", [data["judges"]], "held_out_accuracy", True),
               ("order flips, held-out pairs", [data["judges"]], "held_out_flip_rate", False)]
    for m in ("ilr", "dpo"):
        points = [p for k, p in points_of(data, m).items() if k]
        columns += [(f"{what}, {METHODS[m][0]}", [data[kind].get(p, {}) for p in points], key, error) for what, kind, key, error in (
            ("judge error", "comparisons", "accuracy", True), ("order flips", "comparisons", "flip_rate", False),
            ("precision", "refinements", "precision", False), ("recall", "refinements", "recall", False))]
    columns = [c for c in columns if any(average(by_seed, c[2]) for by_seed in c[1])]
    groups = [(str(s), [s]) for s in data["seeds"]] + ([("mean", data["seeds"])] if len(data["seeds"]) > 1 else [])
    return table(["seed", *(c[0] for c in columns)], [[name, *(
        ", ".join(average({s: v for s, v in by_seed.items() if s in seeds}, key, error=error) or "–" for by_seed in rounds)
        for _, rounds, key, error in columns)] for name, seeds in groups]) if columns else ""


def caveats(data):
    """What to know before trusting the page further than it goes, as far as the run folder says it."""
    settings, tests, n = data["settings"], data["tests"], len(data["seeds"])
    trainings = {len(v) for by_seed in tests.values() for v in by_seed.values()}
    first = {s: retrains[:1] for s, retrains in data["answers"].get("sft", {}).items()}
    unused = ["WEAK_ACCURACY"] * bool(settings.get("LABEL_NOISE")) + ["JUDGE_ACCURACY"] * (settings.get("JUDGE", "trained") != "trained")
    dialed = [what.format(float(settings[key])) for key, what in (
        ("WEAK_ACCURACY", "the demonstrator is the checkpoint whose samples come nearest to {:.0%} right"),
        ("JUDGE_ACCURACY", "the judge's training stops at {:.0%} of its stopping pairs"),
        ("JUDGE_FLIPS", "{:.0%} of the judge's answers are turned round"), ("LABEL_NOISE", "{:.0%} of the demonstrations are made wrong, the others references"))
        if (float(settings.get(key) or 0) > 0 or key == "LABEL_NOISE" and settings.get(key)) and key not in unused]
    said = ["One seed, one draw of data, weak model and judge: nothing here says what another would give." if n == 1 else
            f"{n} seeds, each with data, a weak model and a judge of its own."
            + (" They are few: a bootstrap over them is too narrow, and Student's t leans on the normal." if n < 10 else "")]
    said += [what for key, value, what in (
        ("TASK", "arithmetic", "All seeds share one pair of base models, trained here: no interval says anything of other base models."),
        ("JUDGE", "oracle", "The judge is an oracle, which reads the references."),
        ("CLEAN_START", "1", "Labels that are wrong by their references were dropped before SFT."),
        ("EVAL", "validation", "These are validation problems, on which settings may have been chosen.")) if settings.get(key) == value]
    if dialed:
        said.append(f"Supervision is dialed: {'; '.join(dialed)}. How unreliable it came out is a setting, not a finding.")
    if (loss := settings.get("DPO_LOSS") or "sigmoid") != "sigmoid":
        said.append(f"DPO, wherever it says so, is trained with the loss {loss}.")
    if missing := [f"{p} has {len(tests[p])}" for p in sorted(tests) if len(tests[p]) < n]:
        said.append(f"Not every point has all {n} seeds: {', '.join(missing)}.")
    if trainings == {1}:
        said.append("One training a point: how much retraining alone would change a number is not measured.")
    elif "dpo" in methods_of(data) and (found := paired({**data["answers"], "start": first}, last_of(data)["dpo"][1], "start")):
        said.append(f"DPO starts from SFT's first training: its last round minus that one alone is {found['mean']:+.1f} points (bootstrap "
                    f"{found['bootstrap'][0]:+.1f} to {found['bootstrap'][1]:+.1f}).")
    return said


def write_report(data, said, price, drawn):
    settings, tests, methods, n = data["settings"], data["tests"], methods_of(data), len(data["seeds"])
    metric, split = data["metric"], settings.get("EVAL", "test")
    most = max((max(points_of(data, m)) for m in methods), default=0)
    retrains = max(len(v) for by_seed in tests.values() for v in by_seed.values())
    claimed = "".join(f"{sentence(c)}\n" for c in said)
    rounds = table(["method", "SFT", *(f"round {k}" for k in range(1, most + 1))],
                   [[METHODS[m][0], *(cell(tests[p], data["n_test"]) if (p := points_of(data, m).get(k)) else "" for k in range(most + 1))]
                    for m in methods])
    text = [f"# {settings.get('TASK', data['run'].name)}: ILR and its alternatives under unreliable supervision\n",
            f"{n} seed(s): {', '.join(map(str, data['seeds']))}. {metric.capitalize()} in percent on {data['n_test']:,} {split} problems a seed, "
            + (f"mean of up to {retrains} trainings a point.\n" if retrains > 1 else "one training a point.\n"), "## Claims\n", claimed]
    if said:
        text.append("In parentheses, 95% intervals of the paired difference, a point's trainings averaged. Bootstrap (percentiles of 10,000 draws): "
                    + ("seeds are drawn again and, within each, problems; it covers which of both there were. Student's t, over the seeds' mean "
                       "differences, covers whatever differs from seed to seed, taken for normal. " if n > 1 else
                       "problems are drawn again; it covers which problems there were, and neither other seeds nor other trainings. ")
                    + f'"A beats B" is said where every interval excludes 0; none is corrected for their number ({len(said)}).\n')
    if "gains.png" in drawn:
        text.append("![gain over SFT, by method](gains.png)\n")
    if found := findings(data):
        text += ["## What the paper finds, here\n", table(["finding", "points, last rounds", "here"], found),
                 "In parentheses, the wider ends of the two intervals. That something does not help holds where it is established to harm; where no gain is "
                 "established, how large one may be all the same is the interval's upper end.\n"]
    text += [f"## {metric.capitalize()} by round\n", rounds,
             ("± is Student's 95% interval over the seeds" if n > 1 else "Brackets: Wilson's 95% interval over problems, not seeds or trainings")
             + "; SFT, on the unreliable labels, is round 0 of every method.\n",
             "".join(f"- {name}: {what}.\n" for name, what in (METHODS[m] for m in methods)),
             table(["beside it", metric], [[name, cell(tests[p], data["n_test"])] for p, name in (
                 ("weak", "weak model alone"), ("gold", "ceiling: SFT on gold labels of the same problems")) if p in tests]),
             *([f"![{metric} per round](test_accuracy.png)\n"] if methods else [])]
    if series := labels_of(data):
        text += ["## Label accuracy by round\n",
                 table(["", *(f"round {k}" for k in range(1 + max(map(max, series.values()))))],
                       [[f"{METHODS[m][0]}'s labels", *(cell(r[k]) if k in r else "" for k in range(1 + max(r)))]
                        for m, r in series.items()]),
                 "![label accuracy per round](label_accuracy.png)\n"]
    rows = [*((p, f"shared: {name}") for p, name in (("weak", "weak side"), ("judge", "judge"), ("sft", "SFT start"))),
            *((p, f"{METHODS[m][0]}, through round {k}") for m in methods for k, p in points_of(data, m).items() if k)]
    text += ["## Price\n", table(["", *PRICES.values()], [[name, *(number(c, price[p][c]) for c in PRICES)] for p, name in rows if p in price]),
             "Mean over seeds; blank: not recorded. A method's rows are cumulative, on top of what is shared (naive, ensemble, SPIN and DPO-coin "
             "need no judge). Training on labels counts once, for the last round; a chain of policies counts whole; what a method takes over from "
             "another (half-models, samples, comparisons) counts too. FLOPs: 2 a weight for each token read or generated, 4 for each token "
             "trained on and 2 more a trained weight, without attention's own part (Kaplan et al. 2020, arXiv 2001.08361). Not counted: base "
             "models, test answers (the ensemble's too), a point's further trainings. Seconds: wall time of each stage's last start, beside others of higher or lower priority: no price"
             + (f"; the whole run took {data['seconds']['whole run']:,.0f}" if "whole run" in data["seconds"] else "") + ".\n"]
    if "price.png" in drawn:
        text.append(f"![{metric} against price](price.png)\n\nEach line begins at SFT, whose price is in all of them; the judge's is in none.\n")
    if {"ilr", "dpo"} <= set(methods):
        text += ["### At equal budgets\n", f"Beside each round, the {metric} of the other method's last round that costs no more.\n",
                 table(["", metric, "the other, for no more comparisons", "the other, for no more FLOPs"],
                       [[f"{METHODS[m][0]}, round {k}", f"{over_seeds(tests[p])[0]:.1f}", *(
                           "" if (j := within(data, price, other, c, price[p][c])) is None else
                           f"{over_seeds(tests[f'{other}_{j}'])[0]:.1f} (round {j})" if j else "none" for c in ("asked", "flops"))]
                        for m, other in (("ilr", "dpo"), ("dpo", "ilr")) for k, p in points_of(data, m).items() if k])]
    text += ["## Caveats\n", "".join(f"- {c}\n" for c in caveats(data))]
    if found := supervision(data):
        text += ["### How unreliable was the supervision\n", found,
                 "In percent, by round where a cell has several. Judge error: of the pairs with one right side, those decided wrongly. Order flips: "
                 "answers that change with the order of the two. Precision: of the labels replaced, those that got better (DPO: of the pairs kept, "
                 "those whose chosen side is the better). Recall: of the labels whose proposal was better, those replaced.\n"]
    if "judge.png" in drawn:
        text.append("![the judge on the pairs asked about](judge.png)\n")
    if asked := [p for m in methods for k, p in points_of(data, m).items() if k and p in data["comparisons"]]:
        text.append(table(["", "pairs asked about", "position bias (%)", "labels replaced, pairs kept", "% of all", "% of disagreements"], [[
            p, average(data["comparisons"][p], "asked", False), average(data["comparisons"][p], "position_bias"),
            *(average(data["refinements"].get(p, {}), k, k != "kept") for k in ("kept", "share_of_all", "share_of_asked"))] for p in asked]))
    write_text(data["run"] / "report.md", "\n".join(text))
    return f"{claimed}\n{rounds}"


# ---------------------------------------------------------------- report: figures
def draw(data, price, said):
    """Draw what there is data for; the names of the figures."""
    run, tests, methods, n = data["run"], data["tests"], methods_of(data), len(data["seeds"])
    what = f"{data['settings'].get('EVAL', 'test')} {data['metric']}"
    seeds = f"mean, 95% interval of {n} seeds" if n > 1 else f"seed {data['seeds'][0]}"
    points, drawn = {m: {k: p for k, p in points_of(data, m).items() if k} for m in METHODS}, []

    def save(figure, name, title, *rest):
        figure(run / name, title, *rest)
        drawn.append(name)

    def summed(rounds):
        return {k: (*over_seeds(by_seed), [100 * v for v in seed_means(by_seed).values()]) for k, by_seed in rounds.items()}

    if methods:
        beside = [(name, over_seeds(tests[p])[0]) for p, name in (("weak", "weak model alone"), ("gold", "ceiling (gold labels)")) if p in tests]
        save(_figures.by_round, "test_accuracy.png", f"{what.capitalize()} per round ({seeds if n == 1 or len(methods) < _figures.MANY else f'mean of {n} seeds'})",
             f"{what} (%)", [(METHODS[m][0], m, summed({k: tests[p] for k, p in points_of(data, m).items()})) for m in methods], beside)
    if len(gains := [(c["a"], c["mean"], *widest(c), c["per_seed"]) for c in said if c["b"] == "SFT"]) > 2:
        save(_figures.gains, "gains.png", f"Gain over SFT ({n} seeds: mean, 95% interval)" if n > 1 else f"Gain over SFT ({seeds}: 95% interval)", f"points of {what}", gains)
    if series := labels_of(data):
        save(_figures.by_round, "label_accuracy.png", f"Correct training labels per round ({seeds})", "label accuracy (%)",
             [(f"{METHODS[m][0]}'s labels", m, summed(r)) for m, r in series.items()], [])
    panels = []
    for column, label, start in (("asked", "comparisons asked", 0), ("flops", "FLOPs", price.get("sft", {}).get("flops"))):
        costs = {m: [price[p][column] for p in points[m].values()] for m in methods if "sft" in tests}
        lines = [(METHODS[m][0], m, [(start + x, over_seeds(tests[p])[0]) for x, p in zip([0, *xs], ["sft", *points[m].values()])])
                 for m, xs in costs.items() if None not in (start, *xs)]
        panels += [(label, lines)] if any(x for *_, line in lines for x, _ in line) else []
    if panels:
        save(_figures.price, "price.png", f"{what.capitalize()} against price (means, rounds in order)", f"{what} (%)", panels)
    calibration = [(METHODS[m][0], m, found) for m in ("ilr", "dpo") if (found := reliability(
        c["calibration"] for p in points[m].values() for c in data["comparisons"].get(p, {}).values() if c.get("calibration")))]
    lines = [(f"{METHODS[m][0]}: {what}", m, key == "accuracy", found) for m in ("ilr", "dpo") for kind, key, what in (
        ("comparisons", "accuracy", "judge's accuracy"), ("refinements", "precision", "replacement" if m == "ilr" else "pairs kept"))
        if (found := {k: float(v) for k, p in points[m].items() if (v := average(data[kind].get(p, {}), key))})]
    if calibration or lines:
        save(_figures.judge, "judge.png", "The judge on the pairs that it was asked about", calibration, lines)
    return drawn


def report(args):
    run = Path(args.run)
    data = collect(run)
    if not data["tests"]:
        raise InputError(f"{run}: no graded answers in {run}/seed_*/*/: has a run finished a stage there?")
    price, said = prices(data), claims(data)
    drawn = draw(data, price, said)
    print(write_report(data, said, price, drawn))
    write_json(run / "report.json", {      # seconds are in times.jsonl: a run that is made again writes the same bytes here
        **{k: data[k] for k in ("seeds", "n_test", "tests", "labels", "judges", "comparisons", "refinements")}, "claims": said,
        "price": {p: {c: v for c, v in row.items() if c != "seconds"} for p, row in price.items()}})
    _figures.html(run / "report.md")
    print(f"{run}/report.md, report.html, report.json" + "".join(f", {name}" for name in drawn))


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
    r = commands.add_parser("report", help="a run folder -> report.md, report.html, report.json and figures")
    r.add_argument("run", metavar="RUN_DIR")
    c = commands.add_parser("config", help="write or check RUN_DIR/config.json")
    c.add_argument("run", metavar="RUN_DIR")
    c.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
