"""tasks/bird.py: results of queries, hostile SQL against a real database, grading in the stages."""
import ast
import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import time

import pytest
from conftest import ROOT, rows, run
from kill_test import PAIR, call

import compare
import evaluate
import refine
from core.records import InputError, write_jsonl
from tasks import bird

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
    "SELECT 1\0DROP TABLE Artist"]


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
    monkeypatch.setattr(bird.os, "cpu_count", lambda: 1)
    start = time.monotonic()
    slow, fine = answers(SLOW_STEP, "SELECT 1")
    assert slow is None and fine and bird.results["chinook", SLOW_STEP] == [None, "killed"]
    assert time.monotonic() - start < 30


def test_a_worker_that_cannot_work_is_an_error_and_lower_limits_are_kept(chinook):
    import subprocess
    import sys
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
@pytest.mark.slow
def test_the_chain_on_64_real_problems(tmp_path):
    """Every stage of `run_ilr.sh bird` with the shipped base models.

    BIRD's own databases are not here: these are made of the problems' schemas, three rows a table.
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
            problems.append(r)
        if len(problems) == 64 + 8:
            break
    write_jsonl(tmp_path / "in/train.jsonl", problems[8:])
    write_jsonl(tmp_path / "in/test.jsonl", problems[:8])
    done = call(tmp_path / "run", tmp_path / "bases", "bird", DATA_DIR=tmp_path / "in",
                ILR_BIRD_DATABASES=tmp_path / "dbs", GT=32, ROUNDS=1, JOBS=2, LORA_RANK=4,
                LOAD_IN_4BIT=0, CHECKPOINTS="50", WEAK_MODEL=PAIR / "weak",
                STRONG_MODEL=PAIR / "strong", PACKING="--row-tokens 512 --micro-tokens 2048",
                DECODING="--max-new-tokens 24", WEAK_EPOCHS=1, SFT_EPOCHS=1, JUDGE_EPOCHS=1,
                DPO_EPOCHS=1, DPO_SAMPLES=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run/seed_0"
    assert [r["id"] for r in rows(run / "ilr_1/labels.jsonl")] == [
        r["id"] for r in rows(run / "data/unlab.jsonl")]
    assert len(rows(run / "data/unlab.jsonl")) == 32
    assert all(len(r["reference_result"]) == 64 for r in rows(run / "data/test.jsonl"))
    for point in ("weak", "sft", "gold", "ilr_1", "dpo_1"):
        assert {r["correct"] for r in rows(run / point / "eval_1.graded.jsonl")} <= {0.0, 1.0}
    assert "| ILR |" in (tmp_path / "run/report.md").read_text()
