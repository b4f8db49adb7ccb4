"""refine.py: how many, which and what is said of it."""
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from conftest import rows, run

import refine
from tasks import InputError, arithmetic, write_jsonl

ALPHAS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.7]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_accept_count_is_the_number_above_the_quantile(alpha):
    rng = np.random.default_rng(0)
    for n in range(1, 161):
        # in exact arithmetic: the (1 - alpha) quantile of 0, 1, ..., n-1 by linear interpolation is (1 - alpha)(n - 1)
        exact = (1 - Fraction(str(alpha))) * (n - 1)
        assert refine.accept_count(n, alpha) == sum(x > exact for x in range(n))
        scores = rng.permutation(n) / n + rng.random() / n
        above = int((scores > np.quantile(scores, 1 - alpha)).sum())
        # where the quantile is a score itself, numpy's rounding puts it on either side of that score
        assert refine.accept_count(n, alpha) == above if exact.denominator != 1 else abs(refine.accept_count(n, alpha) - above) <= 1


def test_accept_count_at_the_ends():
    assert [refine.accept_count(n, 0.15) for n in (0, 1, 2, 21, 101)] == [0, 0, 1, 3, 15]
    assert refine.accept_count(50, 0) == 0 and refine.accept_count(50, 1) == 49


def comparison(i, prob_b, a="#### 1", b="#### 2", reference="2", **more):
    return {"id": f"p{i:03d}", "prompt": "q", "completion_a": a, "completion_b": b, "reference": reference, "agree": prob_b is None,
            "prob_b_ab": prob_b, "prob_b_ba": prob_b, "prob_b": prob_b, **more}


def test_accepted_ids():
    for seed in range(30):
        rng = random.Random(seed)
        comparisons = [comparison(i, rng.choice([None, rng.random(), rng.random()])) for i in range(60)]
        scores = [c["prob_b"] for c in comparisons if not c["agree"]]
        # the release's rule, word for word, for distinct scores; rounding decides nothing as 0.83 (n - 1) is no whole number
        if (83 * (len(scores) - 1)) % 100:
            expected = {c["id"] for c in comparisons if not c["agree"] and c["prob_b"] > max(0.5, np.quantile(scores, 0.83))}
            assert refine.accepted_ids(comparisons, 0.17) == expected and expected
    # only above 0.5, however many are wanted
    few = [comparison(i, p) for i, p in enumerate([0.9, 0.5, 0.4, 0.51, 0.1])]
    assert refine.accepted_ids(few, 0.9) == {"p000", "p003"} and refine.accepted_ids([comparison(0, None)], 0.9) == set()


def test_ties_go_in_order_of_id():
    tied = [comparison(i, 0.8) for i in range(21)] + [comparison(50, 0.9), comparison(60, None)]
    random.Random(0).shuffle(tied)
    assert refine.accept_count(22, 0.15) == 4       # 21 - floor(17.85)
    assert refine.accepted_ids(tied, 0.15) == {"p050", "p000", "p001", "p002"}


@pytest.fixture()
def files(tmp_path):
    """40 labels, every third of which agrees with its proposal, with random right and wrong answers."""
    rng = random.Random(1)
    comparisons = [comparison(i, None if i % 3 == 0 else rng.random(), f"#### {rng.choice([2, 3])}",
                              f"x\n#### {rng.choice([2, 4])}") for i in range(40)]
    for c in comparisons[::3]:
        c["completion_b"] = f"x\n{c['completion_a']}"
    labels = [{"id": c["id"], "prompt": "q", "completion": c["completion_a"], "reference": "2", "source": "weak", "extra": i}
              for i, c in enumerate(comparisons)]
    write_jsonl(tmp_path / "labels.jsonl", labels)
    write_jsonl(tmp_path / "c.jsonl", comparisons[::-1])
    write_jsonl(tmp_path / "proposals.jsonl", [{"id": c["id"], "completion": c["completion_b"]} for c in comparisons])
    return tmp_path, labels, {c["id"]: c for c in comparisons}


def refined(folder, *argv):
    run(refine, "--task", "arithmetic", "--labels", folder / "labels.jsonl", "--out", folder / "new.jsonl", "--round", 3, *argv)
    return rows(folder / "new.jsonl"), json.loads((folder / "new.jsonl.summary").read_text())


@pytest.mark.parametrize("method", ["ilr", "oracle", "naive"])
def test_refined_labels(files, method):
    folder, labels, by_id = files
    more = ["--proposals", folder / "proposals.jsonl"] if method == "naive" else ["--comparisons", folder / "c.jsonl"]
    new, summary = refined(folder, "--method", method, "--max-replace", 0.4, *more)
    asked = [c for c in by_id.values() if c["prob_b"] is not None]
    expected = {"ilr": {c["id"] for c in sorted(asked, key=lambda c: -c["prob_b"])[:10] if c["prob_b"] > 0.5},
                "oracle": {c["id"] for c in asked if c["prob_b"] > 0.5},
                "naive": {r["id"] for r in new if r["accepted"]}}[method]
    # ilr: 25 - floor(0.6 * 25) of the 26 disagreements; naive: 0.4 of all 40; oracle: no cap
    assert len(asked) == 26 and (len(expected) > 10 if method == "oracle" else len(expected) == {"ilr": 10, "naive": 16}[method])
    better = worse = before = after = fixable = 0
    for label, r in zip(labels, new, strict=True):      # one row per problem, in the labels' order
        c = by_id[label["id"]]
        if label["id"] in expected:
            assert r == {**label, "completion": c["completion_b"], "source": "proposal", "round": 3, "accepted": True,
                         "prob_b": None if method == "naive" else c["prob_b"]}
        else:
            assert r == {**label, "accepted": False, "prob_b": None if method == "naive" else c["prob_b"]}
        x, y = label["completion"].endswith(" 2"), r["completion"].endswith(" 2")
        better, worse, before, after = better + (y > x), worse + (y < x), before + x, after + y
        fixable += c["completion_b"].endswith(" 2") and not x        # pairs that agree are right, or wrong, together
    n = len(expected)
    assert summary == {"kept": n, "share_of_all": n / 40, "asked": 0 if method == "naive" else 26,
                       "share_of_asked": None if method == "naive" else n / 26, "correct_before": before / 40, "correct_after": after / 40,
                       "became_right": better, "became_wrong": worse, "precision": better / n,
                       "fixable": fixable, "recall": better / fixable}
    assert better and worse and fixable > better


def test_references_change_no_label(files):
    folder, labels, _ = files
    new, _ = refined(folder, "--comparisons", folder / "c.jsonl")
    write_jsonl(folder / "labels.jsonl", [{**r, "reference": "999"} for r in labels])
    write_jsonl(folder / "c.jsonl", [{**c, "reference": "999"} for c in rows(folder / "c.jsonl")])
    (folder / "new.jsonl").unlink()
    again, _ = refined(folder, "--comparisons", folder / "c.jsonl")
    assert [{**r, "reference": "2"} for r in again] == new


def test_naive_is_random_by_seed_and_round_alone(files):
    folder, labels, _ = files
    chosen = set()
    for k, more in enumerate([["--seed", 0], ["--seed", 0], ["--seed", 1]]):
        if k == 1:
            write_jsonl(folder / "labels.jsonl", labels[::-1])
        new, _ = refined(folder, "--method", "naive", "--proposals", folder / "proposals.jsonl", *more)
        chosen.add(frozenset(r["id"] for r in new if r["accepted"]))
        assert sum(r["accepted"] for r in new) == 6         # exactly floor(0.15 * 40)
        (folder / "new.jsonl").unlink()
    assert len(chosen) == 2         # the order of the rows changes nothing, the seed does


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
    assert len(pairs) == min(len(decided), math.floor(round(alpha * 100) * n / 100))     # whole hundredths: exact
    kept = sorted(decided, key=lambda c: -abs(c["prob_b"] - 0.5))[:len(pairs)]
    assert sorted(p["id"] for p in pairs) == sorted(c["id"] for c in kept)
    by_id = {c["id"]: c for c in comparisons}
    for p in pairs:
        i, prob_b = p["id"][1:].lstrip("0") or "0", by_id[p["id"]]["prob_b"]
        assert (p["chosen"], p["rejected"]) == ((f"b{i}", f"a{i}") if prob_b > 0.5 else (f"a{i}", f"b{i}"))
        assert p["prob_chosen"] == max(prob_b, 1 - prob_b) > 0.5
    assert refine.preference_pairs(comparisons[::-1], alpha, 0) == pairs       # distinct scores: the order changes nothing
    write_jsonl(tmp_path / "c.jsonl", comparisons)
    run(refine, "--method", "pairs", "--task", "arithmetic", "--comparisons", tmp_path / "c.jsonl", "--max-replace", alpha,
        "--out", tmp_path / "p.jsonl")
    assert rows(tmp_path / "p.jsonl") == pairs


def test_tied_pairs_are_drawn_by_the_seed(tmp_path):
    """The oracle's scores are 0, 1 and 0.5: which of the decided ones are kept is the seed's choice."""
    comparisons = [comparison(i, (0.0, 1.0, 0.5)[i % 3], "#### 2" if i % 3 == 0 else "#### 1", "#### 2" if i % 3 == 1 else "#### 1", pair=0)
                   for i in range(60)]
    kept = {s: {p["id"] for p in refine.preference_pairs(comparisons, 0.25, s)} for s in range(3)}
    assert all(len(k) == 15 for k in kept.values()) and kept[0] != kept[1] != kept[2]
    assert refine.preference_pairs(comparisons[::-1], 0.25, 0) == refine.preference_pairs(comparisons, 0.25, 0)
    assert all(arithmetic.grade({**p, "completion": p["chosen"]}) > arithmetic.grade({**p, "completion": p["rejected"]})
               for p in refine.preference_pairs(comparisons, 0.25, 0))
    write_jsonl(tmp_path / "c.jsonl", comparisons)
    run(refine, "--method", "pairs", "--task", "arithmetic", "--comparisons", tmp_path / "c.jsonl", "--max-replace", 0.25,
        "--out", tmp_path / "p.jsonl")
    assert json.loads((tmp_path / "p.jsonl.summary").read_text()) == {
        "kept": 15, "share_of_all": 0.25, "chosen_correct": 1.0, "rejected_correct": 0.0, "precision": 1.0}


def test_clean_keeps_the_right_labels_alone(tmp_path):
    labels = [{"id": i, "prompt": "p", "completion": f"#### {i % 3}", "reference": "1", "more": i} for i in range(7)]
    write_jsonl(tmp_path / "l.jsonl", labels)
    run(refine, "--method", "clean", "--labels", tmp_path / "l.jsonl", "--task", "arithmetic", "--out", tmp_path / "c.jsonl")
    assert rows(tmp_path / "c.jsonl") == [labels[1], labels[4]]
    write_jsonl(tmp_path / "w.jsonl", labels[2:4])
    with pytest.raises(InputError, match="none of its 2 labels is right"):
        run(refine, "--method", "clean", "--labels", tmp_path / "w.jsonl", "--task", "arithmetic", "--out", tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()


def test_noise_is_of_the_share_and_kind_asked_for(tmp_path):
    gold = [{"id": i, "prompt": "p", "completion": f"{i}+0={i}\n#### {i}", "reference": str(i)} for i in range(40)]
    weak = [{**r, "completion": "#### 100" if r["id"] % 4 == 0 else r["completion"], "source": "weak"} for r in gold]     # ten are wrong
    write_jsonl(tmp_path / "gold.jsonl", gold)
    write_jsonl(tmp_path / "weak.jsonl", weak)

    def noise(share, kind, seed=0):
        out = tmp_path / f"{share}_{kind}_{seed}.jsonl"
        run(refine, "--method", "noise", "--labels", tmp_path / "weak.jsonl", "--proposals", tmp_path / "gold.jsonl", "--task", "arithmetic",
            "--share", share, "--kind", kind, "--seed", seed, "--out", out)
        new = rows(out)
        assert [r["id"] for r in new] == list(range(40)) and all(set(r) == {*gold[0], "source"} for r in new)
        return new, {r["id"] for r in new if not arithmetic.grade(r)}
    new, wrong = noise(0.3, "symmetric")
    assert len(wrong) == 12 and {r["completion"] for r in new} <= {r["completion"] for r in gold}       # wrong for them, right for another
    assert {r["id"] for r in new if r["source"] == "noise"} == wrong != noise(0.3, "symmetric", 1)[1]
    new, wrong = noise(0.2, "systematic")
    assert len(wrong) == 8 and all(new[i] == weak[i] for i in wrong) and all(i % 4 == 0 for i in wrong)
    assert noise(0, "symmetric")[1] == noise(0, "systematic")[1] == set()
    with pytest.raises(InputError, match="10 of 40 labels are wrong, fewer than 30.0%"):
        noise(0.3, "systematic")
    assert not (tmp_path / "0.3_systematic_0.jsonl").exists()
    assert len(noise(0.025, "symmetric")[1]) == 1 and len(noise(1, "symmetric")[1]) == 40


def test_noise_is_wrong_where_problems_share_an_answer_and_is_trained_on():
    """Another problem's reference is no error where the answer is the same; a label that cannot be parsed is none that SFT would see."""
    labels = [{"id": i, "prompt": "p", "completion": "no idea" if i < 20 else "#### 77", "reference": str(i % 3)} for i in range(60)]
    gold = {r["id"]: f"{r['id']}: #### {r['reference']}" for r in labels}
    for seed in range(5):
        new = refine.noisy(arithmetic, labels, gold, 0.5, "symmetric", seed)
        wrong = [r for r in new if not arithmetic.grade(r)]
        assert len(wrong) == 30 and all(r["source"] == "noise" for r in wrong) and {r["completion"] for r in new} <= {*gold.values()}
        wrong = [r for r in refine.noisy(arithmetic, labels, gold, 0.5, "systematic", seed) if not arithmetic.grade(r)]
        assert len(wrong) == 30 and all(arithmetic.is_well_formed(r["completion"]) for r in wrong)
    with pytest.raises(InputError, match="40 of 60 labels are wrong, fewer than 75.0%"):
        refine.noisy(arithmetic, labels, gold, 0.75, "systematic", 0)
    with pytest.raises(InputError, match="too alike"):
        refine.noisy(arithmetic, [{**r, "reference": "0"} for r in labels], dict.fromkeys(gold, "#### 0"), 0.5, "symmetric", 0)


# ---------------------------------------------------------------- baselines on the same comparisons
@pytest.fixture
def two_rounds(tmp_path):
    """First labels of 40 problems, and ILR's comparisons and labels of two rounds."""
    labels = [{"id": f"p{i:03d}", "prompt": f"USER:\nq{i}\n\nASSISTANT:\n", "completion": f"#### {i % 3}", "reference": "2", "source": "weak"} for i in range(40)]
    write_jsonl(tmp_path / "0.jsonl", labels)
    now = labels
    for k in (1, 2):
        rng = random.Random(k)
        found = [{**comparison(i, rng.random() if i % 4 else None, r["completion"], f"#### {rng.randrange(9)}"), "prompt": r["prompt"]} for i, r in enumerate(now)]
        write_jsonl(tmp_path / f"c{k}.jsonl", found)
        run(refine, "--task", "arithmetic", "--labels", tmp_path / f"{k - 1}.jsonl", "--comparisons", tmp_path / f"c{k}.jsonl", "--max-replace", 0.3,
            "--round", k, "--out", tmp_path / f"{k}.jsonl")
        now = rows(tmp_path / f"{k}.jsonl")
    return tmp_path


def baseline(folder, method, *more):
    (folder / "out.jsonl").unlink(missing_ok=True)
    run(refine, "--method", method, "--task", "arithmetic", "--out", folder / "out.jsonl", *more)
    return rows(folder / "out.jsonl")


def test_filter_drops_what_was_ever_replaced(two_rounds):
    labels, first, second = (rows(two_rounds / f"{k}.jsonl") for k in range(3))
    replaced = {r["id"] for r in first + second if r["accepted"]}
    assert {r["id"] for r in first if r["accepted"]} < replaced and len(replaced) < 40
    kept = baseline(two_rounds, "filter", "--labels", two_rounds / "2.jsonl")
    assert [(r["id"], r["completion"]) for r in kept] == [(r["id"], r["completion"]) for r in labels if r["id"] not in replaced]


def test_rft_adds_what_was_accepted_and_removes_nothing(two_rounds):
    labels, first, second = (rows(two_rounds / f"{k}.jsonl") for k in range(3))
    new = baseline(two_rounds, "rft", "--labels", two_rounds / "0.jsonl", "--proposals", two_rounds / "1.jsonl", two_rounds / "2.jsonl")
    assert new[:40] == labels and len({r["id"] for r in new}) == len(new)
    texts = {(r["prompt"], r["completion"]) for r in new}
    assert texts == {(r["prompt"], r["completion"]) for r in labels + [r for r in first + second if r["accepted"]]} and len(texts) == len(new) > 45


def test_steer_writes_the_judges_mean_score_into_the_prompt(two_rounds):
    comparisons = [c for k in (1, 2) for c in rows(two_rounds / f"c{k}.jsonl")]
    new = baseline(two_rounds, "steer", "--labels", two_rounds / "0.jsonl", "--comparisons", two_rounds / "c1.jsonl", two_rounds / "c2.jsonl")
    scores = {}
    for c in comparisons:
        if not c["agree"]:
            scores.setdefault((c["prompt"], c["completion_a"]), []).append(1 - c["prob_b"])
            scores.setdefault((c["prompt"], c["completion_b"]), []).append(c["prob_b"])
    expected = {(p.replace("USER:\n", f"USER:\nQuality: {min(4, math.floor(5 * sum(s) / len(s)))}\n"), text) for (p, text), s in scores.items()}
    assert {(r["prompt"], r["completion"]) for r in new if "Quality" in r["prompt"]} == expected and len({r["id"] for r in new}) == len(new)
    plain = [r for r in new if "Quality" not in r["prompt"]]
    assert [r["id"] for r in plain] == [f"p{i:03d}" for i in range(0, 40, 4)]       # where nothing was asked
    asking = baseline(two_rounds, "steer", "--labels", two_rounds / "0.jsonl")
    assert [r["prompt"] for r in asking] == [f"USER:\nQuality: 4\nq{i}\n\nASSISTANT:\n" for i in range(40)]
    assert refine.ask_for("plain", 0) == "Quality: 0\nplain"


def test_chosen_are_the_chosen_sides_of_the_same_pairs(two_rounds):
    pairs = baseline(two_rounds, "pairs", "--comparisons", two_rounds / "c1.jsonl")      # ILR's comparisons have no `pair`
    chosen = baseline(two_rounds, "chosen", "--comparisons", two_rounds / "c1.jsonl")
    assert len(pairs) == 6 and [(r["prompt"], r["completion"]) for r in chosen] == [(p["prompt"], p["chosen"]) for p in pairs]


def test_spin_prefers_the_demonstration_to_each_other_sample(two_rounds):
    labels = rows(two_rounds / "0.jsonl")
    write_jsonl(two_rounds / "s.jsonl", [{**r, "completion": f"#### {(i + s) % 3}", "sample": s} for i, r in enumerate(labels) for s in (0, 1, 2)])
    pairs = baseline(two_rounds, "spin", "--labels", two_rounds / "0.jsonl", "--proposals", two_rounds / "s.jsonl")
    assert [(p["id"], p["pair"], p["chosen"], p["rejected"]) for p in pairs] == [
        (r["id"], s, r["completion"], f"#### {(i + s) % 3}") for i, r in enumerate(labels) for s in (1, 2)]


def test_vote_takes_the_answer_that_most_agree_on(two_rounds):
    labels = rows(two_rounds / "0.jsonl")[:3]
    answers = [["#### 5", "#### 7", "so #### 7"], ["#### 1", "#### 2", "#### 3"], ["#### 4", "nothing", "#### 4"]]     # 7 of 2; a tie: the first; 4
    write_jsonl(two_rounds / "l.jsonl", labels)
    for k, part in enumerate([(0, 1), (2,)]):
        write_jsonl(two_rounds / f"s{k}.jsonl", [{**r, "completion": a[s], "sample": s} for r, a in zip(labels, answers) for s in part])
    voted = baseline(two_rounds, "vote", "--labels", two_rounds / "l.jsonl", "--proposals", two_rounds / "s0.jsonl", two_rounds / "s1.jsonl")
    assert [(r["id"], r["completion"], r["votes"], r["reference"]) for r in voted] == [
        ("p000", "#### 7", 2, "2"), ("p001", "#### 1", 1, "2"), ("p002", "#### 4", 2, "2")]


@pytest.mark.parametrize("method, more, message", [
    ("vote", ["--proposals", "few.jsonl"], "id p001 of .* is missing"), ("rft", ["--proposals", "0.jsonl"], "field 'accepted' is missing"),
    ("rft", [], "needs --proposals"), ("ilr", ["--comparisons", "c1.jsonl", "c2.jsonl"], "reads one file of --comparisons, not 2")])
def test_baselines_refuse_what_they_cannot_use(two_rounds, method, more, message):
    write_jsonl(two_rounds / "few.jsonl", rows(two_rounds / "0.jsonl")[:1])
    with pytest.raises(InputError, match=message):
        baseline(two_rounds, method, "--labels", two_rounds / "0.jsonl", *[two_rounds / x if x.endswith("jsonl") else x for x in more])
    assert not (two_rounds / "out.jsonl").exists()


def test_other_readings_of_the_judge(tmp_path):
    rng = random.Random(0)
    comparisons = [comparison(i, rng.random(), f"a{i}", f"b{i}", pair=0) for i in range(400)]
    same, coin = (refine.misread(comparisons, reading, 0) for reading in ("same", "coin"))
    assert all(abs(c["prob_b"] - 0.5) < 1e-6 and c["prob_b"] != 0.5 for c in same) and len({c["prob_b"] > 0.5 for c in same}) == 2
    # neither knows what the judge said: of 400, agreement by chance is 200 with a standard deviation of 10
    for rows_ in (same, coin):
        assert 140 < sum((c["prob_b"] > 0.5) == (d["prob_b"] > 0.5) for c, d in zip(rows_, comparisons)) < 260
    assert coin == refine.misread(comparisons, "coin", 0) != refine.misread(comparisons, "coin", 1)
    pairs = refine.preference_pairs(same, 0.5, 0)
    assert len(pairs) == 200 and {p["chosen"][0] for p in pairs} == {"a", "b"}
    next_round = refine.misread([{**c, "completion_a": c["completion_a"] + "'"} for c in comparisons], "coin", 0)       # other samples, another toss
    assert 140 < sum((c["prob_b"] > 0.5) == (d["prob_b"] > 0.5) for c, d in zip(coin, next_round)) < 260
    for method in ("ilr", "filter"):
        with pytest.raises(InputError, match="--reading has no effect"):
            run(refine, "--method", method, "--reading", "coin", "--task", "arithmetic", "--labels", tmp_path / "l.jsonl", "--out", tmp_path / "o.jsonl")
    write_jsonl(tmp_path / "c.jsonl", [{k: v for k, v in c.items() if k != "prob_b_ab"} for c in comparisons])
    with pytest.raises(InputError, match="'prob_b_ab' is missing"):
        run(refine, "--method", "pairs", "--reading", "same", "--task", "arithmetic", "--comparisons", tmp_path / "c.jsonl", "--out", tmp_path / "o.jsonl")
    agreed = [comparison(0, None, pair=0)]
    assert refine.misread(agreed, "same", 0) == agreed
