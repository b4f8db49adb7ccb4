"""Errors: one line, with the exit code that belongs to it, and nothing is left behind."""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_config

import compare
import dpo
import evaluate
import generate
import refine
import sft
from baselines import label_noise
from core.cli import run_stage
from core.records import write_json, write_jsonl
from tasks import arithmetic

STAGES = {"sft": sft, "generate": generate, "compare": compare, "refine": refine, "dpo": dpo,
          "evaluate": evaluate, "tasks/arithmetic": arithmetic,
          "baselines/label_noise": label_noise}


@pytest.fixture(scope="module")
def good(tiny, problems, tmp_path_factory):
    """A folder with one good input of every kind; `{name}` in an argument stands for the file."""
    top = tmp_path_factory.mktemp("good")
    labels = problems[:6]
    write_jsonl(top / "labels.jsonl", labels)
    write_jsonl(top / "proposals.jsonl", [{**r, "completion": "1+1=2\n#### 2"} for r in labels])
    write_jsonl(top / "samples.jsonl", [
        {**r, "sample": s, "completion": f"#### {s}"} for r in labels for s in (0, 1)])
    write_jsonl(top / "comparisons.jsonl", [
        {"id": r["id"], "pair": 0, "prompt": r["prompt"], "completion_a": r["completion"],
         "completion_b": "#### 2", "agree": False, "prob_b_ab": 0.8, "prob_b_ba": 0.1,
         "prob_b": 0.85} for r in labels])
    write_jsonl(top / "pairs.jsonl", [
        {"id": r["id"], "prompt": r["prompt"], "chosen": r["completion"], "rejected": "#### 0"}
        for r in labels])
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    config = tiny_config(vocab=len(tokenizer), num_labels=2)
    judge = AutoModelForSequenceClassification.from_config(config)
    for part in (judge, tokenizer):
        part.save_pretrained(top / "judge")
    write_json(top / "judge/judge.json", {})
    write_json(top / "coin/judge.json", {"held_out_accuracy": 0.5})
    (top / "no_model").mkdir()
    (top / "torn").mkdir()
    for path in (tiny / "model").iterdir():
        kept = 5000 if path.suffix == ".safetensors" else None
        (top / "torn" / path.name).write_bytes(path.read_bytes()[:kept])
    for name in ("model", "tokenizer", "weak.json"):
        (top / name).symlink_to(tiny / name)
    return top


JUDGE = "compare train --model {model} --task arithmetic --out {out} "
SCORE = "compare score --task arithmetic --out {out} "
REFINE = "refine --task arithmetic --out {out} "
# stage and input that is spoiled -> its command, {bad} standing for the spoiled file
COMMANDS = {
    "sft labels": "sft --model {model} --data {bad} --task arithmetic --out {out}",
    "generate labels": "generate --model {model} --data {bad} --out {out}",
    "compare samples": JUDGE + "--data {bad} --gold {labels.jsonl}",
    "compare labels": JUDGE + "--data {samples.jsonl} --gold {bad}",
    "compare labels a": SCORE + "--judge {judge} --a {bad} --b {proposals.jsonl}",
    "compare proposals": SCORE + "--judge oracle --a {labels.jsonl} --b {bad}",
    "compare samples a": SCORE + "--judge oracle --a {bad}",
    "refine labels": REFINE + "--labels {bad} --comparisons {comparisons.jsonl}",
    "refine comparisons": REFINE + "--labels {labels.jsonl} --comparisons {bad}",
    "refine comparisons pairs": REFINE + "--method pairs --comparisons {bad}",
    "refine proposals": REFINE + "--method naive --labels {labels.jsonl} --proposals {bad}",
    "dpo pairs": "dpo --model {model} --data {bad} --out {out}",
    "evaluate labels": "evaluate grade --task arithmetic --data {bad} --out {out}",
    "label_noise labels": "baselines/label_noise --task arithmetic --labels {bad} "
                          "--proposals {proposals.jsonl} --out {out}",
}
FIELDS = {"dpo pairs": "rejected", "refine comparisons": "agree",
          "refine comparisons pairs": "agree", "generate labels": "prompt",
          "compare samples a": "sample", "evaluate labels": "reference"}


def spoil(lines, how, field):
    """(lines, what the message must say after the file's name)"""
    second = json.loads(lines[1])
    if how == "malformed JSON":
        return [lines[0], lines[1][:-9], *lines[2:]], ":2: not JSON"
    if how == "missing field":
        second.pop(field)
        return [lines[0], json.dumps(second), *lines[2:]], f":2: field '{field}' is missing"
    if how == "duplicate id":
        return [*lines, lines[1]], f":{len(lines) + 1}: id \"{second['id']}\""
    if how == "no number":
        bad = lines[1][:-1] + ', "more": NaN}'
        return [lines[0], bad, *lines[2:]], ":2: not JSON (NaN is no number)"
    if how == "half a character":
        return [lines[0], lines[1][:-1] + ', "more": "\\ud800"}', *lines[2:]], ":2: not JSON"
    if how == "an id of no kind":
        bad = json.dumps({**second, "id": [1]})
        return [lines[0], bad, *lines[2:]], ":2: field 'id' must be a string or a whole number"
    if how == "a list":
        return [lines[0], "[1, 2]"], ":2: expected a JSON object"
    return [], ": holds no records"                    # an empty file


def listing(*tops):
    return sorted(str(p) for top in tops for p in Path(top).rglob("*"))


def fill(command, good, **names):
    """The words of a command; {name} is one of `names`, or else a file of `good`."""
    return [re.sub(r"\{(.+?)\}", lambda m: str(names.get(m[1]) or good / m[1]), word)
            for word in command.split()]


def refused(command, good, tmp_path, capsys, code=2, **names):
    """The one line of stderr of a command that must fail, and may leave nothing in tmp_path."""
    words = fill(command, good, out=tmp_path / "new/out", **names)
    stage = STAGES[words[0]]
    before = listing(good, tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_stage(stage.parser(), stage.main, words[1:])
    said = capsys.readouterr().err
    assert ended.value.code == code, said
    assert len(said.splitlines()) == 1 and said.startswith(words[0] + ".py"), said
    assert listing(good, tmp_path) == before
    return said


@pytest.mark.parametrize("how", ["malformed JSON", "missing field", "duplicate id", "no number",
                                 "half a character", "an id of no kind", "a list", "empty file"])
@pytest.mark.parametrize("name", COMMANDS)
def test_spoiled_file(name, how, good, tmp_path, capsys):
    kind = name.split()[1]
    lines, message = spoil((good / f"{kind}.jsonl").read_text().splitlines(), how,
                           FIELDS.get(name, "completion"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(line + "\n" for line in lines))
    assert f"{bad}{message}" in refused(COMMANDS[name], good, tmp_path, capsys, bad=bad)


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_file(name, good, tmp_path, capsys):
    assert "nowhere.jsonl: No such file" in refused(COMMANDS[name], good, tmp_path, capsys,
                                                    bad=tmp_path / "nowhere.jsonl")


PROMPT, ANSWER = json.dumps({"prompt": "q"}), json.dumps({"prompt": "q", "completion": "5"})


@pytest.mark.parametrize("content, message", [
    (json.dumps([{"prompt": "q"}]).encode(), ":1: expected a JSON object, found list: write one"),
    (json.dumps([{"prompt": "q"}], indent=1).encode(), ":1: not JSON (.*): write one object"),
    (json.dumps({"prompt": "q"}, indent=1).encode(), ":1: not JSON (.*): write one object"),
    (f"{PROMPT}{PROMPT}\n".encode(), ":1: not JSON (.*): write one object per line"),
    (gzip.compress(ANSWER.encode()), ": not UTF-8 text (.*): unpack it, or write it as JSON Lines"),
    (b"PAR1\x15\x04\xff", ": not UTF-8 text (.*): unpack it, or write it as JSON Lines in UTF-8"),
    (ANSWER.encode("utf-16"), ": not UTF-8 text (.*): unpack it, or write it as JSON Lines in UTF"),
    (None, ": Is a directory: expected a file of JSON Lines")])
def test_a_file_that_is_no_json_lines_says_what_to_do(content, message, good, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir() if content is None else bad.write_bytes(content)
    said = refused(COMMANDS["sft labels"], good, tmp_path, capsys, bad=bad)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(re.escape(str(bad)) + pattern, said), said


@pytest.mark.parametrize("name", ["compare proposals", "compare labels", "refine proposals",
                                  "refine comparisons", "label_noise labels"])
def test_a_join_of_different_problems_is_refused(name, good, tmp_path, capsys):
    """As line numbers give it where one of two files has another order."""
    bad = tmp_path / "bad.jsonl"
    records = [json.loads(line) for line in (good / f"{name.split()[1]}.jsonl").open()]
    prompts = [r["prompt"] for r in records]
    write_jsonl(bad, [{**r, "prompt": p} for r, p in zip(records, prompts[::-1], strict=True)])
    said = refused(COMMANDS[name], good, tmp_path, capsys, bad=bad)
    assert re.search(r"\.jsonl:\d: id \S+ has another prompt than in \S+\.jsonl:\d", said), said


@pytest.mark.parametrize("folder", ["no_model", "tokenizer", "torn", "nowhere"])
@pytest.mark.parametrize("name", ["sft labels", "generate labels", "dpo pairs", "compare samples"])
def test_folder_that_is_no_model(name, folder, good, tmp_path, capsys):
    kind = name.split()[1]
    command = COMMANDS[name].replace("model}", f"{folder}}}").replace("bad}", f"{kind}.jsonl}}")
    many = tmp_path / "many.jsonl"      # enough problems for the judge's three splits
    write_jsonl(many, [{**r, "completion": "#### 0"} for r in arithmetic_records(30)])
    write_jsonl(tmp_path / "gold.jsonl", arithmetic_records(30))
    command = command.replace("{samples.jsonl}", str(many))
    command = command.replace("{labels.jsonl}", str(tmp_path / "gold.jsonl"))
    assert f"{good / folder}: not a model folder" in refused(command, good, tmp_path, capsys)


@pytest.mark.parametrize("field, value, what", [
    ("prob_b", 7, "a probability"), ("prob_b", "0.9", "a probability or null"),
    ("prob_b", None, "null where the two agree"), ("agree", "false", "true or false"),
    ("agree", 1, "true or false"), ("completion_b", None, "a string"), ("id", True, "a string or")])
def test_comparisons_of_no_sense(field, value, what, good, tmp_path, capsys):
    records = [json.loads(line) for line in (good / "comparisons.jsonl").open()]
    write_jsonl(tmp_path / "bad.jsonl",
                [records[0], {**records[1], field: value}, *records[2:]])
    said = refused(COMMANDS["refine comparisons"], good, tmp_path, capsys,
                   bad=tmp_path / "bad.jsonl")
    assert f"bad.jsonl:2: field '{field}' must be" in said and what in said


def test_a_reference_that_is_no_number(good, tmp_path, capsys):
    records = [json.loads(line) for line in (good / "labels.jsonl").open()]
    write_jsonl(tmp_path / "bad.jsonl", [{**records[0], "reference": "sNaN"}])
    assert f"the reference of id {records[0]['id']} is 'sNaN'" in refused(
        COMMANDS["evaluate labels"], good, tmp_path, capsys, bad=tmp_path / "bad.jsonl")


def test_a_model_that_lacks_weights(good, tmp_path, capsys):
    """One more layer in the config than in the weights: never a random layer in silence."""
    shutil.copytree(good / "model", tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    write_json(tmp_path / "short/config.json",
               {**config, "num_hidden_layers": config["num_hidden_layers"] + 1})
    command = "generate --model {short} --data {labels.jsonl} --out {out}"
    said = refused(command, good, tmp_path, capsys, short=tmp_path / "short")
    assert "its weights lack" in said


def arithmetic_records(count):
    found = arithmetic.problems("train", count, 0)
    return [arithmetic.record("train", 0, i, p) for i, p in enumerate(found)]


@pytest.mark.parametrize("folder", ["model", "no_model", "nowhere"])
def test_folder_that_is_no_judge(folder, good, tmp_path, capsys):
    command = COMMANDS["compare labels a"].replace("{bad}", "{labels.jsonl}")
    command = command.replace("{judge}", f"{{{folder}}}")
    assert f"--judge {good / folder}: " in refused(command, good, tmp_path, capsys)


# more proposals than labels, or gold than samples, is no mistake
@pytest.mark.parametrize("name, change", [
    ("compare proposals", "one less"), ("compare proposals", "one more"),
    ("refine comparisons", "one less"), ("refine comparisons", "one more"),
    ("refine proposals", "one less"), ("compare labels", "one less")])
def test_ids_that_do_not_match(name, change, good, tmp_path, capsys):
    lines = (good / f"{name.split()[1]}.jsonl").read_text().splitlines()
    first, bad = json.loads(lines[0]), tmp_path / "bad.jsonl"
    if change == "one less":
        lines = lines[1:]
    else:
        lines.append(json.dumps({**first, "id": "another"}))
    bad.write_text("\n".join(lines) + "\n")
    said = refused(COMMANDS[name], good, tmp_path, capsys, bad=bad)
    named = first["id"] if change == "one less" else "another"
    assert str(bad) in said and f"id {named} " in said


@pytest.mark.parametrize("command, message", [
    ("sft --data {labels.jsonl} --out {out}", "give either --model, or --init-config"),
    ("sft --model {model} --init-config {weak.json} --data {labels.jsonl} --out {out}",
     "give either --model, or --init-config"),
    ("sft --init-config {weak.json} --data {labels.jsonl} --out {out}",
     "together with --tokenizer"),
    ("sft --init-config {labels.jsonl} --tokenizer {tokenizer} --data {labels.jsonl} --out {out}",
     "l: not the JSON of a model"),
    ("sft --init-config {nowhere} --tokenizer {tokenizer} --data {labels.jsonl} --out {out}",
     "nowhere: not the JSON of a model"),
    ("sft --model {model} --data {labels.jsonl} --out {no_model}",
     "exists: delete it, or choose another name"),
    ("sft --model {model} --data {labels.jsonl} --out {out} --half 3",
     "argument --half: invalid choice: 3"),
    ("sft --model {model} --data {labels.jsonl} --out {out} --lr fast",
     "argument --lr: fast: expected a number above 0"),
    ("sft --model {model} --data {labels.jsonl} --out {out} --task french",
     "--task french: there is no tasks/french.py"),
    ("sft --model {model} --data {labels.jsonl} --out {out} --max-length 3",
     "labels.jsonl: no record fits --max-length 3"),
    ("generate --model {model} --data {labels.jsonl} --out {out} --num-samples 2",
     "--num-samples above 1 needs a --temperature"),
    ("generate --model {model} --data {labels.jsonl} --out {out} --num-beams 2 --temperature 1",
     "--num-beams above 1 goes with"),
    ("generate --model {model} {model} --data {labels.jsonl} --out {out}", "--model has 2 values"),
    ("generate --model {model} --data {labels.jsonl} --out {out} --max-prompt-tokens 3",
     "raise --max-prompt-tokens"),
    ("generate --model {model} --data {labels.jsonl}",
     "the following arguments are required: --out"),
    ("compare score --judge oracle --task french --a {labels.jsonl} --out {out}",
     "no tasks/french.py"),
    (SCORE + "--judge oracle --a {labels.jsonl} --b {proposals.jsonl} {proposals.jsonl}",
     "proposals.jsonl:1: id train-0-0 stands already in"),
    (REFINE + "--method naive --labels {labels.jsonl} --proposals {labels.jsonl} {labels.jsonl}",
     "labels.jsonl:1: id train-0-0 stands already in"),
    (JUDGE + "--data {samples.jsonl} --gold {labels.jsonl} --optimizer sgd",
     "argument --optimizer: invalid choice"),
    (REFINE + "--method pairs --labels {labels.jsonl}", "--method pairs needs --comparisons"),
    (REFINE + "--method naive --labels {labels.jsonl}", "--method naive needs --proposals"),
    ("refine --labels {labels.jsonl} --comparisons {comparisons.jsonl} --task french --out {out}",
     "no tasks/french.py"),
    (REFINE + "--labels {labels.jsonl} --comparisons {comparisons.jsonl} --max-replace 1.5",
     "argument --max-replace: 1.5: expected a share between 0 and 1"),
    ("refine --labels {labels.jsonl} --comparisons {comparisons.jsonl} --task arithmetic "
     "--out {labels.jsonl}", "labels.jsonl exists"),
    ("evaluate grade --task arithmetic --data {labels.jsonl} --out {labels.jsonl}",
     "labels.jsonl exists"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --epochs 0",
     "argument --epochs: 0: expected a whole number above 0"),
    ("sft --model {model} --data {labels.jsonl} --out {out} --lr nan",
     "argument --lr: nan: expected a number above 0"),
    ("generate --model {judge} --data {labels.jsonl} --out {out}",
     "judge: a judge, not a language model"),
    ("generate --model {model} --data {labels.jsonl} --out {out} --temperature -1",
     "argument --temperature: -1: expected 0 or"),
    (REFINE + "--labels {proposals.jsonl} --comparisons {comparisons.jsonl}",
     "is not the label in"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --max-length 3",
     "pairs.jsonl: no pair fits --max-length 3"),
    ("dpo --model {model} --reference {no_model} --data {pairs.jsonl} --out {out}",
     "no_model: not a model folder"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss kto",
     "argument --loss: invalid choice: 'kto'"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss cdpo",
     "--loss cdpo needs a noise rate: give either --noise or --judge"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss rdpo --noise 0.5",
     "argument --noise: 0.5: expected a share below 0.5"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss rdpo --judge {coin}",
     "coin: right on 50.0% of its held-out pairs, no better"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss cdpo --judge {judge}",
     "judge: not a folder that `compare.py train`"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss cdpo --judge {nowhere}",
     "nowhere: not a folder that `compare.py train`"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --noise 0",
     "--noise has no effect with --loss sigmoid"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss asft --beta 0.1",
     "--beta has no effect with --loss asft"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --loss asft --reference {model}",
     "--reference has no effect with --loss asft"),
    ("dpo --model {model} --data {pairs.jsonl} --out {out} --nll-weight -1",
     "argument --nll-weight: -1: expected 0 or a number above it"),
    ("evaluate grade --task french --data {labels.jsonl} --out {out}", "no tasks/french.py"),
    ("evaluate report {no_model}", "no graded answers in"),
    ("evaluate pick --task arithmetic --data {labels.jsonl} --models {labels.jsonl} --accuracy 0.5 "
     "--out {out}", "no such folder"),
    ("generate --model {model} --data {labels.jsonl} --out {out} {out}",
     "--out names one file twice"),
    ("sft --model {model} --data {labels.jsonl} --out=", "--out is empty: leave it out, or say"),
    ("generate --model {model} --data {labels.jsonl} --out {out} --out=", "--out is empty"),
    ("sft --model= --data {labels.jsonl} --out {out}", "--model is empty"),
    ("refine --method naive --labels {labels.jsonl} --proposals= --out {out}",
     "--proposals is empty"),
    ("evaluate grade --task arithmetic --data {labels.jsonl} --out=", "--out is empty"),
    ("evaluate nothing", "invalid choice: 'nothing'"),
    ("tasks/arithmetic --out {out} --train 5 --gt 5", "--gt 5 must lie between 0 and --train 5"),
])
def test_arguments_that_cannot_be(command, message, good, tmp_path, capsys):
    assert message in refused(command, good, tmp_path, capsys)


def stage(words, **more):
    """A stage as a process of its own."""
    return subprocess.run([sys.executable, ROOT / f"{words[0]}.py", *words[1:]],
                          capture_output=True, text=True, **more)


def test_one_process_ends_as_the_functions_do(good, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    done = stage(fill(COMMANDS["refine labels"], good, bad=tmp_path / "bad.jsonl",
                      out=tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"refine.py: error: {tmp_path}/bad.jsonl:1: field 'prompt' is missing\n"


@pytest.mark.parametrize("name", ["sft labels", "dpo pairs"])
def test_a_loss_that_is_no_number(name, good, tmp_path):
    out = tmp_path / "out"
    done = stage([*fill(COMMANDS[name], good, bad=good / f"{name.split()[1]}.jsonl", out=out),
                  "--lr", "1e30", "--epochs", "4"])
    assert done.returncode == 1 and "Traceback" not in done.stderr and not out.exists()
    last = done.stderr.splitlines()[-1]     # before it: the progress bar, on its own line
    said = r"(sft|dpo)\.py: error: the (loss|gradient norm) is (nan|inf).*: lower --lr.*"
    assert re.fullmatch(said, last), done.stderr
    assert done.stderr.count("error") == 1


# ---------------------------------------------------------------- a full disk
@pytest.fixture
def small_disk(tmp_path):
    """fill(bytes to leave free) -> a file to delete, on a disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk],
                             capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")

    def leave(free):
        (disk / "filler").write_bytes(b"")
        space = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - free))
        return disk / "filler"
    yield leave
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("command, free", [
    # the first row of metrics
    ("sft --model {model} --data {labels.jsonl} --out {out} --epochs 2", 0),
    # the model
    ("sft --model {model} --data {labels.jsonl} --out {out} --epochs 2", 20_000),
    # the resumable state
    ("sft --model {model} --data {labels.jsonl} --out {out} --epochs 2 --state-every 0", 20_000),
    ("generate --model {model} --data {labels.jsonl} --out {out} --max-new-tokens 30", 0),
    ("generate --model {model} --data {labels.jsonl} --out {out} --max-new-tokens 30", 4096),
    (SCORE + "--judge {judge} --a {labels.jsonl} --b {proposals.jsonl}", 0),
    (SCORE + "--judge {judge} --a {labels.jsonl} --b {proposals.jsonl}", 4096),
    (REFINE + "--labels {labels.jsonl} --comparisons {comparisons.jsonl}", 0),
    ("dpo --model {model} --data {pairs.jsonl} --out {out}", 20_000),
])
def test_a_full_disk(command, free, good, small_disk, tmp_path, capsys):
    filler, out = small_disk(free), tmp_path / "disk/out"
    words = fill(command, good, out=out)
    code = STAGES[words[0]]
    with pytest.raises(SystemExit) as ended:
        run_stage(code.parser(), code.main, words[1:])
    said = capsys.readouterr().err
    assert ended.value.code == 1, said
    assert re.search("No space left|disk may be full", said.splitlines()[-1]), said
    assert said.count(".py: error:") == 1 and not out.exists()
    filler.unlink()
    # the same command, now that there is room
    run_stage(code.parser(), code.main, words[1:])
    capsys.readouterr()
    whole = tmp_path / "whole"
    run_stage(code.parser(), code.main, fill(command, good, out=whole)[1:])

    def contents(top):
        return sorted(p.read_bytes() for p in ([top] if top.is_file() else top.iterdir()))
    assert contents(out) == contents(whole)
