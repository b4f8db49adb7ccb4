"""How much of "DPO fails" can rounding make? DPO's first round again, in other arithmetic.

    python benchmarks/rounding.py RUN [RUN ...] --work runs/rounding --rates run paper

For each seed of finished runs that train every weight: dpo_1's training once more from the same SFT
model on the same pairs, with its recorded flags, and its model's answers to the same problems:

fp32      weights, gradients and sums in fp32 (of the run's own rate: the run's dpo_1 itself)
exact     bf16 weights and gradients; the optimizer's result is kept exactly (core/precision.py)
nearest   bf16 weights and gradients; the result is rounded to the nearest bf16 weight, SFT's first
rounded SFT   SFT's weights rounded to the nearest bf16, and nothing trained

All answers are computed in fp32. Rates: `run` is the run's own flags, `1e-5` the default task's
preset, `paper` the paper's rate and optimizer. Models and answers are kept in --work; what is
complete there is not made again. Intervals are of 95%. A run counts as one pair of base models.
"""
import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import precision
from _bench import ROOT, in_words, save
from _seeds import below_runs, mean, over, where
from _why import open_run

from core.cli import make_parser, run_stage
from core.records import InputError, dumps, read_jsonl
from core.sources import fingerprint
from report.statistics import mean_interval, paired
from tasks import get_task, warm

RATES = {"run": [], "1e-5": ["--lr", "1e-5"],
         "paper": ["--lr", "1e-6", "--optimizer", "rmsprop8bit"]}
WAYS = ("fp32", "exact", "nearest")
DTYPE = {"fp32": "float32", "exact": "bfloat16", "nearest": "bfloat16"}


# ---------------------------------------------------------------- one seed
def recorded(run, bases, seed):
    """(flags of dpo_1's training, flags of its answers) of a seed; None if it has not both."""
    try:
        return [precision.words(run, bases, seed, f"dpo_1/{stage}_1")
                for stage in ("train", "answer")]
    except (OSError, IndexError, ValueError):
        return None


def value(argv, flag):
    return argv[argv.index(flag) + 1] if flag in argv else None


def round_model(source, out):
    """Write a model with its weights rounded to bf16, without what is missing to fp32."""
    import torch

    from core.models import open_model, save_model
    from core.tokens import open_tokenizer
    model = open_model(source, torch.device("cpu"), dtype=torch.bfloat16)
    unfinished = out.with_name(f".{out.name}.writing")
    save_model(model, open_tokenizer(source), unfinished)
    unfinished.rename(out)


def make(name, train, answer, folder):
    """Model and answers of one way, unless they are there. Returns their folder, whose name says
    by a digest what they are made from."""
    rate, _, way = name.partition(" ")
    flags = [*train, *RATES.get(rate, []), "--dtype", DTYPE.get(way, "float32")]
    inputs = [fingerprint(value(train, "--model")), fingerprint(value(train, "--data")),
              fingerprint(value(answer, "--data"))]
    kept = [word for word in (*flags, *answer) if "/" not in word]      # without paths
    digest = hashlib.sha256(dumps([name, kept, inputs]).encode()).hexdigest()[:8]
    folder = folder / f"{name.replace(' ', '_')}_{digest}"
    model, answers = folder / "model", folder / "answers.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not model.exists() and name == "rounded SFT":
        round_model(value(train, "--model"), model)
    elif not model.exists():
        precision.child(way, "dpo", [*flags, "--out", str(model)])
    if not answers.exists():
        subprocess.run([sys.executable, ROOT / "generate.py", *answer, "--model", model,
                        "--out", answers, "--dtype", "float32"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def of_seed(task, run, seed, argv, work, rates):
    """{way: {grades: {id: correct}, changed, loss, margin, moved}} of a seed, and SFT's.

    changed: % of the answers whose text is not SFT's. moved: % of the weights that are not SFT's,
    for nearest not those of rounded SFT. Loss and margin: means of the last 12 steps.
    """
    train, answer = argv
    if value(train, "--lora-rank") not in (None, "0"):
        raise InputError(f"{run}: trains adapters, which are fp32: nothing is rounded there")
    start = Path(value(train, "--model"))

    def graded(path):
        rows = read_jsonl(path, ("id", "completion", "reference"))
        warm(task, rows)
        return ({"grades": {r["id"]: task.grade(r) for r in rows}},
                {r["id"]: r["completion"] for r in rows})
    sft, texts = graded(start.parent / "eval_1.jsonl")
    found = {"SFT": sft}
    for name in ["rounded SFT", *(f"{rate} {way}" for rate in rates for way in WAYS)]:
        model = run / f"seed_{seed}/dpo_1/model_1"
        if name == "run fp32" and value(train, "--dtype") in (None, "float32") and not (
                model / "exact").exists():
            answers = model.parent / "eval_1.jsonl"
        else:
            folder = make(name, train, answer, work)
            model, answers = folder / "model", folder / "answers.jsonl"
        way = name.partition(" ")[2]
        found[name], now = graded(answers)
        found[name]["changed"] = 100 * mean(now[i] != text for i, text in texts.items())
        if name != "rounded SFT":
            steps = read_jsonl(model / "metrics.jsonl", ("loss",), ())
            moved = precision.change(start, model, "AutoModelForCausalLM", way)
            found[name] |= {"loss": precision.mean(steps, "loss"),
                            "margin": precision.mean(steps, "rewards/margins"),
                            "moved": 100 * (moved != 0).double().mean().item()}
    return found


# ---------------------------------------------------------------- all seeds
def difference(seeds, a, b):
    """`paired` of two ways over the seeds, in points, and `runs`: (mean, half width) over runs."""
    having = {s["name"]: s for s in seeds if a in s["ways"] and b in s["ways"]}
    answers = {way: {name: [s["ways"][way]["grades"]] for name, s in having.items()}
               for way in (a, b)}
    found = paired(answers, a, b)
    by_run = {}
    for s, d in zip(having.values(), found["per_seed"], strict=True):
        by_run.setdefault(s["run"], []).append(d)
    return {**found, "runs": mean_interval([mean(values) for values in by_run.values()])}


def row(words, found):
    low, high = found["student"] or (None, None)
    half = found["runs"][1]
    return (f"| {words} | {found['mean']:+.2f} | "
            + (f"{low:+.2f} to {high:+.2f}" if found["student"] else "") + " | "
            + "{:+.2f} to {:+.2f} | ".format(*found["bootstrap"])
            + f"{found['runs'][0]:+.2f}" + (f" ± {half:.2f}" if half is not None else "") + " |")


def page(seeds, rates):
    """(text, {row: what `difference` or `over` found})."""
    found, lines = {}, ["| way | accuracy, % | answers changed, % | loss | margin | "
                        "weights moved, % |", "| --- | --- | --- | --- | --- | --- |"]
    for name in seeds[0]["ways"]:
        accuracy = over(seeds, lambda s, n=name: mean(s["ways"][n]["grades"].values()), 100)
        cells = []
        for key, digits in (("changed", 1), ("loss", 4), ("margin", 4), ("moved", 1)):
            one = over(seeds, lambda s, n=name, k=key: s["ways"][n].get(k))
            cells.append(f"{one['seeds'][0]:.{digits}f}" if one else "")
        lines.append(f"| {name} | {accuracy['seeds'][0]:.2f} | " + " | ".join(cells) + " |")
        found[name] = accuracy
    lines += ["", "| points | mean | over seeds | seeds and problems | over base pairs |",
              "| --- | --- | --- | --- | --- |"]
    pairs = [("rounded SFT", "SFT")]
    for rate in rates:
        fp32, exact, nearest = (f"{rate} {way}" for way in WAYS)
        pairs += [(fp32, "SFT"), (exact, "SFT"), (nearest, "SFT"), (nearest, "rounded SFT"),
                  (exact, nearest), (exact, fp32)]
    for a, b in pairs:
        found[f"{a} less {b}"] = difference(seeds, a, b)
        lines.append(row(f"{a} less {b}", found[f"{a} less {b}"]))
    return "\n".join(lines), found


def main(args):
    os.environ["TQDM_DISABLE"] = "1"
    work, seeds = Path(args.work).resolve(), []
    for k, run in enumerate(dict.fromkeys(Path(run).resolve() for run in args.runs)):
        task, _, folders = open_run(run)
        for seed, folder in folders.items():
            argv, name = recorded(run, args.bases, seed), f"{below_runs(run)} seed {seed}"
            if not argv or not all((folder / f"{p}/eval_1.jsonl").exists()
                                   for p in ("sft", "dpo_1")):
                print(f"{name}: left out, it has no finished round of DPO", file=sys.stderr)
                continue
            try:
                ways = of_seed(get_task(task), run, seed, argv, work / below_runs(run).replace(
                    "/", "_") / f"seed_{seed}", args.rates)
            except subprocess.CalledProcessError as e:      # it has said why
                raise ChildProcessError(f"{name}: {Path(e.cmd[1]).name} failed") from None
            seeds.append({"run": k, "name": name, "lr": value(argv[0], "--lr"), "ways": ways})
            said = ", ".join(f"{way} {mean(w['grades'].values()):.1%}" for way, w in ways.items())
            print(f"{name}, lr {seeds[-1]['lr']}: {said}", file=sys.stderr, flush=True)
    if not seeds:
        raise InputError("no seed of these runs has a finished round of DPO")
    text, found = page(seeds, args.rates)
    runs = len({s["run"] for s in seeds})
    rate = ", ".join(sorted({s["lr"] for s in seeds}, key=float))
    note = (f"Seeds: {len(seeds)}; pairs of base models: {runs}; the runs' own rates of DPO: "
            f"{rate}. Changed: not SFT's text. Moved: not SFT's weight; of nearest, not rounded "
            "SFT's. Loss and margin: means of the last 12 steps. Intervals are of 95%.")
    text = f"{textwrap.fill(note, 100)}\n\n{text}\n\n{in_words(where())}"
    print(text)
    for s in seeds:     # the shares are enough
        for way in s["ways"].values():
            way["accuracy"] = mean(way.pop("grades").values())
    save(Path(args.out).resolve(), text, {"about": where(), "found": found, "seeds": seeds}, 1)


if __name__ == "__main__":
    p = make_parser(__doc__, prog="rounding.py")
    p.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders")
    p.add_argument("--bases", default=str(ROOT / "bases"), help="where their base models are")
    p.add_argument("--work", default=str(ROOT / "runs/rounding"), help="folder of models, kept")
    p.add_argument("--rates", nargs="+", default=["run"], choices=list(RATES))
    p.add_argument("--out", default=str(ROOT / "benchmarks/results/rounding"),
                   help="names of the results, without .md and .json")
    run_stage(p, main)
