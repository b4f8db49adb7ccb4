"""Other methods on the same labels, samples and comparisons: one file per method.

    METHODS="ilr dpo filter" bash run_ilr.sh
    python baselines/filter.py --run runs/arithmetic/seed_0 --round 1 --task arithmetic \\
        --out labels.jsonl

To add a method, add a file; run_ilr.sh and the report find it by its name, with - for _
(dpo_labels.py is METHODS=dpo-labels). Such a file has

    NAME     its name in the report
    WHAT     one sentence for the report, with its source
    STYLE    (colour, marker, dash) of its line in the figures
    ROUND    what one round is: steps in order, as one string (below)
    SAMPLES  optional: answers per prompt that `sample` draws; default: the setting DPO_SAMPLES
    ROUNDS   optional: how many rounds there are, if fewer than the setting ROUNDS
    NEEDS    the method whose files it reads ("ilr" or "dpo"), or ""
    reads(seed_dir, k, start) -> [(kind, path)] that round k reads. kind: a key of KINDS;
             seed_dir: Path of runs/x/seed_S; start: Path of the labels that SFT starts from
    make(args, *files) -> the records of round args.round; files: the records of each of `reads`,
             in order; with the step `vote`, the test problems come first
             args: also seed, task, alpha (ILR's share) and dpo_alpha (DPO's) of the run
    questions(records) -> the test problems as this method asks them (step `questions`)
    check(args)  optional: raises InputError for arguments that cannot work, without reading a file
    price(k) -> what "this method through round k" has to pay for: paths below seed_dir of trained
             models, generated .jsonl files and comparisons.jsonl

and ends by calling `main(__file__)`. A file without ROUND is a tool, and no method. The steps:

    labels     make -> METHOD_k/labels.jsonl
    grade      the share of correct labels, to stand beside ILR's: for one label per problem
    pairs      make -> METHOD_k/preferences.jsonl
    vote       make -> METHOD_k/eval_1.jsonl, answers to the test problems
    questions  questions -> METHOD_1/questions.jsonl, what is asked in place of the test problems
    retrain    SFT of the strong base model on labels.jsonl, and its test answers
    finetune   SFT of the policy of the round before on labels.jsonl, and its test answers
    prefer     DPO of the policy of the round before on preferences.jsonl, and its test answers
    prefer-unjudged  the same where no judge chose: the loss is not told the judge's error rate
    sample     the policy's answers to D_unlab -> samples.jsonl
    judge      the judge compares samples.jsonl two by two -> comparisons.jsonl
    halves     the half-models of ILR's round 1 answer the test problems -> samples_1/2.jsonl
"""
import importlib
from pathlib import Path

from core.cli import make_parser, positive, run_stage, share, whole
from core.records import InputError, dumps, read_jsonl, write_json, write_jsonl
from core.unfinished import refuse_existing
from refine import measure_pairs
from tasks import get_task

NEEDED = ("NAME", "WHAT", "STYLE", "NEEDS", "reads", "make", "price")
HERE = Path(__file__).resolve().parent

# What `reads` names: {kind: (required fields, fields that together occur once)}.
LABEL = ("id", "prompt", "completion")
KINDS = {"labels": (LABEL, ("id",)),
         "refined": ((*LABEL, "source", "accepted"), ("id",)),      # labels that refine.py wrote
         "samples": (LABEL, ("id", "sample")),
         "comparisons": (("id", "prompt", "completion_a", "completion_b", "agree", "prob_b",
                          "prob_b_ab", "prob_b_ba"), ("id", "pair"))}


def load(name):
    """The module of a method or tool. Raises InputError where there is no such file."""
    file = name.replace("-", "_")
    if file.startswith("_") or not (HERE / f"{file}.py").exists():
        raise InputError(f"{name}: there is no baselines/{file}.py")
    try:
        module = importlib.import_module(f"baselines.{file}")
    except (SyntaxError, ImportError) as e:
        raise InputError(f"baselines/{file}.py: {e}") from None
    missing = [x for x in NEEDED if not hasattr(module, x)] if hasattr(module, "ROUND") else []
    if missing:
        raise InputError(f"baselines/{file}.py: a method needs {', '.join(missing)}")
    return module


def names():
    """The methods that have a file here, in alphabetical order."""
    found = sorted(p.stem.replace("_", "-") for p in HERE.glob("[a-z]*.py"))
    return [name for name in found if hasattr(load(name), "ROUND")]


def cross_labelling(k, method="ilr", first=1):
    """What the proposals and comparisons of rounds first..k had to pay for, for `price`."""
    paths = []
    for j in range(first, k + 1):
        files = ["half_1", "half_2", "proposals_1.jsonl", "proposals_2.jsonl"]
        if method != "naive":
            files.append("comparisons.jsonl")
        paths += [f"{method}_{j}/{file}" for file in files]
    return paths


# ---------------------------------------------------------------- the program of every method
def parser(name):
    """The command line of a method or tool."""
    module = load(name)
    if hasattr(module, "parser"):
        return module.parser()
    p = make_parser(module.__doc__, prog=f"baselines/{name.replace('-', '_')}.py")
    p.add_argument("--run", required=True, help="folder of one seed of a run: runs/x/seed_S")
    p.add_argument("--round", type=positive, default=1, help="the round to make")
    p.add_argument("--task", required=True, help="whose grade the summary uses")
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--start", help="labels that SFT starts from; without it noise/, clean/ or "
                   "weak/labels.jsonl of the run, the first that exists")
    p.add_argument("--alpha", type=share, default=0.15, help="share of the disagreements that ILR "
                   "may replace")
    p.add_argument("--dpo-alpha", type=share, default=0.15, help="share of all pairs that DPO "
                   "trains on")
    p.add_argument("--max-replace", type=share, help="sets both of these")
    p.add_argument("--seed", type=whole, default=0, help="data seed, of random choices")
    p.add_argument("--questions", help="test problems: those to vote on, or to ask in another way "
                   "where --out is named questions.jsonl")
    p.set_defaults(method=name)
    return p


def check(args):
    """Refuse what cannot work, judging by the arguments alone."""
    module = load(args.method)
    get_task(args.task)
    if hasattr(module, "ROUND"):
        if args.round > getattr(module, "ROUNDS", args.round):
            raise InputError(f"--round {args.round}: {args.method} ends with round {module.ROUNDS}")
        if not args.questions and ("vote" in module.ROUND.split() or asks(module, args)):
            raise InputError(f"{args.method} needs --questions")
    if hasattr(module, "check"):
        module.check(args)


def asks(module, args):
    """Whether it is the step `questions` that is asked for."""
    return hasattr(module, "questions") and Path(args.out).name == "questions.jsonl"


def start_of(run):
    """The labels that SFT starts from in a run: the first file that exists."""
    found = [run / folder / "labels.jsonl" for folder in ("noise", "clean", "weak")]
    return next((path for path in found if path.exists()), found[-1])


def run(args):
    """Read what the method reads, make its records of one round, write them."""
    check(args)
    refuse_existing(args.out)
    module, task = load(args.method), get_task(args.task)
    if args.max_replace is not None:
        args.alpha = args.dpo_alpha = args.max_replace
    if asks(module, args):
        problems = read_jsonl(args.questions, LABEL)
        return write(args, module.questions(problems), len(problems))

    folder = Path(args.run)
    start = Path(args.start) if args.start else start_of(folder)
    files = module.reads(folder, args.round, start)
    if "vote" in module.ROUND.split():
        files = [("labels", args.questions), *files]
    read = [read_jsonl(path, *KINDS[kind]) for kind, path in files]
    check_answered(files, read)
    records = module.make(args, *read)

    (kind, path), total = files[0], len(read[0])
    if not records and kind == "comparisons":
        raise InputError(f"{path}: the judge prefers neither side in any of the {total} pairs")
    if not records:
        raise InputError(f"{path}: {args.method} leaves nothing of its {total} records")
    if kind == "comparisons" and "chosen" in records[0]:
        result, text = measure_pairs(task, records, total)
        write_json(f"{args.out}.summary", result)
        write_jsonl(args.out, records)
        return print(f"{args.out}: {text}")
    write(args, records, total)


def check_answered(files, read):
    """The samples must answer every problem of the first file."""
    samples = [(path, records) for (kind, path), records in zip(files, read, strict=True)
               if kind == "samples"]
    answered = {r["id"] for _, records in samples for r in records}
    missing = {r["id"] for r in read[0]} - answered
    if samples and missing:
        paths = " ".join(str(path) for path, _ in samples)
        raise InputError(f"{paths}: id {min(missing, key=dumps)} of {files[0][1]} is missing")


def write(args, records, total):
    write_jsonl(args.out, records)
    print(f"{args.out}: {len(records)} records from {total}")


def main(file):
    """The command line of a file of this folder."""
    run_stage(parser(Path(file).stem.replace("_", "-")), run)
