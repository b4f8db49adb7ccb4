"""refine.py: how many labels are replaced, which ones, and what is said of it."""
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from conftest import rows, run

import refine
from core.records import InputError, write_jsonl
from tasks import arithmetic

ALPHAS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.7]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_accept_count_is_the_number_above_the_quantile(alpha):
    rng = np.random.default_rng(0)
    for n in range(1, 161):
        # exact: the (1 - alpha) quantile of 0, 1, ..., n-1, interpolated, is (1 - alpha)(n - 1)
        exact = (1 - Fraction(str(alpha))) * (n - 1)
        count = refine.accept_count(n, alpha)
        assert count == sum(x > exact for x in range(n))
        scores = rng.permutation(n) / n + rng.random() / n
        above = int((scores > np.quantile(scores, 1 - alpha)).sum())
        # where the quantile is a score itself, numpy's rounding puts it on either side of that
        assert count == above if exact.denominator != 1 else abs(count - above) <= 1


def test_accept_count_at_the_ends():
    assert [refine.accept_count(n, 0.15) for n in (0, 1, 2, 21, 101)] == [0, 0, 1, 3, 15]
    assert refine.accept_count(50, 0) == 0 and refine.accept_count(50, 1) == 49


def comparison(i, prob_b, a="#### 1", b="#### 2", reference="2", **more):
    return {"id": f"p{i:03d}", "prompt": "q", "completion_a": a, "completion_b": b,
            "reference": reference, "agree": prob_b is None,
            "prob_b_ab": prob_b, "prob_b_ba": prob_b, "prob_b": prob_b, **more}


def test_accepted_ids():
    for seed in range(30):
        rng = random.Random(seed)
        comparisons = [comparison(i, rng.choice([None, rng.random(), rng.random()]))
                       for i in range(60)]
        scores = [c["prob_b"] for c in comparisons if not c["agree"]]
        # the release's rule, word for word, for distinct scores; rounding decides nothing as
        # 0.83 (n - 1) is no whole number
        if (83 * (len(scores) - 1)) % 100:
            threshold = max(0.5, np.quantile(scores, 0.83))
            expected = {c["id"] for c in comparisons
                        if not c["agree"] and c["prob_b"] > threshold}
            assert refine.accepted_ids(comparisons, 0.17) == expected and expected
    # only above 0.5, however many are wanted
    few = [comparison(i, p) for i, p in enumerate([0.9, 0.5, 0.4, 0.51, 0.1])]
    assert refine.accepted_ids(few, 0.9) == {"p000", "p003"}
    assert refine.accepted_ids([comparison(0, None)], 0.9) == set()


def test_ties_go_in_order_of_id():
    tied = [comparison(i, 0.8) for i in range(21)] + [comparison(50, 0.9), comparison(60, None)]
    random.Random(0).shuffle(tied)
    assert refine.accept_count(22, 0.15) == 4       # 21 - floor(17.85)
    found = refine.accepted_ids(tied, 0.15)
    assert found == {"p050", "p000", "p001", "p002"}
    assert refine.tied_at_the_cap(tied, found) == 18
    assert refine.tied_at_the_cap(tied, {"p050"}) == refine.tied_at_the_cap(tied, set()) == 0


@pytest.fixture()
def files(tmp_path):
    """40 labels, every third of which agrees with its proposal, with random right and wrong
    answers."""
    rng = random.Random(1)
    comparisons = [comparison(i, None if i % 3 == 0 else rng.random(), f"#### {rng.choice([2, 3])}",
                              f"x\n#### {rng.choice([2, 4])}") for i in range(40)]
    for c in comparisons[::3]:
        c["completion_b"] = f"x\n{c['completion_a']}"
    labels = [{"id": c["id"], "prompt": "q", "completion": c["completion_a"], "reference": "2",
               "source": "weak", "extra": i} for i, c in enumerate(comparisons)]
    write_jsonl(tmp_path / "labels.jsonl", labels)
    write_jsonl(tmp_path / "c.jsonl", comparisons[::-1])
    write_jsonl(tmp_path / "proposals.jsonl",
                [{"id": c["id"], "completion": c["completion_b"]} for c in comparisons])
    return tmp_path, labels, {c["id"]: c for c in comparisons}


def refined(folder, *argv):
    run(refine, "--task", "arithmetic", "--labels", folder / "labels.jsonl",
        "--out", folder / "new.jsonl", "--round", 3, *argv)
    return rows(folder / "new.jsonl"), json.loads((folder / "new.jsonl.summary").read_text())


@pytest.mark.parametrize("method", ["ilr", "oracle", "naive"])
def test_refined_labels(files, method):
    folder, labels, by_id = files
    more = ["--comparisons", folder / "c.jsonl"]
    if method == "naive":
        more = ["--proposals", folder / "proposals.jsonl"]
    new, summary = refined(folder, "--method", method, "--max-replace", 0.4, *more)
    asked = [c for c in by_id.values() if c["prob_b"] is not None]
    surest = sorted(asked, key=lambda c: -c["prob_b"])[:10]
    expected = {"ilr": {c["id"] for c in surest if c["prob_b"] > 0.5},
                "oracle": {c["id"] for c in asked if c["prob_b"] > 0.5},
                "naive": {r["id"] for r in new if r["accepted"]}}[method]
    # ilr: 25 - floor(0.6 * 25) of the 26 disagreements; naive: 0.4 of all 40; oracle: no cap
    assert len(asked) == 26
    assert (len(expected) > 10 if method == "oracle"
            else len(expected) == {"ilr": 10, "naive": 16}[method])
    better = worse = before = after = fixable = 0
    for label, r in zip(labels, new, strict=True):      # one row per problem, in the labels' order
        c = by_id[label["id"]]
        prob_b = None if method == "naive" else c["prob_b"]
        if label["id"] in expected:
            assert r == {**label, "completion": c["completion_b"], "source": "proposal",
                         "round": 3, "accepted": True, "prob_b": prob_b}
        else:
            assert r == {**label, "accepted": False, "prob_b": prob_b}
        x, y = label["completion"].endswith(" 2"), r["completion"].endswith(" 2")
        better, worse = better + (y > x), worse + (y < x)
        before, after = before + x, after + y
        # pairs that agree are right, or wrong, together
        fixable += c["completion_b"].endswith(" 2") and not x
    n = len(expected)
    assert summary == {"kept": n, "share_of_all": n / 40, "asked": 0 if method == "naive" else 26,
                       "share_of_asked": None if method == "naive" else n / 26,
                       "correct_before": before / 40, "correct_after": after / 40,
                       "became_right": better, "became_wrong": worse, "precision": better / n,
                       "fixable": fixable, "recall": better / fixable}
    assert better and worse and fixable > better


def test_references_change_no_label(files):
    folder, labels, _ = files
    new, _ = refined(folder, "--comparisons", folder / "c.jsonl")
    write_jsonl(folder / "labels.jsonl", [{**r, "reference": "999"} for r in labels])
    write_jsonl(folder / "c.jsonl",
                [{**c, "reference": "999"} for c in rows(folder / "c.jsonl")])
    (folder / "new.jsonl").unlink()
    again, _ = refined(folder, "--comparisons", folder / "c.jsonl")
    assert [{**r, "reference": "2"} for r in again] == new


def test_naive_is_random_by_seed_and_round_alone(files):
    folder, labels, _ = files
    chosen = set()
    for k, more in enumerate([["--seed", 0], ["--seed", 0], ["--seed", 1],
                              ["--seed", 0, "--round", 4]]):
        if k == 1:
            write_jsonl(folder / "labels.jsonl", labels[::-1])
        new, _ = refined(folder, "--method", "naive",
                         "--proposals", folder / "proposals.jsonl", *more)
        chosen.add(frozenset(r["id"] for r in new if r["accepted"]))
        assert sum(r["accepted"] for r in new) == 6         # exactly floor(0.15 * 40)
        (folder / "new.jsonl").unlink()
    assert len(chosen) == 3     # the order of the rows changes nothing, seed and round do


def test_every_method_takes_the_seed_and_ilr_draws_nothing_from_it(files):
    folder, _, _ = files
    found = []
    for seed in (0, 1):
        found.append(refined(folder, "--comparisons", folder / "c.jsonl", "--seed", seed))
        (folder / "new.jsonl").unlink()
    assert found[0] == found[1]
    for method in refine.METHODS:
        argv = ["--method", method, "--task", "arithmetic", "--out", "o", "--seed", "5"]
        assert refine.parser().parse_args(argv).seed == 5


def test_stale_or_missing_comparisons_are_refused(files):
    folder, labels, _ = files
    write_jsonl(folder / "labels.jsonl", [{**labels[0], "completion": "#### 77"}, *labels[1:]])
    with pytest.raises(InputError, match="completion_a of id p000"):
        refined(folder, "--comparisons", folder / "c.jsonl")
    write_jsonl(folder / "labels.jsonl", [*labels, {**labels[0], "id": "new"}])
    with pytest.raises(InputError, match="id new"):
        refined(folder, "--comparisons", folder / "c.jsonl")
    assert not (folder / "new.jsonl").exists()


# ---------------------------------------------------------------- preference pairs
@pytest.mark.parametrize("n, alpha", [(40, 0.15), (20, 0.15), (7, 0.3), (100, 0.07), (30, 1.0)])
def test_preference_pairs(n, alpha, tmp_path):
    rng = random.Random(n)
    comparisons = [comparison(i, rng.random(), f"a{i}", f"b{i}", pair=i % 3) for i in range(n)]
    for c in comparisons[:n // 4]:
        c["prob_b"] = 0.5
    comparisons[-1].update(prob_b=None, agree=True)
    pairs = refine.preference_pairs(comparisons, alpha, 0)
    decided = [c for c in comparisons if c["prob_b"] not in (None, 0.5)]
    # alpha in whole hundredths: exact
    assert len(pairs) == min(len(decided), math.floor(round(alpha * 100) * n / 100))
    kept = sorted(decided, key=lambda c: -abs(c["prob_b"] - 0.5))[:len(pairs)]
    assert sorted(p["id"] for p in pairs) == sorted(c["id"] for c in kept)
    by_id = {c["id"]: c for c in comparisons}
    for p in pairs:
        i, prob_b = p["id"][1:].lstrip("0") or "0", by_id[p["id"]]["prob_b"]
        sides = (f"b{i}", f"a{i}") if prob_b > 0.5 else (f"a{i}", f"b{i}")
        assert (p["chosen"], p["rejected"]) == sides
        assert p["prob_chosen"] == max(prob_b, 1 - prob_b) > 0.5
    # distinct scores: the order changes nothing
    assert refine.preference_pairs(comparisons[::-1], alpha, 0) == pairs
    write_jsonl(tmp_path / "c.jsonl", comparisons)
    run(refine, "--method", "pairs", "--task", "arithmetic", "--comparisons", tmp_path / "c.jsonl",
        "--max-replace", alpha, "--out", tmp_path / "p.jsonl")
    assert rows(tmp_path / "p.jsonl") == pairs


def test_tied_pairs_are_drawn_by_the_seed(tmp_path):
    """The oracle's scores are 0, 1 and 0.5: the seed chooses which of the decided ones are kept."""
    comparisons = [comparison(i, (0.0, 1.0, 0.5)[i % 3], "#### 2" if i % 3 == 0 else "#### 1",
                              "#### 2" if i % 3 == 1 else "#### 1", pair=0) for i in range(60)]
    kept = {s: {p["id"] for p in refine.preference_pairs(comparisons, 0.25, s)} for s in range(3)}
    assert all(len(k) == 15 for k in kept.values()) and kept[0] != kept[1] != kept[2]
    pairs = refine.preference_pairs(comparisons, 0.25, 0)
    assert refine.preference_pairs(comparisons[::-1], 0.25, 0) == pairs

    def grade(pair, side):
        return arithmetic.grade({**pair, "completion": pair[side]})
    assert all(grade(p, "chosen") > grade(p, "rejected") for p in pairs)
    write_jsonl(tmp_path / "c.jsonl", comparisons)
    run(refine, "--method", "pairs", "--task", "arithmetic", "--comparisons", tmp_path / "c.jsonl",
        "--max-replace", 0.25, "--out", tmp_path / "p.jsonl")
    assert json.loads((tmp_path / "p.jsonl.summary").read_text()) == {
        "kept": 15, "share_of_all": 0.25, "chosen_correct": 1.0, "rejected_correct": 0.0,
        "precision": 1.0}


# ---------------------------------------------------------------- clean, and what is refused
def test_clean_keeps_the_right_labels_alone(tmp_path):
    labels = [{"id": i, "prompt": "p", "completion": f"#### {i % 3}", "reference": "1", "more": i}
              for i in range(7)]
    write_jsonl(tmp_path / "l.jsonl", labels)
    run(refine, "--method", "clean", "--labels", tmp_path / "l.jsonl", "--task", "arithmetic",
        "--out", tmp_path / "c.jsonl")
    assert rows(tmp_path / "c.jsonl") == [labels[1], labels[4]]
    write_jsonl(tmp_path / "w.jsonl", labels[2:4])
    with pytest.raises(InputError, match="none of its 2 labels is right"):
        run(refine, "--method", "clean", "--labels", tmp_path / "w.jsonl", "--task", "arithmetic",
            "--out", tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()


@pytest.mark.parametrize("argv, message", [
    ("--method ilr --labels l --comparisons c1 c2", "reads one file of --comparisons, not 2"),
    ("--method pairs --comparisons c1 c2", "reads one file of --comparisons, not 2"),
    ("--labels l", "--method ilr needs --comparisons"),
    ("--comparisons c", "--method ilr needs --labels"),
    ("--method oracle --labels l", "--method oracle needs --comparisons"),
    ("--method naive --labels l", "--method naive needs --proposals"),
    ("--method clean", "--method clean needs --labels"),
    ("--method pairs --labels l", "--method pairs needs --comparisons")])
def test_check_refuses_by_the_arguments_alone(argv, message):
    args = refine.parser().parse_args([*argv.split(), "--task", "arithmetic", "--out", "o"])
    with pytest.raises(InputError, match=message):
        refine.check(args)
