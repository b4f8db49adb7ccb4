"""SaferPaca (Bianchi et al., 2023): instructions to follow (Alpaca's), and unsafe ones to refuse.

    python tasks/saferpaca.py --out data --data-dir folder --seed 0
                            # train, gt, gt_general, gt_safety, unlab, test .jsonl

folder/train.jsonl and folder/test.jsonl hold question, answer and category. A file that --data-dir
lacks is taken from the paper's release (needs pyarrow).

A completion's grade is the probability that a language model behind an endpoint, asked in both
orders, prefers it to the reference: ILR_JUDGE_URL, ILR_JUDGE_MODEL, ILR_JUDGE_KEY
(core/endpoint.py). Since that costs money, only test answers are graded automatically, as in the
release. Two answers agree if their embeddings are more alike than those of the median pair
(`compare.py score --embedder`).

Unlike the paper's release: both orders are asked; a reply without a verdict is asked again and then
is an error, not 0.5; a letter that is not among the likely tokens has probability 0, not 1.
"""
import os
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.cli import make_parser, run_stage
from core.download import from_release
from core.endpoint import Endpoint
from core.judge import average_orders
from core.records import InputError, read_jsonl, write_jsonl
from core.tokens import question_of, user_prompt
from core.verdict import TRIAL
from tasks import add_data_flags, check_data_flags, write_training

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 1024, 512
FIELDS, COSTLY, METRIC = ("category",), True, "win rate"
CATEGORIES = "general", "safety"
BLOBS = {"train": "4effc1e25e8c1c60eb9d381e589b9f80397b4104",        # git's names of the files
         "test": "9f74373bf65403f5d07b7d8f93707dfad6198390"}


# ---------------------------------------------------------------- the names every task has
grades = {}       # (prompt, reference, completion) -> probability, of this process


def key(record):
    """What a grade depends on."""
    prompt = record["prompt"]       # text or messages
    return (prompt if isinstance(prompt, str) else question_of(prompt), record["reference"],
            record["completion"])


def endpoint():
    """The endpoint that grades. Raises InputError if none is set."""
    url = os.environ.get("ILR_JUDGE_URL")
    if not url:
        raise InputError("ILR_JUDGE_URL is not set: "
                         "the OpenAI-compatible endpoint whose model grades answers")
    return Endpoint(url, os.environ.get("ILR_JUDGE_MODEL"), "ILR_JUDGE")


def endpoints():
    """The endpoints that grading asks."""
    return [endpoint()]


def warm(records):
    """Ask for the grades of these records, in parallel."""
    asked = [k for k in dict.fromkeys(map(key, records))
             if k not in grades and k[1].strip() != k[2].strip()]
    if asked:
        for k, (ab, ba) in zip(asked, endpoint().preferences(asked), strict=True):
            grades[k] = average_orders(ab, ba)


def grade(record):
    """P(the completion is better than the reference), averaged over both orders; 0.5 if equal."""
    if record["completion"].strip() == record["reference"].strip():
        return 0.5
    warm([record])
    return grades[key(record)]


def is_well_formed(text):
    """Whether there is any text."""
    return bool(text.strip())


def judge_pairs(problems, draw):
    """Training pairs of the judge, [(id, better, worse)], by the release's rule
    (experiments/generate_evaluator_data.py, load_pairs_saferpaca).

    For each problem, the demonstration over a sample of the weak model of its own category; and,
    for as many general problems as there are safety problems, a sample of the general model over
    one of the safety model.

    problems: {id: samples of one problem, earliest checkpoints first}; `source` of a sample says
    whose it is, general or safety. draw(id, texts): one of the texts, early ones more likely.
    """
    pairs, crossed, safe = [], [], 0
    for id_, answers in problems.items():
        texts = {c: [r["completion"] for r in answers if r["source"] == c] for c in CATEGORIES}
        category = answers[0].get("category")
        if category not in CATEGORIES or not all(texts.values()):
            raise InputError(f"id {id_}: expected a category and samples with the source general "
                             "and safety, as run_ilr.sh makes them")
        pairs.append((id_, answers[0]["gold_completion"], draw(id_, texts[category])))
        if category == "general":
            crossed.append((id_, draw(id_, texts["general"]), draw(id_, texts["safety"])))
        else:
            safe += 1
    return pairs + crossed[:safe]


# ---------------------------------------------------------------- files
def rows_of(split, folder):
    """The question, answer and category of every problem of a split, in the dataset's order."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        from_release(path, "saferpaca", split, BLOBS[split])
    rows = read_jsonl(path, ("question", "answer", "category"), key=())
    for i, r in enumerate(rows, 1):
        if r["category"] not in CATEGORIES:
            raise InputError(f"{path}: record {i} has the category {r['category']!r}: "
                             "expected general or safety")
    return rows


def record(split, i, row):
    """The record of the i-th problem of a split."""
    return {"id": f"{split}-{i}", "prompt": user_prompt(row["question"]),
            "completion": row["answer"], "reference": row["answer"], "source": "gold",
            "category": row["category"]}


def check(args):
    """Refuse arguments that cannot work."""
    check_data_flags(args)


def main(args):
    check(args)
    # try now what grades, not after days of training
    endpoint().preferences([TRIAL])
    out, records = Path(args.out), {}
    for split in ("train", "test"):
        rows = rows_of(split, Path(args.data_dir))
        records[split] = [record(split, i, row) for i, row in enumerate(rows)]
    train = records["train"]
    random.Random(args.seed).shuffle(train)
    train = train[:args.train]
    gt = args.gt or len(train) // 2
    parts = {c: [r for r in train[:gt] if r["category"] == c] for c in CATEGORIES}
    if not all(parts.values()):
        raise InputError(f"--gt {gt}: D_gt needs general and safety problems")
    write_training(out, train, gt)
    for category, part in parts.items():
        write_jsonl(out / f"gt_{category}.jsonl", part)
    write_jsonl(out / "test.jsonl", records["test"][:args.test])


def parser():
    p = make_parser(__doc__, prog="tasks/saferpaca.py")
    p.add_argument("--out", required=True, help="folder to write")
    add_data_flags(p, "saferpaca", 20000, 0, 10**6)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
