"""evaluate.py: grading, picking, the report of a run folder: intervals, claims, prices, figures."""
import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT, rows, run

import evaluate
from core.records import InputError, write_json, write_jsonl
from report import figures, statistics
from report.caveats import caveats
from report.claims import claims, compared, contrasts, findings, sentence
from report.collect import collect
from report.html import write_html
from report.methods import METHODS
from report.statistics import paired


# ---------------------------------------------------------------- intervals
@pytest.mark.parametrize("successes, n, low, high", [
    # Newcombe 1998, table I, method 3: to 4 digits
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718)])
def test_wilson(successes, n, low, high):
    assert statistics.wilson(successes / n, n) == pytest.approx((low, high), abs=5.1e-5)
    other = statistics.wilson(1 - successes / n, n)
    assert other == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


def test_wilson_holds_its_mean():
    """None or all right: an error bar must not have a length below 0."""
    for n in range(1, 3000):
        for mean in (0.0, 1.0):
            low, high = statistics.wilson(mean, n)
            assert 0 <= low <= mean <= high <= 1


def test_t_quantiles():
    """The table against the density itself, integrated by Simpson's rule: P(0 < T < q) = 0.475."""
    for df, q in enumerate(statistics.T975, 1):
        x = np.linspace(0, q, 20001)
        scale = np.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        density = scale * (1 + x * x / df) ** (-(df + 1) / 2)
        area = (density[:-1:2] + 4 * density[1::2] + density[2::2]).sum() * (x[1] - x[0]) / 3
        # three digits behind the point: an error of 5e-4 in q, times the density there, at most
        # 0.06 (1 for df = 1: 0.002)
        assert area == pytest.approx(0.475, abs=5e-4 * density[-1] * 1.1)


def test_mean_interval():
    # by hand: mean 2, standard deviation 1, t(2 df) = 4.303, 4.303 / sqrt(3) = 2.4843 (four digits)
    assert statistics.mean_interval([1, 2, 3]) == (2, pytest.approx(2.4843, abs=1e-4))
    assert statistics.mean_interval([0.7]) == (0.7, None)
    mean, half = statistics.mean_interval([0.0, 1.0] * 50)     # beyond the table: the normal's
    expected = 1.96 * np.std([0.0, 1.0] * 50, ddof=1) / 10
    assert half == pytest.approx(expected, rel=1e-12) and mean == 0.5


# ---------------------------------------------------------------- grade and pick
def test_grade(problems, tmp_path, capsys):
    wrong = [{**p, "completion": "#### -1"} if i % 4 == 0 else p for i, p in enumerate(problems)]
    write_jsonl(tmp_path / "d.jsonl", wrong)
    run(evaluate, "grade", "--task", "arithmetic", "--data", tmp_path / "d.jsonl",
        "--out", tmp_path / "g.jsonl")
    graded = rows(tmp_path / "g.jsonl")
    assert [g["correct"] for g in graded] == [0.0, 1.0, 1.0, 1.0] * 5
    without = [{k: v for k, v in g.items() if k != "correct"} for g in graded]
    assert without == rows(tmp_path / "d.jsonl")
    # Wilson for 15 of 20, a calculator's: 0.5313 to 0.8881
    assert "accuracy 75.0% of 20, 95% interval 53.1% to 88.8%" in capsys.readouterr().out


@pytest.fixture()
def candidates(tmp_path, problems):
    """--data and --models of three models, whose samples are right as often as asked for."""
    def make(*right):
        for k, n in enumerate(right):
            (tmp_path / f"m{k}").mkdir()
            samples = [p if i < n else {**p, "completion": "#### x"}
                       for i, p in enumerate(problems[:10])]
            write_jsonl(tmp_path / f"s{k}.jsonl", samples)
        return ["--data", *sorted(tmp_path.glob("s*.jsonl")),
                "--models", *sorted(tmp_path.glob("m*"))]
    return make


def test_pick_links_to_the_model_nearest_to_an_accuracy(tmp_path, candidates, capsys):
    files = candidates(1, 4, 8)
    for accuracy, name in ((0.0, "m0"), (0.45, "m1"), (0.9, "m2")):
        out = tmp_path / "links" / str(accuracy)
        run(evaluate, "pick", "--task", "arithmetic", *files, "--accuracy", accuracy, "--out", out)
        assert out.resolve() == (tmp_path / name).resolve()
        assert not os.readlink(out).startswith("/")
        assert "10.0%, 40.0%, 80.0%" in capsys.readouterr().out
    with pytest.raises(InputError, match="3 files for 2"):
        run(evaluate, "pick", "--task", "arithmetic", *files[:-1], "--accuracy", 0.5,
            "--out", tmp_path / "other")


def test_pick_refuses_where_nothing_is_right(tmp_path, candidates):
    """Of demonstrations that are all wrong nothing can be learned; one that is right may be."""
    asked = ["--task", "arithmetic", "--accuracy", 0.45, "--out", tmp_path / "labeler"]
    files = candidates(0, 0, 0)
    with pytest.raises(InputError, match=r"0\.0%, 0\.0%, 0\.0%") as e:
        run(evaluate, "pick", *files, *asked)
    assert all(name in str(e.value) for name in ("WEAK_LR", "WEAK_EPOCHS", "CHECKPOINTS"))
    assert "\n" not in str(e.value) and not os.path.lexists(tmp_path / "labeler")
    for k in range(3):
        shutil.rmtree(tmp_path / f"m{k}")
    run(evaluate, "pick", *candidates(0, 1, 0), *asked)
    assert (tmp_path / "labeler").resolve() == (tmp_path / "m1").resolve()


@pytest.mark.parametrize("completion, why", [
    ("2+", r"none of the 30 answers can be parsed .*; 30 of 30 are cut off, see --max-new-tokens"),
    ("#### -1", r"demonstrations: 30 of 30 are cut off, see --max-new-tokens")])
def test_pick_says_where_answers_were_cut_off(completion, why, tmp_path, candidates):
    files = candidates(0, 0, 0)
    for path in files[1:4]:
        write_jsonl(path, [{**r, "completion": completion, "truncated": True} for r in rows(path)])
    with pytest.raises(InputError, match=why):
        run(evaluate, "pick", *files, "--task", "arithmetic", "--accuracy", 0.45, "--out",
            tmp_path / "labeler")


@pytest.mark.parametrize("argv, message", [
    (["grade", "--task", "algebra", "--data", "x"], "there is no tasks/algebra.py"),
    (["grade", "--task", "arithmetic", "--data", "x", "--exact-release"], "no task arithmetic"),
    (["pick", "--task", "arithmetic", "--data", "x", "y", "--models", "m", "--accuracy", "0.5",
      "--out", "o"], "2 files for 1")])
def test_check_refuses_by_the_arguments_alone(argv, message):
    with pytest.raises(InputError, match=message):
        evaluate.check(evaluate.parser().parse_args(argv))


# ---------------------------------------------------------------- the report
def graded(path, correct, n=20):
    # U+2028 ends a line for str.splitlines and not in JSON Lines
    records = [{"id": i, "completion": "\u2028", "correct": float(i < correct)} for i in range(n)]
    write_jsonl(path, records)


def write_stages(folder, stages):
    """stages.jsonl as a run writes it: a row where a stage begins, and one where it ends."""
    lines = []
    for stage, seconds, *outs in stages:
        lines += [{"stage": stage, "begun": True},
                  {"stage": stage, "seconds": seconds, "outs": outs}]
    write_jsonl(folder / "stages.jsonl", lines)


@pytest.fixture()
def run_folder(tmp_path):
    """Two seeds with ILR and DPO, two rounds each, two retrains of every point."""
    folder = tmp_path / "run"
    write_json(folder / "config.json", {"settings": {"TASK": "arithmetic", "ROUNDS": "2"}})
    write_stages(folder, [(f"seed_{s}/sft/train", 10 + 10 * s, f"seed_{s}/sft/model_1")
                          for s in (0, 1)])
    right = {"weak": 6, "sft": 8, "gold": 18, "ilr_1": 10, "ilr_2": 12, "dpo_1": 9, "dpo_2": 7}
    for seed in (0, 1):
        at = folder / f"seed_{seed}"
        for point, k in right.items():
            for r in (1, 2):
                graded(at / point / f"eval_{r}.graded.jsonl", k + seed + 2 * (r - 1))
            if point[-1].isdigit():
                write_json(at / point / "comparisons.jsonl.summary", {
                    "pairs": 40, "asked": 30, "flip_rate": 0.1, "position_bias": 0.05,
                    "decisive": 20, "accuracy": 0.75})
                kind = "labels" if point.startswith("ilr") else "preferences"
                write_json(at / point / f"{kind}.jsonl.summary", {
                    "kept": 4, "share_of_all": 0.1, "share_of_asked": 4 / 30, "precision": 0.5})
        for point, k in (("weak", 10), ("ilr_1", 12), ("ilr_2", 13)):
            graded(at / point / "labels.graded.jsonl", k)
        write_json(at / "judge/model/judge.json",
                   {"held_out_accuracy": 0.8, "held_out_flip_rate": 0.2})
    return folder


def report(folder):
    run(evaluate, "report", folder)
    return (folder / "report.md").read_text()


def prices_of(text):
    """The section of the page on prices."""
    return text.partition("## Price\n")[2].partition("## Caveats")[0]


def table_row(text, *begin):
    """The cells of the only row that begins with these."""
    row, = [line.split(" | ")[len(begin):] for line in text.splitlines()
            if line.startswith(f"| {' | '.join(begin)} | ")]
    return [cell.removesuffix("|").strip() for cell in row]


def test_report(run_folder, capsys):
    text = report(run_folder)
    for name in ("test_accuracy.png", "label_accuracy.png"):
        data = (run_folder / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    numbers = json.loads((run_folder / "report.json").read_text())
    assert numbers["seeds"] == [0, 1] and numbers["n_test"] == 20
    assert numbers["tests"]["ilr_2"] == {"0": [0.6, 0.7], "1": [0.65, 0.75]}
    assert numbers["labels"]["ilr_1"] == {"0": [0.6], "1": [0.6]}
    # by hand: seeds' means 65 and 70, sd 3.5355, t(1 df) 12.706: 12.706 * 3.5355 / sqrt(2) = 31.8
    assert ("| ILR | 47.5 ± 31.8 | 57.5 ± 31.8 | 67.5 ± 31.8 |\n"
            "| DPO | 47.5 ± 31.8 | 52.5 ± 31.8 | 42.5 ± 31.8 |\n") in text
    assert "| ILR's labels | 50.0 ± 0.0 | 60.0 ± 0.0 | 65.0 ± 0.0 |" in text
    # every seed differs by the same, 12 - 8 and 8 - 7 of 20 problems; the winner is named first
    said = re.findall(r"^- (.*) \(bootstrap (\S+) to (\S+), Student's t (\S+) to (\S+); "
                      r"by seed (\S+), (\S+)\)\.$", text, re.M)
    assert [(c[0], *map(float, c[3:])) for c in said] == [
        ("**ILR (round 2) beats SFT by 20.0 points**", 20, 20, 20, 20),
        ("**SFT beats DPO (round 2) by 5.0 points**", 5, 5, 5, 5),
        ("**ILR (round 2) beats DPO (round 2) by 25.0 points**", 25, 25, 25, 25),
        ("**ILR (round 2) beats DPO (round 1: the rounds differ; its best on these problems, a "
         "choice in DPO's favor) by 15.0 points**", 15, 15, 15, 15)]
    for (_, low, high, *_), found in zip(said, numbers["claims"], strict=True):
        assert 0 < float(low) < abs(found["mean"]) < float(high)
    assert [(c["a"], c["mean"]) for c in numbers["claims"][:2]] == [
        ("ILR (round 2)", pytest.approx(20)), ("DPO (round 2)", pytest.approx(-5))]
    # the console: claims, the table by round, the names of the files
    said = capsys.readouterr().out
    assert said.startswith("- **ILR (round 2) beats SFT") and "| DPO | 47.5" in said
    assert "price.png, judge.png" in said.splitlines()[-1] and said.count("\n") < 14
    # 7 and 9 of 20 problems after DPO, 8 in SFT's first training
    assert ("DPO starts from SFT's first training: its last round minus that one alone is "
            "+0.0 points") in text
    assert table_row(text, "ilr_1") == ["30", "5.0", "4", "10.0", "13.3"]
    assert table_row(text, "mean") == ["50.0", "20.0", "20.0",
                                       *["25.0, 25.0", "10.0, 10.0", "50.0, 50.0"] * 2]
    # deterministic: the same folder makes the same files
    before = {p.name: p.read_bytes() for p in run_folder.iterdir() if p.is_file()}
    report(run_folder)
    assert {p.name: p.read_bytes() for p in run_folder.iterdir() if p.is_file()} == before


def test_report_of_one_seed_and_an_unfinished_run(run_folder):
    shutil.rmtree(run_folder / "seed_1")
    shutil.rmtree(run_folder / "seed_0/dpo_2")
    text = report(run_folder)
    ilr, dpo = ([line for line in text.splitlines() if line.startswith(f"| {m} |")][0]
                for m in ("ILR", "DPO"))
    # 13 of 20: Wilson's 0.4329 to 0.8188
    assert ilr.endswith("| 65.0 [43.3, 81.9] |") and ilr.count("[") == 3
    assert dpo.count("[") == 2 and "Wilson" in text and "1 seed(s): 0" in text
    assert "Student's t" not in text and "neither other seeds nor other trainings" in text
    assert "One seed, one draw" in text
    # a single interval decides
    assert re.search(r"\*\*ILR \(round 2\) beats SFT by 20.0 points\*\* "
                     r"\(bootstrap \+\S+ to \+\S+\)\.", text)
    # whatever has been finished so far: no start, a later round alone, another's folder, models
    # beside the methods only
    (run_folder / "seed_0.bak").mkdir()
    shutil.rmtree(run_folder / "seed_0/sft")
    shutil.rmtree(run_folder / "seed_0/ilr_1")
    text = report(run_folder)
    assert "| ILR |  |  | 65.0 [43.3, 81.9] |" in text and "beats SFT" not in text
    # of ILR the second round alone is left, of DPO the first: nothing compares them
    assert "None: of two points" in text and "What the paper finds" not in text
    assert "price.png" not in text
    for point in ("ilr_2", "dpo_1"):
        shutil.rmtree(run_folder / "seed_0" / point)
    text = report(run_folder)
    assert "ceiling" in text and "test_accuracy.png" not in text and "judge.png" not in text
    shutil.rmtree(run_folder / "seed_0")
    with pytest.raises(InputError, match="no graded answers"):
        report(run_folder)


# ---------------------------------------------------------------- claims
def brute_bootstrap(differences, draws, seed):
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        seeds = [differences[k] for k in rng.integers(len(differences), size=len(differences))]
        means.append(np.mean([d[rng.integers(len(d), size=len(d))].mean() for d in seeds]))
    return np.percentile(means, (2.5, 97.5)), np.std(means)


@pytest.mark.parametrize("seeds, values", [(1, [-1, 0, 1]), (4, [-1, 0, 1]),
                                           (5, [k / 3 for k in range(-3, 4)]), (3, None)])
def test_bootstrap_against_index_by_index(seeds, values):
    """values: what a problem's difference may be; None: any number, as for a grade that is a
    probability."""
    rng = np.random.default_rng(seeds)
    differences = []
    for k in range(seeds):
        n = 60 + 20 * k
        differences.append(rng.choice(values, n) + 0.05 * k if values
                           else rng.normal(0.1 * k, 1, n))
    expected, spread = brute_bootstrap(differences, 4000, 1)
    # a 2.5% quantile of n draws from a normal has a standard error of
    # spread * sqrt(0.025 * 0.975 / n) / 0.0584: 0.042 spreads for n = 4,000, 0.027 for 10,000,
    # together 0.05; four of these
    found = statistics.bootstrap(differences)
    assert np.abs(np.array(found) - expected).max() < 0.2 * spread
    assert statistics.bootstrap(differences) == found
    if seeds > 1:       # wider than problems alone: seeds are drawn too
        alone = brute_bootstrap([np.concatenate(differences)], 1000, 2)[1]
        assert spread > 1.02 * alone


def test_bootstrap_at_the_ends():
    assert statistics.bootstrap([np.zeros(10)] * 3) == (0, 0)
    assert statistics.bootstrap([np.full(7, 0.5)]) == (0.5, 0.5)
    # one seed with 10 of 20 at 1: quantiles of a binomial; of B(20, 0.5) P(5 or fewer) is 0.021,
    # P(6 or fewer) 0.058, and symmetric
    found = statistics.bootstrap([np.repeat([1.0, 0.0], 10)])
    assert found == pytest.approx((0.3, 0.7), abs=1e-9)


def answers_of(*seeds):
    """{seed: [{id: correct} of each retrain]} from strings of 0 and 1."""
    return {seed: [dict(enumerate(map(float, retrain))) for retrain in retrains]
            for seed, retrains in enumerate(seeds)}


def of_forty(right, seeds=3):
    """`answers_of` with the first problems of 40 right, the same in every seed."""
    return answers_of(*[["1" * right + "0" * (40 - right)]] * seeds)


def test_pairs_are_of_the_same_problems_averaged_over_retrains():
    answers = {"a": answers_of(["1110", "1010"], ["1111"]),
               "b": answers_of(["0110"], ["1100", "1000"]), "c": answers_of(["11"])}
    found = paired(answers, "a", "b")
    # (3 + 2) / 2 - 2 and 4 - (2 + 1) / 2 of four
    assert found["per_seed"] == [12.5, 62.5] and found["mean"] == 37.5
    # sd 35.36 / sqrt(2) = 25
    assert found["student"] == pytest.approx((37.5 - 12.706 * 25, 37.5 + 12.706 * 25))
    assert not found["established"]
    # joined by id, not by place
    turned = {0: [dict(reversed(r.items())) for r in answers["a"][0]], 1: answers["a"][1]}
    assert paired({"a": turned, "b": answers["b"]}, "a", "b") == found
    assert paired({**answers, "b": {1: answers["b"][1]}}, "a", "b")["per_seed"] == [62.5]
    assert paired(answers, "a", "nothing") is None
    message = "seed 0: the graded answers of a and c are not of the same problems"
    with pytest.raises(InputError, match=message):
        paired(answers, "a", "c")


@pytest.mark.parametrize("seeds, established", [
    ((["1" * 40, "0" * 40],) * 3, True), ((["1" * 40, "0" * 40],), True),
    ((["1" * 40, "0" * 40], ["1" * 40, "0" * 40], ["1" * 20 + "0" * 20, "0" * 40]), True),
    # three seeds that gain 50, 5 and 5 points: the bootstrap excludes 0, Student's t does not
    ((["1" * 20 + "0" * 20, "0" * 40], ["11" + "0" * 38, "0" * 40], ["11" + "0" * 38, "0" * 40]),
     False),
    # the same gain of one problem in three seeds: Student's t excludes 0, the bootstrap does not
    ((["1" + "0" * 39, "0" * 40],) * 3, False)])
def test_a_claim_needs_every_interval(seeds, established):
    answers = {"a": answers_of(*([a] for a, _ in seeds)), "b": answers_of(*([b] for _, b in seeds))}
    found = paired(answers, "a", "b")
    assert found["established"] == established
    # whoever is named first, the winner is said
    for claim, a, b in ((found, "A", "B"), (paired(answers, "b", "a"), "B", "A")):
        said = sentence({"a": a, "b": b, **claim})
        if established:
            assert f"**A beats B by {found['mean']:.1f} points**" in said and "-" not in said[1:]
        else:
            assert f"{a} against {b}: {claim['mean']:+.1f} points, not established" in said
            assert "beats" not in said


@pytest.mark.parametrize("sft, ilr, dpo, verdicts", [
    # of 40: ILR gains, DPO neither gains nor loses
    (10, 20, 10, ["holds", "no gain established", "holds"]),
    # a gain of one problem; DPO gains, and is above ILR
    (10, 11, 20, ["not established", "does not hold: gains", "does not hold: worse"]),
    # ILR loses; DPO fails to improve by losing
    (20, 10, 10, ["does not hold: worse", "holds: worse", "not established"])])
def test_findings_hold_or_not(sft, ilr, dpo, verdicts):
    answers = {p: of_forty(right) for p, right in {"sft": sft, "ilr_2": ilr, "dpo_2": dpo}.items()}
    found = {what: (points, verdict) for what, points, verdict
             in findings({"answers": answers, "tests": answers})}
    asked = ("ILR improves on SFT", "DPO fails to improve on SFT", "ILR improves on DPO")
    assert [found[what][1] for what in asked] == verdicts
    gain = f"{100 * (ilr - sft) / 40:+.1f} ("
    assert len(found) == 3 and found["ILR improves on SFT"][0].startswith(gain)


@pytest.mark.parametrize("settings, said", [
    ({}, True), ({"LABEL_NOISE": "", "CLEAN_START": "0"}, True), ({"CLEAN_START": "1"}, False),
    ({"LABEL_NOISE": "0.3"}, False), ({"LABEL_NOISE": "0"}, False)])
def test_labels_that_the_weak_model_did_not_write(run_folder, settings, said):
    """Nothing is said of its labels then; and that all demonstrations are references is said."""
    answers = {p: of_forty(right) for p, right in {"sft": 20, "weak": 10}.items()}
    found = findings({"answers": answers, "tests": answers, "settings": settings})
    assert [verdict for _, _, verdict in found] == ["holds"] * said
    text = " ".join(caveats({**collect(run_folder), "settings": settings}))
    noise = "of the demonstrations are made wrong, the others references"
    assert (noise in text) == bool(settings.get("LABEL_NOISE"))


def test_methods_are_compared_at_the_last_round_that_both_have():
    right = {"sft": 4, "weak": 2, "ilr_1": 10, "ilr_2": 20, "ilr_3": 30, "dpo_1": 9, "dpo_2": 6,
             "naive_1": 8, "rft_2": 7, "ensemble_1": 5}
    answers = {point: of_forty(n) for point, n in right.items()}
    answers["dpo_4"], answers["filter_3"] = answers["dpo_2"], {9: of_forty(3)[0]}
    data = {"answers": answers, "tests": {p: {seed: [n / 40] for seed in answers[p]}
                                          for p, n in {**right, "dpo_4": 6, "filter_3": 3}.items()}}
    found = [(c["a"], c["b"], round(c["mean"] * 40 / 100)) for c in claims(data)]
    assert found == [
        *((f"{name} (round {k})", "SFT", gain) for name, k, gain in (
            ("ILR", 3, 26), ("DPO", 4, 2), ("naive", 1, 4), ("ensemble", 1, 1), ("RFT", 2, 3))),
        ("ILR (round 2)", "DPO (round 2)", 14), ("ILR (round 1)", "naive (round 1)", 2),
        ("ILR (round 1)", "ensemble (round 1)", 5), ("ILR (round 2)", "RFT (round 2)", 13),
        # the two whose rounds differ say so
        ("ILR (round 2)", "DPO (round 1: the rounds differ; its best on these problems, a choice "
         "in DPO's favor)", 11),
        ("ILR (round 3)", "ensemble (round 1: the rounds differ; it has no more)", 25)]
    # SFT at a method's last round; filter has no seed in common with ILR
    assert [points for _, *points in contrasts(data)] == [
        ["sft", "weak", True], ["dpo_4", "sft", False], ["ilr_3", "sft", True],
        ["ilr_2", "dpo_2", True], ["ilr_1", "naive_1", True]]
    assert [row[0] for row in findings(data)] == [row[0] for row in contrasts(data)]


def test_the_page_says_what_the_paper_says_of_dpo_and_what_it_finds(run_folder):
    text = report(run_folder).partition("## What the paper finds")[2]
    here, verdict = table_row(text, "DPO fails to improve on SFT")
    assert re.fullmatch(r"DPO \(round 2\) minus SFT: -5\.0 \(-\d+\.\d to -\d\.\d\)", here)
    assert verdict == "holds: worse"


# ---------------------------------------------------------------- prices
@pytest.fixture()
def priced(run_folder):
    """The same run with what its stages write of their cost, and times; N = 1,000 weights, LoRA of
    100 for DPO, a judge of 500."""
    def model(path, tokens, read=0, trained=1000):
        write_json(path / "price.json", {"weights": 1000, "trained_weights": trained,
                                         "trained_tokens": tokens, "read_tokens": read})

    def made(path, generated, read):
        write_json(path.with_name(f"{path.name}.price"), {
            "weights": 1000, "generated_tokens": generated, "read_tokens": read})

    stages = []
    for seed in (0, 1):
        at = run_folder / f"seed_{seed}"
        model(at / "weak/model", 50)
        model(at / "judge/model", 70, read=5)
        model(at / "sft/model_1", 200)
        # further trainings of a point and test answers cost nothing here
        model(at / "sft/model_2", 10**9)
        made(at / "sft/eval_1.jsonl", 10**9, 60)
        made(at / "weak/labels.jsonl", 40, 60)
        for path in ("judge/samples_30.jsonl", "judge/samples_100.jsonl"):
            made(at / path, 20, 60)
            graded(at / path, 1)
        for k in (1, 2):
            for h in (1, 2):
                model(at / f"ilr_{k}/half_{h}", 100)
                made(at / f"ilr_{k}/proposals_{h}.jsonl", 50, 70)
            model(at / f"ilr_{k}/model_1", 200)
            model(at / f"dpo_{k}/model_1", 80, read=160, trained=100)
            made(at / f"dpo_{k}/samples.jsonl", 300, 90)
            for m, asked in (("ilr", 30), ("dpo", 45)):
                summary = at / f"{m}_{k}/comparisons.jsonl.summary"
                bins = [[0.05, 0.2, 8 + seed], [None, None, 0],
                        *[[0.1 * b + 0.05, 0.5, 6] for b in range(2, 9)], [0.95, 1.0, 1]]
                write_json(summary, {**json.loads(summary.read_text()), "asked": asked,
                                     "weights": 500, "read_tokens": 60, "calibration": bins})
            point = f"seed_{seed}/ilr_{k}"
            stages += [(f"{point}/{stage}", seconds, *(f"{point}/{out}" for out in outs))
                       for stage, seconds, *outs in (
                ("half_1", 5, "half_1"), ("half_2", 6, "half_2"),
                ("propose", 3, "proposals_1.jsonl", "proposals_2.jsonl"),
                ("compare", 2, "comparisons.jsonl"), ("refine", 9, "labels.jsonl"),
                ("train", 10, "model_1"), ("train", 99, "model_2"), ("train", 98, "model_1"),
                ("answer", 99, "eval_1.jsonl"))]
            point = f"seed_{seed}/dpo_{k}"
            stages += [(f"{point}/{stage}", seconds + seed, f"{point}/{out}")
                       for stage, seconds, out in (("sample", 7, "samples.jsonl"),
                                                   ("compare", 2, "comparisons.jsonl"),
                                                   ("train", 4, "model_1"))]
    write_stages(run_folder, [*stages, ("whole run", 777)])
    return run_folder


def test_prices_by_hand(priced):
    text = report(priced)
    # a trained token: 2N + 2N + 2M; half-models 2 x 100 x 6,000, proposals 2 x 2,000 x 120,
    # comparisons 1,000 x 60, final 200 x 6,000; in round 2 one final training, not two
    assert table_row(text, "ILR, through round 1") == ["30", "100", "400", "200", "2.94e+06", "26"]
    assert table_row(text, "ILR, through round 2") == ["60", "200", "600", "400", "4.68e+06", "42"]
    # 2,000 x 390 for samples, 1,000 x 60, 80 x (4,000 + 200) for training and 2,000 x 160 for the
    # reference; seconds 13 and 16
    assert table_row(text, "DPO, through round 1") == ["45", "300", "80", "310", "1.50e+06", "14"]
    assert table_row(text, "DPO, through round 2") == ["90", "600", "160", "620", "2.99e+06", "29"]
    # 50 x 6,000 + 2,000 x 100; 70 x 6,000 + 2,000 x (5 + 160)
    assert table_row(text, "shared: weak side") == ["0", "40", "50", "60", "5.00e+05", ""]
    assert table_row(text, "shared: judge") == ["0", "40", "70", "125", "7.50e+05", ""]
    assert table_row(text, "shared: SFT start") == ["0", "0", "200", "0", "1.20e+06", ""]
    assert "the whole run took 777" in text
    assert "(price.png)" in text and "(judge.png)" in text
    # each round's budget: the other's last round that costs no more, both ways
    budgets = prices_of(text)
    assert [table_row(budgets, f"{m}, round {k}") for m in ("ILR", "DPO") for k in (1, 2)] == [
        ["57.5", "none", "52.5 (round 1)"], ["67.5", "52.5 (round 1)", "42.5 (round 2)"],
        ["52.5", "57.5 (round 1)", "none"], ["42.5", "67.5 (round 2)", "57.5 (round 1)"]]
    assert json.loads((priced / "report.json").read_text())["price"]["ilr_2"] == {
        "asked": 60, "generated": 200, "trained": 600, "read": 400, "flops": 4.68e6}


def test_a_report_survives_what_does_not_belong_to_it(priced, monkeypatch):
    """A folder that looks like a round; a judge that was not trained; and without the package
    markdown all but the HTML is written."""
    (priced / "seed_0/ilr_old").mkdir()
    data = (priced / "seed_0/sft/eval_1.graded.jsonl").read_bytes()
    (priced / "seed_0/ilr_old/eval_1.graded.jsonl").write_bytes(data)
    write_json(priced / "config.json", {"settings": {
        "TASK": "arithmetic", "JUDGE": "oracle", "JUDGE_ACCURACY": "0.8", "WEAK_ACCURACY": "0.45"}})
    text = report(priced)
    assert "The judge is an oracle" in text and "the judge's training stops" not in text
    assert "45% right" in text and "round old" not in text
    # it is named, and counts nowhere
    assert "no method that this code knows: ilr_old.\n" in text
    assert "ilr_old" not in (priced / "report.json").read_text()
    (priced / "report.json").unlink()
    monkeypatch.setitem(sys.modules, "markdown", None)
    with pytest.raises(InputError, match="needs the package markdown"):
        report(priced)
    assert (priced / "report.json").exists()


def test_a_price_that_is_missing_is_left_blank(priced):
    (priced / "seed_1/ilr_2/half_1/price.json").unlink()
    (priced / "seed_0/dpo_1/samples.jsonl.price").unlink()
    text = prices_of(report(priced))
    assert table_row(text, "ILR, through round 1")[4] == "2.94e+06"
    assert table_row(text, "ILR, through round 2") == ["60", "200", "", "", "", "42"]
    assert table_row(text, "DPO, through round 1") == ["45", "", "80", "", "", "14"]
    assert table_row(text, "ILR, round 1") == ["57.5", "none", ""]
    assert table_row(text, "ILR, round 2")[1:] == ["52.5 (round 1)", ""]
    # an oracle and a person read no tokens of ours; what an endpoint reads is unknown
    for judge, read in (("oracle", "80"), ("human", "80"), ("http://h/v1", "")):
        write_json(priced / "config.json", {"settings": {"TASK": "arithmetic", "JUDGE": judge}})
        for seed in (0, 1):
            write_json(priced / f"seed_{seed}/ilr_1/comparisons.jsonl.summary", {"asked": 30})
        expected = "140" if read else ""
        assert table_row(report(priced), "ILR, through round 1")[3] == expected


HALVES = ("ilr_{k}/half_1", "ilr_{k}/half_2")
PROPOSALS = ("ilr_{k}/proposals_1.jsonl", "ilr_{k}/proposals_2.jsonl")
CROSS = (*HALVES, *PROPOSALS, "ilr_{k}/comparisons.jsonl")
SAMPLED = ("dpo_{k}/samples.jsonl", "dpo_{k}/comparisons.jsonl")


@pytest.mark.parametrize("method, each_round, last", [
    ("ilr", CROSS, "ilr_2/model_1"),
    ("naive", [p.replace("ilr", "naive") for p in CROSS[:4]], "naive_2/model_1"),
    ("filter", CROSS, "filter_2/model_1"), ("rft", CROSS, "rft_2/model_1"),
    ("steer", CROSS, "steer_2/model_1"),
    *((m, [p.replace("dpo", m) for p in (*SAMPLED, "dpo_{k}/model_1")], None)
      for m in ("dpo", "dpo-release")),
    ("dpo-coin", ("dpo-coin_{k}/samples.jsonl", "dpo-coin_{k}/model_1"), None),
    ("dpo-labels", (*CROSS, "dpo-labels_{k}/model_1"), None),
    ("spin", ("spin_{k}/samples.jsonl", "spin_{k}/model_1"), None),
    ("sft-chosen", (*SAMPLED, "sft-chosen_{k}/model_1"), "dpo_1/model_1")])
def test_what_each_method_pays_for(method, each_round, last):
    expected = [p.format(k=k) for k in (1, 2) for p in each_round] + ([last] if last else [])
    assert sorted(METHODS[method].price(2)) == sorted(expected)


def test_an_ensemble_pays_for_two_half_models():
    assert METHODS["ensemble"].price(1) == ["ilr_1/half_1", "ilr_1/half_2"]


# ---------------------------------------------------------------- figures and the page
def test_calibration_is_pooled_over_seeds_and_rounds(priced):
    data = collect(priced)
    points = statistics.reliability(c["calibration"] for p in ("ilr_1", "ilr_2")
                                    for c in data["comparisons"][p].values())
    # first bin 2 x (8 + 9) pairs, the second empty, then 24 each, the last 4: below ten, left out
    assert [(round(x, 3), round(y, 3)) for x, y, _, _ in points] == [
        (0.05, 0.2), *((round(0.1 * b + 0.05, 3), 0.5) for b in range(2, 9))]
    low, high = statistics.wilson(0.2, 34)
    assert points[0][2:] == pytest.approx((0.2 - low, high - 0.2))
    assert statistics.reliability([]) == []


class Page(HTMLParser):
    """Names of all tags, sources of the images, cells of the tables."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.cells += [data] if self.tags and self.tags[-1] in ("td", "th") else []


def test_the_page_is_self_contained(priced):
    text, page = report(priced), Page()
    html = (priced / "report.html").read_text()
    page.feed(html)
    figures = re.findall(r"\((\w+\.png)\)", text)
    assert {"test_accuracy.png", "label_accuracy.png", "price.png", "judge.png"} <= set(figures)
    assert set(figures) == {path.name for path in priced.glob("*.png")}
    inside = [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in page.sources]
    assert inside == [(priced / f).read_bytes() for f in figures]
    assert page.tags.count("table") == text.count("| --- |\n") >= 11
    assert "47.5 ± 31.8" in page.cells and "ILR, through round 2" in page.cells
    assert page.tags.count("li") == text.count("\n- ")
    assert "<strong>ILR (round 2) beats SFT by 20.0 points</strong>" in html
    headings = re.findall(r"^## (.*)", text, re.M)
    assert [h for h in headings if h not in ("Training curves", "Lengths")] == [
        "Claims", "What the paper finds, here", "Accuracy by round", "Label accuracy by round",
        "Examples", "Price", "Caveats", "Settings"]
    assert page.tags.count("h2") == len(headings)


def test_a_legend_has_each_line_once_and_no_bars_where_there_are_none(priced, monkeypatch):
    calibration, lines = figures.judge_lines(collect(priced))
    names = [name for name, *_ in lines]
    assert {name for name, *_ in calibration} <= set(names) and len(set(names)) == len(names) == 4
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path, handles: drawn.update(handles))
    for half in (None, 2.0):
        with figures.as_shipped():
            figures.by_round(priced, "", "", [("ILR", "ilr", {0: (5, half, [5]),
                                                              1: (6, half, [6])})], [])
        assert drawn["ILR"].has_yerr == bool(half)


def test_every_method_has_a_place_and_a_style_of_its_own(run_folder):
    methods = list(METHODS)
    assert methods[:3] == ["ilr", "dpo", "naive"] and methods[3:] == sorted(methods[3:])
    for seed in (0, 1):
        for m in methods[2:]:
            for k in (1,) if m == "ensemble" else (1, 2, 3):
                graded(run_folder / f"seed_{seed}/{m}_{k}/eval_1.graded.jsonl", 8 + k)
    text = report(run_folder)
    names = re.findall(r"^\| ([\w-]+) \| 47.5", text, re.M)
    assert names == [m.NAME for m in METHODS.values()]
    assert all(f"\n- {m.NAME}: {m.WHAT}.\n" in text for m in METHODS.values())
    # all against SFT; ILR against all others, against DPO's best, and its last round against the
    # ensemble's only one; DPO against its two readings
    n = len(methods)
    said = json.loads((run_folder / "report.json").read_text())["claims"]
    assert n >= 12 and len(said) == n + (n - 1) + 2 + 2
    assert "](gains.png)" in text and (run_folder / "gains.png").stat().st_size > 5000


NEW_METHOD = """
NAME = "mine"
WHAT = "a method of a new file"
STYLE = ("#123456", "8", (0, (9, 1)))
ROUND = "labels retrain"
NEEDS = "ilr"


def price(k):
    return ["ilr_1/half_1", f"my-own_{k}/model_1"]
def reads(seed_dir, k, start):
    return []
def make(args):
    return []
"""


def test_a_file_in_baselines_is_in_the_report(priced, tmp_path):
    """One new file, and the report names, prices and draws the method."""
    copy = tmp_path / "copy"
    for name in ("core", "tasks", "report", "baselines"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("evaluate.py", "refine.py"):
        shutil.copy(ROOT / name, copy)
    (copy / "baselines/my_own.py").write_text(NEW_METHOD)
    for seed in (0, 1):
        graded(priced / f"seed_{seed}/my-own_1/eval_1.graded.jsonl", 15)
        write_json(priced / f"seed_{seed}/my-own_1/model_1/price.json", {
            "weights": 1000, "trained_weights": 1000, "trained_tokens": 10, "read_tokens": 0})
    report(priced)
    figures = {name: (priced / name).read_bytes() for name in ("test_accuracy.png", "price.png")}
    before = (priced / "report.md").read_text()
    assert "mine" not in before and "no method that this code knows: my-own_1.\n" in before
    done = subprocess.run([sys.executable, "evaluate.py", "report", priced], cwd=copy,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = (priced / "report.md").read_text()
    assert table_row(text, "mine")[:2] == ["47.5 ± 31.8", "75.0 ± 0.0"]
    assert "- mine: a method of a new file.\n" in text and "mine (round 1)" in text
    assert "my-own_1" not in text.partition("## Caveats")[2]
    # 110 trained tokens x 6,000
    assert table_row(text, "mine, through round 1")[:5] == ["0", "0", "110", "0", "6.60e+05"]
    assert all((priced / name).read_bytes() != drawn for name, drawn in figures.items())


@pytest.mark.parametrize("settings, said, unsaid", [
    ({"TASK": "arithmetic", "WEAK_ACCURACY": "0.45", "JUDGE_ACCURACY": "0"},
     ["one pair of base models", "nearest to 45% right"], ["stops at", "oracle"]),
    ({"TASK": "arithmetic", "BASE_SEED": "3", "PRETRAIN": "26000", "STRONG_MODEL": ""},
     ["All seeds share one pair of base models (bases/, BASE_SEED=3): no interval"], ["oracle"]),
    ({"TASK": "gsm8k", "JUDGE_ACCURACY": "0.8", "EVAL": "validation", "BASE_SEED": "0",
      "WEAK_MODEL": "a/b", "STRONG_MODEL": "c/d"},
     ["stops at 80%", "validation problems", "one pair of base models (a/b, c/d): no interval"],
     ["BASE_SEED=0: no", "nearest"]),
    ({"JUDGE": "oracle", "CLEAN_START": "1", "JUDGE_FLIPS": "0"},
     ["oracle", "dropped before SFT"], ["dialed", "the loss"]),
    ({"LABEL_NOISE": "0.3", "WEAK_ACCURACY": "0.45"},
     ["30% of the demonstrations are made wrong"], ["nearest to 45%"]),
    ({"JUDGE_FLIPS": "0.3", "DPO_LOSS": "rdpo"},
     ["dialed: 30% of the judge's answers are turned round", "the loss rdpo"], ["oracle"])])
def test_caveats_are_those_of_the_run(run_folder, settings, said, unsaid):
    write_json(run_folder / "config.json", {"settings": settings})
    shutil.rmtree(run_folder / "seed_1/ilr_2")
    text = report(run_folder)
    found = text.partition("## Caveats")[2].partition("## Settings")[0]
    assert "2 seeds, each with" in found
    assert "Not every point has all 2 seeds: ilr_2 has 1." in found
    assert all(s in found for s in said) and not any(s in found for s in unsaid)


def test_a_judge_that_learnt_nothing_is_a_caveat(run_folder):
    path = run_folder / "seed_1/judge/model/judge.json"
    judge = json.loads(path.read_text())
    for accuracy, said in ((0.5, True), (0.51, False)):
        write_json(path, {**judge, "held_out_accuracy": accuracy})
        assert ("judge of seed 1 is right on 50%" in report(run_folder)) == said


def test_answers_that_are_graded_alike_leave_no_interval(run_folder):
    for seed in (0, 1):
        shutil.copytree(run_folder / f"seed_{seed}/sft", run_folder / f"seed_{seed}/dpo_9")
    text = report(run_folder)
    assert "DPO (round 9) against SFT: every problem is graded alike" in text
    assert "+0.0 (no problem is graded otherwise)" in text and "+0.0 to +0.0" not in text


def test_supervision_by_seed_and_round(run_folder):
    for seed in (0, 1):
        for k in (1, 2):
            path = run_folder / f"seed_{seed}/ilr_{k}/labels.jsonl.summary"
            write_json(path, {**json.loads(path.read_text()), "precision": 0.8 - 0.1 * k,
                              "recall": 0.5 + 0.1 * seed - 0.1 * k})
    text = report(run_folder)
    # label error, held-out error and flips; of ILR's pairs: error, flips, precision, recall; of
    # DPO's: error, flips, precision
    more = ["25.0, 25.0", "10.0, 10.0", "50.0, 50.0"]
    assert table_row(text, "0") == ["50.0", "20.0", "20.0", *more[:2], "70.0, 60.0", "40.0, 30.0",
                                    *more]
    assert table_row(text, "1")[6] == "50.0, 40.0" and table_row(text, "mean")[6] == "45.0, 35.0"


# ---------------------------------------------------------------- a run of which seeds are missing
def test_one_seed_of_several_establishes_nothing():
    same = {i: 0.0 for i in range(100)}
    better = {i: 1.0 for i in range(100)}
    data = {"answers": {"a": {1: [better], 2: [better]}, "b": {2: [same]}}}
    found = compared(data, "a", "b")
    assert (found["per_seed"], found["of"], found["established"]) == ([100.0], 2, False)
    assert "; 1 of 2 seeds)" in sentence({**found, "a": "a", "b": "b"})
    del data["answers"]["a"][1]
    assert compared(data, "a", "b")["established"]


@pytest.mark.parametrize("grade", ['"x"', "null", "[1]", "2", "-1", "1e999"])
def test_a_grade_that_is_none_is_named(tmp_path, grade):
    path = tmp_path / "seed_0/sft/eval_1.graded.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"id": 1, "completion": "", "correct": ' + grade + "}\n")
    with pytest.raises(InputError, match="sft/eval_1.graded.jsonl"):
        collect(tmp_path)


def test_a_config_that_was_edited_badly_ends_no_report(tmp_path):
    (tmp_path / "seed_²").mkdir()
    (tmp_path / "seed_9").write_text("a file")
    (tmp_path / "stages.jsonl").write_text('{"stage": "a", "sec')
    for settings in ({"ROUNDS": 3, "WEAK_ACCURACY": "45%"}, [], None):
        write_json(tmp_path / "config.json", {"settings": settings})
        data = collect(tmp_path)
        assert data["seeds"] == [] and data["seconds"] == {}
        assert all(isinstance(v, str) for v in data["settings"].values())
        assert caveats({**data, "seeds": [0]})


def test_the_page_takes_in_its_own_figures_only(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "r.md").write_text('# T\n\n![a](a.png)\n\n    --x src="b.png" src="gone.png"\n')
    write_html(tmp_path / "r.md")
    html = (tmp_path / "r.html").read_text()
    assert html.count("data:image/png") == 1 and "gone.png" in html
