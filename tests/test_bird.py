"""tasks/bird.py: results of queries, hostile SQL against a real database, grading in the stages."""
import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, rows, run
from kill_test import PAIR, call

import compare
import evaluate
import refine
from core.records import InputError, write_jsonl
from tasks import _sql, bird

SHARED = ROOT.parent / "shared/data"
pytestmark = pytest.mark.skipif(not (SHARED / "chinook.sqlite").exists(),
                                reason=f"needs chinook.sqlite in {SHARED}")
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
# one step of minutes, which no handler interrupts
SLOW_STEP = "SELECT instr(zeroblob(9000000), zeroblob(4000000) || x'01')"


@pytest.fixture(autouse=True)
def chinook(tmp_path, monkeypatch):
    (tmp_path / "db/chinook").mkdir(parents=True)
    path = tmp_path / "db/chinook/chinook.sqlite"
    shutil.copy(SHARED / "chinook.sqlite", path)
    monkeypatch.setenv("ILR_BIRD_DATABASES", str(tmp_path / "db"))
    monkeypatch.setenv("ILR_SQL_TIMEOUT", "1")
    monkeypatch.setattr(bird, "results", {})
    monkeypatch.setattr(bird, "days", {})
    return path


def answers(*queries):
    bird.run_queries([("chinook", q) for q in queries])
    return [bird.results["chinook", q][0] for q in queries]


def test_equal_sets_of_rows_are_equal_results():
    a, b, c, d, e, f, g = answers(
        "SELECT Name FROM Artist", "SELECT Name FROM Artist ORDER BY Name DESC",
        "SELECT Name FROM Artist UNION ALL SELECT Name FROM Artist",
        "SELECT Name FROM Artist WHERE ArtistId > 1", "SELECT ArtistId, Name FROM Artist",
        "SELECT Name, ArtistId FROM Artist", "SELECT Name FROM Artist -- with a comment")
    assert a == b == c == g and len({a, d, e, f}) == 4
    one, real, text, null, nothing, blob = answers(
        "SELECT 1", "SELECT 1.0", "SELECT '1'", "SELECT NULL", "SELECT 1 WHERE 0", "SELECT x'31'")
    assert one == real and len({one, text, null, nothing, blob}) == 5
    assert None not in {one, text, null, nothing, blob}


HOSTILE = [
    "", " ", "-- nothing", "/* nothing */", ";", "SELEC 1", "SELECT * FROM nowhere",
    "SELECT 1; DROP TABLE Artist", "DROP TABLE Artist", "DELETE FROM Artist",
    "UPDATE Artist SET Name = 'x'", "INSERT INTO Artist VALUES (9999, 'x')",
    "REPLACE INTO Artist VALUES (1, 'x')", "CREATE TABLE x (y)", "CREATE TEMP TABLE x (y)",
    "CREATE VIEW x AS SELECT 1", "CREATE TRIGGER x AFTER INSERT ON Artist BEGIN SELECT 1; END",
    "CREATE INDEX x ON Artist (Name)", "ALTER TABLE Artist RENAME TO x",
    "ALTER TABLE Artist ADD COLUMN x", "REINDEX", "ANALYZE", "VACUUM",
    "VACUUM INTO 'stolen.sqlite'", "ATTACH 'other.sqlite' AS x", "DETACH main", "BEGIN", "COMMIT",
    "ROLLBACK", "SAVEPOINT x", "PRAGMA query_only = OFF", "PRAGMA journal_mode = DELETE",
    "PRAGMA writable_schema = ON", "PRAGMA user_version = 7", "PRAGMA table_info(Artist)",
    "SELECT * FROM pragma_database_list", "SELECT load_extension('x.so')",
    "SELECT readfile('/etc/passwd')", "SELECT writefile('x', 'y')", "SELECT edit('x')",
    "SELECT fts3_tokenizer('simple', x'00')", "SELECT randomblob(1000000000)",
    "SELECT zeroblob(2000000000)", "SELECT hex(zeroblob(9000000))",
    "SELECT group_concat(a.Name || b.Name) FROM Track a, Track b",
    "SELECT a.* FROM Track a, Track b, Track c", ENDLESS,
    "SELECT count(*) FROM Track a, Track b, Track c, Track d",
    "SELECT " + "(" * 300 + "1" + ")" * 300, "SELECT 1 " + "+ 1" * 2000,
    "SELECT '" + "x" * 200_000 + "'",
    "INSERT INTO sqlite_master VALUES (1)", "CREATE VIRTUAL TABLE x USING fts3(y)",
    "WITH x AS (SELECT 1) DELETE FROM Artist", "EXPLAIN DELETE FROM Artist",
    "SELECT 1\0DROP TABLE Artist", "SELECT ?", "SELECT :x", "SELECT printf('%.*c', 2e9, 'x')",
    "SELECT replace(hex(zeroblob(4000000)), '0', 'xxxx')", "PRAGMA trusted_schema = ON",
    "PRAGMA temp_store_directory = '/tmp'", "SELECT * FROM pragma_table_info('Artist')",
    "ATTACH ':memory:' AS x", "VACUUM main INTO 'stolen.sqlite'", "RELEASE x",
    "SELECT " + "abs(" * 300 + "1" + ")" * 300, "CREATE TEMP VIEW x AS SELECT 1",
    "WITH RECURSIVE c(x) AS (SELECT 'x' UNION ALL SELECT x || x FROM c) SELECT length(x) FROM c",
    "SELECT a.Name FROM Track a, Track b, Track c ORDER BY random()"]


def test_hostile_queries_return_nothing_and_change_nothing(chinook, tmp_path):
    before, start = hashlib.sha256(chinook.read_bytes()).hexdigest(), time.monotonic()
    assert len(set(HOSTILE)) > 50 and not any(answers(*HOSTILE))
    # the endless ones were stopped; a guard, not a benchmark
    assert time.monotonic() - start < 60
    assert hashlib.sha256(chinook.read_bytes()).hexdigest() == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["chinook.sqlite"]
    assert answers("SELECT count(*) FROM Artist")[0]       # and the next query is answered
    assert "interrupted" in bird.results["chinook", ENDLESS][1]


def test_a_query_that_hangs_is_killed_and_the_next_one_answered(monkeypatch):
    monkeypatch.setattr(bird, "GRACE", 0.5)
    monkeypatch.setattr(bird, "cores", lambda: 1)
    start = time.monotonic()
    slow, fine = answers(SLOW_STEP, "SELECT 1")
    assert slow is None and fine and bird.results["chinook", SLOW_STEP] == [None, "killed"]
    assert time.monotonic() - start < 30


def test_a_worker_that_cannot_work_is_an_error_and_lower_limits_are_kept(chinook):
    code = ("from tasks import bird; bird.run_queries([('chinook', 'SELECT 1')]); "
            "print(bird.results['chinook', 'SELECT 1'][0])")
    limited = f"ulimit -t 100 -v 3000000; {sys.executable} -c \"{code}\""
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (answers("SELECT 1")[0], 0), done.stderr
    chinook.write_bytes(b"no database")
    said = "a process of its own cannot read it: DatabaseError: file is not a database"
    with pytest.raises(OSError, match=said):
        answers("SELECT 2 FROM Artist", "SELECT 3 FROM Artist")


def record(id_, sql, reference="SELECT Name FROM Artist"):
    return {"id": id_, "prompt": "p", "completion": sql, "reference": reference, "db": "chinook",
            "reference_result": answers(reference)[0]}


def test_grade_and_agreement():
    good, bad = record(1, "SELECT Name FROM Artist"), record(1, "SELECT 1")
    same = record(1, "SELECT DISTINCT Name FROM Artist")
    broken, again, other = record(1, "SELEC"), record(1, " SELEC\n"), record(1, "SELEC 2")
    assert [bird.grade(r) for r in (good, same, bad, broken)] == [1, 1, 0, 0]
    assert bird.agree(good, same) and not bird.agree(good, bad) and bird.agree(broken, again)
    assert not bird.agree(broken, other)
    assert bird.is_well_formed("SELECT 1") and not bird.is_well_formed(" \n")
    # BIRD's own script calls it right
    assert bird.grade(record(1, "", "SELECT 1 WHERE 0")) == 0
    with pytest.raises(InputError, match="id 1 has no reference_result"):
        bird.grade({"id": 1, "completion": "SELECT 1", "db": "chinook"})


READ_AS_SELECT_1 = [        # (completion, prompt)
    ("SELECT 1", ""), ("  SELECT 1\n", ""), ("\ufeffSELECT 1", ""), (";SELECT 1", ""),
    ("SELECT 1;", ""), ("SELECT 1 ;; ;", ""), ("SELECT 1; -- done; really\n/* ; */", ""),
    ("```sql\nSELECT 1\n```", ""), ("```sqlite\nSELECT 1;\n```", ""), ("```\nSELECT 1\n```", ""),
    ("```SQL\r\nSELECT 1;\r\n```\r\n", ""), ("````sql\nSELECT 1\n````", ""),
    ("~~~sql\nSELECT 1\n~~~", ""), ("  ~~~\n  SELECT 1\n  ~~~", ""), ("```sql\nSELECT 1", ""),
    ("```SELECT 1```", ""), ("```sql SELECT 1; ```", ""), ("``` sql\nSELECT 1```", ""),
    ("```{sql}\nSELECT 1\n```", ""), ("```sql title=q\nSELECT 1\n```", ""),
    ("```sql\nSELECT 1\n```\nIt's what you're after; see?", ""),
    ("Here's the query:\n\n```sql\nSELECT 1;\n```\n\nWith it, you select one row.", ""),
    ("```python\nit's;\n```\n```sql\nSELECT 1\n```\n", ""),
    ("```sql\nSELECT 1\n```\nwhich returns\n```\n1\n```", ""),
    ("```\n1 | x\n```\nfrom\n```\nSELECT 1\n```", ""), ("<sql>SELECT 1</sql>", ""),
    ("<SQL>\nSELECT 1;\n</SQL> done", ""), ("SQL: SELECT 1", ""), ("**SQL:** SELECT 1;", ""),
    ("Here's the query: SELECT 1", ""), ("The query\nSELECT 1;", ""),
    ("<think>SELECT 2; it's</think>\nSELECT 1", ""),
    ("<think>```sql\nSELECT 2\n```</think><answer>\n```sql\nSELECT 1\n```\n</answer>", ""),
    ("Select it: SELECT 2</think>SELECT 1", ""), ("SELECT 1</s>", ""), ("SELECT 1;<|im_end|>", ""),
    ("1. it's old; 2. we're done; so use COUNT(). Finally the SQL is: SELECT 1;</s>", ""),
    ("With this query you get it:\n```sql\nSELECT 1\n```", ""),
    ("SELECT 1<eos>", ""), ("SELECT 1 <end_of_turn>\n", ""), ("SELECT 1 [/INST]", ""),
    ("SELECT 1<|eot_id|>", ""), ("SELECT 1<｜end▁of▁sentence｜>", ""), ("SELECT 1</answer>", ""),
    ("`SELECT 1`", ""), ("`SELECT 1`;\n", ""), ("`SELECT 1;`", ""), ("Here it is: `SELECT 1`.", ""),
    ('{"sql": "SELECT 1"}', ""), ('{\n  "sql": "SELECT\\u00201;"\n}\n', ""),
    ("```text\nSELECT 1\n```", ""), ("```query\nSELECT 1```", ""), ("\u200bSELECT 1", ""),
    ("1", "-- How many?\nSELECT "), ("1;", "select"), ("```sql\n1;\n```\nas asked", "SELECT"),
    ("Here it is:\n```\n1\n```", "SELECT"), ("<sql>1</sql>", "SELECT"),
    ("```SELECT 1```", "SELECT"), ("Here it is: SELECT 1", "SELECT"),
    ("Here it is:\n```sql\nSELECT 1\n```", "SELECT"),
    ("SELECT 1", "-- How many?\nSELECT "), ("1\n```\n", "```sql\nSELECT"),
    ("```sql\nSELECT 1\n```", "SELECT "), ("SELECT 1\n```\nas you asked", "SQL:\n```sql\n")]


@pytest.mark.parametrize("text, prompt", READ_AS_SELECT_1)
def test_fences_final_semicolons_and_prose_around_one_statement_are_left_out(text, prompt):
    assert _sql.statements(text, prompt) == ["SELECT 1"]


@pytest.mark.parametrize("text", [
    "SELECT 'a;b', \"c;d\", `e;f`, [g;h] FROM t -- ; i\n", "SELECT '```', '~~~\n~~~' FROM t",
    "-- Answer: SELECT 2; it's\nSELECT 1", "/* SELECT 2; */ SELECT 1", "SELECT ~~~1",
    "SELECT 'it''s; so' AS \"a\"\"b;c\"", "SELECT '</sql>', '<|x|>'",
    "WITH a AS (SELECT 1),\n\nb AS (SELECT 2)\n\nSELECT * FROM a, b", "VALUES (1), (2)",
    "SELECT 1\n\nThis query returns 1.", "SELECT 1\t----- bird -----\tfinancial", "SELEC 1",
    "EXPLAIN QUERY PLAN\nSELECT 1", "SELECT a<b>c, [/d], `e:` FROM t", '{"sql": 1}',
    "CREATE TABLE x AS\nSELECT 1", "I do not know", "12 + 5 = 17"])
def test_other_texts_are_run_as_they_stand(text):
    assert _sql.statements(text) == [text.strip()]
    assert _sql.statements(f"It's this:\n```sql\n{text}\n```") == [text.strip()]


@pytest.mark.parametrize("text", [
    "SELECT Name FROM Artist; SELECT 2", "SELECT Name FROM Artist;\nSELEC 2",
    "SELECT Name FROM Artist;\n\nThis query returns names.", "SELEC 1;\nSELECT Name FROM Artist",
    "DROP TABLE Artist;\nSELECT Name FROM Artist", "SELECT Name FROM Artist; DROP TABLE Artist",
    "PRAGMA query_only = OFF;\nSELECT Name FROM Artist",
    "```sql\nSELECT Name FROM Artist;\nSELECT 2\n```",
    "```sql\nSELECT Name FROM Artist\n```\nor\n```sql\nSELECT 2\n```",
    "```\nSELECT Name FROM Artist\n```\n```\nSELECT 2\n```",
    "```sql\nSELECT Name FROM Artist\n```\n```sql\nSELECT Name FROM Artist\n```",
    "SELECT Name FROM Artist\n```sql\nSELECT 2\n```", "SELECT Name FROM Artist\n\nSELECT 2",
    "Query 1: SELECT Name FROM Artist\nQuery 2: SELECT 2", "CREATE TABLE x AS\nSELECT Name FROM x",
    "A: SELECT Name FROM Artist; B: SELECT 2", "EXPLAIN\nSELECT Name FROM Artist",
    "<sql>SELECT Name FROM Artist</sql><sql>SELECT 2</sql>",
    "`SELECT Name FROM Artist` or `SELECT 2`", "`SELECT Name FROM Artist; SELECT 2`",
    '{"sql": "SELECT Name FROM Artist", "sql": "SELECT 2"}',
    "SELECT Name FROM Artist<end_of_turn>\nSELECT 2", "<think>SELECT Name FROM Artist"])
def test_several_statements_are_refused_and_the_first_one_never_counts(text):
    assert bird.grade(record(1, text)) == 0


def test_a_fence_changes_neither_grade_nor_agreement_and_the_query_runs_once(monkeypatch):
    texts = ["SELECT Name FROM Artist", "```sql\nSELECT Name FROM Artist;\n```",
             "Here it is: SELECT Name FROM Artist;;"]
    records, asked = [record(i, text) for i, text in enumerate(texts)], []
    monkeypatch.setattr(bird, "results", {})
    ask = bird.Worker.ask
    monkeypatch.setattr(bird.Worker, "ask",
                        lambda self, *query: asked.append(query) or ask(self, *query))
    bird.warm(records)
    assert [bird.grade(r) for r in records] == [1, 1, 1] and len(asked) == 1
    assert all(bird.agree(records[0], r) for r in records)
    opened = {**record(4, "Name FROM Artist"), "prompt": "-- all names\nSELECT "}
    assert bird.grade(opened) == 1 and bird.agree(opened, records[0]) and len(asked) == 1


def test_labels_that_hold_one_statement_train():
    assert all(map(bird.is_well_formed, ["SELECT 1", "SELEC", "```sql\nSELECT 1;\n```", "5"]))
    assert not any(map(bird.is_well_formed, ["", " ;\n", "-- nothing", "```sql\n```",
                                             "SELECT 1; SELECT 2", "<think>SELECT 1"]))


def test_reading_a_long_text_takes_linear_time():
    start = time.monotonic()
    for part in ("'", '"', "`", "[", "/*", "/**/", "--", "```", "```sql\n", "~~~\n", "<sql>", ": ",
                 "it's\n```\n", "SELECT 1;", "</think>", "/**/```\n", "x:   \n",
                 "```text", '{"sql":"', "\\", "<|", "</a", "<eos>", ":`SELECT 1`", "[/INST"):
        for before in ("", '{"sql": "'):
            _sql.statements(before + part * 10_000, "SELECT")
    assert time.monotonic() - start < 60      # quadratic time would be hours


# ---------------------------------------------------------------- values
def test_bytes_that_are_no_utf_8_keep_rows_apart():
    values = ["CAST(x'ff' AS TEXT)", "CAST(x'fe' AS TEXT)", "CAST(x'c3' AS TEXT)", "char(65533)",
              "CAST(x'eda080' AS TEXT)", "x'ff'", "'\\udcff'", "CAST(x'efbfbd' AS TEXT)"]
    found = answers(*(f"SELECT {v}" for v in values))
    assert None not in found and len(set(found)) == 7 and found[3] == found[7]
    a, b, c = answers("SELECT CAST(x'4dfc' AS TEXT)", "SELECT CAST(x'4dfd' AS TEXT)",
                      "SELECT CAST(x'4d' || x'fc' AS TEXT)")
    assert a == c != b


def test_numbers_are_equal_as_in_python():
    equal = ["0.0", "-0.0", "1", "1.0", "NULL", "9e999 - 9e999", "9007199254740992",
             "9007199254740992.0", "9e999", "9e998"]
    found = answers(*(f"SELECT {v}" for v in equal))
    assert None not in found and found[::2] == found[1::2] and len(set(found)) == 5
    assert len(set(answers("SELECT 9007199254740993", "SELECT 9007199254740992.0", "SELECT 9e999",
                           "SELECT -9e999", "SELECT 0.1 + 0.2", "SELECT 0.3"))) == 6
    # names of columns do not count, not even equal ones; EXPLAIN is no answer
    a, b, c = answers("SELECT 1 AS x, 2 AS x", "VALUES (1, 2)", "EXPLAIN VALUES (1, 2)")
    assert a == b != c


# ---------------------------------------------------------------- the clock
CLOCK = ["SELECT date('now')", "SELECT CURRENT_TIMESTAMP", "SELECT strftime('%Y', 'NOW')",
         "SELECT JulianDay ('now') > 0", "SELECT datetime()", "SELECT \"date\"('now', '-1 day')",
         "WITH t(d) AS (SELECT 'n' || 'ow') SELECT date(d) FROM t",
         "SELECT [time] /* of day */ ('now', 'localtime')", "SELECT current_date",
         "SELECT count(*) FROM Artist WHERE unixepoch() > 0"]


def test_references_that_read_the_clock_are_graded_by_what_they_return_then(tmp_path, capsys):
    write_jsonl(tmp_path / "in/train.jsonl", [
        {"question": "q", "answer": q, "db_name": "chinook"} for q in ("SELECT 1", "SELECT 2")])
    write_jsonl(tmp_path / "in/test.jsonl", [
        {"question": "q", "answer": q, "db_name": "chinook"}
        for q in [*CLOCK, "SELECT 1", "SELECT 'date(''now'')' AS current_time_of_day"]])
    run(bird, "--out", tmp_path / "d", "--data-dir", tmp_path / "in", "--gt", 1)
    assert f"{len(CLOCK)} of {len(CLOCK) + 2} test references call a" in capsys.readouterr().out
    test = rows(tmp_path / "d/test.jsonl")
    assert [r["reference_result"] is None for r in test] == [True] * len(CLOCK) + [False] * 2
    assert all(_sql.CLOCK.search(q) for q in CLOCK)
    today = {**test[0], "completion": "SELECT strftime('%Y-%m-%d', 'now')"}
    yesterday = {**test[0], "completion": "SELECT date('now', '-1 day')"}
    second = {**test[1], "completion": "SELECT datetime('now')"}
    bird.warm([today, yesterday, second, *test])
    assert [bird.grade(r) for r in (today, yesterday, second)] == [1, 0, 1]
    assert [bird.grade(r) for r in test] == [1] * len(test)
    assert bird.agree(second, {**second, "completion": "SELECT CURRENT_TIMESTAMP"})
    assert not bird.agree(today, yesterday)
    run(evaluate, "grade", "--task", "bird", "--data", tmp_path / "d/test.jsonl")
    assert f"accuracy 100.0% of {len(test)}" in capsys.readouterr().out


def test_a_stored_result_of_another_day_is_not_used():
    old = {**record(1, "SELECT date('now')", "SELECT date('now', '-1 day')"),
           "reference": "SELECT date('now')"}
    assert isinstance(old["reference_result"], str)      # as older record files have it
    assert bird.grade(old) == 1
    assert bird.grade({**old, "completion": "SELECT date('now', '-1 day')"}) == 0


def test_a_view_that_reads_the_clock_is_noticed(chinook, tmp_path):
    with contextlib.closing(sqlite3.connect(chinook)) as connection:
        connection.execute("CREATE VIEW today AS SELECT date('now') AS day")
    write_jsonl(tmp_path / "in/train.jsonl", [
        {"question": "q", "answer": f"SELECT {i}", "db_name": "chinook"} for i in range(2)])
    write_jsonl(tmp_path / "in/test.jsonl", [
        {"question": "q", "answer": "SELECT day FROM today", "db_name": "chinook"}])
    run(bird, "--out", tmp_path / "d", "--data-dir", tmp_path / "in", "--gt", 1)
    test, = rows(tmp_path / "d/test.jsonl")
    assert test["reference_result"] is None
    assert bird.grade({**test, "completion": "SELECT date()"}) == 1


def test_what_the_clock_says_is_forgotten_on_another_day(monkeypatch):
    clock, still = ("chinook", "SELECT julianday('now')"), ("chinook", "SELECT 1")
    bird.run_queries([clock, still])
    first = dict(bird.results)
    bird.run_queries([clock, still])
    assert bird.results == first and list(bird.days) == [clock]      # not run again
    monkeypatch.setattr(bird, "today", lambda: "tomorrow")
    before = bird.results[still]
    bird.run_queries([clock, still])
    assert bird.results[clock] != first[clock] and bird.results[still] is before


def test_a_day_that_begins_between_two_queries_does_no_harm():
    # the middle query sees what the last one sees, no more what the first one saw
    key = "chinook", "a", "b", "a"
    bird.results[key] = [["old", None], ["new", None], ["new", None]]
    assert bird.same(key)
    bird.results[key] = [["old", None], ["other", None], ["new", None]]
    assert not bird.same(key)


def test_a_reference_that_never_repeats_is_only_right_word_by_word():
    never = {**record(1, "SELECT random()"), "reference": "SELECT random()",
             "reference_result": None}
    assert bird.grade(never) == 1 and bird.grade({**never, "completion": "SELECT random() "}) == 1
    assert bird.grade({**never, "completion": "SELECT random() + 0"}) == 0
    failing = {**never, "reference": "SELECT date(x)"}
    with pytest.raises(OSError, match="chinook: 'SELECT date.x.' cannot be run again: .*no such"):
        bird.grade(failing)
    with pytest.raises(InputError, match="id 1 has no reference_result"):
        bird.grade({k: v for k, v in never.items() if k != "reference"})


# ---------------------------------------------------------------- databases
def state(folder):
    """What lies in a folder: names, contents, times."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def read(path, sql="SELECT a FROM t"):
    """The answer of a worker about a database at `path`."""
    worker = bird.Worker()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return worker.ask(_sql.committed(path, folder), sql, 5)
        finally:
            worker.close()


ROW = _sql.digest([(1,)])


def wal_database(path):
    """A connection to a new database in WAL mode, whose row 1 is committed but only in the -wal."""
    connection = sqlite3.connect(path)
    for statement in ("PRAGMA journal_mode = WAL", "CREATE TABLE t (a)", "INSERT INTO t VALUES (1)",
                      "COMMIT"):
        connection.execute(statement)
    return connection


def test_a_database_in_wal_mode_is_read_and_nothing_appears_beside_it(tmp_path):
    folder = tmp_path / "a b?c#d%41&e"
    folder.mkdir()
    writer = wal_database(folder / "x ?#%41.sqlite")
    (tmp_path / "link.sqlite").symlink_to(folder / "x ?#%41.sqlite")
    before = state(folder)
    assert len(before) == 3
    assert read(folder / "x ?#%41.sqlite") == read(tmp_path / "link.sqlite") == [ROW, None, False]
    assert state(folder) == before
    # what is not committed is not read; a crash leaves the files without -shm
    writer.execute("INSERT INTO t VALUES (2)")
    (tmp_path / "crashed").mkdir()
    for end in ("", "-wal"):
        shutil.copy(folder / f"x ?#%41.sqlite{end}", tmp_path / f"crashed/y.sqlite{end}")
    writer.rollback()
    before = state(tmp_path / "crashed")
    assert read(tmp_path / "crashed/y.sqlite") == [ROW, None, False]
    assert state(tmp_path / "crashed") == before
    writer.close()       # takes in the -wal and removes it
    before = state(folder)
    assert list(before) == ["x ?#%41.sqlite"] and before["x ?#%41.sqlite"][0][18:20] == b"\2\2"
    assert read(folder / "x ?#%41.sqlite") == [ROW, None, False] and state(folder) == before


def test_a_journal_of_a_writer_that_crashed_is_rolled_back_in_a_copy(tmp_path):
    path = tmp_path / "x.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("UPDATE t SET a = 2")
        connection.execute("CREATE TABLE u (b)")
        connection.executemany("INSERT INTO u VALUES (?)", [("x" * 3000,)] * 200)   # spills
        (tmp_path / "crashed").mkdir()
        for end in ("", "-journal"):
            shutil.copy(f"{path}{end}", tmp_path / f"crashed/x.sqlite{end}")
        connection.rollback()
    before = state(tmp_path / "crashed")
    assert before["x.sqlite"][0] != path.read_bytes() and before["x.sqlite-journal"][0]
    assert read(tmp_path / "crashed/x.sqlite") == [ROW, None, False]
    assert state(tmp_path / "crashed") == before


@pytest.mark.parametrize("mode", ["WAL", "DELETE", "PERSIST"])
def test_a_read_only_folder_will_do(mode):
    with tempfile.TemporaryDirectory() as folder:       # others may enter it, unlike tmp_path
        path = Path(folder) / "x.sqlite"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        before, me = state(path.parent), os.geteuid()
        if not me:      # the administrator may write everywhere
            os.seteuid(65534)
        try:
            with tempfile.TemporaryDirectory(dir="/tmp") as copies:
                assert _sql.execute(_sql.committed(path, copies), "SELECT a FROM t", 5)[0] == ROW
        finally:
            os.seteuid(me)
            Path(folder).chmod(0o755)
        assert state(path.parent) == before


def test_a_database_that_changes_while_it_is_copied_is_an_error(tmp_path, monkeypatch):
    writer, copyfile = wal_database(tmp_path / "x.sqlite"), shutil.copyfile

    def copy_and_write(source, target):
        copyfile(source, target)
        writer.execute("INSERT INTO t VALUES (3)")
        writer.commit()
    monkeypatch.setattr(_sql.shutil, "copyfile", copy_and_write)
    with pytest.raises(OSError, match="x.sqlite: another process writes to this database"):
        read(tmp_path / "x.sqlite")
    writer.close()


def test_queries_of_a_database_in_wal_mode_leave_no_copy_behind(chinook, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    chinook.unlink()
    with contextlib.closing(wal_database(chinook)):
        before = state(chinook.parent)
        assert answers("SELECT a FROM t", "SELECT a + 0 FROM t") == [ROW, ROW]
        assert state(chinook.parent) == before and not list((tmp_path / "temporary").iterdir())


def test_databases_lie_where_the_zip_files_put_them(chinook, tmp_path):
    deep = tmp_path / "db/dev_20240627/dev_databases/other/other.sqlite"
    deep.parent.mkdir(parents=True)
    shutil.copy(chinook, deep)
    assert (bird.database("chinook"), bird.database("other")) == (chinook, deep)
    again = tmp_path / "db/train/train_databases/other/other.sqlite"
    again.parent.mkdir(parents=True)
    again.symlink_to(deep)
    with pytest.raises(InputError, match="two databases of one name"):
        bird.database("other")
    for name in ("Chinook", "absent", "..", "", "a/b", "../chinook", "a\0b", "*"):
        with pytest.raises(InputError, match="no such database; .*, which holds chinook$") as error:
            bird.database(name)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the machine
def test_workers_follow_the_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(bird.Path, "read_text", lambda self: "max 100000\n")      # no quota
    monkeypatch.setattr(bird.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(bird.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert bird.cores() == 2
    monkeypatch.setattr(bird.Path, "read_text", lambda self: "150000 100000\n")
    assert bird.cores() == 1
    monkeypatch.setattr(bird.Path, "read_text", lambda self: "9000 100000\n")
    assert bird.cores() == 1
    monkeypatch.delattr(bird.os, "sched_getaffinity")          # macOS
    monkeypatch.setattr(bird.Path, "read_text", lambda self: Path("/nowhere/cpu.max").open())
    assert bird.cores() == 64


@pytest.mark.parametrize("error", ["ValueError('current limit exceeds maximum limit')",
                                   "OSError(22, 'Invalid argument')"])
def test_workers_start_where_a_limit_of_memory_is_refused(tmp_path, monkeypatch, error):
    """As on macOS: setrlimit refuses RLIMIT_AS."""
    (tmp_path / "mac.py").write_text(f"""
import resource, runpy, sys
set_limit = resource.setrlimit
def refuse(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise {error}
    set_limit(kind, limits)
resource.setrlimit = refuse
runpy.run_path(sys.argv[1], run_name="__main__")
""")
    monkeypatch.setattr(bird, "COMMAND", [sys.executable, "-I", tmp_path / "mac.py", _sql.__file__])
    fine, endless = answers("SELECT 1", ENDLESS)
    assert fine and not endless


def test_a_missing_database_is_bad_input(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "in/train.jsonl",
                [{"question": "q", "answer": "SELECT 1", "db_name": "absent"}] * 3)
    write_jsonl(tmp_path / "in/test.jsonl",
                [{"question": "q", "answer": "SELECT 1", "db_name": "../chinook"}])
    arguments = ["--out", tmp_path / "out", "--data-dir", tmp_path / "in", "--gt", 1]
    with pytest.raises(InputError, match="no such database"):
        run(bird, *arguments)
    for seconds in ("nan", "inf", "0", "-20", "soon"):
        monkeypatch.setenv("ILR_SQL_TIMEOUT", seconds)
        with pytest.raises(InputError, match=f"ILR_SQL_TIMEOUT is '{seconds}'"):
            answers("SELECT 1")
    monkeypatch.setenv("ILR_SQL_TIMEOUT", "1")
    write_jsonl(tmp_path / "in/train.jsonl",
                [{"question": "q", "answer": f"SELEC {i}", "db_name": "chinook"} for i in range(3)])
    write_jsonl(tmp_path / "in/test.jsonl",
                [{"question": "q", "answer": "SELECT 1", "db_name": "chinook"}])
    # all references fail
    with pytest.raises(InputError, match="between 0 and the 0 problems"):
        run(bird, *arguments)
    with pytest.raises(InputError, match="id 7 has no db"):
        bird.warm([{"id": 7, "completion": "SELECT 1"}])
    monkeypatch.setattr(bird, "results", {})
    monkeypatch.delenv("ILR_BIRD_DATABASES")
    with pytest.raises(InputError, match="ILR_BIRD_DATABASES is not set"):
        run(bird, *arguments)
    assert not (tmp_path / "out").exists()


def test_records_go_through_the_stages(tmp_path, capsys):
    queries = [f"SELECT Name FROM Artist WHERE ArtistId = {i}" for i in range(1, 13)]
    write_jsonl(tmp_path / "in/train.jsonl",
                [{"question": f"q{i}", "answer": q, "db_name": "chinook"}
                 for i, q in enumerate(queries)])
    write_jsonl(tmp_path / "in/test.jsonl",
                [{"question": "t", "answer": q, "db_name": "chinook"}
                 for q in ("SELECT 1", "SELEC")])
    folder = os.environ.pop("ILR_BIRD_DATABASES")
    run(bird, "--out", tmp_path / "d", "--data-dir", tmp_path / "in", "--gt", 4, "--database-dir",
        folder)
    said = "1 of 2 test references cannot be run and are left out, the first: test-1"
    assert said in capsys.readouterr().out
    gt, unlab, test = (rows(tmp_path / f"d/{n}.jsonl") for n in ("gt", "unlab", "test"))
    assert (len(gt), len(unlab), len(test)) == (4, 8, 1)
    assert test[0]["prompt"] == "USER:\nt\n\nASSISTANT:\n" and test[0]["db"] == "chinook"
    labels = [{**r, "completion": r["completion"] if i < 4 else "SELECT 0"}
              for i, r in enumerate(unlab)]
    other = [r["completion"].replace("Name", "Name AS n") for r in unlab]
    proposals = [{**r, "completion": "SELECT 0" if i < 4 else other[i]}
                 for i, r in enumerate(unlab)]
    samples = [{**r, "sample": k, "completion": x["completion"]}
               for r in unlab for k, x in enumerate((r, labels[7]))]
    for name, records in (("l", labels), ("p", proposals), ("s", samples)):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    run(evaluate, "grade", "--task", "bird", "--data", tmp_path / "l.jsonl")
    assert "accuracy 50.0% of 8" in capsys.readouterr().out
    run(compare, "score", "--judge", "oracle", "--task", "bird", "--a", tmp_path / "l.jsonl",
        "--b", tmp_path / "p.jsonl", "--out", tmp_path / "c.jsonl")
    run(refine, "--method", "oracle", "--labels", tmp_path / "l.jsonl", "--comparisons",
        tmp_path / "c.jsonl", "--task", "bird", "--out", tmp_path / "l2.jsonl")
    refined = rows(tmp_path / "l2.jsonl")
    assert [r["accepted"] for r in refined] == [False] * 4 + [True] * 4
    assert all(bird.grade(r) == 1 for r in refined)
    run(compare, "score", "--judge", "oracle", "--task", "bird", "--a", tmp_path / "s.jsonl",
        "--out", tmp_path / "sc.jsonl")
    run(refine, "--method", "pairs", "--comparisons", tmp_path / "sc.jsonl", "--task", "bird",
        "--max-replace", 0.5, "--out", tmp_path / "pref.jsonl")
    assert "chosen correct 100.0%, rejected correct 0.0%" in capsys.readouterr().out
    assert len(rows(tmp_path / "pref.jsonl")) == 4


@pytest.mark.skipif(not (SHARED / "bird/test.jsonl").exists(), reason="needs the BIRD problems")
def test_every_real_prompt_fits_its_token_limit():
    problems = [json.loads(line) for line in (SHARED / "bird/test.jsonl").open()]
    assert len(problems) == 1405
    assert all(p["question"].startswith("Given the following database schema") for p in problems)
    # no tokenizer makes more tokens of a text than it has bytes
    lengths = [len(f"USER:\n{p['question']}\n\nASSISTANT:\n".encode()) for p in problems]
    assert max(lengths) < bird.MAX_PROMPT_TOKENS


@pytest.mark.skipif(not (SHARED / "bird/test.jsonl").exists(), reason="needs the BIRD problems")
def test_every_real_reference_is_read_as_it_stands_and_14_read_the_clock():
    gold = [json.loads(line)["answer"] for line in (SHARED / "bird/test.jsonl").open()]
    assert len(gold) == 1405
    for around in ("{}", "{};", "```sql\n{}\n```", "Here's it:\n```\n{};\n```\nIt's it.",
                   "The query is: {};", "<sql>{}</sql>", "{}\n```\nIt's it."):
        assert [_sql.statements(around.format(q)) for q in gold] == [[q] for q in gold]
    now = [q for q in gold if re.search(r"(?i)'now'|current_|\(\s*\)", q)]
    again = [q for q in gold if _sql.CLOCK.search(q)]
    assert len(now) == 14 and len(again) == 115 and set(now) < set(again)


@pytest.mark.skipif(not (SHARED / "bird/test.jsonl").exists(), reason="needs the BIRD problems")
@pytest.mark.slow
def test_the_chain_on_64_real_problems(tmp_path):
    """Every stage of `run_ilr.sh bird` with the shipped base models.

    BIRD's own databases are not here: these are made of the problems' schemas, three rows a table.
    The prompts are the real ones, the answers short.
    """
    short = sorted(map(json.loads, (SHARED / "bird/test.jsonl").open()),
                   key=lambda r: len(r["question"]))
    made, problems = {}, []
    for r in short:
        path = tmp_path / "dbs" / r["db_name"] / f"{r['db_name']}.sqlite"
        if path not in made:
            path.parent.mkdir(parents=True)
            made[path] = sqlite3.connect(path)
            for table, columns in ast.literal_eval(r["db_schema"]).items():
                columns = [c for c in columns if c != "*"]
                names = ", ".join(f'"{c}"' for c in columns)
                places = ", ".join("?" * len(columns))
                filling = [[k + i for i in range(len(columns))] for k in range(3)]
                made[path].execute(f'CREATE TABLE "{table}" ({names})')
                made[path].executemany(f'INSERT INTO "{table}" VALUES ({places})', filling)
            made[path].commit()
        # a reference that only the real tables can answer
        with contextlib.suppress(sqlite3.Error):
            made[path].execute(r["answer"]).fetchall()
            # what is cut off does not train: few steps teach where a short answer ends
            problems.append({**r, "answer": f"SELECT {len(problems) % 3}"})
        if len(problems) == 64 + 8:
            break
    write_jsonl(tmp_path / "in/train.jsonl", problems[8:])
    write_jsonl(tmp_path / "in/test.jsonl", problems[:8])
    done = call(tmp_path / "run", tmp_path / "bases", "bird", DATA_DIR=tmp_path / "in",
                ILR_BIRD_DATABASES=tmp_path / "dbs", GT=32, ROUNDS=1, JOBS=2, LORA_RANK=0,
                LOAD_IN_4BIT=0, CHECKPOINTS="50", WEAK_MODEL=PAIR / "weak",
                STRONG_MODEL=PAIR / "strong", PACKING="--micro-tokens 2048",
                DECODING="--max-new-tokens 24", WEAK_LR="3e-3", WEAK_EPOCHS=4, WEAK_BATCH=4,
                SFT_LR="3e-3", SFT_EPOCHS=2, SFT_BATCH=4, JUDGE_EPOCHS=1, DPO_EPOCHS=1,
                DPO_SAMPLES=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run/seed_0"
    assert [r["id"] for r in rows(run / "ilr_1/labels.jsonl")] == [
        r["id"] for r in rows(run / "data/unlab.jsonl")]
    assert len(rows(run / "data/unlab.jsonl")) == 32
    assert all(len(r["reference_result"]) == 64 for r in rows(run / "data/test.jsonl"))
    for point in ("weak", "sft", "gold", "ilr_1", "dpo_1"):
        assert {r["correct"] for r in rows(run / point / "eval_1.graded.jsonl")} <= {0.0, 1.0}
    assert "| ILR |" in (tmp_path / "run/report.md").read_text()
