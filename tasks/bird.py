"""BIRD (Li et al., 2023): a question, a schema and a hint -> SQL, graded by what it returns.

    export ILR_BIRD_DATABASES=databases     # databases/<db>/<db>.sqlite
    python tasks/bird.py --out data --data-dir folder --seed 0

The databases are at https://bird-bench.github.io. folder/train.jsonl and folder/test.jsonl hold
question, answer and db_name. A file that --data-dir lacks is taken from the paper's release (needs
pyarrow).

A completion is right if it returns the same set of rows as the reference within ILR_SQL_TIMEOUT
(30) seconds. As in BIRD, order and repetitions of rows do not count, the order of columns does.
The results of the references are computed here, once, and stored as `reference_result`.

SQL written by a model is not trusted. It runs in separate processes, one per core. They open the
database read-only, allow only SELECT, and limit time, memory, number of rows and size of a value.
A process that hangs is killed. Unlike this, the paper's release runs the SQL in the trainer, with
write access.
"""
import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.cli import make_parser, run_stage
from core.download import from_release
from core.records import InputError, read_jsonl, write_jsonl
from core.tokens import user_prompt
from tasks import add_data_flags, check_data_flags, write_training

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 4096, 256
FIELDS = "db", "reference_result"
BLOBS = {"train": "a610c90f212b4952f65db29db17e80e42edf1d83",        # git's names of the files
         "test": "d59632acfb7312ee7ee72de47a7a24e6954ccf89"}
MAX_ROWS = 1_000_000
MAX_VALUE, MAX_MEMORY = 10_000_000, 4 << 30     # bytes: of a text or blob; of a process
GRACE = 10       # seconds after the time limit until a process that does not stop is killed
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
           sqlite3.SQLITE_RECURSIVE}
FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}


# ---------------------------------------------------------------- in the worker process
def open_database(path):
    """A connection that can read the database and nothing else."""
    connection = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)
    for pragma in ("query_only = ON", "trusted_schema = OFF", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    for limit, value in ((sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE),
                         (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
                         (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
                         (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200)):
        connection.setlimit(limit, value)

    def authorize(action, _, name, *__):      # name: of the function, if the action is to call one
        if action == sqlite3.SQLITE_FUNCTION and str(name).lower() in FORBIDDEN:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY
    connection.set_authorizer(authorize)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def digest(rows):
    """A hash, the same for equal sets of rows: 1 and 1.0 are equal, as they are in Python."""
    def plain(value):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    texts = sorted(map(repr, {tuple(map(plain, row)) for row in rows}))
    return hashlib.sha256("\n".join(texts).encode("utf-8", "replace")).hexdigest()


def execute(path, sql, seconds):
    """The digest of a query's result.

    Raises sqlite3.Error, or ValueError if the text is no query or returns too many rows.
    """
    connection = open_database(path)
    try:
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        cursor = connection.execute(sql)
        if cursor.description is None:
            raise ValueError("no query")
        rows = cursor.fetchmany(MAX_ROWS)
        if cursor.fetchone():
            raise ValueError(f"more than {MAX_ROWS:,} rows")
        return digest(rows)
    finally:
        connection.close()


def work():
    """Read requests from stdin, JSON lines [path, sql, seconds]; answer each on stdout.

    An answer is a line [digest or null, error or null].
    """
    import resource

    def lower(kind, limit):      # never above the system's own limit
        hard = resource.getrlimit(kind)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (soft, hard))

    lower(resource.RLIMIT_AS, MAX_MEMORY)
    lower(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        path, sql, seconds = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 5)
        try:
            answer = [execute(path, sql, seconds), None]
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OverflowError) as e:
            answer = [None, f"{type(e).__name__}: {e}"]
        print(json.dumps(answer), flush=True)


# ---------------------------------------------------------------- in the process that grades
class Worker:
    """A process that runs queries. It is started when needed and killed when a query hangs."""
    process = None

    def ask(self, path, sql, seconds):
        """[digest or None, error or None] of a query. Raises OSError if no query can be run."""
        if self.process is None or self.process.poll() is not None:
            kept = ("PATH", "LD_LIBRARY_PATH", "LANG")      # no keys, no settings
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--work"], text=True, encoding="utf-8",
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
            return json.loads(line or '[null, "killed"]')
        finally:
            timer.cancel()

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()


results = {}       # (database, query) -> [digest or None, error or None], of this process


def database(name):
    """The path of a database, by ILR_BIRD_DATABASES. Raises InputError if there is none."""
    folder = os.environ.get("ILR_BIRD_DATABASES")
    if not folder:
        raise InputError("ILR_BIRD_DATABASES is not set: "
                         "the folder of BIRD's databases, <db>/<db>.sqlite")
    path = Path(folder) / name / f"{name}.sqlite"
    if not path.is_file() or Path(name).name != name:
        raise InputError(f"{path}: no such database; ILR_BIRD_DATABASES names their folder")
    return path


def run_queries(queries):
    """Run the (db, SQL) pairs that have not been run yet, on all cores; fills `results`."""
    queries = [q for q in dict.fromkeys(queries) if q not in results]
    if not queries:       # as when records are graded one by one after `warm`
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
    paths = {db: database(db) for db in {db for db, _ in queries}}
    own, workers = threading.local(), []

    def ask(query):
        if not hasattr(own, "worker"):
            own.worker = Worker()
            workers.append(own.worker)
        return own.worker.ask(paths[query[0]], query[1], seconds)

    try:
        with ThreadPoolExecutor(min(os.cpu_count(), len(queries))) as pool:
            found = tqdm(pool.map(ask, queries), total=len(queries), desc="sql", unit="query",
                         mininterval=1, disable=len(queries) < 10)
            results.update(zip(queries, found, strict=True))
    finally:
        for worker in workers:
            worker.close()


def query(record):
    """(db, SQL) of a record."""
    if not isinstance(record.get("db"), str):
        raise InputError(f"id {record['id']} has no db: make the records with tasks/bird.py")
    return record["db"], record["completion"]


def result(record):
    """The digest of what a record's completion returns, or None if it fails."""
    run_queries([query(record)])
    return results[query(record)][0]


# ---------------------------------------------------------------- the names every task has
def warm(records):
    """Run the queries of these records in parallel, before they are graded or compared."""
    run_queries(map(query, records))


def is_well_formed(text):
    """Whether there is any text: SQL is parsed only when it runs."""
    return bool(text.strip())


def grade(record):
    """1.0 if the completion returns what the reference returns, else 0.0.

    A query that fails or times out is wrong.
    """
    if not isinstance(record.get("reference_result"), str):
        raise InputError(f"id {record['id']} has no reference_result: "
                         "make the records with tasks/bird.py")
    return float(result(record) == record["reference_result"])


def agree(a, b):
    """Whether two records' queries return the same; if one fails, whether the texts are equal."""
    if a["completion"].strip() == b["completion"].strip():
        return True
    x = result(a)
    return x is not None and x == result(b)


# ---------------------------------------------------------------- files
def check(args):
    """Refuse arguments that cannot work."""
    if args.work:
        return
    if not args.out:
        raise InputError("give --out")
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
    if args.work:
        return work()
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
        rows[split] = [{**r, "reference_result": result(r)} for r in records
                       if result(r) is not None]
    if not rows["test"]:
        raise InputError(f"{args.data_dir}/test.jsonl: no problem is left to test on")
    write_training(out, rows["train"], args.gt)
    write_jsonl(out / "test.jsonl", rows["test"])


def parser():
    p = make_parser(__doc__, prog="tasks/bird.py")
    p.add_argument("--out", help="folder to write")
    add_data_flags(p, "bird", 10**6, 4714, 10**6)
    p.add_argument("--database-dir", help="folder of the databases (default: ILR_BIRD_DATABASES, "
                                          "which the other stages read)")
    p.add_argument("--work", action="store_true",
                   help="run queries from standard input (for this file's own use)")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
