"""BIRD (Li et al., 2023): a question, a schema and a hint -> SQL, graded by what it returns.

    export ILR_BIRD_DATABASES=folder                             # folder/<db>/<db>.sqlite, from https://bird-bench.github.io
    python tasks/bird.py --out data --data-dir folder --seed 0   # folder/train.jsonl, test.jsonl: question, answer, db_name

What --data-dir lacks comes from the paper's release (needs pyarrow); the databases do not.

A completion is right if it returns the same set of rows as the reference, within ILR_SQL_TIMEOUT (30) seconds: order and
repetitions of rows do not count, the order of columns does (BIRD's rule). What the references return is computed here, once, and
goes along as `reference_result`.

Model-written SQL is hostile. It runs in processes of its own, as many as cores, that open the database read-only, may only
select, and are bounded in time, memory, rows and size of a value; one that hangs is killed. In the paper's release it runs in the
trainer with write access.
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
from tasks import InputError, add_data_flags, from_release, make_parser, read_jsonl, run_stage, user_prompt, write_jsonl, write_training

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 4096, 256
FIELDS = "db", "reference_result"
BLOBS = {"train": "a610c90f212b4952f65db29db17e80e42edf1d83", "test": "d59632acfb7312ee7ee72de47a7a24e6954ccf89"}     # git's names
MAX_ROWS, MAX_VALUE, MAX_MEMORY = 1_000_000, 10_000_000, 4 << 30     # rows; bytes of a text or blob; bytes of a process
GRACE = 10       # seconds after which a process is killed whose query should have been stopped already
FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}


# ---------------------------------------------------------------- in the worker
def open_database(path):
    """A connection that can read the database and nothing else."""
    connection = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)
    for pragma in ("query_only = ON", "trusted_schema = OFF", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    for limit, value in ((sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE), (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
                         (sqlite3.SQLITE_LIMIT_ATTACHED, 0), (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200)):
        connection.setlimit(limit, value)
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    connection.set_authorizer(lambda action, first, second, *_: sqlite3.SQLITE_OK if action in allowed and not (
        action == sqlite3.SQLITE_FUNCTION and str(second).lower() in FORBIDDEN) else sqlite3.SQLITE_DENY)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def digest(rows):
    """One text for equal sets of rows: 1 and 1.0 are equal, as they are in Python."""
    rows = {tuple(int(x) if isinstance(x, float) and x.is_integer() else x for x in row) for row in rows}
    return hashlib.sha256("\n".join(sorted(map(repr, rows))).encode("utf-8", "replace")).hexdigest()


def execute(path, sql, seconds):
    """The digest of what a query returns. Raises sqlite3.Error, or ValueError for no query and for too many rows."""
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
    """Answer requests, a JSON line [path, sql, seconds] each, with a line [digest or null, error or null]."""
    import resource

    def lower(kind, limit):      # never above what the system allows already
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))

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


# ---------------------------------------------------------------- outside
class Worker:
    """A process that runs queries, started when needed and killed when one hangs."""
    process = None

    def ask(self, path, sql, seconds):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen([sys.executable, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                                            env={k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "LANG")})
            error = self.exchange(path, "SELECT count(*) FROM sqlite_master", 30)[1]
            if error:       # else every query would count as wrong
                raise OSError(f"{path}: a process of its own cannot read it: {error}")
        return self.exchange(path, sql, seconds)

    def exchange(self, path, sql, seconds):
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
    folder = os.environ.get("ILR_BIRD_DATABASES")
    if not folder:
        raise InputError("ILR_BIRD_DATABASES is not set: the folder of BIRD's databases, <db>/<db>.sqlite")
    path = Path(folder) / name / f"{name}.sqlite"
    if not path.is_file() or Path(name).name != name:
        raise InputError(f"{path}: no such database; ILR_BIRD_DATABASES names their folder")
    return path


def run_queries(queries):
    """Run (db, SQL) pairs that have not been run yet, on all cores: fills `results`."""
    queries = [q for q in dict.fromkeys(queries) if q not in results]
    if not queries:       # as in grading record by record, after `warm`
        return
    from concurrent.futures import ThreadPoolExecutor
    from tqdm import tqdm
    try:
        seconds = float(os.environ.get("ILR_SQL_TIMEOUT", 30))
    except ValueError:
        seconds = 0
    if not 0 < seconds <= 86400:
        raise InputError(f"ILR_SQL_TIMEOUT is {os.environ['ILR_SQL_TIMEOUT']!r}: expected seconds, up to a day")
    paths = {db: database(db) for db in {db for db, _ in queries}}
    own, workers = threading.local(), []

    def ask(query):
        if not hasattr(own, "worker"):
            own.worker = Worker()
            workers.append(own.worker)
        return own.worker.ask(paths[query[0]], query[1], seconds)

    try:
        with ThreadPoolExecutor(min(os.cpu_count(), len(queries))) as pool:
            results.update(zip(queries, tqdm(pool.map(ask, queries), total=len(queries), desc="sql", unit="query", mininterval=1,
                                             disable=len(queries) < 10)))
    finally:
        for worker in workers:
            worker.close()


def query(record):
    if not isinstance(record.get("db"), str):
        raise InputError(f"id {record['id']} has no db: make the records with tasks/bird.py")
    return record["db"], record["completion"]


def result(record):
    run_queries([query(record)])
    return results[query(record)][0]


# ---------------------------------------------------------------- the names every task has
def warm(records):
    """Run the queries of these records side by side, before they are graded or compared one by one."""
    run_queries(map(query, records))


def is_well_formed(text):
    return bool(text.strip())


def grade(record):
    """1.0 if the completion returns what the reference does, else 0.0; a query that fails or times out is wrong."""
    if not isinstance(record.get("reference_result"), str):
        raise InputError(f"id {record['id']} has no reference_result: make the records with tasks/bird.py")
    return float(result(record) == record["reference_result"])


def agree(a, b):
    """Two records' queries return the same; where one fails, only equal texts agree."""
    if a["completion"].strip() == b["completion"].strip():
        return True
    x = result(a)
    return x is not None and x == result(b)


# ---------------------------------------------------------------- files
def main(args):
    if args.work:
        return work()
    if args.database_dir:
        os.environ["ILR_BIRD_DATABASES"] = args.database_dir
    out, rows = Path(args.out), {}
    for split in ("train", "test"):
        path = Path(args.data_dir) / f"{split}.jsonl"
        if not path.exists():
            from_release(path, "bird", split, BLOBS[split])
        found = read_jsonl(path, ("question", "answer", "db_name"), key=())
        rows[split] = [{"id": f"{split}-{i}", "prompt": user_prompt(r["question"]), "completion": r["answer"],
                        "reference": r["answer"], "source": "gold", "db": r["db_name"]} for i, r in enumerate(found)]
    random.Random(args.seed).shuffle(rows["train"])
    rows = {"train": rows["train"][:args.train], "test": rows["test"][:args.test]}
    warm(rows["train"] + rows["test"])
    for split, records in rows.items():
        failed = [r for r in records if result(r) is None]
        if failed:
            print(f"{len(failed)} of {len(records)} {split} references cannot be run and are left out, the first: {failed[0]['id']} "
                  f"({results[failed[0]['db'], failed[0]['completion']][1]})")
        rows[split] = [{**r, "reference_result": result(r)} for r in records if result(r) is not None]
    if not rows["test"]:
        raise InputError(f"{args.data_dir}/test.jsonl: no problem is left to test on")
    write_training(out, rows["train"], args.gt)
    write_jsonl(out / "test.jsonl", rows["test"])


def parser():
    p = make_parser(__doc__, prog="tasks/bird.py")
    p.add_argument("--out", help="folder to write")
    add_data_flags(p, "bird", 10**6, 4714, 10**6)
    p.add_argument("--database-dir", help="folder of the databases (default: ILR_BIRD_DATABASES, which the other stages read)")
    p.add_argument("--work", action="store_true", help="run queries from standard input (for this file's own use)")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
