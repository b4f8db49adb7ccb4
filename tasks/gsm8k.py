"""GSM8K (Cobbe et al., 2021): 7,473 training and 1,319 test problems of grade-school mathematics.

    python tasks/gsm8k.py --out data --seed 0                     # train, gt, unlab, test .jsonl (+ validation, platinum)
    python tasks/gsm8k.py --out data --data-dir folder            # folder/train.jsonl, test.jsonl: question, answer

What --data-dir lacks comes from the Hugging Face hub or its local cache (dataset openai/gsm8k; needs pyarrow), else from the
authors' repository, checked by SHA-256. The training problems are shuffled by the seed and cut in D_gt and D_unlab.

Unlike the paper's release, answers are compared as numbers: `65,960`, `$65960` and `65960.00` are one answer.
"""
import hashlib
import random
import re
import sys
from decimal import Decimal
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks import (InputError, add_data_flags, download, make_parser, read_jsonl, run_stage, user_prompt, whole, write_jsonl, write_text,
                   write_training)

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 512, 256
AUTHORS = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
HUB = {"train": ("openai/gsm8k", "main/train-00000-of-00001.parquet"),
       "test": ("openai/gsm8k", "main/test-00000-of-00001.parquet"),
       "platinum": ("madrylab/gsm8k-platinum", "main/test-00000-of-00001.parquet")}


# ---------------------------------------------------------------- the names every task has
NUMBER = re.compile(r"[\s*_`$€£({\[\\]*([-+\u2212]?)[\s$€£]*([0-9][0-9,]*+(?:\.[0-9]+)?+|\.[0-9]+)"
                    r"(?!\s*/\s*[0-9]|\s+[0-9]+\s*/\s*[0-9]|[eE^][0-9])")


def final_answer(text):
    """The number behind the last `####` as Decimal, or None: currency, commas, percent, markdown and a final dot are no
    part of it, nor is what follows it. A fraction or a power is no number."""
    marker, tail = text.rpartition("####")[1:]
    match = NUMBER.match(tail) if marker else None
    return Decimal(("-" if match[1] in ("-", "\u2212") else "") + match[2].replace(",", "")) if match else None


def is_well_formed(text):
    return final_answer(text) is not None


def grade(record):
    """1.0 if the number behind the last `####` equals the reference, else 0.0."""
    reference = final_answer(f"#### {record['reference']}")
    if reference is None:
        raise InputError(f"the reference of id {record['id']} is {record['reference']!r}: expected a number")
    return float(final_answer(record["completion"]) == reference)


def grade_release(record):
    """The release's rule (metrics/eval_gsm8k.py): the word behind the last `####` equals the reference as text."""
    words = record["completion"][max(record["completion"].rfind("####"), 0):].split()
    return float(len(words) > 1 and words[1] == record["reference"])


def agree(a, b):
    """Two records give the same answer; where either has none, only equal texts agree."""
    x, y = final_answer(a["completion"]), final_answer(b["completion"])
    return x == y if x is not None and y is not None else a["completion"] == b["completion"]


# ---------------------------------------------------------------- files
def from_hub(split):
    """The rows of a split from the hub or its cache; None where there is neither, or no pyarrow to read them."""
    try:
        import huggingface_hub
        import pyarrow.parquet
        return pyarrow.parquet.read_table(huggingface_hub.hf_hub_download(*HUB[split], repo_type="dataset")).to_pylist()
    except Exception as e:      # no network, no access, no such file, no pyarrow: the library has an exception for each
        print(f"{HUB[split][0]}: not from the hub ({'it needs `pip install pyarrow`' if isinstance(e, ImportError) else type(e).__name__})")


def rows_of(split, folder):
    """The (question, answer) of a split, in the dataset's order."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        rows = from_hub(split)
        if rows:
            write_jsonl(path, [{"question": r["question"], "answer": r["answer"]} for r in rows])
        elif split in SHA256:
            write_text(path, download(f"{AUTHORS}{split}.jsonl", lambda data: hashlib.sha256(data).hexdigest() == SHA256[split],
                                      path.name).decode())
        else:
            raise InputError(f"{path}: missing, and {HUB[split][0]} is out of reach (it needs a network and pyarrow)")
    return read_jsonl(path, ("question", "answer"), key=())


def record(split, i, row):
    reference = row["answer"].rpartition("####")[2].strip()
    return {"id": f"{split}-{i}", "prompt": user_prompt(row["question"]), "completion": row["answer"],
            "reference": reference, "source": "gold"}


def main(args):
    out, folder = Path(args.out), Path(args.data_dir)
    records = {split: [record(split, i, r) for i, r in enumerate(rows_of(split, folder))]
               for split in ("train", "test", *(["platinum"] if args.platinum else []))}
    train = records["train"]
    random.Random(args.seed).shuffle(train)
    rest = max(0, len(train) - args.validation)
    write_training(out, train[:min(args.train, rest)], args.gt)
    if args.validation:
        write_jsonl(out / "validation.jsonl", train[rest:])
    if args.platinum:
        write_jsonl(out / "platinum.jsonl", records["platinum"])
    write_jsonl(out / "test.jsonl", records["test"][:args.test])


def parser():
    p = make_parser(__doc__, prog="tasks/gsm8k.py")
    p.add_argument("--out", required=True, help="folder to write")
    add_data_flags(p, "gsm8k", 7473, 3736, 1319)
    p.add_argument("--validation", type=whole, default=0, help="training problems kept for validation.jsonl instead")
    p.add_argument("--platinum", action="store_true", help="also write platinum.jsonl, the test set of GSM8K-Platinum")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
