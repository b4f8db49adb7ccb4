"""tasks/: the record format and the generator of the default task."""
import hashlib
import re
import textwrap

import pytest
from conftest import rows, run

import tasks
from core import records
from core.records import InputError, read_jsonl, write_jsonl
from core.tokens import encode_completion, encode_prompt
from tasks import arithmetic


# ---------------------------------------------------------------- the arithmetic task
def test_splits_are_disjoint_and_deterministic(tmp_path):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(arithmetic, "--out", tmp_path / out, "--train", 60, "--gt", 20, "--test", 30, "--seed",
            seed)
    names = ("train", "gt", "unlab", "validation", "test")
    files = {out: {n: rows(tmp_path / out / f"{n}.jsonl") for n in names} for out in "abc"}
    assert files["a"] == files["b"] and files["a"]["test"] != files["c"]["test"]
    a = files["a"]
    assert a["train"] == a["gt"] + a["unlab"] and [len(a[n]) for n in names] == [60, 20, 40, 30, 30]
    # whatever the seeds: no problem of one split is in another, the base models' corpus included
    texts = {n: {r["prompt"] for f in files.values() for r in f[n]}
             for n in ("train", "validation", "test")}
    texts["pretrain"] = {question + "\n"
                         for question, _, _ in arithmetic.problems("pretrain", 300, 0)}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    # nor can it ever be: the hashes of two splits share no residue
    residues = [{int(hashlib.sha256(t[:-1].encode()).hexdigest(), 16) % 10 for t in split}
                for split in texts.values()]
    assert sum(map(len, residues)) == len(set.union(*residues)) == 10
    assert all(len({r["prompt"] for r in a[n]}) == len({r["id"] for r in a[n]}) == len(a[n])
               for n in names)


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_corpora_give_the_skill_and_not_the_format(name):
    corpus = arithmetic.make_corpus(name, 120, 0)
    assert len(corpus) == len({r["id"] for r in corpus}) == 140
    assert corpus == arithmetic.make_corpus(name, 120, 0)
    answers = {f"solved-{i}": p[2] for i, p in enumerate(arithmetic.problems("pretrain", 120, 0))}
    for r in corpus:
        calculations = re.findall(r"(\d+[-+*/]\d+)=(\d+)", r["completion"])
        assert calculations and all(eval(left) == int(right) for left, right in calculations)
        if r["id"] in answers:
            assert re.findall(r"\d+", r["completion"])[-1] == str(answers[r["id"]])
            assert "####" not in r["completion"]
        else:
            # bare calculations answer nothing
            assert not re.search("[A-Za-z]", r["prompt"] + r["completion"])


def test_gold_completions_are_right():
    calculate = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
                 "/": lambda a, b: a // b}
    steps = set()
    for i, problem in enumerate(arithmetic.problems("train", 400, 0)):
        r = arithmetic.record("train", 0, i, problem)
        *lines, last = r["completion"].split("\n")
        # the opening sentence's number is the first one
        value = int(re.search(r"\d+", r["prompt"])[0])
        for line in lines:
            a, sign, b, c = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            assert int(a) == value and (sign != "/" or value % 2 == 0)
            value = calculate[sign](int(a), int(b))
            assert int(c) == value and 1 <= value <= arithmetic.MAX_VALUE
        assert last == f"#### {value}" and r["reference"] == str(value)
        assert arithmetic.grade(r) == 1.0 and arithmetic.is_well_formed(r["completion"])
        assert arithmetic.grade({**r, "reference": str(value + 1)}) == 0.0
        steps.add(len(lines))
    assert steps == {2, 3, 4, 5}


def test_tokenizer_round_trip_and_lengths(tokenizer, problems):
    texts = [r[k] for r in problems for k in ("prompt", "completion")]
    for text in [*texts, "  é\t日本\n\n#### -1,000 ", "a <b> & 'c'"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    for r in problems:
        assert len(encode_prompt(tokenizer, r["prompt"])) <= arithmetic.MAX_PROMPT_TOKENS
        assert len(encode_completion(tokenizer, r["completion"])) <= arithmetic.MAX_NEW_TOKENS


@pytest.mark.parametrize("text, answer", [
    ("1+1=2\n#### 2", 2), ("#### 1,000", 1000), ("#### -3", -3), ("####  7 \n", 7), ("####7", 7),
    ("#### 2.50", 2.5), ("#### 1\n#### 2", 2), ("", None), ("2", None), ("####", None),
    ("#### ,", None), ("#### two", None), ("#### 2 apples", None), ("#### 2\nand so on", None),
    ("####\n2", None), ("#### 9,5", None), ("#### 9{,}500", None), ("#### 1,2,3", None),
    ("#### 1234,567", None), ("#### \u0664\u0662", None), ("#### 1,234,567.5", 1234567.5)])
def test_final_answer(text, answer):
    assert arithmetic.final_answer(text) == answer
    assert arithmetic.is_well_formed(text) == (answer is not None)


@pytest.mark.parametrize("a, b, same", [
    ("#### 1,000", "x\n#### 1000", True), ("#### 5", "#### 5.0", True), ("#### 5", "#### 6", False),
    ("#### 5", "5", False), ("none", "none", True), ("none", "nothing", False)])
def test_agree(a, b, same):
    a, b = {"completion": a}, {"completion": b}
    assert arithmetic.agree(a, b) == arithmetic.agree(b, a) == same


# ---------------------------------------------------------------- records
GOOD = '{"id": 1, "completion": "x"}'


@pytest.mark.parametrize("text, line, words", [
    (GOOD + "\n{broken\n", 2, "not JSON"), (GOOD + "\n\n[1]\n", 3, "expected a JSON object"),
    (GOOD + '\n{"id": 2}\n', 2, "'completion'"),
    (GOOD + '\n{"id": 2, "completion": 3}', 2, "must be a string"),
    (GOOD + "\n" + GOOD, 2, "line 1"), ("", None, "no records"), ("\n \n", None, "no records"),
    (None, None, "No such file"), (b"\xff\xfe", None, "not UTF-8")])
def test_read_jsonl_names_file_and_line(tmp_path, text, line, words):
    path = tmp_path / "d.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as e:
        read_jsonl(path, ("id", "completion"))
    message = str(e.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ") and "\n" not in message


def test_jsonl_round_trip(tmp_path):
    found = [{"id": "é\u2028", "prompt": "a\nb\r\x85", "sample": 0},
             {"id": "é\u2028", "prompt": "", "sample": 1}]
    write_jsonl(tmp_path / "new/d.jsonl", found)
    assert read_jsonl(tmp_path / "new/d.jsonl", ("id", "prompt"), ("id", "sample")) == found
    with pytest.raises(InputError, match="d.jsonl:2: id"):
        read_jsonl(tmp_path / "new/d.jsonl")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [{"id": 1}])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_jsonl(path, [{"id": 2}, {"id": object()}])

    def full(_):
        raise OSError("No space left on device")
    monkeypatch.setattr(records.os, "fsync", full)
    for target in (path, tmp_path / "other.jsonl"):
        with pytest.raises(OSError, match="No space"):
            write_jsonl(target, [{"id": 3}])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_get_task_refuses_what_is_no_task():
    with pytest.raises(InputError, match="arithmetic"):
        tasks.get_task("../sft")
    for name in ("arithmetic", "bird", "gsm8k", "saferpaca"):
        assert name in tasks.TASKS
        task = tasks.get_task(name)
        names = ("parser", "check", "main", "grade", "is_well_formed", "MAX_PROMPT_TOKENS",
                 "MAX_NEW_TOKENS")
        assert all(hasattr(task, a) for a in names)
        assert hasattr(task, "agree") == (name != "saferpaca")      # it compares embeddings instead


def test_the_smallest_task_in_the_docstring_runs(tmp_path):
    """tasks/__init__.py shows one: it writes its files, grades them right, and finds agreement."""
    import types
    example = tasks.__doc__.partition("DATA_DIR")[2].partition("\n\n")[2]
    mytask = types.ModuleType("mytask")
    exec(textwrap.dedent(example).replace("Path(__file__)", "Path('tasks/mytask.py')"),
         mytask.__dict__)
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"in/{split}.jsonl",
                    [{"question": f"{split} {i}", "answer": str(i)} for i in range(4)])
    argv = ["--out", tmp_path / "out", "--data-dir", tmp_path / "in", "--seed", 0, "--test", 2]
    run(mytask, *argv, "--train", 3, "--gt", 1)
    assert [len(rows(tmp_path / f"out/{n}.jsonl")) for n in ("gt", "unlab", "test")] == [1, 2, 2]
    a, b = rows(tmp_path / "out/unlab.jsonl")
    assert mytask.grade(a) == 1 and mytask.grade({**a, "completion": b["completion"]}) == 0
    assert mytask.agree(a, a) and not mytask.agree(a, b) and mytask.is_well_formed("x")
    with pytest.raises(InputError, match="--gt 3 must lie between 0 and the 3"):
        run(mytask, *argv, "--train", 3, "--gt", 3)
