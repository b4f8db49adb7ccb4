"""What a task is. A task is one file of this folder; adding a task is adding a file.

`bash run_ilr.sh mytask` runs any tasks/mytask.py, with the settings of presets/mytask.sh if there
is one, else of presets/generic.sh. `get_task` says what the file must have. The smallest one that
runs, for a folder (DATA_DIR, default data/mytask) with train.jsonl and test.jsonl:

    \"\"\"My task: answers to questions, right if they are the reference, word for word.\"\"\"
    import random
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from core.cli import make_parser, run_stage
    from core.records import read_jsonl, write_jsonl
    from core.tokens import user_prompt
    from tasks import add_data_flags, check_data_flags as check, write_training

    def is_well_formed(text):
        return bool(text.strip())

    def grade(record):
        return float(record["completion"].strip() == record["reference"])

    def agree(a, b):
        return a["completion"].strip() == b["completion"].strip()

    def records(args, split):
        rows = read_jsonl(f"{args.data_dir}/{split}.jsonl", ("question", "answer"), key=())
        return [{"id": f"{split}-{i}", "prompt": user_prompt(r["question"]),
                 "completion": r["answer"], "reference": r["answer"]} for i, r in enumerate(rows)]

    def main(args):
        check(args)
        train = records(args, "train")
        random.Random(args.seed).shuffle(train)
        write_training(args.out, train[:args.train], args.gt)
        write_jsonl(f"{args.out}/test.jsonl", records(args, "test")[:args.test])

    def parser():
        p = make_parser(__doc__, prog="tasks/mytask.py")
        p.add_argument("--out", required=True, help="folder to write")
        add_data_flags(p, "mytask", 1000, 500, 200)
        return p

    if __name__ == "__main__":
        run_stage(parser(), main)
"""
import importlib
from pathlib import Path

from core.cli import positive, whole
from core.records import InputError, write_jsonl

TASKS = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))


def parsable(name, records, field, what):
    """The records whose `field` the task can parse; says how many of these, `what`, it cannot."""
    task = get_task(name)
    kept = [r for r in records if task.is_well_formed(r[field])]
    print(f"{len(records) - len(kept)} of {len(records)} {what}")
    return kept


def unparsed(name, records):
    """Why none of the answers can be parsed, in words; "" if the task can parse one of them."""
    task, n = get_task(name), len(records)
    if any(task.is_well_formed(r["completion"]) for r in records):
        return ""
    causes = [f"{len(found)} of {n} {what}" for what, found in (
        ("are empty", [r for r in records if not r["completion"].strip()]),
        ("are cut off, see --max-new-tokens", [r for r in records if r.get("truncated")])) if found]
    return (f"none of the {n} answers can be parsed by task {name}: the model has not learnt the "
            "format, or has lost it" + "".join(f"; {cause}" for cause in causes)
            + ". Train it longer or at another learning rate")


def why_no_pairs(name, samples):
    """Why a judge can learn nothing of right and wrong from samples (lists of records, warm), in
    words; "" if it can."""
    task, records = get_task(name), [r for records in samples for r in records]
    if hasattr(task, "judge_pairs") or any(task.grade(r) != 1 for r in records):
        return unparsed(name, records)
    return (f"all {len(records)} samples are right: there is no wrong answer to learn from. Sample "
            "earlier checkpoints (CHECKPOINTS), or at a higher --temperature")


class NoTask:
    """What stands for a task where --task is not given: nothing is parsed or graded, and two
    completions agree if they are the same text."""
    COSTLY = True       # so no summary grades

    @staticmethod
    def agree(a, b):
        return a["completion"].strip() == b["completion"].strip()


def get_task(name):
    """The module of a task; NoTask for None. Raises InputError if there is no such file. A task has

    parser()                      the ArgumentParser of `python tasks/NAME.py`
    check(args)                   refuses (InputError) arguments that cannot work, reading no file
    main(args)                    writes the problems as records: gt.jsonl (D_gt), unlab.jsonl
                                  (D_unlab) and, as the last file, test.jsonl; any other file that
                                  the preset's EVALS names, such as validation.jsonl, before it
    grade(record) -> float        1.0 if record["completion"] is right by record["reference"],
                                  else 0.0; or a probability
    is_well_formed(text) -> bool  whether the completion can be parsed
    agree(a, b) -> bool           whether two records' completions give the same answer. Without
                                  it, their embeddings are compared (compare.py score --embedder)

    and may have

    FIELDS                        names of further fields of a record that grade and agree read
    METRIC                        the name of the mean grade in the report; default: accuracy
    COSTLY                        True: grading costs money, so only what evaluate.py is asked to
                                  grade is graded
    warm(records)                 prepares the grading of these records, in parallel
    endpoints()                   the endpoints that grading asks (core/endpoint.py): a run tries
                                  them before it trains anything
    judge_pairs(problems, draw)   its own training pairs for the judge (core.judge.make_pairs)
    MAX_PROMPT_TOKENS, MAX_NEW_TOKENS   the longest prompt and answer, for the preset's DECODING

    run_ilr.sh gives `main` the flags --out FOLDER --train N --gt N --test N --seed S, --data-dir if
    DATA_DIR is set, and then what the preset's DATA_FLAGS says.

    A record has `id` (unique in its file), `prompt`, `completion` (the demonstration that D_gt is
    learnt from), `reference` (what grade compares with; only measurements read it), and any further
    fields, which every stage carries along.
    """
    if name is None:
        return NoTask
    if name not in TASKS:
        raise InputError(f"--task {name}: there is no tasks/{name}.py; "
                         f"choose from {', '.join(TASKS)}")
    return importlib.import_module(f"tasks.{name}")


def warm(task, *files):
    """Let a task prepare the grading of all these lists of records, if grading takes it long."""
    if hasattr(task, "warm"):
        task.warm([r for records in files for r in records])


def may_grade(task, *files):
    """Whether a stage may grade these records for its summary. If so, the task is warmed.

    It may if all of them have references and grading costs nothing.
    """
    records = [r for records in files for r in records]
    if getattr(task, "COSTLY", False) or not all(isinstance(r.get("reference"), str)
                                                   for r in records):
        return False
    warm(task, records)
    return True


def fields_for_grading(task, record):
    """The fields of a record, besides its completion, that the task reads to grade it."""
    return {k: record[k] for k in ("reference", *getattr(task, "FIELDS", ())) if k in record}


def write_training(out, train, gt):
    """Write training problems as train, gt and unlab .jsonl to the folder `out`.

    D_gt is the first `gt` of them, D_unlab the rest. Raises InputError if one of them is empty.
    """
    if not 0 < gt < len(train):
        raise InputError(f"--gt {gt} must lie between 0 and the {len(train)} problems to train on")
    for name, records in (("train", train), ("gt", train[:gt]), ("unlab", train[gt:])):
        write_jsonl(Path(out) / f"{name}.jsonl", records)


def add_data_flags(p, task, train, gt, test):
    """Add the flags of a task that is made from files. The numbers are defaults; gt=0: half."""
    p.add_argument("--data-dir", default=f"data/{task}",
                   help="folder of train.jsonl and test.jsonl; filled where they are missing")
    p.add_argument("--train", type=positive, default=train,
                   help="training problems, D_gt and D_unlab together")
    p.add_argument("--gt", type=positive if gt else whole, default=gt,
                   help="of these, problems of D_gt, whose references train the weak side"
                        + ("" if gt else " (0: half)"))
    p.add_argument("--test", type=positive, default=test, help="test problems, the first so many")
    p.add_argument("--seed", type=whole, default=0, help="of the order of the training problems")


def check_data_flags(args):
    """Refuse flags of add_data_flags that leave no problem for D_unlab."""
    if args.gt >= args.train:
        raise InputError(f"--gt {args.gt} must lie between 0 and the {args.train} problems "
                         "to train on")
