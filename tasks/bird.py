"""BIRD (Li et al., 2023): a question, a schema and a hint -> SQL, graded by what it returns.

    export ILR_BIRD_DATABASES=databases     # databases/<db>/<db>.sqlite
    python tasks/bird.py --out data --data-dir folder --seed 0

The databases are at https://bird-bench.github.io. folder/train.jsonl and folder/test.jsonl hold
question, answer and db_name. A file that --data-dir lacks is taken from the paper's release (needs
pyarrow).

A completion is right if it returns the same set of rows as the reference within ILR_SQL_TIMEOUT
(30) seconds. As in BIRD, order and repetitions of rows do not count, the order of columns does.
The results of the references are computed here, once, and stored as `reference_result`, except for
references that read the clock: they run again when they are graded. docs/bird.md has all rules.

SQL written by a model is not trusted. It runs in separate processes (tasks/_sql.py), one per core.
They open the database read-only, allow only SELECT, and limit time, memory, number of rows and size
of a value. A process that hangs is killed. Unlike this, the paper's release runs the SQL in the
trainer, with write access.
"""
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.cli import make_parser, run_stage
from core.download import from_release
from core.records import InputError, read_jsonl, write_jsonl
from core.tokens import user_prompt
from tasks import _sql, add_data_flags, check_data_flags, write_training

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 4096, 256
FIELDS = "db", "reference_result"
BLOBS = {"train": "a610c90f212b4952f65db29db17e80e42edf1d83",        # git's names of the files
         "test": "d59632acfb7312ee7ee72de47a7a24e6954ccf89"}
COMMAND = [sys.executable, "-I", _sql.__file__]
GRACE = 10       # seconds after the time limit until a process that does not stop is killed


# ---------------------------------------------------------------- databases
def database(name):
    """The path of a database, by ILR_BIRD_DATABASES. Raises InputError if there is none.

    It is FOLDER/<db>/<db>.sqlite, or up to two folders deeper, as BIRD's zips unpack.
    """
    if not os.environ.get("ILR_BIRD_DATABASES"):
        raise InputError("ILR_BIRD_DATABASES is not set: "
                         "the folder of BIRD's databases, <db>/<db>.sqlite")
    folder = Path(os.environ["ILR_BIRD_DATABASES"])
    path = folder / name / f"{name}.sqlite"
    found = []
    for depth in ("", "*/", "*/*/") if Path(name).name == name else ():
        places = sorted(folder.glob(depth)) if depth else [folder]
        found = [p for p in (place / name / path.name for place in places) if p.is_file()]
        if found:
            break
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]}: two databases of one name; "
                         "ILR_BIRD_DATABASES must hold one")
    if not found:
        others = sorted(p.stem for p in folder.glob("*/*.sqlite"))
        raise InputError(f"{path}: no such database; ILR_BIRD_DATABASES names their folder, which "
                         f"holds {', '.join(others[:3]) or 'none'}{', ...' * (len(others) > 3)}")
    return found[0]


# ---------------------------------------------------------------- queries
class Worker:
    """A process that runs queries. It is started when needed and killed when a query hangs."""
    process = None

    def ask(self, path, sql, seconds):
        """[digest or None, error or None, whether another day may differ] of a query.

        Raises OSError if no query can be run.
        """
        if self.process is None or self.process.poll() is not None:
            kept = ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ")      # no keys, no settings
            self.process = subprocess.Popen(
                COMMAND, text=True, encoding="utf-8",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if k in kept})
            error = self.exchange(path, "SELECT count(*) FROM sqlite_master", 30)[1]
            if error:       # without this check every query would count as wrong
                raise OSError(f"{path}: a process of its own cannot read it: {error}")
        return self.exchange(path, sql, seconds)

    def exchange(self, path, sql, seconds):
        """Send one request and read its answer; kill the process if it takes too long."""
        timer = threading.Timer(seconds + GRACE, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps([str(path), sql, seconds]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                self.process.wait()
            return json.loads(line or '[null, "killed", false]')
        finally:
            timer.cancel()

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()


def cores():
    """How many cores this process may use: by its affinity and by its container's quota."""
    has_affinity = hasattr(os, "sched_getaffinity")      # not on macOS
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):       # no such file; "max": no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, quota // period))
    return count


def today():
    """The date, in UTC and here."""
    return time.strftime("%F", time.gmtime()), time.strftime("%F")


# of this process: (database, query) -> [digest or None, error or None],
# (database, query, query, ...) -> a list of these
results = {}
days = {}       # a key of `results` that may differ another day -> the day it is of


def run_queries(keys):
    """Run the (db, SQL) pairs that have not been run yet, on all cores; fills `results`.

    Several queries in one key, (db, SQL, SQL, ...), run one right after the other.
    """
    day = today()
    keys = [k for k in dict.fromkeys(keys) if k not in results or days.get(k, day) != day]
    if not keys:       # as when records are graded one by one after `warm`
        return
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm
    try:
        seconds = float(os.environ.get("ILR_SQL_TIMEOUT", 30))
    except ValueError:
        seconds = 0
    if not 0 < seconds <= 86400:
        raise InputError(f"ILR_SQL_TIMEOUT is {os.environ['ILR_SQL_TIMEOUT']!r}: "
                         "expected seconds, up to a day")
    paths = {db: database(db) for db in dict.fromkeys(k[0] for k in keys)}
    own, workers = threading.local(), []

    def ask(key):
        if not hasattr(own, "worker"):
            own.worker = Worker()
            workers.append(own.worker)
        day = today()
        answers = [own.worker.ask(paths[key[0]], sql, seconds) for sql in key[1:]]
        return day, answers

    try:
        with (tempfile.TemporaryDirectory(prefix="bird-") as folder,
              ThreadPoolExecutor(min(cores(), len(keys))) as pool):
            paths = {db: _sql.committed(path, folder) for db, path in paths.items()}
            found = tqdm(pool.map(ask, keys), total=len(keys), desc="sql", unit="query",
                         mininterval=1, disable=len(keys) < 10)
            for key, (day, answers) in zip(keys, found, strict=True):
                short = [answer[:2] for answer in answers]
                results[key] = short if len(key) > 2 else short[0]
                days.pop(key, None)
                if any(changing for _, _, changing in answers):
                    days[key] = day
    finally:
        for worker in workers:
            worker.close()


def query(record, field="completion"):
    """(db, SQL) of a record's completion or reference. Several statements: SQLite refuses them."""
    if not isinstance(record.get("db"), str):
        raise InputError(f"id {record['id']} has no db: make the records with tasks/bird.py")
    prompt = record.get("prompt")
    prompt = prompt if isinstance(prompt, str) and field == "completion" else ""
    return record["db"], ";\n".join(_sql.statements(record[field], prompt))


def result(record):
    """The digest of what a record's completion returns, or None if it fails."""
    run_queries([query(record)])
    return results[query(record)][0]


def reads_clock(record):
    """Whether a record's reference runs again when it is graded: another day it may differ."""
    if "reference_result" not in record or not isinstance(record.get("reference"), str):
        return False
    # a string: also of records that were made before such references were left open
    return record["reference_result"] is None or bool(_sql.CLOCK.search(record["reference"]))


def again(record):
    """(db, reference, completion, reference): the clock may tick between two of them."""
    db, sql = query(record)
    reference = query(record, "reference")[1]
    return db, reference, sql, reference


def same(key):
    """Whether the middle one of three queries returns what the first or the last one does.

    Raises OSError if one of these two fails.
    """
    run_queries([key])
    first, other, last = results[key]
    if first[0] is None or last[0] is None:
        raise OSError(f"{key[0]}: {key[1]!r} cannot be run again: {first[1] or last[1]}")
    return other[0] in (first[0], last[0])


# ---------------------------------------------------------------- the names every task has
def warm(records):
    """Run the queries of these records in parallel, before they are graded or compared."""
    run_queries([*map(query, records), *map(again, filter(reads_clock, records))])


def is_well_formed(text):
    """Whether the text holds one statement. It is parsed only when it runs."""
    return len(_sql.statements(text)) == 1


def grade(record):
    """1.0 if the completion returns what the reference returns, else 0.0.

    A query that fails or times out is wrong.
    """
    if reads_clock(record):
        _, reference, sql, _ = key = again(record)
        return float(sql == reference or same(key))
    if not isinstance(record.get("reference_result"), str):
        raise InputError(f"id {record['id']} has no reference_result: "
                         "make the records with tasks/bird.py")
    return float(result(record) == record["reference_result"])


def agree(a, b):
    """Whether two records' queries return the same; if one fails, whether the texts are equal."""
    x, y = query(a), query(b)
    if x == y:
        return True
    first, second = result(a), result(b)
    if None in (first, second):
        return False
    return same((*x, y[1], x[1])) if x in days or y in days else first == second


# ---------------------------------------------------------------- files
def check(args):
    """Refuse arguments that cannot work."""
    check_data_flags(args)


def rows_of(split, folder):
    """The records of all problems of a split, in the dataset's order."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        from_release(path, "bird", split, BLOBS[split])
    rows = read_jsonl(path, ("question", "answer", "db_name"), key=())
    return [{"id": f"{split}-{i}", "prompt": user_prompt(r["question"]), "completion": r["answer"],
             "reference": r["answer"], "source": "gold", "db": r["db_name"]}
            for i, r in enumerate(rows)]


def main(args):
    check(args)
    if args.database_dir:
        os.environ["ILR_BIRD_DATABASES"] = args.database_dir
    out = Path(args.out)
    train, test = (rows_of(split, Path(args.data_dir)) for split in ("train", "test"))
    random.Random(args.seed).shuffle(train)
    rows = {"train": train[:args.train], "test": test[:args.test]}
    warm(rows["train"] + rows["test"])
    for split, records in rows.items():
        failed = [r for r in records if result(r) is None]
        if failed:
            first, error = failed[0]["id"], results[query(failed[0])][1]
            print(f"{len(failed)} of {len(records)} {split} references cannot be run and are left "
                  f"out, the first: {first} ({error})")
        # null: what the reference returns today says nothing about another day
        rows[split] = [{**r, "reference_result": None if query(r) in days else result(r)}
                       for r in records if result(r) is not None]
        clock = sum(r["reference_result"] is None for r in rows[split])
        print(f"{clock} of {len(rows[split])} {split} references call a date or random function: "
              "they run again when they are graded")
    if not rows["test"]:
        raise InputError(f"{args.data_dir}/test.jsonl: no problem is left to test on")
    write_training(out, rows["train"], args.gt)
    write_jsonl(out / "test.jsonl", rows["test"])


def parser():
    p = make_parser(__doc__, prog="tasks/bird.py")
    p.add_argument("--out", required=True, help="folder to write")
    add_data_flags(p, "bird", 10**6, 4714, 10**6)
    p.add_argument("--database-dir", help="folder of the databases (default: ILR_BIRD_DATABASES, "
                                          "which the other stages read)")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
