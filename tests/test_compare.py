"""compare.py: what the judge reads, both orders, training pairs, splits, training and stopping."""
import json
import math
import random
from collections import Counter

import pytest
import torch
from conftest import assert_same_gradients, check_resume, first_gradients, rows, run, tiny_config
from transformers import AutoModelForSequenceClassification

import compare
from core.attention import separate
from core.judge import (
    ask_simulated,
    average_orders,
    judge_logits,
    make_pairs,
    measure,
    three_splits,
)
from core.models import open_model
from core.packing import pack
from core.records import InputError, read_jsonl, write_json, write_jsonl
from tasks import arithmetic

CPU = torch.device("cpu")


def wrong(record, by=1):
    before = record["completion"].rpartition("#")[0]
    return {**record, "completion": f"{before}# {int(record['reference']) + by}"}


def random_judge(family="llama", seed=0, **more):
    torch.manual_seed(seed)
    config = tiny_config(family, num_labels=2, **more)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def judge(tiny, tokenizer, tmp_path_factory):
    """A folder as `compare.py train` writes it, with random weights."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    random_judge(vocab=len(tokenizer), initializer_range=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "judge.json", {})
    return folder


@pytest.fixture()
def two_files(problems, tmp_path):
    """a: right on even problems, b: right on odd ones; the two last agree."""
    a = [r if i % 2 == 0 else wrong(r) for i, r in enumerate(problems[:8])]
    b = [r if i % 2 else wrong(r) for i, r in enumerate(problems[:8])]
    agree = [problems[8], wrong(problems[9])]
    write_jsonl(tmp_path / "a.jsonl", a + agree)
    write_jsonl(tmp_path / "b.jsonl", (b + agree)[::-1])      # rows are joined by id, not by place
    return tmp_path


def score(judge, folder, a, b, out, *more):
    run(compare, "score", "--judge", judge, "--task", "arithmetic", "--a", folder / a,
        "--b", folder / b, "--out", folder / out, *more)
    return rows(folder / out), json.loads((folder / f"{out}.summary").read_text())


# ---------------------------------------------------------------- score
def test_a_judge_that_knows_and_one_that_sees_only_the_position(judge, tokenizer, problems,
                                                                two_files, monkeypatch):
    answers = {p["prompt"]: p["reference"] for p in problems}
    read = []

    def knows(model, sequences, args, device):
        """0.7 more often 'change' than it should be, yet it knows which answer is right."""
        read.append([list(s) for s in sequences])
        out = []
        for ids in sequences:
            text, b, end = tokenizer.decode(ids).split("</s>")
            question, _, a = text.removeprefix("<s>").partition("\n")
            right = [arithmetic.grade({"completion": c, "reference": answers[question + "\n"]})
                     for c in (a, b)]
            assert end == "" and sum(right) == 1
            out.append(0.95 if right[1] else 0.7)
        return out

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    monkeypatch.setattr("core.judge.probabilities", knows)
    for a, b in (("a.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl")):
        comparisons, summary = score(judge, two_files, a, b, f"knows_{a}")
        assert [c["id"] for c in comparisons] == [r["id"] for r in rows(two_files / a)]
        in_order = sorted(comparisons, key=lambda c: int(c["id"].split("-")[2]))
        assert [c["agree"] for c in in_order] == [False] * 8 + [True] * 2
        for c in comparisons:
            if c["agree"]:
                assert c["prob_b_ab"] is c["prob_b_ba"] is c["prob_b"] is None
            else:
                b_is_right = arithmetic.grade({**c, "completion": c["completion_b"]}) == 1.0
                assert (c["prob_b"] > 0.5) == b_is_right and c["prob_b"] != 0.5
                one, two = c["completion_a"], c["completion_b"]
                forward, backward = ([1, *ids(c["prompt"]), *ids(x), 2, *ids(y), 2]
                                     for x, y in ((one, two), (two, one)))
                assert forward != backward
                at, = [i for i, s in enumerate(read[-1]) if s == forward]
                # asked in both orders, which really differ
                assert read[-1][at + 1] == backward
        assert [summary[k] for k in ("pairs", "asked", "decisive")] == [10, 8, 8]
        assert summary["accuracy"] == 1.0
        assert summary["flip_rate"] == 1.0      # each order alone says "change"
        # float64 arithmetic
        assert summary["position_bias"] == pytest.approx((0.95 - 0.3) / 2, abs=1e-12)

    p = random.Random(0).random()
    monkeypatch.setattr("core.judge.probabilities",
                        lambda model, sequences, *_: [p] * len(sequences))
    comparisons, summary = score(judge, two_files, "a.jsonl", "b.jsonl", "position.jsonl")
    assert {c["prob_b"] for c in comparisons if not c["agree"]} == {0.5}
    assert (summary["flip_rate"], summary["accuracy"]) == (1.0, 0.5)


def test_average_orders():
    for i in range(2000):
        p, q = random.Random(i).random() ** 9, random.Random(-i - 1).random() ** 9
        # position alone: exactly, at any size
        assert average_orders(p, p) == 0.5
        # exchanging A and B: the same judgement; two roundings of float64
        assert average_orders(p, q) == pytest.approx(1 - average_orders(q, p), abs=3e-16)
    assert average_orders(1.0, 0.0) == 1.0 and average_orders(0.0, 1.0) == 0.0


def test_oracle(two_files):
    comparisons, summary = score("oracle", two_files, "a.jsonl", "b.jsonl", "c.jsonl")
    assert [c["prob_b"] for c in comparisons] == [0.0, 1.0] * 4 + [None] * 2
    assert summary["accuracy"] == 1.0
    write_jsonl(two_files / "bad.jsonl", [wrong(r, 2) for r in rows(two_files / "a.jsonl")])
    comparisons, summary = score("oracle", two_files, "bad.jsonl", "a.jsonl", "d.jsonl")
    assert [c["prob_b"] for c in comparisons[1:8:2]] == [0.5] * 4       # both wrong: no preference


@pytest.mark.parametrize("accuracy", [0.5, 0.6, 0.8, 0.95, 1.0])
def test_a_simulated_judge_errs_as_often_as_it_is_told(accuracy):
    """Of 4,000 pairs: within four standard deviations of a share."""
    def record(i, right):
        return {"id": i, "completion": f"{i}\n#### {7 if right else 8}", "reference": "7"}
    n = 4000
    one_right = {i: ({}, record(i, i % 2), record(i, 1 - i % 2), False) for i in range(n)}
    alike = {i: ({}, record(i, i % 2), {**record(i, i % 2), "completion": f"so: #### {8 - i % 2}"},
                 False) for i in range(n)}
    found = ask_simulated(arithmetic, one_right, accuracy, 0)
    right = sum((p > 0.5) == (i % 2 == 0) for i, (p, _) in found.items()) / n
    assert abs(right - accuracy) <= 4 * (accuracy * (1 - accuracy) / n) ** 0.5
    none = ask_simulated(arithmetic, alike, accuracy, 0)
    assert abs(sum(p > 0.5 for p, _ in none.values()) / n - 0.5) < 4 * (0.25 / n) ** 0.5
    # its log-odds, of B, have variance 1 around their mean; 0.09: four standard deviations
    odds = [math.log(p / (1 - p)) for p, _ in none.values()]
    assert abs(sum(x * x for x in odds) / n - 1) < 0.09
    assert all(ab == pytest.approx(1 - ba) for ab, ba in found.values())
    # the same judgement of the same texts, in whatever order they come; another one of a new seed
    turned = {i: (key, b, a, same) for i, (key, a, b, same) in one_right.items()}
    turned = ask_simulated(arithmetic, turned, accuracy, 0)
    assert all(1 - p == pytest.approx(turned[i][0]) for i, (p, _) in found.items())
    assert accuracy == 1 or found != ask_simulated(arithmetic, one_right, accuracy, 1)


def test_calibration(problems):
    """Ten bins of prob_b: by hand, with pairs on a bin's edges, one that agrees and one of which
    neither side is right."""
    def pair(p, b_right, a_right=None):
        a, b = (f"#### {problems[0]['reference'] if right else -1}"
                for right in (not b_right if a_right is None else a_right, b_right))
        return {"completion_a": a, "completion_b": b, "reference": problems[0]["reference"],
                "agree": p is None, "prob_b_ab": p, "prob_b_ba": p, "prob_b": p}
    comparisons = [pair(*x) for x in (
        (0.0, True), (0.05, False), (0.3, True), (0.3, True), (0.3, False), (0.3, True),
        (0.95, True), (1.0, False), (0.95, False, False), (None, True))]
    found = measure(comparisons, compare.grades_of(arithmetic, comparisons))
    bins = dict(enumerate(found["calibration"]))
    assert len(bins) == 10
    for k, expected in ((0, [0.025, 0.5, 2]), (3, [0.3, 0.75, 4]), (9, [0.975, 0.5, 2])):
        assert bins.pop(k) == pytest.approx(expected, abs=1e-12)
    assert list(bins.values()) == [[None, None, 0]] * 7
    assert sum(n for _, _, n in found["calibration"]) == found["decisive"] == 8
    assert "decisive" not in measure(comparisons)       # without grades


def test_scores_do_not_depend_on_batches_and_packing(judge, two_files):
    base, _ = score(judge, two_files, "a.jsonl", "b.jsonl", "1.jsonl")
    settings = [["--batch-size", 1], ["--micro-tokens", 1], ["--micro-tokens", 700]]
    for i, more in enumerate(settings):
        other, _ = score(judge, two_files, "a.jsonl", "b.jsonl", f"{i}.out", *more)
        for x, y in zip(base, other, strict=True):
            if not x["agree"]:
                # fp32: probabilities are at most 1, logits carry about 1e-6 (test_sft)
                assert [x[k] for k in ("prob_b_ab", "prob_b_ba", "prob_b")] == pytest.approx(
                    [y[k] for k in ("prob_b_ab", "prob_b_ba", "prob_b")], abs=2e-5)
    probs = [c["prob_b"] for c in base if not c["agree"]]
    # a judge that sees the texts: else equality says nothing
    assert max(probs) - min(probs) > 0.01


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma", "mistral", "qwen3"])
def test_judge_reads_the_last_token_even_where_pad_is_eos(family, one_row):
    model = random_judge(family, pad_token_id=2)
    assert not one_row or separate(model)
    reference = random_judge(family, pad_token_id=2).double()
    sequences = [[1, 5, 6, 2, 7, 2], [1, 5, 6, 2, 7], [1, 8, 2, 2], [1] + [9] * 11 + [2, 4, 2]]
    got = {}
    for batch in pack([(ids, [0] * len(ids)) for ids in sequences], 32, CPU, model):
        owner, logits = judge_logits(model, batch)
        got.update(zip(owner.tolist(), logits, strict=True))
    for i, ids in enumerate(sequences):
        hidden = reference.base_model(input_ids=torch.tensor([ids]),
                                      use_cache=False).last_hidden_state[0, -1]
        # fp32 logits against float64, as in test_sft
        assert (got[i] - reference.score(hidden)).abs().max() < 2e-5
    assert (got[0] - got[1]).abs().max() > 0.01         # the last EOS counts


def test_samples_are_paired_two_by_two(judge, problems, tmp_path):
    samples = [{**wrong(p, s), "sample": s} for p in problems[:3] for s in (3, 0, 2, 1)]
    samples[2]["completion"] = samples[0]["completion"]     # equal texts of a pair: nothing to ask
    write_jsonl(tmp_path / "s.jsonl", samples)
    run(compare, "score", "--judge", judge, "--task", "arithmetic", "--a", tmp_path / "s.jsonl",
        "--out", tmp_path / "c.jsonl")
    by = {(s["id"], s["sample"]): s["completion"] for s in samples}
    comparisons = rows(tmp_path / "c.jsonl")
    assert [(c["id"], c["pair"], c["completion_a"], c["completion_b"]) for c in comparisons] == [
        (p["id"], k, by[p["id"], 2 * k], by[p["id"], 2 * k + 1])
        for p in problems[:3] for k in (0, 1)]
    assert [c["agree"] for c in comparisons] == [False, True] + [False] * 4
    write_jsonl(tmp_path / "odd.jsonl", samples[:3])
    with pytest.raises(InputError, match="even number"):
        run(compare, "score", "--judge", judge, "--task", "arithmetic",
            "--a", tmp_path / "odd.jsonl", "--out", tmp_path / "d.jsonl")


# ---------------------------------------------------------------- training pairs
def checkpoints(*texts):
    """One list of samples per checkpoint, of one problem whose right answer is 7."""
    return [[{"id": "p", "prompt": "q", "completion": t, "reference": "7",
              "gold_completion": "gold\n#### 7"}] for t in texts]


RIGHT, WRONG = ["r0 #### 7", "r1 #### 7", "r2 #### 7"], ["w0 #### 1", "w1 #### 2", "w2 #### 3"]


@pytest.mark.parametrize("texts, expected", [
    # expected: for each kind of pair, {(better, worse): share}, the release's rule spelled out
    (RIGHT, [{("gold\n#### 7", r): w / 7 for r, w in zip(RIGHT, (4, 2, 1), strict=True)}]),
    # unparseable: left out
    (["no answer", *WRONG],
     [{("gold\n#### 7", x): w / 7 for x, w in zip(WRONG, (4, 2, 1), strict=True)}]),
    ([WRONG[0], RIGHT[0], WRONG[1], RIGHT[1]],
     [{("gold\n#### 7", r): w / 3 for r, w in zip(RIGHT[:2], (2, 1), strict=True)},
      {(b, x): v / 7 * w / 3 for b, v in zip(RIGHT[:2] + ["gold\n#### 7"], (4, 2, 1), strict=True)
       for x, w in zip(WRONG[:2], (2, 1), strict=True)}])])
def test_make_pairs_follows_the_release(texts, expected):
    trials, counts = 4000, [Counter() for _ in expected]
    for seed in range(trials):
        pairs = make_pairs(arithmetic, checkpoints(*texts), seed)
        assert len(pairs) == len(expected)
        for count, pair in zip(counts, pairs, strict=True):
            assert (pair["id"], pair["prompt"]) == ("p", "q")
            count[pair["better"], pair["worse"]] += 1
    for count, shares in zip(counts, expected, strict=True):
        assert set(count) == set(shares)
        for key, share in shares.items():     # binomial: within 4.5 standard deviations
            assert abs(count[key] - trials * share) < 4.5 * (trials * share * (1 - share)) ** 0.5


def test_several_incorrect_samples_of_a_problem_are_all_different():
    for seed in range(50):
        texts = [*WRONG, WRONG[0], RIGHT[0]]
        two, all_ = (make_pairs(arithmetic, checkpoints(*texts), seed, n)[1:] for n in (2, 9))
        assert len({p["worse"] for p in two}) == 2 and sorted(p["worse"] for p in all_) == WRONG
        assert {p["better"] for p in two + all_} <= {RIGHT[0], "gold\n#### 7"}


def test_equal_texts_make_no_pair():
    assert make_pairs(arithmetic, checkpoints("gold\n#### 7", "gold\n#### 7"), 0) == []


@pytest.mark.parametrize("kind", ["symmetric", "systematic"])
def test_flipped_answers(problems, tmp_path, kind):
    """A judge that knows, with a share of its answers turned around, has a chosen accuracy."""
    many = [{**p, "id": f"{p['id']} {k}", "completion": f"#### {p['reference']}"}
            for k in range(50) for p in problems]
    for k in (1, 2):        # two questions about each problem
        write_jsonl(tmp_path / f"b{k}.jsonl",
                    [{**p, "completion": f"#### {int(p['reference']) + k}"} for p in many])
    write_jsonl(tmp_path / "a.jsonl", many)
    found = [score("oracle", tmp_path, "a.jsonl", f"b{k}.jsonl", f"c{k}.jsonl",
                   "--flip-share", 0.3, "--flip-kind", kind) for k in (1, 2)]
    n = len(many)
    for comparisons, summary in found:
        assert abs(summary["accuracy"] - 0.7) < 4 * math.sqrt(0.3 * 0.7 / n)
        assert {c["prob_b"] for c in comparisons} == {0.0, 1.0}
    # wrong about a problem twice
    both = sum(a["prob_b"] and b["prob_b"] for a, b in zip(*(c for c, _ in found), strict=True))
    if kind == "systematic":
        assert both == round((1 - found[0][1]["accuracy"]) * n)
    else:
        assert abs(both / n - 0.09) < 4 * math.sqrt(0.09 * 0.91 / n)
    _, summary = score("oracle", tmp_path, "a.jsonl", "b1.jsonl", "d.jsonl", "--flip-kind", kind)
    assert summary["accuracy"] == 1.0


def test_three_splits():
    pairs = [{"id": f"p{i % 100}", "n": i} for i in range(170)]
    splits = three_splits(pairs, 0)
    ids = [{p["id"] for p in split} for split in splits]
    # by problem, so disjoint
    assert [len(x) for x in ids] == [80, 10, 10] and len(set.union(*ids)) == 100
    assert sorted(p["n"] for split in splits for p in split) == list(range(170))
    shuffled, other = three_splits(pairs[::-1], 0), three_splits(pairs, 1)
    assert [{p["id"] for p in s} for s in shuffled] == ids
    assert [{p["id"] for p in s} for s in other] != ids


# ---------------------------------------------------------------- training
@pytest.fixture(scope="module")
def train_argv(tiny, problems, tmp_path_factory):
    """Two checkpoints' samples of 20 problems: every problem has a wrong sample, every other one
    a right one too."""
    top = tmp_path_factory.mktemp("samples")
    write_jsonl(top / "gold.jsonl", problems)
    write_jsonl(top / "1.jsonl", [wrong(p) for p in problems])
    right = [{**p, "completion": f"#### {p['reference']}"} for p in problems]
    write_jsonl(top / "2.jsonl",
                [wrong(p, 3) if i % 2 else right[i] for i, p in enumerate(problems)])
    return ["train", "--model", tiny / "model", "--task", "arithmetic",
            "--data", top / "1.jsonl", top / "2.jsonl", "--gold", top / "gold.jsonl",
            "--batch-size", 8, "--device", "cpu"]


def splits_of(argv):
    """The examples of the three splits, from the stage's own pairs (tested above)."""
    a = compare.parser().parse_args([str(x) for x in [*argv, "--out", "x"]])
    gold = {r["id"]: r["completion"] for r in rows(a.gold)}
    samples = [[{**r, "gold_completion": gold[r["id"]]} for r in read_jsonl(p)] for p in a.data]
    return three_splits(make_pairs(arithmetic, samples, a.seed, a.wrong_per_problem), a.seed)


def brute_probability(model, tokenizer, prompt, a, b):
    """P(change to B), one question alone, unpacked, in float64."""
    ids = [1] + [i for text, end in ((prompt, []), (a, [2]), (b, [2]))
                 for i in tokenizer(text, add_special_tokens=False).input_ids + end]
    hidden = model.base_model(input_ids=torch.tensor([ids]),
                              use_cache=False).last_hidden_state[0, -1]
    return model.score(hidden).softmax(-1)[1]


def both_probabilities(model, tokenizer, pair):
    """P(change) of (better, worse), where change is wrong, and of (worse, better)."""
    better, worse = pair["better"], pair["worse"]
    return (brute_probability(model, tokenizer, pair["prompt"], better, worse),
            brute_probability(model, tokenizer, pair["prompt"], worse, better))


# the second diverges: its stopping loss rises
@pytest.mark.parametrize("lr, epochs", [(1e-3, 2), (0.3, 6)])
def test_training_end_to_end(train_argv, tokenizer, tmp_path, lr, epochs):
    run(compare, *train_argv, "--out", tmp_path / "judge", "--lr", lr, "--epochs", epochs)
    about = json.loads((tmp_path / "judge/judge.json").read_text())
    train, stopping, reported = splits_of(train_argv)
    history = about["stop_losses"]
    rising = [i for i in range(1, len(history)) if history[i] > history[i - 1]]
    # stopped at the first rise, or ran to the end without one
    if len(history) < epochs:
        assert rising == [len(history) - 1]
    else:
        assert all(i == epochs - 1 for i in rising)
    assert about["train_pairs"] == len(train) and about["held_out_pairs"] == len(reported)
    assert about["epochs"] == len(history)
    log = rows(tmp_path / "judge/metrics.jsonl")
    steps = [r for r in log if "loss" in r]
    assert len(steps) == len(history) * -(-2 * len(train) // 8)
    # ln 2 to the 6 digits of the log: the head starts at 0
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=2e-6)
    # rounded to 6 digits
    assert [r["stop_loss"] for r in log if "stop_loss" in r] == pytest.approx(history, abs=1e-6)

    model = open_model(tmp_path / "judge", CPU, "AutoModelForSequenceClassification").double()
    losses = []
    for p in stopping:
        wrongly, rightly = both_probabilities(model, tokenizer, p)
        losses += [-(1 - wrongly).log().item(), -rightly.log().item()]
    # the folder holds the best epoch; 1e-3 relative: logits of a diverged model are large, and
    # fp32 sums them
    assert sum(losses) / len(losses) == pytest.approx(min(history), rel=1e-3)
    right = []
    for p in reported:
        wrongly, rightly = both_probabilities(model, tokenizer, p)
        surer = (rightly - wrongly).item()
        # a diverged judge says 1.0 in both orders: a tie in fp32, whose spacing below 1 is 6e-8,
        # counts one half
        right.append(0.5 if abs(surer) < 1e-7 else surer > 0)
    assert about["held_out_accuracy"] == sum(right) / len(right)
    if lr == 0.3:
        assert len(history) < epochs


def test_training_stops_at_an_accuracy(train_argv, tmp_path, monkeypatch, capsys):
    argv = [*train_argv, "--lr", 1e-4, "--epochs", 2, "--wrong-per-problem", 2]
    for accuracy in (0, 0.01, 1.1):
        out = ["--out", tmp_path / str(accuracy)]
        args = compare.parser().parse_args([str(x) for x in argv + out])
        args.stop_accuracy = accuracy       # 1.1, which the command line refuses, is never reached
        compare.main(args)
    train = splits_of(argv)[0]
    steps = -(-2 * len(train) // 8)
    first_check = -(-steps // 4)
    assert first_check < steps
    # any judge is that good: it stops where it is first looked at, and is kept
    log = rows(tmp_path / "0.01/metrics.jsonl")
    assert [r["step"] for r in log] == [*range(1, first_check + 1), first_check]
    assert log[-1]["stop_accuracy"] >= 0.01
    about = json.loads((tmp_path / "0.01/judge.json").read_text())
    assert about["epochs"] == round(first_check / steps, 2)
    # none is this good: the looking itself changes nothing
    never, always = (tmp_path / f"{folder}/model.safetensors" for folder in ("1.1", "0"))
    assert never.read_bytes() == always.read_bytes()
    for calls in (first_check - 1, first_check):
        check_resume(monkeypatch, capsys, tmp_path / f"cut{calls}", compare,
                     [*argv, "--stop-accuracy", 0.01], calls)


def test_gradient_is_that_of_the_full_batch_mean(train_argv, tiny, tokenizer, tmp_path,
                                                 monkeypatch):
    def seeded(weight, _):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    # a head of 0 has no gradients behind it
    monkeypatch.setattr("core.judge.set_exact", seeded)
    argv = [*train_argv, "--batch-size", 1000, "--epochs", 1]
    large = first_gradients(monkeypatch, compare, *argv, "--out", tmp_path / "a")
    small = first_gradients(monkeypatch, compare, *argv, "--out", tmp_path / "b",
                            "--micro-tokens", 1)
    model = open_model(tiny / "model", CPU, "AutoModelForSequenceClassification", num_labels=2)
    seeded(model.score.weight, 0)
    model = model.double()
    train = splits_of(argv)[0]
    likelihoods = []
    for p in train:
        wrongly, rightly = both_probabilities(model, tokenizer, p)
        likelihoods += [(1 - wrongly).log(), rightly.log()]
    (-sum(likelihoods) / len(likelihoods)).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for got in (large, small):
        assert_same_gradients(got, expected)


@pytest.mark.parametrize("calls", [4, 7, 8])      # inside an epoch, at its stopping loss, after it
def test_interrupted_training_continues_byte_for_byte(train_argv, tmp_path, monkeypatch, capsys,
                                                      calls):
    check_resume(monkeypatch, capsys, tmp_path, compare,
                 [*train_argv, "--lr", 1e-4, "--epochs", 2], calls)


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize("argv, message", [
    (["train", "--model", "x", "--task", "nothing", "--data", "x", "--gold", "x"],
     "there is no tasks/nothing.py"),
    (["score", "--judge", "oracle", "--task", "nothing", "--a", "x", "--b", "y"],
     "there is no tasks/nothing.py"),
    (["score", "--judge", "simulated", "--task", "arithmetic", "--a", "x"], "go together"),
    (["score", "--judge", "oracle", "--judge-accuracy", "0.7", "--task", "arithmetic", "--a", "x"],
     "go together"),
    (["score", "--judge", "simulated", "--judge-accuracy", "0.4", "--task", "arithmetic", "--a",
      "x"], "expected 0.5 .a coin. to 1"),
    (["score", "--judge", "x", "--task", "saferpaca", "--a", "x", "--b", "y"],
     "name an --embedder"),
    (["score", "--judge", "http://localhost:1/v1", "--task", "arithmetic", "--a", "x"],
     "has no name: set --judge-model .JUDGE_MODEL of run_ilr.sh."),
    (["score", "--judge", "http://a:b@c/v1", "--judge-model", "m", "--task", "gsm8k", "--a", "x"],
     "the endpoint's URL: expected")])
def test_what_the_arguments_alone_tell(argv, message):
    with pytest.raises(InputError, match=message):
        compare.check(compare.parser().parse_args([*argv, "--out", "x"]))


@pytest.mark.parametrize("judge, run_by_many", [
    ("folder", True), ("oracle", False), ("simulated", False), ("human", False),
    ("http://localhost:1/v1", False)])
def test_judges_that_need_one_process(judge, run_by_many, monkeypatch):
    monkeypatch.setattr(compare, "world", lambda: 2)
    accuracy = ["--judge-accuracy", "0.7"] if judge == "simulated" else []
    args = compare.parser().parse_args(["score", "--judge", judge, "--judge-model", "m", *accuracy,
                                        "--task", "arithmetic", "--a", "x", "--out", "y"])
    if run_by_many:
        return compare.check(args)
    with pytest.raises(InputError, match="start it without torchrun"):
        compare.check(args)
