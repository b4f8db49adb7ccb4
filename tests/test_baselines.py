"""baselines/: what each method makes of a run's files, and that a new method is one file."""
import json
import math
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, rows, run

import baselines
import refine
from baselines import dpo_coin, dpo_release, label_noise, steer
from core.records import InputError, write_jsonl
from tasks import arithmetic


def comparison(i, prob_b, a="#### 1", b="#### 2", **more):
    return {"id": f"p{i:03d}", "prompt": "q", "completion_a": a, "completion_b": b,
            "reference": "2", "agree": prob_b is None,
            "prob_b_ab": prob_b, "prob_b_ba": prob_b, "prob_b": prob_b, **more}


@pytest.fixture
def two_rounds(tmp_path):
    """A seed's folder: first labels of 40 problems, ILR's comparisons and labels of two rounds."""
    now = [{"id": f"p{i:03d}", "prompt": f"USER:\nq{i}\n\nASSISTANT:\n",
            "completion": f"#### {i % 3}", "reference": "2", "source": "weak"} for i in range(40)]
    labels = tmp_path / "weak/labels.jsonl"
    write_jsonl(labels, now)
    for k in (1, 2):
        rng, folder = random.Random(k), tmp_path / f"ilr_{k}"
        found = []
        for i, r in enumerate(now):
            prob_b = rng.random() if i % 4 else None
            c = comparison(i, prob_b, r["completion"], f"#### {rng.randrange(9)}")
            found.append({**c, "prompt": r["prompt"]})
        write_jsonl(folder / "comparisons.jsonl", found)
        run(refine, "--task", "arithmetic", "--labels", labels, "--max-replace", 0.3, "--round", k,
            "--comparisons", folder / "comparisons.jsonl", "--out", folder / "labels.jsonl")
        labels = folder / "labels.jsonl"
        now = rows(labels)
    return tmp_path


def parsed(name, *argv):
    return baselines.parser(name).parse_args([str(a) for a in argv])


def baseline(folder, name, *more, out="out.jsonl"):
    """The records that a method makes in a seed's folder."""
    (folder / out).unlink(missing_ok=True)
    baselines.run(parsed(name, "--run", folder, "--task", "arithmetic", "--out", folder / out,
                         *more))
    return rows(folder / out)


def labels_of(folder):
    return [rows(folder / f"{name}/labels.jsonl") for name in ("weak", "ilr_1", "ilr_2")]


# ---------------------------------------------------------------- labels
def test_filter_drops_what_was_ever_replaced(two_rounds):
    labels, first, second = labels_of(two_rounds)
    replaced = {r["id"] for r in first + second if r["accepted"]}
    assert {r["id"] for r in first if r["accepted"]} < replaced and len(replaced) < 40
    kept = baseline(two_rounds, "filter", "--round", 2)
    assert [(r["id"], r["completion"]) for r in kept] == [
        (r["id"], r["completion"]) for r in labels if r["id"] not in replaced]


def test_rft_adds_what_was_accepted_and_removes_nothing(two_rounds):
    labels, first, second = labels_of(two_rounds)
    new = baseline(two_rounds, "rft", "--round", 2)
    assert new[:40] == labels and len({r["id"] for r in new}) == len(new)
    texts = {(r["prompt"], r["completion"]) for r in new}
    accepted = [r for r in first + second if r["accepted"]]
    assert texts == {(r["prompt"], r["completion"]) for r in labels + accepted}
    assert len(texts) == len(new) > 45
    rft = baselines.load("rft")       # what was accepted twice is there once
    assert rft.make(None, labels, first, first) == rft.make(None, labels, first)


def test_steer_writes_the_judges_mean_score_into_the_prompt(two_rounds):
    comparisons = [c for k in (1, 2) for c in rows(two_rounds / f"ilr_{k}/comparisons.jsonl")]
    new = baseline(two_rounds, "steer", "--round", 2)
    assert new == baseline(two_rounds, "steer", "--round", 2, "--questions", "not/read.jsonl")
    scores = {}
    for c in comparisons:
        if not c["agree"]:
            scores.setdefault((c["prompt"], c["completion_a"]), []).append(1 - c["prob_b"])
            scores.setdefault((c["prompt"], c["completion_b"]), []).append(c["prob_b"])
    expected = set()
    for (prompt, text), s in scores.items():
        quality = min(4, math.floor(5 * sum(s) / len(s)))
        expected.add((prompt.replace("USER:\n", f"USER:\nQuality: {quality}\n"), text))
    asked = [r for r in new if "Quality" in r["prompt"]]
    assert {(r["prompt"], r["completion"]) for r in asked} == expected
    assert len({r["id"] for r in new}) == len(new)
    plain = [r for r in new if "Quality" not in r["prompt"]]
    assert [r["id"] for r in plain] == [f"p{i:03d}" for i in range(0, 40, 4)]       # never asked
    asking = baseline(two_rounds, "steer", "--questions", two_rounds / "weak/labels.jsonl",
                      out="questions.jsonl")
    assert [r["prompt"] for r in asking] == [
        f"USER:\nQuality: 4\nq{i}\n\nASSISTANT:\n" for i in range(40)]
    assert steer.ask_for("plain", 0) == "Quality: 0\nplain"


def test_both_orders_replaces_only_what_the_judge_says_twice(two_rounds):
    """By hand: of ILR's comparisons those that hold in both orders, the cap being ILR's."""
    texts, replaced = {r["id"]: r["completion"] for r in rows(two_rounds / "weak/labels.jsonl")}, 0
    expected = []
    for k in (1, 2):
        path, rng = two_rounds / f"ilr_{k}/comparisons.jsonl", random.Random(10 + k)
        comparisons = rows(path)
        for c in comparisons:
            if not c["agree"]:
                c["prob_b_ba"] = rng.random()
                c["prob_b"] = (1 + c["prob_b_ab"] - c["prob_b_ba"]) / 2
        write_jsonl(path, comparisons)
        asked = [c for c in comparisons if not c["agree"]]
        sure = [c for c in asked if c["prob_b_ab"] > 0.5 and c["prob_b_ba"] < 0.5
                and texts[c["id"]] == c["completion_a"]]
        sure.sort(key=lambda c: -c["prob_b"])
        kept = sure[:refine.accept_count(len(asked), 0.3)]
        assert len(asked) == 30 and 0 < len(kept) < len({c["id"] for c in asked
                                                         if c["prob_b"] > 0.5})
        texts.update({c["id"]: c["completion_b"] for c in kept})
        replaced += len(kept)
        expected.append(dict(texts))
    assert replaced > 8
    for k in (1, 2):
        new = baseline(two_rounds, "both-orders", "--round", k, "--alpha", 0.3)
        assert new == baseline(two_rounds, "both-orders", "--round", k, "--max-replace", 0.3)
        assert {r["id"]: r["completion"] for r in new} == expected[k - 1] and len(new) == 40
        assert {r["round"] for r in new if r["source"] == "proposal"} == set(range(1, k + 1))


def test_chosen_are_the_chosen_sides_of_the_same_pairs(two_rounds):
    shutil.copytree(two_rounds / "ilr_1", two_rounds / "dpo_1")      # comparisons without `pair`
    pairs = baseline(two_rounds, "dpo-labels")
    said = (two_rounds / "out.jsonl.summary").read_text()
    chosen = baseline(two_rounds, "sft-chosen")
    assert len(pairs) == 6 and [(r["prompt"], r["completion"]) for r in chosen] == [
        (p["prompt"], p["chosen"]) for p in pairs]
    assert (two_rounds / "out.jsonl.summary").read_text() == said and json.loads(said)["kept"] == 6
    run(refine, "--method", "pairs", "--task", "arithmetic", "--out", two_rounds / "pairs.jsonl",
        "--comparisons", two_rounds / "dpo_1/comparisons.jsonl")
    assert rows(two_rounds / "pairs.jsonl") == pairs


# ---------------------------------------------------------------- pairs
def test_spin_prefers_the_demonstration_to_each_other_sample(two_rounds):
    labels = rows(two_rounds / "weak/labels.jsonl")
    write_jsonl(two_rounds / "spin_1/samples.jsonl", [
        {**r, "completion": f"#### {(i + s) % 3}", "sample": s}
        for i, r in enumerate(labels) for s in (0, 1, 2)])
    pairs = baseline(two_rounds, "spin")
    assert [(p["id"], p["pair"], p["chosen"], p["rejected"]) for p in pairs] == [
        (r["id"], s, r["completion"], f"#### {(i + s) % 3}")
        for i, r in enumerate(labels) for s in (1, 2)]


def test_other_readings_of_the_judge(tmp_path):
    rng = random.Random(0)
    comparisons = [comparison(i, rng.random(), f"a{i}", f"b{i}", pair=0) for i in range(400)]
    same, coin = dpo_release.as_released(comparisons), dpo_coin.toss(comparisons, 0)
    assert all(abs(c["prob_b"] - 0.5) < 1e-6 and c["prob_b"] != 0.5 for c in same)
    assert len({c["prob_b"] > 0.5 for c in same}) == 2

    def agreement(a, b):
        return sum((c["prob_b"] > 0.5) == (d["prob_b"] > 0.5) for c, d in zip(a, b, strict=True))
    # what the judge said in the other order is not read
    others = [{**c, "prob_b": 0.9, "prob_b_ba": 0.1} for c in comparisons]
    read = [c["prob_b"] for c in dpo_release.as_released(others)]
    assert read == [c["prob_b"] for c in same]
    # neither knows what the judge said: of 400, agreement by chance is 200, standard deviation 10
    for found in (same, coin):
        assert 140 < agreement(found, comparisons) < 260
    assert coin == dpo_coin.toss(comparisons, 0) != dpo_coin.toss(comparisons, 1)
    pairs = refine.preference_pairs(same, 0.5, 0)
    assert len(pairs) == 200 and {p["chosen"][0] for p in pairs} == {"a", "b"}
    others = [{**c, "completion_a": c["completion_a"] + "'"} for c in comparisons]
    assert 140 < agreement(coin, dpo_coin.toss(others, 0)) < 260    # other samples, another toss
    agreed = [comparison(0, None, pair=0)]
    assert dpo_release.as_released(agreed) == agreed == dpo_coin.toss(agreed, 0)
    for name, read in (("dpo-release", same), ("dpo-coin", coin)):
        write_jsonl(tmp_path / f"{name}_1/comparisons.jsonl", comparisons)
        made = baseline(tmp_path, name, "--alpha", 0.1, "--dpo-alpha", 0.5)
        assert made == refine.preference_pairs(read, 0.5, 0)
        assert made == baseline(tmp_path, name, "--max-replace", 0.5)
    write_jsonl(tmp_path / "dpo-release_1/comparisons.jsonl",
                [{k: v for k, v in c.items() if k != "prob_b_ab"} for c in comparisons])
    with pytest.raises(InputError, match="'prob_b_ab' is missing"):
        baseline(tmp_path, "dpo-release")


# ---------------------------------------------------------------- votes
def test_vote_takes_the_answer_that_most_agree_on(two_rounds):
    labels = rows(two_rounds / "weak/labels.jsonl")[:3]
    # 7 of 2; a tie: the first; 4
    answers = [["#### 5", "#### 7", "so #### 7"], ["#### 1", "#### 2", "#### 3"],
               ["#### 4", "nothing", "#### 4"]]
    write_jsonl(two_rounds / "test.jsonl", labels)
    for h, part in ((1, (0, 1)), (2, (2,))):
        write_jsonl(two_rounds / f"ensemble_1/samples_{h}.jsonl", [
            {**r, "completion": a[s], "sample": s}
            for r, a in zip(labels, answers, strict=True) for s in part])
    voted = baseline(two_rounds, "ensemble", "--questions", two_rounds / "test.jsonl")
    assert [(r["id"], r["completion"], r["votes"], r["reference"]) for r in voted] == [
        ("p000", "#### 7", 2, "2"), ("p001", "#### 1", 1, "2"), ("p002", "#### 4", 2, "2")]


# ---------------------------------------------------------------- what is refused
def test_baselines_refuse_files_they_cannot_use(two_rounds):
    labels = rows(two_rounds / "weak/labels.jsonl")
    for h in (1, 2):
        write_jsonl(two_rounds / f"ensemble_1/samples_{h}.jsonl", labels[:1])
    with pytest.raises(InputError, match="id p001 of .* is missing"):
        baseline(two_rounds, "ensemble", "--questions", two_rounds / "weak/labels.jsonl")
    write_jsonl(two_rounds / "spin_1/samples.jsonl", labels[:1])
    with pytest.raises(InputError, match="id p001 of .*weak/labels.jsonl is missing"):
        baseline(two_rounds, "spin")
    write_jsonl(two_rounds / "spin_1/samples.jsonl", labels)
    with pytest.raises(InputError, match="weak/labels.jsonl: spin leaves nothing of its 40"):
        baseline(two_rounds, "spin")
    write_jsonl(two_rounds / "ilr_2/labels.jsonl", labels)
    for name in ("rft", "filter"):
        with pytest.raises(InputError, match="field 'accepted' is missing"):
            baseline(two_rounds, name, "--round", 2)
    with pytest.raises(InputError, match="ilr_3/labels.jsonl: No such file"):
        baseline(two_rounds, "filter", "--round", 3)
    write_jsonl(two_rounds / "ilr_1/comparisons.jsonl", [comparison(0, 0.5), comparison(1, None)])
    with pytest.raises(InputError, match="prefers neither side in any of the 2 pairs"):
        baseline(two_rounds, "dpo-labels")
    assert not (two_rounds / "out.jsonl").exists()
    (two_rounds / "out.jsonl").write_text("kept")
    with pytest.raises(InputError, match="out.jsonl exists"):
        baselines.run(parsed("filter", "--run", two_rounds, "--task", "arithmetic",
                             "--out", two_rounds / "out.jsonl"))


@pytest.mark.parametrize("name, argv, message", [
    ("ensemble", "--task arithmetic", "ensemble needs --questions"),
    ("steer", "--task arithmetic --out questions.jsonl", "steer needs --questions"),
    ("ensemble", "--task saferpaca --questions q", "no rule for when two answers agree"),
    ("ensemble", "--task arithmetic --questions q --round 2", "ensemble ends with round 1"),
    ("filter", "--task french", "no tasks/french.py")])
def test_check_refuses_by_the_arguments_alone(name, argv, message):
    with pytest.raises(InputError, match=message):
        baselines.check(parsed(name, "--run", "r", "--out", "o", *argv.split()))


def test_labels_that_sft_starts_from(two_rounds):
    """noise/ before clean/ before weak/, unless --start names a file."""
    labels = rows(two_rounds / "weak/labels.jsonl")
    for folder, n in (("clean", 30), ("noise", 20)):
        write_jsonl(two_rounds / folder / "labels.jsonl", labels[:n])
        new = baseline(two_rounds, "rft")
        assert new[:n] == labels[:n] and "accepted in 1" in str(new[n]["id"])
    assert baseline(two_rounds, "rft", "--start", two_rounds / "weak/labels.jsonl")[:40] == labels


# ---------------------------------------------------------------- label noise, a tool
def test_noise_is_of_the_share_and_kind_asked_for(tmp_path):
    gold = [{"id": i, "prompt": "p", "completion": f"{i}+0={i}\n#### {i}", "reference": str(i)}
            for i in range(40)]
    weak = [{**r, "source": "weak"} for r in gold]
    for r in weak[::4]:
        r["completion"] = "#### 100"        # ten are wrong
    write_jsonl(tmp_path / "gold.jsonl", gold)
    write_jsonl(tmp_path / "weak.jsonl", weak)

    def noise(share, kind, seed=0):
        out = tmp_path / f"{share}_{kind}_{seed}.jsonl"
        run(label_noise, "--labels", tmp_path / "weak.jsonl", "--proposals",
            tmp_path / "gold.jsonl", "--task", "arithmetic", "--share", share, "--kind", kind,
            "--seed", seed, "--out", out)
        new = rows(out)
        assert [r["id"] for r in new] == list(range(40))
        assert all(set(r) == {*gold[0], "source"} for r in new)
        return new, {r["id"] for r in new if not arithmetic.grade(r)}
    new, wrong = noise(0.3, "symmetric")
    # wrong for them, right for another
    assert len(wrong) == 12 and {r["completion"] for r in new} <= {r["completion"] for r in gold}
    assert {r["id"] for r in new if r["source"] == "noise"} == wrong
    assert wrong != noise(0.3, "symmetric", 1)[1]
    new, wrong = noise(0.2, "systematic")
    assert len(wrong) == 8 and all(new[i] == weak[i] for i in wrong)
    assert all(i % 4 == 0 for i in wrong)
    assert noise(0, "symmetric")[1] == noise(0, "systematic")[1] == set()
    with pytest.raises(InputError, match="10 of 40 labels are wrong, fewer than 30.0%"):
        noise(0.3, "systematic")
    assert not (tmp_path / "0.3_systematic_0.jsonl").exists()
    assert len(noise(0.025, "symmetric")[1]) == 1 and len(noise(1, "symmetric")[1]) == 40
    write_jsonl(tmp_path / "gold.jsonl", gold[:3])
    with pytest.raises(InputError, match="id 3 of .*weak.jsonl is missing"):
        noise(0.1, "symmetric")


def test_noise_is_wrong_where_problems_share_an_answer_and_is_trained_on():
    """Another problem's reference is no error where the answer is the same; a label that cannot be
    parsed is none that SFT would see."""
    labels = [{"id": i, "prompt": "p", "completion": "no idea" if i < 20 else "#### 77",
               "reference": str(i % 3)} for i in range(60)]
    gold = {r["id"]: f"{r['id']}: #### {r['reference']}" for r in labels}

    def noisy(share, kind, seed, of=labels, references=gold):
        return label_noise.noisy(arithmetic, of, references, share, kind, seed)
    for seed in range(5):
        new = noisy(0.5, "symmetric", seed)
        wrong = [r for r in new if not arithmetic.grade(r)]
        assert len(wrong) == 30 and all(r["source"] == "noise" for r in wrong)
        assert {r["completion"] for r in new} <= {*gold.values()}
        wrong = [r for r in noisy(0.5, "systematic", seed) if not arithmetic.grade(r)]
        assert len(wrong) == 30
        assert all(arithmetic.is_well_formed(r["completion"]) for r in wrong)
    with pytest.raises(InputError, match="40 of 60 labels are wrong, fewer than 75.0%"):
        noisy(0.75, "systematic", 0)
    with pytest.raises(InputError, match="too alike"):
        noisy(0.5, "symmetric", 0, [{**r, "reference": "0"} for r in labels],
              dict.fromkeys(gold, "#### 0"))


# ---------------------------------------------------------------- methods are files
STEPS = {"labels", "grade", "pairs", "vote", "questions", "retrain", "finetune", "prefer",
         "prefer-unjudged", "sample", "judge", "halves"}


def test_every_method_says_what_the_run_and_the_report_need(tmp_path):
    ours = ["dpo-coin", "dpo-labels", "dpo-release", "ensemble", "filter", "rft", "sft-chosen",
            "spin", "steer", "both-orders"]
    assert set(ours) <= set(baselines.names())
    assert "label-noise" not in baselines.names() == sorted(baselines.names())
    for name in baselines.names():
        module = baselines.load(name)
        assert set(module.ROUND.split()) <= STEPS and module.NEEDS in ("", "ilr", "dpo")
        assert module.NAME and module.WHAT and len(module.STYLE) == 3
        for kind, path in module.reads(tmp_path, 1, tmp_path / "start.jsonl"):
            assert kind in baselines.KINDS and path.is_relative_to(tmp_path)
        assert all((p.endswith(".jsonl") or "/half_" in p or "/model_1" in p)
                   for p in module.price(1))
    for i in range(3):        # no two alike in colour, in marker or in dash
        found = [str(baselines.load(name).STYLE[i]) for name in ours]
        assert len(set(found)) == len(found)
    with pytest.raises(InputError, match="there is no baselines/no_such.py"):
        baselines.load("no-such")


CROSS = [f"ilr_{{k}}/{file}" for file in ("half_1", "half_2", "proposals_1.jsonl",
                                          "proposals_2.jsonl", "comparisons.jsonl")]


@pytest.mark.parametrize("name, each_round, once", [
    *((m, CROSS, [f"{m}_2/model_1"]) for m in ("filter", "rft", "steer", "both-orders")),
    ("dpo-labels", [*CROSS, "dpo-labels_{k}/model_1"], []),
    ("dpo-release", [f"dpo-release_{{k}}/{file}" for file in (
        "samples.jsonl", "comparisons.jsonl", "model_1")], []),
    ("dpo-coin", ["dpo-coin_{k}/samples.jsonl", "dpo-coin_{k}/model_1"], []),
    ("spin", ["spin_{k}/samples.jsonl", "spin_{k}/model_1"], []),
    ("sft-chosen", ["dpo_{k}/samples.jsonl", "dpo_{k}/comparisons.jsonl",
                    "sft-chosen_{k}/model_1"], ["dpo_1/model_1"])])
def test_price_names_what_a_method_pays_for(name, each_round, once):
    expected = [path.format(k=k) for k in (1, 2) for path in each_round] + once
    assert sorted(baselines.load(name).price(2)) == sorted(expected)


def test_price_of_an_ensemble_and_of_naive_cross_labelling():
    assert baselines.load("ensemble").price(1) == ["ilr_1/half_1", "ilr_1/half_2"]
    assert baselines.cross_labelling(2, "naive") == [
        p.format(k=k).replace("ilr", "naive") for k in (1, 2) for p in CROSS[:4]]


NEW_METHOD = '''"""very-sure: ILR's labels, but only replacements with prob_b above 0.9 count."""
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import cross_labelling, main

NAME, WHAT, STYLE = "very sure", "replacements above 0.9", ("#123456", "8", "-")
ROUND = "labels retrain"
NEEDS = "ilr"


def reads(seed_dir, k, start):
    return [("refined", seed_dir / f"ilr_{k}/labels.jsonl")]


def make(args, labels):
    return [r for r in labels if not r["accepted"] or r["prob_b"] > 0.9]


def price(k):
    return [*cross_labelling(k), f"very-sure_{k}/model_1"]


if __name__ == "__main__":
    main(__file__)
'''


def test_a_new_method_is_one_file(two_rounds, tmp_path_factory):
    """A file put into baselines/ is found by its name, has a command line, and is a method."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("baselines", "core", "tasks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "refine.py", copy)
    (copy / "baselines/very_sure.py").write_text(NEW_METHOD)

    def python(*argv, cwd=copy):
        return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True,
                              text=True)
    done = python("-c", "import sys, baselines\nprint(*baselines.names())\n"
                  "print(baselines.load('very-sure').price(1))\n"
                  "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    assert done.stderr == ""
    names, price, heavy = done.stdout.splitlines()
    assert set(names.split()) == {*baselines.names(), "very-sure"} and heavy == "[]"
    assert price == str([*baselines.cross_labelling(1), "very-sure_1/model_1"])
    # its command line, from another folder
    done = python(copy / "baselines/very_sure.py", "--run", two_rounds, "--round", 1,
                  "--task", "arithmetic", "--out", two_rounds / "new.jsonl", cwd=two_rounds)
    first = labels_of(two_rounds)[1]
    expected = [r for r in first if not r["accepted"] or r["prob_b"] > 0.9]
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(two_rounds / "new.jsonl") == expected and 0 < len(expected) < 40
    refused = python(copy / "baselines/very_sure.py", "--run", two_rounds, "--round", 7,
                     "--task", "arithmetic", "--out", two_rounds / "o.jsonl")
    assert refused.returncode == 2 and refused.stderr == (
        f"baselines/very_sure.py: error: {two_rounds}/ilr_7/labels.jsonl: "
        "No such file or directory\n")


@pytest.mark.parametrize("name", [*baselines.names(), "label-noise"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        baselines.parser(name).parse_args(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"python baselines/{name.replace('-', '_')}.py" in said
