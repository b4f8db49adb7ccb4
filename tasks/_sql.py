"""SQL that a model wrote: which statement a text holds, and the process that runs it (no task).

    python -I tasks/_sql.py < requests        # JSON lines [path, sql, seconds]

tasks/bird.py starts this process; docs/bird.md says how texts are read. The process opens a
database read-only, allows only SELECT, and limits time, memory, number of rows and size of a value.
"""
import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
import sys
import time
from pathlib import Path

MAX_ROWS = 1_000_000
MAX_VALUE, MAX_MEMORY = 10_000_000, 4 << 30     # bytes: of a text or blob; of a process
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
           sqlite3.SQLITE_RECURSIVE}
FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}
CHANGING = {"date", "time", "datetime", "julianday", "strftime", "unixepoch", "timediff",
            "current_date", "current_time", "current_timestamp", "random", "randomblob"}


# ---------------------------------------------------------------- which statement a text holds
WORDS = ("(?:SELECT|WITH|VALUES|EXPLAIN|INSERT|REPLACE|UPDATE|DELETE|CREATE|ALTER|DROP|PRAGMA|"
         "ATTACH|DETACH|VACUUM|ANALYZE|REINDEX|BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE)\\b")
COMMENT = r"--[^\n]*+|/\*(?>.*?(?:\*/|\Z))"
# SQL from here on: blanks and comments, then a word that begins a statement
STARTS = re.compile(rf"(?is)(?:[\s;]|{COMMENT})*+(?={WORDS})")
# where SQL may begin after prose: a line, or what follows a colon
LEAD = re.compile(rf"(?im)(?:^|:)[ \t*]*(?={WORDS})")
STRING = r"""("(?:[^"\\]++|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*+")"""       # of JSON
JSON = re.compile(rf'\{{\s*"sql"\s*:\s*{STRING}\s*\}}\s*')
# a block, and its language if it has one: ```SELECT 1``` and ```text have none
FENCE = re.compile(rf"""(?imx) (?:`{{3,}}|^[ \t]*~{{3,}}) [ \t]* (?:(?:text|txt|plaintext|query)\b)?
                       ((?:(?!{WORDS})\w+)?) | <(sql)>""")
TOKEN = re.compile(rf"""(?imsx)
    (?P<comment>{COMMENT})
  | (?P<fence>`{{3,}}|^[ \t]*~{{3,}}|</\w+>|\[/INST\]|<[|｜][^\s<>]{{1,40}}>
           |<(?:eos|(?:start|end)_of_turn)>)
  | (?P<semicolon>;)
  | (?P<code>'(?:[^']++|'')*+'? | "(?:[^"]++|"")*+"? | `(?:[^`]++|``)*+`? | \[[^]]*+\]?
           | [^\s;'"`[<~/-]++ | \S)""")

# a call of a function in CHANGING, its name quoted or not
CLOCK = re.compile(rf"""(?is)\bcurrent_(?:date|time|timestamp)\b
                      |\b(?:{'|'.join(CHANGING)})["`\]]?(?:\s|{COMMENT})*+\(""", re.VERBOSE)


def split(text, start):
    """The statements from `start` to a closing fence, a special token such as </s> or <|im_end|>,
    or the end of the text; and where that is.

    A `;` in a string, a quoted name or a comment separates nothing. Nothing but comments is no
    statement.
    """
    found, code = [], False
    begin = start
    for token in TOKEN.finditer(text, start):
        if token.lastgroup == "code":
            code = True
        elif token.lastgroup != "comment":
            if code:
                found.append(text[begin:token.start()].strip())
            begin, code = token.end(), False
            if token.lastgroup == "fence":
                return found, begin
    return found + [text[begin:].strip()] * code, len(text)


def after_prose(text, start):
    """`split`, without prose before the first statement. What holds a `;` is no prose, unless it
    ends with a colon."""
    found, end = split(text, start)
    lead = None if STARTS.match(text, start) else LEAD.search(text, start, end)
    if lead and (lead[0].startswith(":") or ";" not in text[start:lead.start()]):
        return split(text, lead.end())
    return found, end


def statements(text, prompt=""):
    """The SQL statements of a completion, without fences, prose before it, and final `;`.

    A text without any of these is its own and only statement. docs/bird.md has the rules.
    """
    text = text.rpartition("</think>")[2].lstrip("\ufeff\u200b \t\r\n")
    if text.startswith("<think>"):                           # cut off while it thinks
        return []
    found = JSON.fullmatch(text)
    text = json.loads(found[1], strict=False) if found else text
    lead, _, code = text.partition("`")                      # `SELECT 1`
    code = code.rstrip("; .\t\r\n")
    if lead.rstrip()[-1:] in ("", ":") and STARTS.match(code) and code.endswith("`"):
        text = code[:-1]
    fence = FENCE.search(text)
    # prose stands before a fence: "With this query you get them:" is no SQL
    prose = fence and (text[:fence.start()].rstrip() or ".").endswith((":", "."))
    # as in BIRD's own prompts, which end with SELECT
    if prompt.rstrip().upper().endswith("SELECT") and not STARTS.match(text):
        start = fence.end() if prose else 0
        lead = None if fence else LEAD.search(text)
        if not STARTS.match(text, start) and not (lead and lead[0].startswith(":")):
            text = f"{text[:start]} SELECT {text[start:].lstrip()}"
    blocks, end = {"sql": [], "": []}, 0
    if STARTS.match(text) and not prose:
        fence = None
    while fence:
        language, start = (fence[1] or fence[2] or "").lower(), fence.end()
        if language and "sql" not in language:               # another language: skip its block
            closing = FENCE.search(text, start)
            end = closing.end() if closing else len(text)
        else:
            found, end = after_prose(text, start)
            if language or any(map(STARTS.match, found)):    # else a table of results
                blocks["sql" if language else ""] += found
        fence = FENCE.search(text, end)
    if blocks["sql"] or blocks[""]:
        return blocks["sql"] or blocks[""]
    found, end = after_prose(text, 0)
    return found + [text[end:].strip()] * bool(LEAD.search(text, end))


# ---------------------------------------------------------------- databases
def committed(path, folder):
    """`path`; or, if committed or unfinished changes lie in a log beside it, a copy in `folder`
    that SQLite has brought up to date. SQLite would otherwise do so beside the original.

    Raises OSError if the files change meanwhile.
    """
    path = path.resolve()      # SQLite looks for the logs beside the file, not beside a link to it
    files = [Path(f"{path}{end}") for end in ("", "-wal", "-journal")]
    files = [f for f in files if f.is_file() and f.stat().st_size]
    if files in ([], [path]):
        return path
    before = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    for f in files:
        shutil.copyfile(f, Path(folder) / f.name)
    if before != [(f.stat().st_size, f.stat().st_mtime_ns) for f in files]:
        raise OSError(f"{path}: another process writes to this database; grade when it is done")
    copy = Path(folder) / path.name
    # of a file that is no database, the worker says so
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(copy)) as c:
        c.execute("SELECT count(*) FROM sqlite_master").fetchall()     # rolls back
        c.execute("PRAGMA journal_mode = DELETE").fetchall()           # takes in the -wal
    return copy


# ---------------------------------------------------------------- in the worker process
def open_database(path):
    """A connection that can read the database and nothing else; and the set of functions, filled
    as queries are prepared, that they call."""
    path, called = Path(path).resolve(), set()
    with open(path, "rb") as f:
        wal = f.read(20)[18:] == b"\2\2"
    # in WAL mode SQLite makes files beside the database, unless it is told that nobody writes
    options = "mode=ro&immutable=1" if wal else "mode=ro"
    connection = sqlite3.connect(f"{path.as_uri()}?{options}", uri=True)
    for pragma in ("query_only = ON", "trusted_schema = OFF", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    for limit, value in ((sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE),
                         (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
                         (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
                         (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200)):
        connection.setlimit(limit, value)

    def authorize(action, _, name, *__):      # name: of the function, if the action is to call one
        if action == sqlite3.SQLITE_FUNCTION:
            called.add(str(name).lower())
            if called & FORBIDDEN:
                return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY
    connection.set_authorizer(authorize)
    # bytes that are not UTF-8 become half surrogates, other bytes other ones
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    return connection, called


def digest(rows):
    """A hash, the same for equal sets of rows: 1 and 1.0 are equal, as they are in Python."""
    def plain(value):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    texts = sorted(map(repr, {tuple(map(plain, row)) for row in rows}))
    return hashlib.sha256("\n".join(texts).encode("utf-8", "replace")).hexdigest()


def execute(path, sql, seconds):
    """The digest of a query's result, and whether it may differ at another time.

    Raises sqlite3.Error, or ValueError if the text is no query or returns too many rows.
    """
    connection, called = open_database(path)
    try:
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        cursor = connection.execute(sql)
        if cursor.description is None:
            raise ValueError("no query")
        rows = cursor.fetchmany(MAX_ROWS)
        if cursor.fetchone():
            raise ValueError(f"more than {MAX_ROWS:,} rows")
        return digest(rows), bool(called & CHANGING)
    finally:
        connection.close()


def work():
    """Read requests from stdin; answer each on stdout.

    An answer is a line [digest or null, error or null, whether it may differ at another time].
    """
    import resource

    def lower(kind, limit):      # never above the system's own limit
        hard = resource.getrlimit(kind)[1]
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(ValueError, OSError):       # macOS refuses RLIMIT_AS
            resource.setrlimit(kind, (soft, hard))

    lower(resource.RLIMIT_AS, MAX_MEMORY)
    lower(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        path, sql, seconds = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 5)
        try:
            found, changing = execute(path, sql, seconds)
            answer = [found, None, changing]
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OverflowError,
                OSError) as e:
            answer = [None, f"{type(e).__name__}: {e}", False]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    work()
