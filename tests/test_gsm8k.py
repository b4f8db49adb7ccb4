"""tasks/gsm8k.py: answers as numbers, the release's rule beside it, where the data come from."""
import hashlib
import json

import pytest
from conftest import ROOT, rows, run
from kill_test import PAIR, call

from core.records import InputError, write_jsonl
from tasks import gsm8k

DATA = ROOT.parent / "shared/data/gsm8k"
real = pytest.mark.skipif(not DATA.exists(), reason=f"needs the GSM8K files in {DATA}")


@pytest.mark.parametrize("text, number", [
    ("#### 42", 42), ("####42", 42), ("####  42", 42), ("#### 42.", 42), ("#### 42.0", 42),
    ("#### 1,000", 1000), ("#### $42", 42), ("#### -$42", -42), ("#### $-42", -42),
    ("#### 42%", 42), ("#### **42**", 42), ("#### **$1,234.50**", 1234.5), ("#### .5", 0.5),
    ("#### 42 dollars", 42), ("#### 42\n\nUSER:\nAnother", 42), ("#### 1\n#### 2", 2),
    ("#### 1\n####", None), ("####\n42", 42), ("42", None), ("", None), ("#### forty", None),
    ("#### 1/2", None), ("#### 12 / 4", None), ("#### 3/", 3), ("## 42", None), ("##### 42", 42),
    ("#### \u0664\u0662", None), ("#### 42,", 42), ("#### +5", 5), ("#### \u22125", -5),
    ("#### 5 1/2", None), ("#### 1e5", None), ("#### 10^3", None), ("#### 5 or 6", 5)])
def test_final_answer(text, number):
    answer = gsm8k.final_answer(text)
    assert (None if answer is None else float(answer)) == number
    assert gsm8k.is_well_formed(text) == (number is not None)


def test_grades_and_agreement():
    def right(text, reference="65,960"):
        record = {"id": 1, "completion": text, "reference": reference}
        return gsm8k.grade(record), gsm8k.grade_release(record)
    assert right("so\n#### 65,960") == (1, 1) and right("so\n#### 65960") == (1, 0)
    assert right("#### 65961") == (0, 0)
    assert right("65,960") == (0, 0) and right("") == (0, 0) and right("#### 5 4", "5") == (1, 1)
    assert right("####5", "5") == (1, 0)
    with pytest.raises(InputError, match="reference of id 1 is 'five'"):
        right("#### 5", "five")
    assert gsm8k.agree({"completion": "a #### 1,000"}, {"completion": "b #### $1000.0"})
    assert not gsm8k.agree({"completion": "#### 1"}, {"completion": "#### 2"})
    assert gsm8k.agree({"completion": "x"}, {"completion": "x"})
    assert not gsm8k.agree({"completion": "x"}, {"completion": "y"})


def write_data(folder, train=20, test=4):
    folder.mkdir()
    for split, count in (("train", train), ("test", test)):
        rows = [{"question": f"{split} {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
                for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def test_files(tmp_path):
    write_data(tmp_path / "in")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(gsm8k, "--out", tmp_path / out, "--data-dir", tmp_path / "in", "--gt", 8,
            "--validation", 3, "--seed", seed)
    a, b, c = ({n: rows(tmp_path / out / f"{n}.jsonl")
                for n in ("train", "gt", "unlab", "validation", "test")} for out in "abc")
    assert a == b and a["gt"] != c["gt"] and a["test"] == c["test"]
    assert a["train"] == a["gt"] + a["unlab"]
    assert [len(a[n]) for n in ("gt", "unlab", "validation", "test")] == [8, 9, 3, 4]
    ids = sorted(r["id"] for r in a["train"] + a["validation"])
    assert ids == sorted(f"train-{i}" for i in range(20))
    assert a["test"][3] == {"id": "test-3", "prompt": "USER:\ntest 3?\n\nASSISTANT:\n",
                            "completion": "3+3=6\n#### 6", "reference": "6", "source": "gold"}
    with pytest.raises(InputError, match="--gt 20 must lie between 0 and the 20"):
        run(gsm8k, "--out", tmp_path / "d", "--data-dir", tmp_path / "in", "--gt", 20)


def test_missing_files_come_from_the_hub_or_the_authors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = tmp_path / "source"
    write_data(source)
    monkeypatch.setattr(gsm8k, "AUTHORS", source.as_uri() + "/")
    monkeypatch.setattr(gsm8k, "from_hub", lambda split: None)
    arguments = ["--out", tmp_path / "out", "--data-dir", tmp_path / "in", "--gt", 8]
    with pytest.raises(InputError, match="train.jsonl: it is not the file that is expected"):
        run(gsm8k, *arguments)
    assert not (tmp_path / "in").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(gsm8k, "SHA256",
                        {s: hashlib.sha256((source / f"{s}.jsonl").read_bytes()).hexdigest()
                         for s in ("train", "test")})
    run(gsm8k, *arguments)
    assert all((tmp_path / "in" / f).read_bytes() == (source / f).read_bytes()
               for f in ("train.jsonl", "test.jsonl"))
    monkeypatch.setattr(gsm8k, "from_hub",
                        lambda split: [{"question": "q?", "answer": "#### 7", "more": 1}])
    run(gsm8k, *arguments[:2], "--data-dir", tmp_path / "in", "--gt", 8, "--platinum")
    assert rows(tmp_path / "out/platinum.jsonl")[0]["reference"] == "7"
    assert len(rows(tmp_path / "in/platinum.jsonl")) == 1
    monkeypatch.setattr(gsm8k, "from_hub", lambda split: None)
    monkeypatch.setattr(gsm8k, "AUTHORS", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(InputError,
                       match="put train.jsonl into a folder and name it with --data-dir"):
        run(gsm8k, "--out", tmp_path / "x", "--data-dir", tmp_path / "empty")


@real
def test_real_gold_answers_are_right_and_their_neighbours_wrong(tmp_path):
    run(gsm8k, "--out", tmp_path, "--data-dir", DATA)
    train, test = rows(tmp_path / "train.jsonl"), rows(tmp_path / "test.jsonl")
    assert (len(train), len(test), len(rows(tmp_path / "gt.jsonl"))) == (7473, 1319, 3736)
    for records in (train, test):
        assert all(gsm8k.grade(r) == 1 == gsm8k.grade_release(r)
                   and gsm8k.is_well_formed(r["completion"]) for r in records)
        others = zip(records, records[1:] + records[:1], strict=True)
        other = [gsm8k.grade({**r, "completion": s["completion"]}) for r, s in others]
        assert 0 < sum(other) / len(other) < 0.02
    # where the two rules part: the gold answer without its comma
    assert sum("," in r["reference"] for r in test) == 14
    plain = [{**r, "completion": r["completion"].replace(",", "")} for r in test]
    assert sum(map(gsm8k.grade, plain)) == 1319 and sum(map(gsm8k.grade_release, plain)) == 1305


@real
@pytest.mark.slow
def test_the_chain_on_64_real_problems(tmp_path):
    """SFT, judge and ILR of `run_ilr.sh gsm8k`, beams included, with the shipped base
    models. Their samples never reach `####`, without which DPO trains on nothing."""
    done = call(tmp_path / "run", tmp_path / "bases", "gsm8k", DATA_DIR=DATA, TRAIN=64, GT=32,
                TEST=8, ROUNDS=1, METHODS="ilr", LORA_RANK=0, WEAK_MODEL=PAIR / "weak",
                STRONG_MODEL=PAIR / "strong", WEAK_LR="3e-3", WEAK_EPOCHS=60,
                PACKING="--row-tokens 512 --micro-tokens 2048",
                WEAK_BATCH=8, SFT_LR="3e-3", SFT_EPOCHS=8, SFT_BATCH=8, JUDGE_LR="1e-3",
                JUDGE_EPOCHS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run/seed_0"
    labels = rows(run / "ilr_1/labels.jsonl")
    assert [r["id"] for r in labels] == [r["id"] for r in rows(run / "data/unlab.jsonl")]
    assert sum(r["accepted"] for r in labels)
    # they are small, but they learn the format
    assert sum(map(gsm8k.is_well_formed, (r["completion"] for r in labels))) > 8
    for point in ("weak", "sft", "gold", "ilr_1"):
        assert {r["correct"] for r in rows(run / point / "eval_1.graded.jsonl")} <= {0.0, 1.0}
    assert "| ILR |" in (tmp_path / "run/report.md").read_text()


def test_dry_run_names_every_stage_in_order(tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", "gsm8k", "--dry-run", EVAL="platinum")
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    stages = [command.split()[1] for command in commands]
    assert done.returncode == 0 and stages[0] == "tasks/gsm8k.py" and stages.count("sft.py") == 12
    assert stages.count("dpo.py") == 3
    assert "google/gemma-2b" in done.stdout and "mistralai/Mistral-7B-v0.1" in done.stdout
    assert not (tmp_path / "run").exists()
    assert commands[0].endswith("--data-dir data/gsm8k --platinum")
    assert "--num-beams 4" in done.stdout and "data/platinum.jsonl" in done.stdout


def test_exact_release_grades_by_the_raw_rule(tmp_path, capsys):
    import evaluate
    write_jsonl(tmp_path / "a.jsonl",
                [{"id": i, "completion": c, "reference": "1,000"}
                 for i, c in enumerate(("#### 1,000", "#### 1000"))])
    for more, share in (([], "100.0%"), (["--exact-release"], "50.0%")):
        run(evaluate, "grade", "--task", "gsm8k", "--data", tmp_path / "a.jsonl", *more)
        assert share in capsys.readouterr().out
    with pytest.raises(InputError, match="the release has no task arithmetic"):
        run(evaluate, "grade", "--task", "arithmetic", "--data", tmp_path / "a.jsonl",
            "--exact-release")
