"""Grade completions; pick the weak model; turn a run folder into a report.

    python evaluate.py grade --task arithmetic --data answers.jsonl --out graded.jsonl
    python evaluate.py pick --task arithmetic --data s1.jsonl s2.jsonl --models m1 m2 \\
        --accuracy 0.45 --out labeler
    python evaluate.py report runs/arithmetic
    python evaluate.py report runs/arithmetic runs/alpha --out runs/both

grade    records with id, completion, reference -> the same with `correct` (1, 0 or a probability),
         and their mean with Wilson's 95% interval over the problems. --exact-release grades as the
         paper's release does: GSM8K answers as raw text, so that 65960 and 65,960 differ.
pick     links --out to the model whose samples are nearest to the asked accuracy: demonstrations
         as unreliable as asked for, on any hardware and with any base model. The release takes a
         weak model as its training left it.
report   a run folder -> report.md, report.html, report.json and figures in it, from the graded
         answers, summaries and prices of every seed that is there. A number that the run has not
         made yet is left blank. report/ is the code. Several run folders -> one page that lays
         them side by side, in a folder of its own (--out; two runs: FIRST+SECOND beside FIRST).

Intervals in the report's tables: Student's t over the seeds' means, each the mean of its retrains;
for one seed, Wilson's over problems. "A beats B" is said where a paired bootstrap over seeds and
problems and Student's t both exclude 0.
"""
import os
from pathlib import Path

from core.cli import make_parser, run_stage, share
from core.records import InputError, read_jsonl, write_json, write_jsonl
from core.unfinished import refuse_existing
from tasks import get_task, unparsed, warm

GRADED = ("id", "completion", "reference")      # the fields that a grade reads


# ---------------------------------------------------------------- grade
def rule_of(args):
    """The function that grades a record. Raises InputError for a task without the asked rule."""
    task = get_task(args.task)
    # ABLATION: another rule for what is right
    rule = getattr(task, "grade_release", None) if args.exact_release else task.grade
    if not rule:
        raise InputError(f"--exact-release: the release has no task {args.task}")
    return rule


def grade(args):
    from report.statistics import wilson
    task, rule = get_task(args.task), rule_of(args)
    if args.out:
        refuse_existing(args.out)
    records = read_jsonl(args.data, GRADED, ("id", "sample"))
    if why := unparsed(args.task, records):
        if args.refuse_unparsed:
            raise InputError(f"{args.data}: {why}")
        print(f"note: {args.data}: {why}")
    warm(task, records)
    graded = [{**r, "correct": rule(r)} for r in records]
    if args.out:
        write_jsonl(args.out, graded)

    mean = sum(r["correct"] for r in graded) / len(graded)
    low, high = wilson(mean, len(graded))
    text = (f"{args.data}: {getattr(task, 'METRIC', 'accuracy')} {mean:.1%} of {len(graded)}, "
            f"95% interval {low:.1%} to {high:.1%}")
    by_category = {}
    for r in graded:
        by_category.setdefault(str(r.get("category") or ""), []).append(r["correct"])
    for name, grades in sorted(by_category.items()):
        if name:
            text += f"; {name} {sum(grades) / len(grades):.1%} of {len(grades)}"
    print(text)


# ---------------------------------------------------------------- pick
def pick(args):
    task = get_task(args.task)
    refuse_existing(args.out)
    for model in args.models:
        if not Path(model).is_dir():
            raise InputError(f"--models {model}: no such folder")
    accuracies, samples = [], []
    for path in args.data:
        records = read_jsonl(path, GRADED, ("id", "sample"))
        warm(task, records)
        samples += records
        accuracies.append(sum(map(task.grade, records)) / len(records))
    said = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    if all(f"{accuracy:.1%}" == "0.0%" for accuracy in accuracies):
        cut = sum(bool(r.get("truncated")) for r in samples)
        why = unparsed(args.task, samples) or (
            f"{cut} of {len(samples)} are cut off, see --max-new-tokens. "
            "Train the weak model longer or at another learning rate")
        raise InputError(
            f"the samples of all candidates are wrong ({said} correct): nothing can be learned "
            f"from such demonstrations: {why} (WEAK_EPOCHS, WEAK_LR), or choose other CHECKPOINTS")

    # ABLATION: which of the weak models writes the demonstrations; ties: the first
    nearest = min(range(len(accuracies)), key=lambda i: abs(accuracies[i] - args.accuracy))
    model, out = args.models[nearest], Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(os.path.relpath(Path(model).resolve(), out.parent.resolve()))
    print(f"{args.out}: {model}, of samples {said} correct the nearest to {args.accuracy:.0%}")


# ---------------------------------------------------------------- report
def report(args):
    if len(args.runs) > 1:
        return report_side_by_side(args)
    from report.claims import claims
    from report.collect import collect
    from report.figures import draw
    from report.html import write_html
    from report.page import write_report
    from report.prices import prices
    run = Path(args.runs[0])
    data = collect(run)
    if not data["tests"]:
        raise InputError(f"{run}: no graded answers in {run}/seed_*/*/: "
                         "has a run finished a stage there?")
    price, said = prices(data), claims(data)
    drawn = draw(data, price, said)
    print(write_report(data, said, price, drawn))

    # without seconds: a run that is made again writes the same bytes
    kept = ("seeds", "n_test", "tests", "labels", "judges", "comparisons", "refinements")
    untimed = {point: {c: v for c, v in row.items() if c != "seconds"}
               for point, row in price.items()}
    write_json(run / "report.json", {**{k: data[k] for k in kept}, "claims": said,
                                     "price": untimed})
    write_html(run / "report.md")
    print(f"{run}/report.md, report.html, report.json" + "".join(f", {name}" for name in drawn))


def report_side_by_side(args):
    from report.side import folder_for, read_runs
    from report.side_page import write_side
    paths = [Path(run) for run in args.runs]
    runs = read_runs(paths)
    print(write_side(runs, folder_for(paths, args.out)))


# ---------------------------------------------------------------- command line
def check(args):
    """Refuse what cannot work, judging by the arguments alone."""
    if args.command == "report":
        if len(args.runs) == 1 and args.out:
            raise InputError("--out: the report of one run goes into its own folder")
        if len(args.runs) > 2 and not args.out:
            raise InputError("three runs or more side by side need --out, a folder for the page")
    if args.command == "grade":
        rule_of(args)
    if args.command == "pick":
        get_task(args.task)
        if len(args.data) != len(args.models):
            raise InputError(f"--data has {len(args.data)} files for {len(args.models)} --models")


def endpoints(args):
    """The endpoints that main(args) asks. A run tries them before it trains anything."""
    return [] if args.command == "report" else getattr(get_task(args.task), "endpoints", list)()


def main(args):
    check(args)
    {"grade": grade, "pick": pick, "report": report}[args.command](args)


def parser():
    p = make_parser(__doc__, prog="evaluate.py")
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("grade", help="accuracy of a file of completions")
    g.add_argument("--task", required=True)
    g.add_argument("--data", required=True, help="records with id, completion, reference")
    g.add_argument("--out", help="also write the records with `correct`")
    g.add_argument("--exact-release", action="store_true",
                   help="by the raw rule of the paper's release")
    g.add_argument("--refuse-unparsed", action="store_true",
                   help="fail where the task can parse none of the completions, instead of grading "
                   "them as wrong")
    k = commands.add_parser("pick", help="the model whose samples are nearest to an accuracy")
    k.add_argument("--task", required=True)
    k.add_argument("--data", required=True, nargs="+",
                   help="samples with id, completion, reference, a file for each of --models")
    k.add_argument("--models", required=True, nargs="+")
    k.add_argument("--accuracy", required=True, type=share, help="a share")
    k.add_argument("--out", required=True, help="link to the model's folder")
    r = commands.add_parser("report",
                            help="a run folder -> report.md, report.html, report.json and figures; "
                            "several -> one page of them side by side")
    r.add_argument("runs", metavar="RUN_DIR", nargs="+",
                   help="one: its report goes into it; several: a page of them in --out")
    r.add_argument("--out", help="folder for the page of several runs; with two it may be left out")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
