"""What rejected answers teach that the judge did not say: DPO's rounds again with other pairs.

    python benchmarks/rejected.py RUN [RUN ...] --bases bases

dpo.py leaves out pairs whose chosen answer the task cannot parse or a token limit cut off, as the
release does with the first; their rejected answers may be either. So DPO is told which answers are
usable, whatever its judge knows. For each seed of finished runs with a simulated judge all rounds
of DPO are made again with their recorded flags:

again     the same, but the judge errs by another seed: how much one run says
usable    pairs with an unusable rejected answer are left out too

Files are kept in --work; what is there is not made again. Intervals are of 95%, over the runs; a
run counts as one pair of base models.
"""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import precision
from _bench import ROOT, in_words, save
from _seeds import below_runs, mean, where
from _why import open_run
from make_map import points

from core.cli import make_parser, run_stage
from core.records import InputError, read_json, read_jsonl, write_jsonl
from report.tables import table
from tasks import get_task, warm

WAYS = ("again", "usable")
OTHER = 1000                # what `again` adds to the judge's seed


def stage(argv, script, **flags):
    """Run a stage with recorded flags, of which some are others, unless its --out is there."""
    argv = list(argv)
    for flag, value in flags.items():
        argv[argv.index(f"--{flag}") + 1] = str(value)
    if Path(argv[argv.index("--out") + 1]).exists():
        return
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *argv], cwd=ROOT,
                          stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ChildProcessError(f"{script}.py {' '.join(argv)} failed")


def usable(task, pairs):
    """The pairs whose rejected answer can be parsed and was not cut off."""
    return [p for p in pairs if task.is_well_formed(p["rejected"])
            and not p.get("rejected_truncated")]


def accuracy(task, path):
    rows = read_jsonl(path, ("id", "completion", "reference"))
    warm(task, rows)
    return round(100 * mean(task.grade(r) for r in rows), 2)


def of_seed(task, run, bases, seed, rounds, work):
    """{way: [accuracy by round]} of a seed in percent; `run` is the run itself."""
    at = run / f"seed_{seed}"
    found = {"run": [accuracy(task, at / f"dpo_{k}/eval_1.jsonl") for k in rounds], "left out": []}
    for way in WAYS:
        policy, found[way] = at / "sft/model_1", []
        for k in rounds:
            def words(name, k=k):
                return precision.words(run, bases, seed, f"dpo_{k}/{name}")
            folder = work / way / f"dpo_{k}"
            folder.mkdir(parents=True, exist_ok=True)
            samples, pairs = folder / "samples.jsonl", folder / "preferences.jsonl"
            if k == rounds[0]:
                samples = at / f"dpo_{k}/samples.jsonl"
            else:
                stage(words("sample"), "generate", model=policy, out=samples)
            judged = words("compare")
            errs = int(judged[judged.index("--seed") + 1]) + OTHER * (way == "again")
            stage(judged, "compare", a=samples, out=folder / "comparisons.jsonl", seed=errs)
            stage(words("pairs"), "refine", comparisons=folder / "comparisons.jsonl", out=pairs)
            kept = read_jsonl(pairs, ("id", "chosen", "rejected"), ("id", "pair"))
            if way == "usable":
                trained = [p for p in kept if task.is_well_formed(p["chosen"])
                           and not p.get("chosen_truncated")]
                found["left out"].append(len(trained) - len(usable(task, trained)))
                pairs = folder / "usable.jsonl"
                write_jsonl(pairs, usable(task, kept))
            stage(words("train_1"), "dpo", model=policy, data=pairs, out=folder / "model")
            policy = folder / "model"
            stage(words("answer_1"), "generate", model=policy, out=folder / "eval_1.jsonl")
            found[way].append(accuracy(task, folder / "eval_1.jsonl"))
    return {**found, "sft": accuracy(task, at / "sft/eval_1.jsonl")}


def main(args):
    os.environ["TQDM_DISABLE"] = "1"
    seeds = []
    for run in dict.fromkeys(Path(run).resolve() for run in args.runs):
        name, _, folders = open_run(run)
        settings = read_json(run / "config.json")["settings"]
        if settings.get("JUDGE") != "simulated":
            raise InputError(f"{run}: its judge is not simulated, so it cannot err by another seed")
        rounds = range(1, 1 + int(settings["ROUNDS"]))
        for seed in folders:
            work = Path(args.work).resolve() / below_runs(run).replace("/", "_") / f"seed_{seed}"
            seeds.append({"name": f"{below_runs(run)}, seed {seed}", "lr": settings["DPO_LR"],
                          **of_seed(get_task(name), run, args.bases, seed, rounds, work)})
            print(seeds[-1], file=sys.stderr, flush=True)
    text = page(seeds)
    print(text)
    save(Path(args.out).resolve(), text, {"about": where(), "seeds": seeds}, 1)


def page(seeds):
    rows = [[f"{s['name']}, lr {s['lr']}", f"{s['sft']:.1f}",
             *(" ".join(f"{a:.1f}" for a in s[way]) for way in ("run", *WAYS)),
             " ".join(map(str, s["left out"]))] for s in seeds]
    lasts = {way: [s[way][-1] - s["sft"] for s in seeds] for way in ("run", *WAYS)}
    lasts["run less usable"] = [s["run"][-1] - s["usable"][-1] for s in seeds]
    lasts["mean of run and again, less usable"] = [
        (s["run"][-1] + s["again"][-1]) / 2 - s["usable"][-1] for s in seeds]
    note = ("Accuracy in percent of SFT, and of DPO by round: the run itself; with a judge that "
            "errs by another seed; without pairs whose rejected answer is unusable. Left out: of "
            "the pairs that would be trained on. Below: after the last round, over SFT or over "
            "another way, in points.")
    return "\n\n".join([
        textwrap.fill(note, 100),
        table(["", "SFT", "run", *WAYS, "left out"], rows),
        table(["after the last round", "points"], [[k, points(v)] for k, v in lasts.items()]),
        in_words(where())])


def parser():
    p = make_parser(__doc__, prog="rejected.py")
    p.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders")
    p.add_argument("--bases", default=str(ROOT / "bases"), help="where their base models are")
    p.add_argument("--work", default=str(ROOT / "runs/rejected"), help="folder of models, kept")
    p.add_argument("--out", default=str(ROOT / "benchmarks/results/rejected"),
                   help="names of the results, without .md and .json")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
