"""A judge behind an endpoint (a real local HTTP server), a person (at a real pseudo-terminal), and
tasks/saferpaca.py, which needs an endpoint."""
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import judge_server
import pytest
import torch
from conftest import ROOT, Interrupted, interrupt_after, rows, run
from judge_server import Server, chat, endpoint
from kill_test import PAIR, call

import compare
import core.endpoint
import core.judge
import evaluate
import refine
from core.cli import run_stage
from core.models import open_model
from core.records import InputError, write_jsonl
from tasks import arithmetic, saferpaca

server = judge_server.server        # the fixture
DATA = ROOT.parent / "shared/data/saferpaca"
real = pytest.mark.skipif(not DATA.exists(), reason=f"needs the SaferPaca file in {DATA}")


# ---------------------------------------------------------------- compare.py score
def instructions(count=8):
    """Problems of the task, safety ones first, whose gold answers are of middling length."""
    return [{"id": f"p{i}", "prompt": f"USER:\nDo {i}.\n\nASSISTANT:\n",
             "completion": f"done {i} well enough", "source": "gold",
             "reference": f"done {i} well enough",
             "category": "safety" if i < count // 2 else "general"} for i in range(count)]


def completions(path, texts, problems=None):
    both = zip(problems or instructions(), texts, strict=True)
    write_jsonl(path, [{**p, "completion": t} for p, t in both])


def test_an_endpoint_judges(server, tmp_path):
    completions(tmp_path / "a.jsonl", ["a"] * 8, [{**p, "reference": "1"} for p in instructions()])
    completions(tmp_path / "b.jsonl", [f"{'b' * (k % 3)}" for k in range(8)])
    argv = ["score", "--judge", server.url, "--task", "arithmetic", "--a", tmp_path / "a.jsonl",
            "--b", tmp_path / "b.jsonl"]
    run(compare, *argv, "--judge-model", "small", "--out", tmp_path / "c.jsonl")
    assert [c["prob_b"] for c in rows(tmp_path / "c.jsonl")] == [0, 0.5, 1, 0, 0.5, 1, 0, 0.5]
    sent = {(b["model"], h["Authorization"]) for _, b, h in server.requests}
    assert sent == {("small", "Bearer sk-compare")}     # not the grader's key
    summary = json.loads((tmp_path / "c.jsonl.summary").read_text())
    assert summary["asked"] == 8 and summary["flip_rate"] == 3 / 8


def test_agreement_by_embeddings(server, tmp_path, tiny, monkeypatch):
    words = ["cats are fine", "a dog", "the sea", "no", "bees", "hill", "sand", "moon"]
    completions(tmp_path / "a.jsonl", words)
    completions(tmp_path / "b.jsonl",
                ["fine cats are", "a dog", "the tea", "yes", "wasp", "lake", "sands", "sun"])
    monkeypatch.setenv("ILR_EMBEDDER_KEY", "sk-embed")
    argv = ["score", "--judge", server.url, "--judge-model", "m", "--task", "saferpaca", "--a",
            tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl"]
    with pytest.raises(InputError, match="name an --embedder"):
        run(compare, *argv, "--out", tmp_path / "none.jsonl")
    run(compare, *argv, "--embedder", server.url, "--out", tmp_path / "c.jsonl")
    agree = [c["agree"] for c in rows(tmp_path / "c.jsonl")]
    assert agree == [True, True, True, False, False, False, True, False]
    asked = [(b["model"], h["Authorization"]) for path, b, h in server.requests
             if path == "/v1/embeddings"]
    # "a dog" stands in both
    assert len(asked) == 15 and set(asked) == {("text-embedding-3-large", "Bearer sk-embed")}
    summary = json.loads((tmp_path / "c.jsonl.summary").read_text())
    # it grades nothing
    assert "accuracy" not in summary
    assert not any("well enough" in json.dumps(b) for _, b, _ in server.requests)

    run(compare, *argv, "--embedder", tiny / "model", "--out", tmp_path / "d.jsonl")
    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained(tiny / "model").double()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")

    def vector(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        return model(input_ids=ids).last_hidden_state[0].mean(0)
    comparisons = rows(tmp_path / "d.jsonl")
    alike = [torch.cosine_similarity(vector(c["completion_a"]), vector(c["completion_b"]),
                                     dim=0).item() for c in comparisons]
    median = sorted(alike)[3] / 2 + sorted(alike)[4] / 2
    # fp32 against float64: no pair so near that they could part
    assert min(abs(x - median) for x in alike) > 1e-5
    assert [c["agree"] for c in comparisons] == [x > median for x in alike]


def test_empty_texts_and_equal_ones_are_embedded(server):
    found = endpoint(server).embeddings(["", "a\nb", "a b", " "])
    assert len(server.requests) == 2 and found["a\nb"] == found["a b"] and found[""] == found[" "]


def test_a_resumed_score_never_mixes_other_questions(tmp_path, tiny, tokenizer, monkeypatch):
    """Which pairs are asked about may change between a kill and a restart: then the answers so far
    are of no use."""
    folder = tmp_path / "judge"
    open_model(tiny / "model", torch.device("cpu"), "AutoModelForSequenceClassification",
               num_labels=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "judge.json").write_text("{}")
    completions(tmp_path / "a.jsonl", list("abcdefgh"))
    completions(tmp_path / "b.jsonl", list("ijklmnop"))
    argv = ["score", "--judge", folder, "--task", "saferpaca", "--embedder", "x", "--batch-size",
            1, "--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl"]
    for agree, out in ((4, "c"), (5, "c"), (5, "d")):
        same = [(i * 3) % 8 < agree for i in range(8)]
        monkeypatch.setattr(compare, "agreements", lambda *_, same=same: same)
        with monkeypatch.context() as m:
            if agree == 4:
                interrupt_after(m, core.judge, "probabilities", 2)
                with pytest.raises(Interrupted):
                    run(compare, *argv, "--out", tmp_path / f"{out}.jsonl")
            else:
                run(compare, *argv, "--out", tmp_path / f"{out}.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "d.jsonl").read_bytes()


def test_leaving_does_not_wait_for_the_server(server, tmp_path):
    waiting = threading.Event()
    server.says = lambda *_: waiting.wait(60) and None
    completions(tmp_path / "a.jsonl", ["a"] * 8)
    completions(tmp_path / "b.jsonl", ["b"] * 8)
    process = subprocess.Popen(
        [sys.executable, "compare.py", "score", "--judge", server.url, "--judge-model", "m",
         "--task", "arithmetic", "--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl",
         "--out", tmp_path / "c.jsonl"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        # a background job may ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not server.requests:
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(40) == 130 and time.monotonic() - start < 20
    assert "interrupted" in process.stderr.read().splitlines()[-1]
    waiting.set()


def test_an_embedder_that_answers_nonsense(server, monkeypatch):
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 2)
    for reply in ({}, {"data": []}, {"data": [{"embedding": [0.0, 0.0]}]},
                  {"data": [{"embedding": ["x"]}]}):
        server.says = lambda *_, reply=reply: reply
        with pytest.raises(OSError, match="without an embedding"):
            endpoint(server).embeddings(["text"])


# ---------------------------------------------------------------- a person
SCREEN = re.compile(r"--- A ---(.*?)--- B ---(.*?)Which is better", re.S)


class Terminal:
    """compare.py score --judge human in a process whose controlling terminal is a pseudo-terminal.
    """

    def __init__(self, *argv):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "compare.py", "score", "--judge", "human",
                                      "--task", "arithmetic", *map(str, argv)])
        self.seen = ""

    def until(self, text, seconds=60):
        """What the screen shows up to `text`, which must come."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.fd, 65536).decode()
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def press(self, keys):
        os.write(self.fd, keys.encode())

    def end(self):
        with contextlib.suppress(OSError):
            while chunk := os.read(self.fd, 65536):
                self.seen += chunk.decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_person_judges_leaves_and_comes_back(tmp_path):
    problems = [arithmetic.record("train", 0, i, p)
                for i, p in enumerate(arithmetic.problems("train", 7, 0))]
    completions(tmp_path / "a.jsonl", [p["completion"] for p in problems], problems)
    worse = [f"worse\x1b[2J {i}\n--- B ---\n#### -{i}" for i in range(1, 7)]
    completions(tmp_path / "b.jsonl", [problems[0]["completion"], *worse], problems)
    argv = ["--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl", "--out",
            tmp_path / "c.jsonl", "--seconds-per-pair", 30]
    one, shown, order = Terminal(*argv), {}, []

    def look(terminal, number):
        screen = terminal.until("answers so far are kept. 0:")
        assert f"pair {number} of 6" in screen       # the one that agrees is not asked about
        # what a model writes does not steer the terminal
        assert "worse\x1b" not in screen and "worse\ufffd[2J" in screen
        assert screen.count("| --- B ---") == 1       # nor pass for the other answer
        a, b = SCREEN.search(screen.replace("| --- B ---", "")).groups()
        id_, = [p["id"] for p in problems
                if " ".join(p["prompt"].split())[:40] in " ".join(screen.split())]
        shown[id_] = "worse" in a
        order.append(id_)
        return shown[id_]
    for number in (1, 2):
        one.press("b" if look(one, number) else "a")         # right twice
    look(one, 3)
    # an arrow is no answer, nor are two keys at once
    one.press("\x1b[A")
    one.press("x")
    one.until("kept. 0:2")
    one.press("q")
    assert one.end() == 130 and not (tmp_path / "c.jsonl").exists()
    assert "the same command continues" in one.seen
    two = Terminal(*argv)
    for number in (3, 4, 5):
        assert look(two, number) is not None
        two.press("a" if shown[order[-1]] else "b")          # wrong three times
    look(two, 6)
    two.press("B" if shown[order[-1]] else "A")
    assert two.end() == 0, two.seen
    assert "6 asked, 0 without an answer, the first shown chosen in" in two.seen
    assert "accuracy 50.0%" in two.seen and order[2] == order[3]
    summary = json.loads((tmp_path / "c.jsonl.summary").read_text())
    chose_first = [s["shown"] for s in rows(tmp_path / "c.jsonl")
                   if not s["agree"] and (s["prob_b"] == 1) == (s["shown"] == "ba")]
    assert summary["flip_rate"] is None and summary["unanswered"] == 0
    assert summary["chose_first"] == len(chose_first) / 6
    comparisons = {c["id"]: c for c in rows(tmp_path / "c.jsonl")}
    order = list(dict.fromkeys(order))
    assert [comparisons[i]["prob_b"] for i in order] == [0, 0, 1, 1, 1, 0]
    assert set(shown.values()) == {True, False}
    for c in comparisons.values():
        assert c["agree"] == (c["id"] == problems[0]["id"]) == ("seconds" not in c)
        if not c["agree"]:
            assert 0 <= c["seconds"] < 30 and c["shown"] == ("ba" if shown[c["id"]] else "ab")
            assert (c["prob_b_ab"], c["prob_b_ba"]) == (c["prob_b"], 1 - c["prob_b"])


def test_a_person_runs_out_of_time(tmp_path):
    problems = [arithmetic.record("train", 0, i, p)
                for i, p in enumerate(arithmetic.problems("train", 2, 0))]
    completions(tmp_path / "a.jsonl", [p["completion"] for p in problems], problems)
    completions(tmp_path / "b.jsonl", ["#### -1"] * 2, problems)
    person = Terminal("--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl", "--out",
                      tmp_path / "c.jsonl", "--seconds-per-pair", 1.5)
    person.until("0:02")
    person.until("Time is up")
    person.press("b")            # only goes on
    person.until("pair 2 of 2")
    person.until("Time is up")
    person.press("b")
    assert person.end() == 0, person.seen
    assert [(c["prob_b"], c["seconds"]) for c in rows(tmp_path / "c.jsonl")] == [(0.5, 1.5)] * 2


def test_a_person_needs_a_terminal(tmp_path):
    completions(tmp_path / "a.jsonl", ["a"] * 8)
    completions(tmp_path / "b.jsonl", ["b"] * 8)
    done = subprocess.run([sys.executable, "compare.py", "score", "--judge", "human", "--task",
                           "arithmetic", "--a", tmp_path / "a.jsonl", "--b", tmp_path / "b.jsonl",
                           "--out", tmp_path / "c.jsonl"], cwd=ROOT, capture_output=True, text=True,
                          start_new_session=True)
    assert done.returncode == 2
    assert done.stderr == "compare.py: error: --judge human needs a terminal\n"
    assert not (tmp_path / "c.jsonl").exists()


# ---------------------------------------------------------------- tasks/saferpaca.py
def test_grades_are_win_rates_in_both_orders(server, tmp_path, capsys):
    texts = ["x", "done 1 well enough", "a very much longer answer than that",
             *["same length 1 as it"[:18]] * 5]
    completions(tmp_path / "a.jsonl", texts)
    run(evaluate, "grade", "--task", "saferpaca", "--data", tmp_path / "a.jsonl", "--out",
        tmp_path / "g.jsonl")
    assert [r["correct"] for r in rows(tmp_path / "g.jsonl")] == [0, 0.5, 1] + [0.5] * 5
    assert len(server.requests) == 14       # nothing is asked about a text that is the reference
    out = capsys.readouterr().out
    assert "50.0%" in out and "of 8" in out and "general 50.0%" in out and "safety 50.0%" in out
    saferpaca.grades.clear()
    run(evaluate, "grade", "--task", "saferpaca", "--data", tmp_path / "a.jsonl", "--out",
        tmp_path / "again.jsonl")
    assert len(server.requests) == 14
    assert (tmp_path / "g.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_a_failing_judge_leaves_no_file(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(core.endpoint, "ATTEMPTS", 2)
    server.says = lambda *_: chat("I would rather not.")
    completions(tmp_path / "a.jsonl", ["x"] * 8)
    with pytest.raises(SystemExit) as e:
        run_stage(evaluate.parser(), evaluate.main,
                  ["grade", "--task", "saferpaca", "--data", str(tmp_path / "a.jsonl"),
                   "--out", str(tmp_path / "g.jsonl")])
    assert e.value.code == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert "does not end in A or B alone: I would rather not." in last


def test_replies_without_a_verdict_may_count_as_undecided(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ILR_JUDGE_UNDECIDED", "1")

    def says(handler, route, body):
        refused = "Do 3." in str(body)
        return chat("I cannot help with that.") if refused else Server.good(handler, route, body)
    server.says = says
    completions(tmp_path / "a.jsonl", ["x"] * 8)
    run(evaluate, "grade", "--task", "saferpaca", "--data", tmp_path / "a.jsonl", "--out",
        tmp_path / "g.jsonl")
    grades = [r["correct"] for r in rows(tmp_path / "g.jsonl")]
    assert grades == [0.5 if i == 3 else 0 for i in range(8)]
    assert "2 of 16 replies without a verdict count as 0.5" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 14
    monkeypatch.delenv("ILR_JUDGE_UNDECIDED")
    saferpaca.grades.clear()
    with pytest.raises(OSError, match="I cannot help with that. .asked about 'USER:.*Do 3"):
        run(evaluate, "grade", "--task", "saferpaca", "--data", tmp_path / "a.jsonl")


def test_judge_pairs_follow_the_release():
    def answers_to(p):
        return [{**p, "gold_completion": p["completion"],
                 "completion": f"{source} {k} {p['id']}", "source": source}
                for k in range(3) for source in ("general", "safety")]
    problems = {p["id"]: answers_to(p) for p in instructions(10)}
    samples = [[answers[k] for answers in problems.values()] for k in range(6)]
    first, kinds = Counter(), Counter()
    for seed in range(300):
        pairs = core.judge.make_pairs(saferpaca, samples, seed)
        assert len(pairs) == 15
        # gold over a sample of the model of its kind
        for p, (id_, answers) in zip(pairs[:10], problems.items(), strict=True):
            assert p["id"] == id_ and p["better"] == answers[0]["gold_completion"]
            assert p["worse"].split()[0] == answers[0]["category"]
            first[p["worse"].split()[1]] += 1
        # general over safety, for general problems, as many as safety ones
        for p in pairs[10:]:
            assert (p["better"].split()[0], p["worse"].split()[0]) == ("general", "safety")
            assert p["better"].endswith(p["id"])
            kinds[p["id"]] += 1
    assert set(kinds) == {f"p{i}" for i in range(5, 10)}
    # binomial: within 4.5 standard deviations
    for k, share in zip("012", (4 / 7, 2 / 7, 1 / 7), strict=True):
        assert abs(first[k] - 3000 * share) < 4.5 * (3000 * share * (1 - share)) ** 0.5
    safe_few = {k: v for i, (k, v) in enumerate(problems.items()) if i > 2}
    assert len(saferpaca.judge_pairs(safe_few, lambda id_, texts: texts[0])) == 7 + 2
    with pytest.raises(InputError, match="id p0: expected a category"):
        saferpaca.judge_pairs({"p0": [{**problems["p0"][0], "source": "checkpoint"}]}, None)


@real
def test_files_of_the_real_problems(server, tmp_path, monkeypatch):
    source = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/train.jsonl", source[::2])
    write_jsonl(tmp_path / "in/test.jsonl", source)
    run(saferpaca, "--out", tmp_path / "out", "--data-dir", tmp_path / "in")
    found = {n: rows(tmp_path / f"out/{n}.jsonl")
             for n in ("train", "gt", "gt_general", "gt_safety", "unlab", "test")}
    assert [len(found[n]) for n in ("train", "gt", "unlab", "test")] == [289, 144, 145, 578]
    assert found["train"] == found["gt"] + found["unlab"]
    assert [r for r in found["gt"] if r["category"] == "general"] == found["gt_general"]
    assert len(found["gt_general"] + found["gt_safety"]) == 144
    assert Counter(r["category"] for r in found["test"]) == {"general": 300, "safety": 278}
    assert found["test"][0]["prompt"] == f"USER:\n{source[0]['question']}\n\nASSISTANT:\n"
    assert max(len((r["prompt"] + r["completion"]).encode()) for r in found["test"]) < 5000
    assert all(saferpaca.is_well_formed(r["completion"]) and saferpaca.grade(r) == 0.5
               for r in found["test"])
    # the endpoint was tried, in both orders, and nothing graded
    assert len(server.requests) == 2
    monkeypatch.delenv("ILR_JUDGE_URL")
    with pytest.raises(InputError, match="ILR_JUDGE_URL is not set"):
        run(saferpaca, "--out", tmp_path / "x", "--data-dir", tmp_path / "in")
    assert not (tmp_path / "x").exists()


@real
@pytest.mark.slow
def test_the_chain_on_64_real_problems(server, tmp_path):
    """Every stage of `run_ilr.sh saferpaca`, with the shipped base models, graded by a server of
    this one."""
    short = [r for r in map(json.loads, (DATA / "test.jsonl").read_text().splitlines())
             if len(r["answer"]) < 80]       # learned well enough to end: DPO needs chosen ones
    general, safety = ([r for r in short if r["category"] == c] for c in saferpaca.CATEGORIES)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/train.jsonl", general[:32] + safety[:32])
    write_jsonl(tmp_path / "in/test.jsonl", general[32:36] + safety[32:36])
    done = call(tmp_path / "run", tmp_path / "bases", "saferpaca", DATA_DIR=tmp_path / "in",
                ROUNDS=1, JOBS=2, LORA_RANK=0, CHECKPOINTS="50", WEAK_MODEL=PAIR / "weak",
                STRONG_MODEL=PAIR / "strong", PACKING="--micro-tokens 2048",
                DECODING="--max-new-tokens 120", EMBEDDER=PAIR / "strong", WEAK_LR="3e-3",
                WEAK_EPOCHS=10, WEAK_BATCH=8, SFT_LR="3e-3", SFT_EPOCHS=10, SFT_BATCH=8,
                JUDGE_LR="1e-3", JUDGE_EPOCHS=1, DPO_LR="1e-5", DPO_EPOCHS=1,
                ILR_JUDGE_URL=server.url, ILR_JUDGE_MODEL="m", ILR_CACHE=tmp_path / "cache",
                TMPDIR=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run/seed_0"
    comparisons, labels = rows(run / "ilr_1/comparisons.jsonl"), rows(run / "ilr_1/labels.jsonl")
    assert len(labels) == len(comparisons) == 32
    assert 10 <= sum(c["agree"] for c in comparisons) <= 20
    asked = [c["prob_b"] for c in comparisons if not c["agree"]]
    most = refine.accept_count(len(asked), 0.15)
    assert sum(r["accepted"] for r in labels) == min(most, sum(p > 0.5 for p in asked))
    for point in ("weak", "sft", "gold", "ilr_1", "dpo_1"):
        assert all(0 <= r["correct"] <= 1 for r in rows(run / point / "eval_1.graded.jsonl"))
    # grading costs money: the test answers only
    assert not list(run.glob("*/labels.graded.jsonl"))
    assert len(server.requests) <= 5 * 8 * 2 + 2
    report = (tmp_path / "run/report.md").read_text()
    assert "win rate" in report and "saferpaca" in report
