"""benchmarks/headline.py, make_map.py: how DPO's learning rate is chosen; the map's cells."""
import json
import os
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import headline  # noqa: E402
import make_map  # noqa: E402

from core.records import InputError, write_json, write_jsonl  # noqa: E402


# ---------------------------------------------------------------- DPO's learning rate
def swept(tmp_path, monkeypatch, accuracy, study=headline):
    """The rates tried in order, and the one chosen, where accuracy(rate) is DPO's."""
    tried, first = [], str(tmp_path / f"dpo_lr_{study.TRIED[0]}")

    def run(out, **settings):
        assert settings["EVAL"] == "validation" and settings["BASE_SEED"] == "3"
        assert settings.get("FROM") == (first if tried else None)
        tried.append(settings["DPO_LR"])
        shares = [accuracy(float(settings["DPO_LR"]))]
        write_json(out / "report.json", {"tests": {"sft": {"110": [0.5], "111": [0.6]},
                                                   "dpo_3": {"110": shares, "111": shares}}})
    monkeypatch.setattr(headline, "run", run)
    found, sft = headline.sweep(tmp_path, study.LADDER, study.TRIED, BASE_SEED="3")
    assert sft == {"110": 0.5, "111": 0.6}
    return tried, headline.best(found)


@pytest.mark.parametrize("peak, tried, chosen", [
    (1e-5, ["3e-6", "1e-5", "3e-5"], "1e-5"),
    (3e-5, ["3e-6", "1e-5", "3e-5", "1e-4"], "3e-5"),
    (1.0, ["3e-6", "1e-5", "3e-5", "1e-4", "3e-4"], "3e-4"),     # no more rates on the ladder
    (3e-6, ["3e-6", "1e-5", "3e-5", "1e-6"], "3e-6"),
    (1e-9, ["3e-6", "1e-5", "3e-5", "1e-6", "3e-7"], "3e-7")])
def test_a_best_rate_at_an_end_is_tried_beyond(tmp_path, monkeypatch, peak, tried, chosen):
    import math
    found = swept(tmp_path, monkeypatch, lambda rate: -abs(math.log(rate / peak)))
    assert found == (tried, chosen)


def test_the_map_tries_no_lower_rate(tmp_path, monkeypatch):
    """Lower ones are SFT again."""
    found = swept(tmp_path, monkeypatch, lambda rate: -rate, make_map)
    assert found == (["1e-5", "3e-5", "1e-4", "3e-6"], "3e-6")


def test_of_equal_rates_the_lowest_is_taken(tmp_path, monkeypatch):
    _, chosen = swept(tmp_path, monkeypatch, lambda rate: 0.5)
    assert chosen == headline.LADDER[0]      # and the lowest is always at an end


def test_no_two_pairs_share_a_seed_and_none_was_used_before():
    seeds = [headline.FIRST_SEED + headline.SEEDS_PER_PAIR * pair + k
             for pair in range(6) for k in range(headline.SEEDS_PER_PAIR)]
    seeds += [make_map.FIRST_SEED + pair for pair in range(6)]
    assert len(set(seeds)) == len(seeds) and min(seeds) > 12
    assert not {*map(int, headline.VALIDATION.split())} & {*seeds}


# ---------------------------------------------------------------- the map
ACCURACY = {"ilr": {"sft": 6, "ilr_3": 9, "naive_3": 7},
            "dpo": {"sft": 6, "dpo_1": 5, "dpo_2": 4, "dpo_3": 3}}      # of 10
ASKED = {"ilr": {"ilr_1": 200, "ilr_2": 200, "ilr_3": 200},
         "dpo": {"dpo_1": 250, "dpo_2": 300, "dpo_3": 300}}


def a_cell(folder, first=250, seed=50):
    """The runs of a cell, with these accuracies and prices; first: what DPO's first round asks."""
    for name in ("ilr", "dpo"):
        at = folder / name / f"seed_{seed}"
        for point in [*ACCURACY[name], *ASKED[name], "naive_1", "naive_2"]:
            right = ACCURACY[name].get(point, 6)
            write_jsonl(at / point / "eval_1.graded.jsonl",
                        [{"id": i, "completion": "", "correct": float(i < right)}
                         for i in range(10)])
        for point, count in ASKED[name].items():
            asked = first if point == "dpo_1" else count
            write_json(at / point / "comparisons.jsonl.summary", {"asked": asked, "accuracy": 0.81})
        write_jsonl(at / "weak/labels.graded.jsonl",
                    [{"id": i, "correct": float(i < 5)} for i in range(10)])
        write_json(folder / name / "config.json", {"commit": "abcdef012345", "settings": {
            "TASK": "arithmetic", "JUDGE": "simulated", "DPO_LR": "1e-5"}})
        write_jsonl(folder / name / "stages.jsonl", [
            {"stage": "a", "cpu_seconds": 2.0}, {"stage": "whole run", "cpu_seconds": 5.0},
            {"stage": "b", "cpu_seconds": 9.0, "from": "elsewhere"}])
    return folder


@pytest.mark.parametrize("first, expected", [
    (250, (2, 40.0)),       # 250 + 300 of ILR's 600
    (601, (1, 50.0))])      # not even one round: it gets that round
def test_the_numbers_of_a_cell(tmp_path, first, expected):
    a_cell(tmp_path, first)
    found = make_map.numbers(tmp_path / "ilr", tmp_path / "dpo", 50)
    assert found["label_accuracy"] == 50 and found["judge_ilr"] == found["judge_dpo"] == 81
    assert (found["sft"], found["ilr"], found["naive"], found["dpo"]) == (60, 90, 70, 30)
    assert (found["dpo_equal_round"], found["dpo_equal"]) == expected
    assert found["asked_ilr"] == 600 and found["asked_dpo"] == 600 + first
    assert found["commit"] == "abcdef0" and make_map.cpu_seconds(tmp_path) == 4
    with pytest.raises(InputError, match="ilr: seed 51 has no graded answers of sft"):
        make_map.numbers(tmp_path / "ilr", tmp_path / "dpo", 51)
    config = json.loads((tmp_path / "dpo/config.json").read_text())
    config["settings"]["EVAL"] = "validation"       # as a run FROM a sweep has it, if not told
    write_json(tmp_path / "dpo/config.json", config)
    with pytest.raises(InputError, match="dpo: its answers are not to the test problems"):
        make_map.numbers(tmp_path / "ilr", tmp_path / "dpo", 50)


def test_a_cell_takes_over_what_another_has(tmp_path, monkeypatch):
    made, judges, labels = [], [], []

    def run(out, **settings):
        judges.append((settings["JUDGE"], settings["JUDGE_ACCURACY"]))
        labels.append((settings["WEAK_ACCURACY"], settings["LABEL_NOISE"], settings["FLIP_KIND"]))
        write_json(out / "report.json", {"tests": {
            "sft": {"50": [0.5]}, "dpo_3": {"50": [float(settings.get("DPO_LR") == "3e-5")]}}})
        made.append((out.relative_to(tmp_path).as_posix(), settings["METHODS"],
                     settings["EVAL"], settings.get("DPO_LR"),
                     settings.get("FROM", "").removeprefix(f"{tmp_path}/")))
    for module in (headline, make_map):
        monkeypatch.setattr(module, "run", run)
    args = make_map.parser().parse_args(["--work", str(tmp_path)])
    make_map.make(args, "weak-0.3", "0.5", 0)
    at = "weak-0.3/judge-0.5/pair_0"
    assert made == [(f"{at}/ilr", "ilr naive", "test", None, ""),
                    (f"{at}/dpo_lr_1e-5", "dpo", "validation", "1e-5", f"{at}/ilr"),
                    (f"{at}/dpo_lr_3e-5", "dpo", "validation", "3e-5", f"{at}/dpo_lr_1e-5"),
                    (f"{at}/dpo_lr_1e-4", "dpo", "validation", "1e-4", f"{at}/dpo_lr_1e-5"),
                    (f"{at}/dpo", "dpo", "test", "3e-5", f"{at}/dpo_lr_3e-5")]
    made.clear()
    make_map.make(args, "weak-0.3", "0.5", 0)
    assert made == []           # complete
    assert judges == [("simulated", "0.5")] * 5
    make_map.make(args, "weak-0.45", "0.8", 0)
    assert made[0][-1] == f"{at}/ilr" and made[1][-1] == "weak-0.45/judge-0.8/pair_0/ilr"
    judges.clear()
    make_map.make(args, "weak-0.45", "trained", 0)
    # nothing of the runs that they are FROM: neither the judge nor the labels
    assert judges == [("trained", "0.8")] * 5
    make_map.make(args, "noise-0.2", "0.5", 0)
    make_map.make(args, "weak-0.3", "0.65", 0)
    assert labels[-10::5] == [("0.45", "0.2", "systematic"), ("0.3", "", "symmetric")]


def test_what_cells_do_not_say_is_the_presets():
    text = "".join((ROOT / f"presets/{name}.sh").read_text() for name in ("arithmetic", "generic"))
    for name, value in make_map.PLAIN.items():
        assert text[text.index(f"{name}=${{{name}:-"):].startswith(f"{name}=${{{name}:-{value}}}")
    assert {name for cell in make_map.LABELS.values() for name in cell} <= {*make_map.PLAIN}


def test_what_the_file_has_is_not_made_again(tmp_path, monkeypatch):
    found, made = a_map(), []
    write_json(tmp_path / "map.json", found)
    monkeypatch.setattr(make_map, "make", lambda *args: made.append(args[-1]) or 1 / 0)
    argv = ["--labels", "weak-0.45", "--judge", "0.8", "--out", str(tmp_path / "map"), "--pairs"]
    make_map.main(make_map.parser().parse_args([*argv, "0", "1", "2"]))
    assert not made and json.loads((tmp_path / "map.json").read_text())["cells"] == found["cells"]
    with pytest.raises(ZeroDivisionError):
        make_map.main(make_map.parser().parse_args([*argv, "2", "3"]))
    assert made == [3]


def a_map():
    """A map of one cell: ILR minus DPO is 1, 2 and 3, DPO minus SFT -1, 0 and 4."""
    cell = {str(pair): {"label_accuracy": 55, "judge_ilr": 80.0, "sft": 60, "dpo": 60 + gain,
                        "ilr": 60 + gain + lead, "naive": 60, "dpo_equal": 60, "cpu_seconds": 1800}
            for pair, (lead, gain) in enumerate([(1, -1), (2, 0), (3, 4)])}
    trained = {"0": {**cell["0"], "judge_ilr": 70.0}}
    return {"cells": {"weak-0.45 0.8": cell, "weak-0.45 trained": trained}, "trained": [],
            "about": {"commit": "c"}}


def test_a_sign_is_established_where_the_interval_excludes_0():
    cell = a_map()["cells"]["weak-0.45 0.8"]
    # by hand: 1, 2, 3 have a standard deviation of 1, t(2) = 4.303: 2.484 over sqrt(3)
    assert make_map.gains(cell, "ilr", "dpo") == (2, pytest.approx(2.484, abs=1e-3), False)
    cell["3"] = {**cell["1"]}
    assert make_map.gains(cell, "ilr", "dpo")[2]        # 2 again: ± 1.3
    for pair in "01":
        cell[pair] = {**cell["2"]}
    del cell["3"]
    assert make_map.gains(cell, "ilr", "dpo") == (3, 0, False)          # alike, but three
    del cell["1"], cell["2"]
    assert make_map.gains(cell, "ilr", "dpo") == (3, None, False)


def test_averages_are_of_the_pairs_that_have_all_cells():
    cell = a_map()["cells"]["weak-0.45 0.8"]
    found = {"cells": {f"{labels} {judge}": {**cell} for labels in make_map.LABELS
                       for judge in make_map.JUDGES}}
    found["cells"]["weak-0.3 0.5"] = {"0": cell["0"], "2": {**cell["2"], "ilr": 91}}
    rows = {row[:2]: row[2] for row in make_map.averages(found)}
    assert list(rows) == [*((labels, "all") for labels in make_map.LABELS),
                          *(("all", judge) for judge in make_map.JUDGES), ("all", "all")]
    assert [len(c) for c in rows.values()] == [2, 3, 3, 2, 3, 3, 3, 2]
    # of pair 2: 91 in one of 4 cells, of 3 and of 12, else 67
    assert rows["weak-0.3", "all"]["2"]["ilr"] == 73 and rows["all", "0.5"]["2"]["ilr"] == 75
    assert rows["all", "all"]["2"]["ilr"] == 69
    # over a coin: pairs 0 and 2; ILR by 60 - 60 and 67 - 91, DPO by nothing; over all labels by a
    # third of that
    rows = {tuple(row[:2]): row[2:] for row in make_map.over_a_coin(found)}
    assert rows["weak-0.3", "0.8"] == [2, "-12.0 ± 152.5", "+0.0 ± 0.0", "-12.0 ± 152.5"]
    assert rows["all", "0.8"] == [2, "-4.0 ± 50.8", "+0.0 ± 0.0", "-4.0 ± 50.8"]
    assert rows["noise-0.2", "0.95"] == [3, *["+0.0 ± 0.0"] * 3] and len(rows) == 12
    assert make_map.averages(a_map()) == []


def test_the_map_grows_and_needs_no_run_folders(tmp_path, monkeypatch):
    a_cell(tmp_path / "run")
    monkeypatch.setattr(make_map, "make", lambda args, labels, judge, pair: tmp_path / "run")
    write_json(tmp_path / "map.json", a_map())
    monkeypatch.setattr(sys, "argv", ["make_map.py"])
    args = make_map.parser().parse_args(["--labels", "weak-0.3", "--judge", "0.5", "--pairs", "0",
                                         "--out", str(tmp_path / "map")])
    make_map.main(args)
    found = json.loads((tmp_path / "map.json").read_text())
    assert list(found["cells"]) == [*a_map()["cells"], "weak-0.3 0.5"]
    assert found["cells"]["weak-0.3 0.5"]["0"]["ilr"] == 90
    text = (tmp_path / "map.md").read_text()
    assert "| weak-0.3 | 0.5 | 1 | 50.0 | 60.0 | 90.0 | 30.0 | 70.0 | +60.0 |" in text
    assert "| weak-0.45 | 0.8 | 3 | 55.0 | 60.0 | 63.0 | 61.0 | 60.0 | +2.0 ± 2.5 |" in text
    assert "| weak-0.45 | trained | 1 | 55.0 | 60.0 | 60.0 | 59.0 | 60.0 | +1.0 |" in text
    assert os.path.getsize(tmp_path / "map.png") > 10_000
    before = (tmp_path / "map.json").read_bytes()
    make_map.main(make_map.parser().parse_args(["--draw", "--out", str(tmp_path / "map")]))
    assert (tmp_path / "map.json").read_bytes() == before
