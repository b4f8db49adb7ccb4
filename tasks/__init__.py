"""The record format and the task registry: what every stage shares and no model library is needed for.

A file is JSON Lines: one object per line, UTF-8, joined with other files by `id` and nothing else.
A task is one module of this folder with the names that `get_task` lists; adding a task is adding a file.
"""
import argparse
import gc
import hashlib
import importlib
import json
import math
import os
import sys
import traceback
from pathlib import Path

from tasks._parallel import first, give_way, is_loss_of_another, leave, lost, processes, rank, world

TASKS = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


class InputError(Exception):
    """Bad arguments or bad input: one line that names the file, the line and what was expected (exit 2)."""


def get_task(name):
    """The module of one task. Its names:

    main(args)                    run as a command, writes train, gt, unlab, validation and test records
    grade(record) -> float        1.0 if record["completion"] is right by record["reference"], else 0.0; or a probability
    agree(a, b) -> bool           two records' completions give the same answer; without it, their embeddings are compared
    is_well_formed(text) -> bool  a completion that the task can parse
    MAX_PROMPT_TOKENS, MAX_NEW_TOKENS
    FIELDS                        optional: names of further fields that grade and agree read
    warm(records)                 optional: does side by side what grading these records will need
    METRIC                        optional: what the mean grade is called, "accuracy" without it
    COSTLY                        optional: True where grading costs money, and no stage grades but for what is asked of it
    judge_pairs(problems, draw)   optional: its own rule for a judge's training pairs (compare.make_pairs)
    """
    if name not in TASKS:
        raise InputError(f"--task {name}: there is no tasks/{name}.py; choose from {', '.join(TASKS)}")
    return importlib.import_module(f"tasks.{name}")


def warm(task, *files):
    """Let a task that is slow to grade do so side by side, before its records are graded one by one."""
    if hasattr(task, "warm"):
        task.warm([r for records in files for r in records])


def user_prompt(question):
    """The prompt of a question to a base model, as the paper's release has it (core/datasets.py)."""
    return f"USER:\n{question}\n\nASSISTANT:\n"


def question_of(prompt):
    """What `user_prompt` made a prompt of, for a chat model, whose template has roles of its own."""
    return prompt.removeprefix("USER:\n").removesuffix("\n\nASSISTANT:\n").strip()


def may_grade(task, *files):
    """Whether a stage may grade these records for its summary: they have references, and it costs nothing. Warms the task."""
    if getattr(task, "COSTLY", False) or not all("reference" in r for records in files for r in records):
        return False
    warm(task, *files)
    return True


def fields_for_grading(task, record):
    """What of a record, besides its completion, a task reads to grade it."""
    return {k: record[k] for k in ("reference", *getattr(task, "FIELDS", ())) if k in record}


# ---------------------------------------------------------------- records
TEXT, WHOLE = ((str,), "a string"), ((int,), "a whole number")
KINDS = {"id": ((str, int), "a string or a whole number"), "sample": WHOLE, "pair": WHOLE, "agree": ((bool,), "true or false"),
         "prob_b": ((int, float, type(None)), "a probability or null"),
         **dict.fromkeys(("prompt", "completion", "completion_a", "completion_b", "chosen", "rejected", "question", "answer",
                          "db_name"), TEXT)}


def not_json(name):
    raise ValueError(f"{name} is no number")


def read_jsonl(path, fields=("id",), key=("id",)):
    """The records of a file, each checked to hold `fields` and to be the only one with its `key` values.

    Raises InputError, naming file and line, for a missing or empty file, malformed JSON (NaN and Infinity are none), an
    absent field, a field of the wrong type (KINDS), and a repeated key.
    """
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().split("\n")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    records, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=not_json)
            line.encode() if "\\u" not in line else dumps(record).encode()      # half a surrogate pair is no text
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{number}: not JSON ({e})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        for name in fields:
            if name not in record:
                raise InputError(f"{path}:{number}: field {name!r} is missing")
            if name in KINDS and type(record[name]) not in KINDS[name][0]:
                raise InputError(f"{path}:{number}: field {name!r} must be {KINDS[name][1]}")
        if "prob_b" in fields and not (record["agree"] if record["prob_b"] is None else 0 <= record["prob_b"] <= 1):
            raise InputError(f"{path}:{number}: field 'prob_b' must be a probability, or null where the two agree")
        if key:
            values = tuple(json.dumps(record.get(k)) for k in key)
            if values in seen:
                where = ", ".join(f"{k} {v}" for k, v in zip(key, values))
                raise InputError(f"{path}:{number}: {where} stands already in line {seen[values]}")
            seen[values] = number
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


def dumps(record):
    return json.dumps(record, ensure_ascii=False)


def half_of(seed, round_, id_):
    """1 or 2: the cross-labelling half of a problem in a round, whatever its place in the file."""
    return 1 + hashlib.sha256(dumps([seed, round_, id_]).encode()).digest()[0] % 2


def write_text(path, text):
    """Write beside `path`, flush to the disk, rename: a crash or a full disk leaves the old file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_jsonl(path, records):
    write_text(path, "".join(dumps(r) + "\n" for r in records))


def write_training(out, train, gt):
    """Training problems as train, gt and unlab .jsonl: D_gt is the first `gt` of them, and neither part may be empty."""
    if not 0 < gt < len(train):
        raise InputError(f"--gt {gt} must lie between 0 and the {len(train)} problems to train on")
    for name, records in (("train", train), ("gt", train[:gt]), ("unlab", train[gt:])):
        write_jsonl(Path(out) / f"{name}.jsonl", records)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """The object in a JSON file, {} where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def download(url, digest, file):
    """The bytes behind a URL, with a progress bar. digest(bytes) must be true; `file` is what to get by hand instead."""
    from urllib.request import urlopen
    from tqdm import tqdm
    chunks = []
    try:
        with urlopen(url, timeout=30) as reply, tqdm(total=int(reply.headers.get("Content-Length") or 0) or None, unit="B",
                                                     unit_scale=True, desc=f"download {short(url)}") as bar:
            while chunk := reply.read(1 << 16):
                chunks.append(chunk)
                bar.update(len(chunk))
    except OSError as e:
        raise InputError(f"{url}: {e}; put {file} into a folder and name it with --data-dir (run_ilr.sh: DATA_DIR)") from None
    data = b"".join(chunks)
    if not digest(data):
        raise InputError(f"{url}: it is not the file that is expected here (its hash differs)")
    return data


def from_release(path, task, split, blob):
    """Fill `path` with a dataset of the paper's release, an Arrow file there. blob: git's name of it, a hash of what is in it."""
    try:
        import pyarrow.ipc
    except ImportError:
        raise InputError(f"{path}: missing; put it there, or `pip install pyarrow` to read the paper's release") from None
    url = ("https://raw.githubusercontent.com/HelloElwin/iterative-label-refinement/3ab48d3fe2702c79434bdb4f25a87b66d8c14f8c/"
           f"data/{task}/{split}/data-00000-of-00001.arrow")
    data = download(url, lambda data: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == blob, path.name)
    write_jsonl(path, pyarrow.ipc.open_stream(data).read_all().to_pylist())


# ---------------------------------------------------------------- unfinished work
def refuse_existing(out):
    if os.path.lexists(out):
        raise InputError(f"--out {out} exists: delete it, or choose another name")


def partial_path(out, args, inputs):
    """Where a stage keeps its unfinished work for `out`: a path whose name holds a hash of the work itself
    (arguments, source of the stages, and size and time of every input file), so that work begun under other
    settings is never continued. Work for the same `out` under another hash is left where it is. The number of processes is no part
    of it: another number continues."""
    return first(lambda: _partial_path(out, args, inputs))


def _partial_path(out, args, inputs):
    refuse_existing(out)
    digest = hashlib.sha256(json.dumps(args, sort_keys=True, default=str).encode())
    here = Path(__file__).parent
    for source in sorted([*here.parent.glob("*.py"), *here.glob("*.py")]):
        digest.update(source.read_bytes())
    for top in inputs:
        for path in sorted(Path(top).rglob("*")) if Path(top).is_dir() else [Path(top)]:
            if path.is_file():
                stat = path.stat()
                digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    out = Path(out)
    return out.with_name(f".{out.name}.{digest.hexdigest()[:12]}.partial")


class BatchLog:
    """Results appended batch by batch to a file; opened again, it keeps the whole batches and drops the rest.

    sizes: number of results in each batch, in the fixed order in which batches are made.
    `self.results` holds what is there already, `self.batches_done` how many batches that is.
    """

    def __init__(self, path, sizes):
        # errors="replace": a kill may have cut the last line, which is dropped, inside a character
        lines = first(lambda: path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else [])
        self.batches_done = count = 0
        while self.batches_done < len(sizes) and count + sizes[self.batches_done] <= len(lines):
            count += sizes[self.batches_done]
            self.batches_done += 1
        self.results = [json.loads(line) for line in lines[:count]]
        self.path = path
        first(lambda: write_text(path, "".join(line + "\n" for line in lines[:count])))

    def append(self, results):
        """Results of one batch; all processes know them, the first writes them."""
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write("".join(dumps(r) + "\n" for r in results))
        self.results += results


# ---------------------------------------------------------------- command line
def bounded(kind, low, high, what):
    """An argparse type: `kind` between `low` and `high`, else "expected `what`"."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {what}")
        return value
    return parse


positive = bounded(int, 1, math.inf, "a whole number above 0")
whole = bounded(int, 0, math.inf, "a whole number")
share = bounded(float, 0, 1, "a share between 0 and 1")
rate = bounded(float, sys.float_info.min, sys.float_info.max, "a number above 0")
amount = bounded(float, 0, sys.float_info.max, "0 or a number above it")


def short(path):
    """The last two parts of a path, for a progress bar."""
    return "/".join(Path(path).parts[-2:])


def run_stage(parser, main, argv=None):
    """Parse, run, and turn what a user can cause into one line: exit 2 for bad input, 1 for a run-time failure."""
    args = parser.parse_args(argv)
    gc.disable()       # until open_tokenizer: what importing torch and transformers makes is there to stay
    try:
        with processes(parser.prog):
            main(args)
    except InputError as e:
        sys.exit(_fail(parser, e, 2))
    except (OSError, ArithmeticError, MemoryError) as e:
        sys.exit(_fail(parser, e, 1))
    except Exception as e:
        # torch and safetensors have their own words for a full disk or device; anything else is a bug and shows its trace
        text = str(e).split("\n")[0]
        if any(s in text for s in ("No space left", "file write failed", "unexpected pos")):
            sys.exit(_fail(parser, f"cannot write a model or state, the disk may be full ({text})", 1))
        if "out of memory" in text:
            sys.exit(_fail(parser, f"{text} (lower --micro-tokens or --batch-size, or see --help for what else saves memory)", 1))
        if is_loss_of_another(e):
            lost(parser.prog, text)
        raise
    except KeyboardInterrupt:
        sys.exit(_fail(parser, "interrupted; the same command continues where it stopped", 130))


def _fail(parser, message, code):
    traceback.clear_frames(sys.exc_info()[2])      # lets go of an open progress bar, which then ends its line
    give_way()
    print(f"{parser.prog}: error: " + (f"process {rank()} of {world()}: " if rank() else "") + str(message), file=sys.stderr)
    leave(code)
    return code


def add_data_flags(p, task, train, gt, test):
    """What every task made from files is asked for; --gt may be 0, half, where that is its default."""
    p.add_argument("--data-dir", default=f"data/{task}", help="folder of train.jsonl and test.jsonl; filled where they are missing")
    p.add_argument("--train", type=positive, default=train, help="training problems, D_gt and D_unlab together")
    p.add_argument("--gt", type=positive if gt else whole, default=gt, help="of these, problems of D_gt, whose references train the weak "
                   "side" + ("" if gt else " (0: half)"))
    p.add_argument("--test", type=positive, default=test, help="test problems, the first so many")
    p.add_argument("--seed", type=whole, default=0, help="of the order of the training problems")


def make_parser(doc, **kwargs):
    """argparse with the stage's docstring as its help and every default shown."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, message):     # one line, as for every other bad input
            give_way()
            self.exit(2, f"{self.prog}: error: {message}; try --help\n")
    return Parser(description=doc, formatter_class=Formatter, **kwargs)
