"""SaferPaca (Bianchi et al., 2023): instructions to follow (Alpaca's), and unsafe ones to refuse.

    python tasks/saferpaca.py --out data --seed 0                     # train, gt, gt_general, gt_safety, unlab, test .jsonl
    python tasks/saferpaca.py --out data --data-dir folder            # folder/train.jsonl, test.jsonl: question, answer, category

What --data-dir lacks comes from the paper's release (needs pyarrow). A completion's grade is the probability that a language
model, asked in both orders, prefers it to the reference: ILR_JUDGE_URL, ILR_JUDGE_MODEL, ILR_JUDGE_KEY (tasks/_judges.py). Since that
costs money, only test answers are graded by themselves, as in the release. Two answers agree where their embeddings are more
alike than the median pair's (`compare.py score --embedder`).

Unlike the paper's release: both orders are asked; a reply without a verdict is asked again and then an error, not 0.5; a
letter that is not among the likely tokens has probability 0, not 1.
"""
import os
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks import (InputError, add_data_flags, from_release, make_parser, read_jsonl, run_stage, user_prompt, write_jsonl,
                   write_training)
from tasks._judges import Endpoint, average_orders

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 1024, 512
FIELDS, COSTLY, METRIC = ("category",), True, "win rate"
CATEGORIES = "general", "safety"
BLOBS = {"train": "4effc1e25e8c1c60eb9d381e589b9f80397b4104", "test": "9f74373bf65403f5d07b7d8f93707dfad6198390"}    # git's names


# ---------------------------------------------------------------- the names every task has
grades = {}       # (prompt, reference, completion) -> probability, of this process


def key(record):
    return record["prompt"], record["reference"], record["completion"]


def endpoint():
    url = os.environ.get("ILR_JUDGE_URL")
    if not url:
        raise InputError("ILR_JUDGE_URL is not set: the OpenAI-compatible endpoint whose model grades answers")
    return Endpoint(url, os.environ.get("ILR_JUDGE_MODEL"), "ILR_JUDGE")


def warm(records):
    """Ask for the grades of these records side by side."""
    asked = [k for k in dict.fromkeys(map(key, records)) if k not in grades and k[1].strip() != k[2].strip()]
    if asked:
        grades.update(zip(asked, (average_orders(*orders) for orders in endpoint().preferences(asked))))


def grade(record):
    """The probability, of both orders, that the endpoint's model prefers the completion to the reference; 0.5 if they are equal."""
    if record["completion"].strip() == record["reference"].strip():
        return 0.5
    warm([record])
    return grades[key(record)]


def is_well_formed(text):
    return bool(text.strip())


def judge_pairs(problems, draw):
    """[(id, better, worse)] by the release's rule (experiments/generate_evaluator_data.py, load_pairs_saferpaca): the
    demonstration over a sample of the weak model of its own category; and, for as many general problems as there are safety
    ones, a sample of the general model over one of the safety model.

    problems: {id: samples of one problem, earliest checkpoints first, their `source` saying which weak model's they are}.
    draw(id, texts): one of the texts, early ones being likelier.
    """
    pairs, crossed, safe = [], [], 0
    for id_, answers in problems.items():
        texts = {c: [r["completion"] for r in answers if r["source"] == c] for c in CATEGORIES}
        category = answers[0].get("category")
        if category not in CATEGORIES or not all(texts.values()):
            raise InputError(f"id {id_}: expected a category and samples with the source general and safety, as run_ilr.sh makes them")
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
            raise InputError(f"{path}: record {i} has the category {r['category']!r}: expected general or safety")
    return rows


def main(args):
    endpoint().preferences([("Name a color.", "Blue.", "Seven.")])       # what grades is tried now, not after days of training
    out, folder = Path(args.out), Path(args.data_dir)
    records = {split: [{"id": f"{split}-{i}", "prompt": user_prompt(r["question"]), "completion": r["answer"], "reference": r["answer"],
                        "source": "gold", "category": r["category"]} for i, r in enumerate(rows_of(split, folder))]
               for split in ("train", "test")}
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
