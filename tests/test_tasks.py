"""tasks/: the record format and the generator of the default task."""
import hashlib
import json
import re

import pytest
from conftest import rows, run

import tasks
from tasks import BatchLog, InputError, arithmetic, read_jsonl, write_jsonl


# ---------------------------------------------------------------- the arithmetic task
def test_splits_are_disjoint_and_deterministic(tmp_path):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(arithmetic, "--out", tmp_path / out, "--train", 60, "--gt", 20, "--test", 30, "--seed", seed)
    names = ("train", "gt", "unlab", "validation", "test")
    files = {out: {n: rows(tmp_path / out / f"{n}.jsonl") for n in names} for out in "abc"}
    assert files["a"] == files["b"] and files["a"]["test"] != files["c"]["test"]
    a = files["a"]
    assert a["train"] == a["gt"] + a["unlab"] and [len(a[n]) for n in names] == [60, 20, 40, 30, 30]
    # whatever the seeds: no problem of one split is in another, the base models' corpus included
    texts = {n: {r["prompt"] for f in files.values() for r in f[n]} for n in ("train", "validation", "test")}
    texts["pretrain"] = {question + "\n" for question, _, _ in arithmetic.problems("pretrain", 300, 0)}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    # nor can it ever be: the hashes of two splits share no residue
    residues = [{int(hashlib.sha256(t[:-1].encode()).hexdigest(), 16) % 10 for t in split} for split in texts.values()]
    assert sum(map(len, residues)) == len(set.union(*residues)) == 10
    assert all(len({r["prompt"] for r in a[n]}) == len({r["id"] for r in a[n]}) == len(a[n]) for n in names)


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_corpora_give_the_skill_and_not_the_format(name):
    corpus = arithmetic.make_corpus(name, 120)
    assert len(corpus) == len({r["id"] for r in corpus}) == 140 and corpus == arithmetic.make_corpus(name, 120)
    answers = {f"solved-{i}": p[2] for i, p in enumerate(arithmetic.problems("pretrain", 120, 0))}
    for r in corpus:
        calculations = re.findall(r"(\d+[-+*/]\d+)=(\d+)", r["completion"])
        assert calculations and all(eval(left) == int(right) for left, right in calculations)
        if r["id"] in answers:
            assert re.findall(r"\d+", r["completion"])[-1] == str(answers[r["id"]]) and "####" not in r["completion"]
        else:
            assert not re.search("[A-Za-z]", r["prompt"] + r["completion"])      # bare calculations answer nothing


def test_gold_completions_are_right():
    calculate = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}
    steps = set()
    for i, problem in enumerate(arithmetic.problems("train", 400, 0)):
        r = arithmetic.record("train", 0, i, problem)
        *lines, last = r["completion"].split("\n")
        value = int(re.search(r"\d+", r["prompt"])[0])      # the opening sentence's number is the first one
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
    import sft
    for text in [r[k] for r in problems for k in ("prompt", "completion")] + ["  é\t日本\n\n#### -1,000 ", "a <b> & 'c'"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    for r in problems:
        assert len(sft.encode_prompt(tokenizer, r["prompt"])) <= arithmetic.MAX_PROMPT_TOKENS
        assert len(sft.encode_completion(tokenizer, r["completion"])) <= arithmetic.MAX_NEW_TOKENS


@pytest.mark.parametrize("text, answer", [
    ("1+1=2\n#### 2", 2), ("#### 1,000", 1000), ("#### -3", -3), ("####  7 \n", 7), ("####7", 7), ("#### 2.50", 2.5),
    ("#### 1\n#### 2", 2), ("", None), ("2", None), ("####", None), ("#### ,", None), ("#### two", None),
    ("#### 2 apples", None), ("#### 2\nand so on", None), ("####\n2", None)])
def test_final_answer(text, answer):
    assert arithmetic.final_answer(text) == answer and arithmetic.is_well_formed(text) == (answer is not None)


@pytest.mark.parametrize("a, b, same", [
    ("#### 1,000", "x\n#### 1000", True), ("#### 5", "#### 5.0", True), ("#### 5", "#### 6", False),
    ("#### 5", "5", False), ("none", "none", True), ("none", "nothing", False)])
def test_agree(a, b, same):
    a, b = {"completion": a}, {"completion": b}
    assert arithmetic.agree(a, b) == arithmetic.agree(b, a) == same


# ---------------------------------------------------------------- records
GOOD = '{"id": 1, "completion": "x"}'


@pytest.mark.parametrize("text, line, words", [
    (GOOD + "\n{broken\n", 2, "not JSON"), (GOOD + "\n\n[1]\n", 3, "expected a JSON object"), (GOOD + '\n{"id": 2}\n', 2, "'completion'"),
    (GOOD + '\n{"id": 2, "completion": 3}', 2, "must be a string"), (GOOD + "\n" + GOOD, 2, "line 1"), ("", None, "no records"),
    ("\n \n", None, "no records"), (None, None, "No such file"), (b"\xff\xfe", None, "not UTF-8")])
def test_read_jsonl_names_file_and_line(tmp_path, text, line, words):
    path = tmp_path / "d.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as e:
        read_jsonl(path, ("id", "completion"))
    message = str(e.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ") and "\n" not in message


def test_jsonl_round_trip(tmp_path):
    records = [{"id": "é\u2028", "prompt": "a\nb\r\x85", "sample": 0}, {"id": "é\u2028", "prompt": "", "sample": 1}]
    write_jsonl(tmp_path / "new/d.jsonl", records)
    assert read_jsonl(tmp_path / "new/d.jsonl", ("id", "prompt"), ("id", "sample")) == records
    with pytest.raises(InputError, match="d.jsonl:2: id"):
        read_jsonl(tmp_path / "new/d.jsonl")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [{"id": 1}])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_jsonl(path, [{"id": 2}, {"id": object()}])
    monkeypatch.setattr(tasks.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    for target in (path, tmp_path / "other.jsonl"):
        with pytest.raises(OSError, match="No space"):
            write_jsonl(target, [{"id": 3}])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_get_task_refuses_what_is_no_task():
    with pytest.raises(InputError, match="arithmetic"):
        tasks.get_task("../sft")
    for name in tasks.TASKS:
        task = tasks.get_task(name)
        assert all(hasattr(task, a) for a in ("main", "grade", "is_well_formed", "MAX_PROMPT_TOKENS", "MAX_NEW_TOKENS"))
        assert hasattr(task, "agree") == (name != "saferpaca")      # which compares embeddings instead


# ---------------------------------------------------------------- unfinished work
@pytest.mark.parametrize("kept, batches", [(0, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 3)])
def test_batch_log_drops_an_incomplete_batch(tmp_path, kept, batches):
    sizes, path = [3, 2, 1], tmp_path / "log"
    path.write_text("".join(f"[{i}]\n" for i in range(kept)) + "[9")     # the last line was cut
    log = BatchLog(path, sizes)
    whole = sum(sizes[:batches])
    assert log.batches_done == batches and log.results == [[i] for i in range(whole)]
    for size in sizes[batches:]:
        log.append([["é"]] * size)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == log.results
    assert len(log.results) == 6 and BatchLog(path, sizes).batches_done == 3


def test_partial_path_changes_with_arguments_and_inputs(tmp_path):
    data, model, out = tmp_path / "d.jsonl", tmp_path / "model", tmp_path / "out"
    data.write_text("a")
    model.mkdir()
    (model / "config.json").write_text("{}")
    base = tasks.partial_path(out, {"lr": 1}, [data, model])
    assert base == tasks.partial_path(out, {"lr": 1}, [data, model]) and base.parent == tmp_path
    seen = {base, tasks.partial_path(out, {"lr": 2}, [data, model])}
    data.write_text("ab")
    seen.add(tasks.partial_path(out, {"lr": 1}, [data, model]))
    (model / "config.json").write_text('{"a": 1}')
    seen.add(tasks.partial_path(out, {"lr": 1}, [data, model]))
    assert len(seen) == 4
    out.write_text("")
    with pytest.raises(InputError, match="exists"):
        tasks.partial_path(out, {"lr": 1}, [data, model])
