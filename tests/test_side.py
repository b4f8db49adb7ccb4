"""Runs side by side: the two intervals, what is pooled and what is not, refusals, the page."""
import json
import re
import shutil

import numpy as np
import pytest
from conftest import everything, run
from test_evaluate import table_row

import evaluate
from core.records import InputError, write_json, write_jsonl
from report import statistics
from report.side import names_of, read_runs, shortened
from report.side_tables import over_runs

N = 40              # test problems; every number below is of so many
SETTINGS = {"TASK": "arithmetic", "EVAL": "test", "ROUNDS": "1", "METHODS": "ilr dpo naive",
            "WEAK_MODEL": "", "STRONG_MODEL": "", "BASE_SEED": "0", "DPO_LR": "1e-5"}
RIGHT = {"weak": 10, "sft": 20, "gold": 38, "dpo_1": 20, "naive_1": 22}


def make_run(folder, ilr, seeds, asked=(30, 20), right=(), **settings):
    """A finished run of one round. ilr: how many of the N problems ILR has right, by seed; right:
    {point: how many} of others; asked: comparisons of ILR and of DPO."""
    write_json(folder / "config.json", {"settings": {**SETTINGS, **settings}, "commit": "a" * 40})
    for seed, k in zip(seeds, ilr, strict=True):
        at = folder / f"seed_{seed}"
        for point, correct in {**RIGHT, "ilr_1": k, **dict(right)}.items():
            write_jsonl(at / point / "eval_1.graded.jsonl", [
                {"id": i, "prompt": f"{seed} {i}", "completion": "#### 1",
                 "correct": float(i < correct)} for i in range(N)])
        for point, n in zip(("ilr_1", "dpo_1"), asked, strict=True):
            write_json(at / point / "comparisons.jsonl.summary", {"asked": n, "accuracy": 0.75})
        for point, n in (("weak", 20), ("ilr_1", 25)):
            write_jsonl(at / point / "labels.graded.jsonl",
                        [{"correct": float(i < n)} for i in range(N)])
        write_json(at / "judge/model/judge.json", {"held_out_accuracy": 0.8})
    return folder


@pytest.fixture()
def pairs(tmp_path):
    """Three runs on base models of their own, two seeds each. ILR gains 2 and 4, 6 and 8, 4 and 6
    of 40 problems."""
    return [make_run(tmp_path / f"pair_{b}/test", ilr, seeds, BASE_SEED=str(b))
            for b, (ilr, seeds) in enumerate((([22, 24], [0, 1]), ([26, 28], [2, 3]),
                                              ([24, 26], [4, 5])))]


@pytest.fixture()
def ablation(tmp_path):
    """A run of two seeds, and a second one in which ILR has 4 and 8 problems more right."""
    return [make_run(tmp_path / "first", [22, 22], [0, 1], ALPHA="0.15"),
            make_run(tmp_path / "second", [26, 30], [0, 1], ALPHA="0.3")]


def side(*args):
    """The page of several runs, as text, and its numbers."""
    run(evaluate, "report", *args)
    if "--out" in args:
        out = args[args.index("--out") + 1]
    else:
        out = args[0].parent / f"{args[0].name}+{args[1].name}"
    return (out / "report.md").read_text(), json.loads((out / "report.json").read_text())


def under(heading, text):
    """What stands below a heading, up to the next."""
    return re.split("^##", text.partition(f"## {heading}\n")[2], flags=re.M)[0]


# ---------------------------------------------------------------- intervals
def test_intervals_by_hand():
    groups = [[1, 3], [5, 7], [4]]
    # means 2, 6, 4: mean 4, sd 2; t(2) 4.303, 4.303 * 2 / sqrt(3)
    mean, half = statistics.over_groups(groups)
    assert (mean, half) == (4, pytest.approx(4.303 * 2 / np.sqrt(3)))
    # squares 1 + 1 + 1 + 1 over 2 degrees of freedom: s^2 = 2; sum(1 / n) = 2
    assert statistics.within_groups(groups) == pytest.approx(4.303 * np.sqrt(2 * 2) / 3)
    assert statistics.within_groups([[1], [2], [3]]) is None
    assert statistics.over_groups([[1, 3]]) == (2, None)
    # one group: Student's interval of its values
    one = statistics.mean_interval([1, 2, 3])[1]
    assert statistics.within_groups([[1, 2, 3]]) == pytest.approx(one, rel=1e-12)


def test_intervals_cover_what_they_say():
    """Effects of 6 groups and values of 2, 2, 2, 2, 3 and 1 in them, drawn 4,000 times."""
    rng, draws, sizes = np.random.default_rng(0), 4000, (2, 2, 2, 2, 3, 1)
    hit = np.zeros((draws, 3))
    for k in range(draws):
        effects = rng.normal(5, 2, len(sizes))
        groups = [list(rng.normal(e, 1, n)) for e, n in zip(effects, sizes, strict=True)]
        mean, over = statistics.over_groups(groups)
        within = statistics.within_groups(groups)
        hit[k] = (abs(mean - 5) < over, abs(mean - effects.mean()) < within,
                  abs(mean - 5) < within)
    # a share of 0.95 of 4,000 has a standard error of 0.0034: three of these, and 0.005 for the
    # unequal sizes in the first
    assert hit[:, 0].mean() == pytest.approx(0.95, abs=0.0154)
    assert hit[:, 1].mean() == pytest.approx(0.95, abs=0.0104)
    assert hit[:, 2].mean() < 0.75      # the interval within groups says nothing of other groups


@pytest.mark.parametrize("groups, established", [
    ([[4, 5], [5, 6], [6, 5]], True),
    ([[5, 6], [6, 5]], True), ([[5], [6], [5]], True),
    ([[4, 6], [40, 42], [10, 12]], False),          # base models differ
    ([[-20, 30], [-10, 20], [-30, 41]], False),     # means agree, 5, 5 and 5.5; seeds do not
    ([[0, 0], [0, 0], [0, 0]], False), ([[4, 5]], False), ([[7]], False)])
def test_a_difference_is_established_by_both_intervals(groups, established):
    found = statistics.pooled(groups)
    assert found["established"] == established
    turned = statistics.pooled([[-v for v in values] for values in groups])
    assert turned["established"] == established and turned["mean"] == -found["mean"]


# ---------------------------------------------------------------- runs on their own base models
def test_runs_on_their_own_base_models(pairs, tmp_path, capsys):
    before = [everything(path) for path in pairs]
    text, numbers = side(*pairs, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert [everything(path) for path in pairs] == before
    assert text.startswith("# arithmetic: 3 runs side by side\n")
    # ILR minus SFT in points of 40 problems: 5 and 10, 15 and 20, 10 and 15
    found, = [c for c in numbers["contrasts"] if c["title"] == "ILR minus SFT, round 1"]
    assert {name: r["per_seed"] for name, r in found["runs"].items()} == {
        name: pytest.approx(gains) for name, gains in (
            ("pair_0", {"0": 5, "1": 10}), ("pair_1", {"2": 15, "3": 20}),
            ("pair_2", {"4": 10, "5": 15}))}
    # means 7.5, 17.5, 12.5: sd 5, t(2) 4.303; within: s^2 = 12.5, t(3) 3.182
    over, within = 4.303 * 5 / np.sqrt(3), 3.182 * np.sqrt(12.5 * 1.5) / 3
    assert found["over"] == pytest.approx(over) and found["within"] == pytest.approx(within)
    assert (over, within) == pytest.approx((12.42, 4.59), abs=0.01)
    row = "| ILR improves on SFT | +12.5 | +7.9 to +17.1 | +0.1 to +24.9 | holds |"
    assert row in text and row in said
    assert ("| DPO fails to improve on SFT | +0.0 | +0.0 to +0.0 | +0.0 to +0.0 | "
            "no gain established |") in text
    assert table_row(text, "ILR minus SFT, round 1") == [
        "+7.5", "+17.5", "+12.5", "**+12.5**", "± 4.6", "± 12.4"]
    # naive has 22 of 40: ILR minus it is 5 points less, and not established over base models
    assert table_row(text, "ILR minus naive, round 1")[-3:] == ["+7.5", "± 4.6", "± 12.4"]
    # accuracies over the runs: 57.5, 67.5 and 62.5
    assert "\n## Accuracy by round\n\n| method | SFT | round 1 |\n" in text
    assert table_row(under("Accuracy by round", text), "ILR") == ["50.0 ± 0.0", "62.5 ± 12.4"]
    assert over_runs(numbers["runs"], "ilr_1") == "62.5 ± 12.4"
    assert table_row(under("Of each run", text), "ILR") == ["57.5", "67.5", "62.5"]
    assert table_row(text, "accuracy, ILR's labels") == ["50.0, 62.5"] * 3
    assert table_row(text, "judge's accuracy, held-out pairs") == ["80.0"] * 3
    assert table_row(text, "judge's accuracy, DPO's pairs") == ["75.0"] * 3
    assert table_row(text, "BASE_SEED") == ["0", "1", "2"]
    assert "The second against the first" not in text
    # report.json: names, no paths of this machine
    assert [r["name"] for r in numbers["runs"]] == ["pair_0", "pair_1", "pair_2"]
    assert numbers["runs"][0]["tests"]["ilr_1"] == {"0": [0.55], "1": [0.6]}
    assert str(tmp_path) not in text + json.dumps(numbers)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "accuracy.png", "gains.png", "report.html", "report.json", "report.md"]


def test_the_same_runs_make_the_same_bytes(pairs, ablation, tmp_path):
    for runs in (pairs, ablation):
        for out in ("a", "b"):
            side(*runs, "--out", tmp_path / out)
        assert everything(tmp_path / "a") == everything(tmp_path / "b")
        side(*runs, "--out", tmp_path / "a")        # over an older page
        assert everything(tmp_path / "a") == everything(tmp_path / "b")
        for out in ("a", "b"):
            shutil.rmtree(tmp_path / out)


@pytest.mark.parametrize("asked, point, gain", [
    ((30, 20), "DPO (round 1)", "+7.5"), ((20, 20), "DPO (round 1)", "+7.5"),
    ((20, 30), "SFT", "+17.5"), ((None, 30), "", "")])
def test_equal_comparisons(pairs, tmp_path, asked, point, gain):
    """Where DPO asked for more, ILR stands against SFT. DPO has 24 of 40 right, SFT 20."""
    shutil.rmtree(pairs[1])
    make_run(pairs[1], [26, 28], [2, 3], asked, {"dpo_1": 24}, BASE_SEED="1")
    text, _ = side(*pairs, "--out", tmp_path / "out")
    assert table_row(text, "ILR minus DPO, no more comparisons")[1] == gain
    assert table_row(text, "DPO's point") == ["DPO (round 1)", point, "DPO (round 1)"]
    shown = str(asked[1] if point[:3] == "DPO" else 0) if point else ""
    assert table_row(text, "comparisons, DPO") == ["20", shown, "20"]


def test_a_run_that_has_not_finished_shows_blanks(pairs, tmp_path):
    for seed in (2, 3):
        shutil.rmtree(pairs[1] / f"seed_{seed}/ilr_1")
    shutil.rmtree(pairs[2] / "seed_4/ilr_1")
    unbegun = tmp_path / "pair_3/test"
    write_json(unbegun / "config.json", {"settings": {**SETTINGS, "BASE_SEED": "3"}})
    text, numbers = side(*pairs, unbegun, "--out", tmp_path / "out")
    assert table_row(text, "ILR minus SFT, round 1")[:4] == ["+7.5", "", "+15.0", ""]
    # means 7.5 and 15 (one seed): t(1) 12.706 * sd 5.303 / sqrt(2); within: s^2 = 12.5, t(1)
    assert table_row(text, "ILR improves on SFT") == [
        "+11.2 (2 of 4 runs)", f"{11.25 - 12.706 * np.sqrt(12.5 * 1.5) / 2:+.1f} to "
        f"{11.25 + 12.706 * np.sqrt(12.5 * 1.5) / 2:+.1f}", "-36.4 to +58.9", "not established"]
    assert table_row(under("Accuracy by round", text), "ILR") == [
        "50.0 ± 0.0 (3 of 4 runs)", "61.2 ± 47.6 (2 of 4 runs)"]
    caveats = under("Caveats", text).replace("\\_", "_")
    for name in ("pair_1", "pair_2"):
        assert f"- {name} lacks points, of some seeds or of all: ilr_1.\n" in caveats
    assert "- pair_3: nothing is graded yet." in caveats and "12.7 standard errors" in text
    assert numbers["runs"][3]["tests"] == {}
    with pytest.raises(InputError, match="no graded answers"):
        run(evaluate, "report", unbegun, shutil.copytree(unbegun, tmp_path / "other"))


def test_one_seed_a_run_and_one_run_with_a_point(tmp_path):
    runs = [make_run(tmp_path / f"r{b}", [24 + b], [b], BASE_SEED=str(b)) for b in range(3)]
    text, _ = side(*runs, "--out", tmp_path / "out")
    # gains 10, 12.5, 15: sd 2.5
    assert table_row(text, "ILR improves on SFT") == ["+12.5", "", "+6.3 to +18.7", "holds"]
    assert "no run has two seeds" in text
    for folder in (runs[0], runs[1]):
        shutil.rmtree(next(folder.glob("seed_*")) / "ilr_1")
    text, _ = side(*runs, "--out", tmp_path / "out")
    assert table_row(text, "ILR improves on SFT") == ["+15.0 (1 of 3 runs)", "", "",
                                                      "not established"]
    assert "One run alone has no interval over base models" in text


def test_rounds_that_every_run_is_to_have(pairs, tmp_path):
    """A run with more rounds does not stand alone at its last one."""
    shutil.copytree(pairs[0] / "seed_0/ilr_1", pairs[0] / "seed_0/ilr_2")
    text, _ = side(*pairs, "--out", tmp_path / "out")
    assert "ILR minus SFT, round 1" in text and "ILR minus SFT, round 2" not in text
    assert table_row(under("Of each run", text), "ILR")[0] == "57.5, 55.0"
    assert table_row(under("Accuracy by round", text), "ILR")[2] == "55.0 (1 of 3 runs)"


def test_what_a_mean_over_runs_mixes_is_said(pairs, tmp_path):
    shutil.rmtree(pairs[2])
    make_run(pairs[2], [24, 26], [0, 1], BASE_SEED="2", DPO_LR="1e-6",
             DATA_FLAGS="--file /home/me/data/x.jsonl")
    config = json.loads((pairs[1] / "config.json").read_text())
    write_json(pairs[1] / "config.json", {**config, "commit": "b" * 40,
                                          "versions": {"torch": "9.9"}})
    text, numbers = side(*pairs, "--out", tmp_path / "out")
    assert "differ in more than base models and seeds: DPO_LR, DATA_FLAGS, torch." in text
    assert table_row(text, "commit") == ["aaaaaaaaa", "bbbbbbbbb", "aaaaaaaaa"]
    assert "Runs have seeds in common" in text and "of different commits" in text
    assert numbers["differ"]["DATA_FLAGS"] == ["", "", "--file …/x.jsonl"]
    # noise in one run: the weak model did not write all of the labels
    assert "better than the weak model" in text
    write_json(pairs[1] / "config.json", {"settings": {**SETTINGS, "BASE_SEED": "1",
                                                       "LABEL_NOISE": "0.3"}})
    assert "better than the weak model" not in side(*pairs, "--out", tmp_path / "out")[0]


# ---------------------------------------------------------------- runs that share base models
def test_an_ablation_is_paired_and_not_pooled(ablation, capsys):
    before = [everything(path) for path in ablation]
    text, numbers = side(*ablation)
    said = capsys.readouterr().out
    assert [everything(path) for path in ablation] == before
    out = ablation[0].parent / "first+second"
    assert f"{out}/report.md" in said
    # 4 and 8 of 40 problems more: 10 and 20 points; mean 15, sd 7.07, t(1) 12.706 * 5
    row = table_row(text, "ILR (round 1)")
    assert row[:4] == ["0, 1", "55.0", "70.0", "+15.0"] and row[5] == "-48.5 to +78.5"
    assert "| ILR (round 1) | 0, 1 | 55.0 | 70.0 | +15.0 |" in said
    assert table_row(text, "DPO (round 1)") == ["0, 1", "50.0", "50.0", "graded alike", "", ""]
    found = numbers["against_first"]["second"]["ilr_1"]
    assert found["per_seed"] == pytest.approx([10, 20]) and not found["established"]
    assert table_row(text, "ALPHA") == ["0.15", "0.3"]
    # each run for itself; no mean over the two, no interval over base models
    assert all(c["mean"] is None and c["over"] is None for c in numbers["contrasts"])
    assert "other base models (95%)" not in text and "95%, other base models" not in text
    assert table_row(text, "ILR improves on SFT")[0].startswith("+5.0 (")
    assert table_row(text, "ILR", "second")[1] == "70.0 ± 63.5"
    names = [p.name for p in out.iterdir()]
    assert "differences.png" in names and "gains.png" not in names


def test_an_ablation_of_other_seeds_or_problems(ablation, tmp_path):
    """Only the same problems of the same seeds are compared."""
    for path in (ablation[1] / "seed_1").glob("*/eval_1.graded.jsonl"):
        path.write_text(path.read_text().replace('"prompt": "1 7"', '"prompt": "another"'))
    text, numbers = side(*ablation)
    assert {p: f["seeds"] for p, f in numbers["against_first"]["second"].items()} == dict.fromkeys(
        ["weak", "sft", "ilr_1", "dpo_1", "naive_1", "gold"], [0])
    # one seed: 4 of 40, and no Student's t
    assert table_row(text, "ILR (round 1)")[:4] == ["0", "55.0", "65.0", "**+10.0**"]
    for point in ("dpo_1", "sft", "naive_1", "weak", "ilr_1"):      # TEST is one less: not of gold
        path = ablation[1] / f"seed_0/{point}/eval_1.graded.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    text, numbers = side(*ablation)
    assert list(numbers["against_first"]["second"]) == ["gold"]
    assert ("Not compared, for want of the same seeds and problems: dpo_1, ilr_1, naive_1, sft, "
            "weak.") in text
    third = make_run(tmp_path / "third", [30], [9], ALPHA="0.5")
    text, numbers = side(*ablation, third, "--out", tmp_path / "out")
    assert "third against first: no seed with graded problems in common." in text
    assert "## Every run against the first" in text and "### second against first" in text


# ---------------------------------------------------------------- names and refusals
@pytest.mark.parametrize("paths, names", [
    (["runs/a", "runs/b"], ["a", "b"]), (["a/test", "b/test"], ["a", "b"]),
    (["x/a/test", "y/a/test"], ["x", "y"]), (["x/a", "y/a", "y/b"], ["x/a", "y/a", "y/b"]),
    (["runs/../a/", "./b"], ["a", "b"]), (["a", "a/b"], ["a", "b"])])
def test_names_tell_runs_apart(paths, names):
    assert names_of(paths) == names


def test_paths_of_this_machine_are_shortened():
    assert shortened("/home/me/models/big") == "…/big"
    assert shortened("--file /a/b c/d --x=/e/f") == "--file …/b c/d --x=…/f"
    assert shortened("google/gemma-2b") == "google/gemma-2b"


def test_bad_input_is_refused_in_one_line(pairs, ablation, tmp_path, monkeypatch):
    other = make_run(tmp_path / "other", [20], [0], TASK="gsm8k")
    validation = make_run(tmp_path / "validation", [20], [0], EVAL="validation")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(pairs[0])
    out = ["--out", tmp_path / "out"]
    before = everything(tmp_path)
    for argv, message in (
            ([pairs[0], *out], "the report of one run goes into its own folder"),
            (pairs, "three runs or more side by side need --out"),
            ([pairs[0], pairs[0]], "the same run twice"),
            ([pairs[0], tmp_path / "link"], "link: the same run twice"),
            ([pairs[0], tmp_path / "empty"], "empty: no run folder"),
            ([pairs[0], tmp_path / "nowhere"], "nowhere: no run folder"),
            ([pairs[0], other], "other: TASK is gsm8k, but arithmetic in"),
            ([pairs[0], validation], "validation: EVAL is validation, but test in"),
            ([*pairs, "--out", pairs[1]], "that is the folder of a run"),
            ([*pairs, "--out", pairs[1] / "inside"], "that is the folder of a run"),
            ([*pairs, "--out", ablation[0]], "that is the folder of a run"),
            ([*pairs, "--out", tmp_path / "file"], "expected a folder")):
        with pytest.raises(InputError, match=message) as e:
            run(evaluate, "report", *argv)
        assert "\n" not in str(e.value)
    assert everything(tmp_path) == before and not (tmp_path / "out").exists()
    write_json(tmp_path / "old/config.json", {})        # a run that says neither TASK nor EVAL
    with pytest.raises(InputError, match="TASK"):
        read_runs([pairs[0], tmp_path / "old"])


def test_names_and_settings_are_shown_and_do_nothing(pairs, tmp_path):
    hostile = tmp_path / "<b>|$x^$*"
    make_run(hostile, [24, 26], [8, 9], BASE_SEED="7", DPO_FLAGS="a | <script> `b`",
             LABELING="$$")
    shutil.copytree(pairs[1], tmp_path / "_x")
    side(hostile, tmp_path / "_x", "--out", tmp_path / "out")
    html = (tmp_path / "out/report.html").read_text()
    assert not re.search("<b>|<script>", html) and "&lt;script&gt;" in html
    widths = {len(re.findall("<t[hd]>", row)) for row in
              re.findall(r"<tr>(.*?)</tr>", html.partition("What the paper")[0], re.S)}
    assert widths == {3}
    assert html.count("<img ") == 2


# ---------------------------------------------------------------- what a row of a mean may say
def test_a_tie_of_single_seeds_establishes_nothing():
    """Grades come in steps: two runs of a seed each may well gain the same."""
    tie = statistics.pooled([[0.4], [0.4]])
    assert tie["over"] == 0 and not tie["established"]
    assert statistics.pooled([[0.4], [0.5], [0.45]])["established"]
