"""GSM8K (Cobbe et al., 2021): 7,473 training and 1,319 test problems of grade-school mathematics.

    python tasks/gsm8k.py --out data --seed 0       # train, gt, unlab, test .jsonl
    python tasks/gsm8k.py --out data --data-dir folder --validation 500 --platinum
                                                    # and validation.jsonl, platinum.jsonl

folder/train.jsonl, test.jsonl and platinum.jsonl hold question and answer. A file that --data-dir
lacks is taken from the Hugging Face hub or its local cache (dataset openai/gsm8k; needs pyarrow),
else from the authors' repository, checked by SHA-256. The training problems are shuffled by the
seed and divided into D_gt and D_unlab.

Unlike the paper's release, answers are compared as numbers: `65,960`, `$65960` and `65960.00` are
the same answer (docs/gsm8k.md has a table of forms).
"""
import hashlib
import random
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.cli import make_parser, run_stage, whole
from core.download import download
from core.records import InputError, read_jsonl, write_jsonl, write_text
from core.tokens import user_prompt
from tasks import add_data_flags, check_data_flags, write_training
from tasks._numbers import read_number

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 512, 256
AUTHORS = ("https://raw.githubusercontent.com/openai/grade-school-math/"
           "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/")
SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
HUB = {"train": ("openai/gsm8k", "main/train-00000-of-00001.parquet"),
       "test": ("openai/gsm8k", "main/test-00000-of-00001.parquet"),
       "platinum": ("madrylab/gsm8k-platinum", "main/test-00000-of-00001.parquet")}


# ---------------------------------------------------------------- the names every task has
def final_answer(text):
    """The number after the last `####` as Fraction, or None if there is none or it is unclear."""
    marker, tail = text.rpartition("####")[1:]
    return read_number(tail) if marker else None


def is_well_formed(text):
    """Whether there is a final answer."""
    return final_answer(text) is not None


def grade(record):
    """1.0 if the final answer equals the reference as a number, else 0.0."""
    reference = final_answer(f"#### {record['reference']}")
    if reference is None:
        raise InputError(f"the reference of id {record['id']} is {record['reference']!r}: "
                         "expected a number")
    return float(final_answer(record["completion"]) == reference)


def grade_release(record):
    """The release's rule (metrics/eval_gsm8k.py): 1.0 if the word after the last `####` is, as
    text, the reference, else 0.0."""
    words = record["completion"][max(record["completion"].rfind("####"), 0):].split()
    return float(len(words) > 1 and words[1] == f"{record['reference']}")


def agree(a, b):
    """Whether two records have the same final answer; if one has none, whether texts are equal."""
    x, y = final_answer(a["completion"]), final_answer(b["completion"])
    if x is None or y is None:
        return a["completion"] == b["completion"]
    return x == y


# ---------------------------------------------------------------- files
def from_hub(split):
    """The rows of a split from the hub or its cache; None without a network or without pyarrow."""
    try:
        import huggingface_hub
        import pyarrow.parquet
        path = huggingface_hub.hf_hub_download(*HUB[split], repo_type="dataset")
        return pyarrow.parquet.read_table(path).to_pylist()
    except Exception as e:      # the library has an exception of its own for each kind of failure
        why = "it needs `pip install pyarrow`" if isinstance(e, ImportError) else type(e).__name__
        print(f"{HUB[split][0]}: not from the hub ({why})")


def from_authors(split, path):
    """Write a split from the authors' repository to `path`."""
    def expected(data):
        return hashlib.sha256(data).hexdigest() == SHA256[split]
    write_text(path, download(f"{AUTHORS}{split}.jsonl", expected, path.name).decode())


def rows_of(split, folder):
    """The question and answer of every problem of a split, in the dataset's order."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        rows = from_hub(split)
        if rows:
            write_jsonl(path, [{"question": r["question"], "answer": r["answer"]} for r in rows])
        elif split in SHA256:
            from_authors(split, path)
        else:
            raise InputError(f"{path}: missing, and {HUB[split][0]} is out of reach "
                             "(it needs a network and pyarrow)")
    return read_jsonl(path, ("question", "answer"), key=())


def record(split, i, row):
    """The record of the i-th problem of a split."""
    reference = row["answer"].rpartition("####")[2].strip()
    return {"id": f"{split}-{i}", "prompt": user_prompt(row["question"]),
            "completion": row["answer"], "reference": reference, "source": "gold"}


def check(args):
    """Refuse arguments that cannot work."""
    check_data_flags(args)


def main(args):
    check(args)
    out, records = Path(args.out), {}
    for split in ("train", "test", *(["platinum"] if args.platinum else [])):
        rows = rows_of(split, Path(args.data_dir))
        records[split] = [record(split, i, row) for i, row in enumerate(rows)]
    train = records["train"]
    random.Random(args.seed).shuffle(train)
    rest = max(0, len(train) - args.validation)     # the last ones are for validation
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
    p.add_argument("--validation", type=whole, default=0,
                   help="training problems kept for validation.jsonl instead")
    p.add_argument("--platinum", action="store_true",
                   help="also write platinum.jsonl, the test set of GSM8K-Platinum")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
