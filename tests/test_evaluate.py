"""evaluate.py: intervals, grading, the configuration of a run, the report of a run folder."""
import json
import os
import math
import shutil

import numpy as np
import pytest
from conftest import rows, run

import evaluate
from tasks import InputError, write_json, write_jsonl


@pytest.mark.parametrize("successes, n, low, high", [      # Newcombe 1998, table I, method 3: to 4 digits
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson(successes, n, low, high):
    assert evaluate.wilson(successes / n, n) == pytest.approx((low, high), abs=5.1e-5)
    assert evaluate.wilson(1 - successes / n, n) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


def test_t_quantiles():
    """The table against the density itself, integrated by Simpson's rule: P(0 < T < q) = 0.475."""
    for df, q in enumerate(evaluate.T975, 1):
        x = np.linspace(0, q, 20001)
        density = np.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)
        area = (density[:-1:2] + 4 * density[1::2] + density[2::2]).sum() * (x[1] - x[0]) / 3
        # three digits behind the point: an error of 5e-4 in q, times the density there, at most 0.06 (1 for df = 1: 0.002)
        assert area == pytest.approx(0.475, abs=5e-4 * density[-1] * 1.1)


def test_mean_interval():
    # by hand: mean 2, standard deviation 1, t(2 df) = 4.303, 4.303 / sqrt(3) = 2.4843 (four digits)
    assert evaluate.mean_interval([1, 2, 3]) == (2, pytest.approx(2.4843, abs=1e-4))
    assert evaluate.mean_interval([0.7]) == (0.7, None)
    mean, half = evaluate.mean_interval([0.0, 1.0] * 50)        # beyond the table: the normal's
    assert half == pytest.approx(1.96 * np.std([0.0, 1.0] * 50, ddof=1) / 10, rel=1e-12) and mean == 0.5


def test_grade(problems, tmp_path, capsys):
    write_jsonl(tmp_path / "d.jsonl", [{**p, "completion": "#### -1"} if i % 4 == 0 else p for i, p in enumerate(problems)])
    run(evaluate, "grade", "--task", "arithmetic", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "g.jsonl")
    graded = rows(tmp_path / "g.jsonl")
    assert [g["correct"] for g in graded] == [0.0, 1.0, 1.0, 1.0] * 5
    assert [{k: v for k, v in g.items() if k != "correct"} for g in graded] == rows(tmp_path / "d.jsonl")
    # Wilson for 15 of 20, a calculator's: 0.5313 to 0.8881
    assert "accuracy 75.0% of 20, 95% interval 53.1% to 88.8%" in capsys.readouterr().out


def test_config_refuses_another_configuration(tmp_path):
    settings = ["TASK=arithmetic", "ALPHA=0.15", "ROUNDS=3", "SEEDS=0 1", "EMPTY="]
    run(evaluate, "config", tmp_path, *settings)
    first = (tmp_path / "config.json").read_bytes()
    about = json.loads(first)
    assert about["settings"] == {"TASK": "arithmetic", "ALPHA": "0.15", "ROUNDS": "3", "SEEDS": "0 1", "EMPTY": ""}
    assert {"python", "torch", "transformers"} <= set(about["versions"])
    run(evaluate, "config", tmp_path, "TASK=gsm8k")        # nothing was made yet: begun anew
    run(evaluate, "config", tmp_path, *settings)
    assert (tmp_path / "config.json").read_bytes() == first
    (tmp_path / "seed_0/data").mkdir(parents=True)
    (tmp_path / "seed_0/data/train.jsonl").write_text("{}\n")
    for changed in (["TASK=arithmetic", "ALPHA=0.2", *settings[2:]], [s for s in settings if "ALPHA" not in s]):
        with pytest.raises(InputError, match="ALPHA was '0.15', is ") as e:
            run(evaluate, "config", tmp_path, *changed)
        assert "TASK" not in str(e.value) and (tmp_path / "config.json").read_bytes() == first
    run(evaluate, "config", tmp_path, *[s.replace("ROUNDS=3", "ROUNDS=6").replace("SEEDS=0 1", "SEEDS=0 1 2") for s in settings])
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["ROUNDS"] == "6"


def test_pick_links_to_the_model_nearest_to_an_accuracy(tmp_path, problems, capsys):
    for k, right in enumerate((1, 4, 8)):
        (tmp_path / f"m{k}").mkdir()
        write_jsonl(tmp_path / f"s{k}.jsonl", [p if i < right else {**p, "completion": "#### x"} for i, p in enumerate(problems[:10])])
    files = ["--data", *sorted(tmp_path.glob("s*.jsonl")), "--models", *sorted(tmp_path.glob("m*"))]
    for accuracy, name in ((0.0, "m0"), (0.45, "m1"), (0.9, "m2")):
        out = tmp_path / "links" / str(accuracy)
        run(evaluate, "pick", "--task", "arithmetic", *files, "--accuracy", accuracy, "--out", out)
        assert out.resolve() == (tmp_path / name).resolve() and not os.readlink(out).startswith("/")
        assert "10.0%, 40.0%, 80.0%" in capsys.readouterr().out
    with pytest.raises(InputError, match="3 files for 2"):
        run(evaluate, "pick", "--task", "arithmetic", *files[:-1], "--accuracy", 0.5, "--out", tmp_path / "other")


def graded(path, correct, n=20):
    # U+2028 ends a line for str.splitlines and not in JSON Lines
    write_jsonl(path, [{"id": i, "completion": "\u2028", "correct": float(i < correct)} for i in range(n)])


@pytest.fixture()
def run_folder(tmp_path):
    """Two seeds with ILR and DPO, two rounds each, two retrains of every point."""
    folder = tmp_path / "run"
    write_json(folder / "config.json", {"settings": {"TASK": "arithmetic", "ROUNDS": "2"}})
    (folder / "times.jsonl").write_text("".join(json.dumps({"stage": f"seed_{s}/sft/train", "seconds": 10 + 10 * s}) + "\n" for s in (0, 1)))
    right = {"weak": 6, "sft": 8, "gold": 18, "ilr_1": 10, "ilr_2": 12, "dpo_1": 9, "dpo_2": 7}
    for seed in (0, 1):
        at = folder / f"seed_{seed}"
        for point, k in right.items():
            for r in (1, 2):
                graded(at / point / f"eval_{r}.graded.jsonl", k + seed + 2 * (r - 1))
            if point[-1].isdigit():
                write_json(at / point / "comparisons.jsonl.summary", {"pairs": 40, "asked": 30, "flip_rate": 0.1, "position_bias": 0.05,
                                                                      "decisive": 20, "accuracy": 0.75})
                kind = "labels" if point.startswith("ilr") else "preferences"
                write_json(at / point / f"{kind}.jsonl.summary", {"kept": 4, "share_of_all": 0.1, "share_of_asked": 4 / 30, "precision": 0.5})
        for point, k in (("weak", 10), ("ilr_1", 12), ("ilr_2", 13)):
            graded(at / point / "labels.graded.jsonl", k)
        write_json(at / "judge/model/judge.json", {"held_out_accuracy": 0.8, "held_out_flip_rate": 0.2})
    return folder


def test_report(run_folder):
    run(evaluate, "report", run_folder)
    for name in ("test_accuracy.png", "label_accuracy.png"):
        data = (run_folder / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    report = json.loads((run_folder / "report.json").read_text())
    assert report["seeds"] == [0, 1] and report["n_test"] == 20
    assert report["tests"]["ilr_2"] == {"0": [0.6, 0.7], "1": [0.65, 0.75]} and report["labels"]["ilr_1"] == {"0": [0.6], "1": [0.6]}
    text = (run_folder / "report.md").read_text()
    # by hand: seeds' means 65 and 70, sd 3.5355, t(1 df) 12.706: 12.706 * 3.5355 / sqrt(2) = 31.8
    row, = [line for line in text.splitlines() if line.startswith("| ILR |")]
    assert row == "| ILR | 47.5 ± 31.8 | 57.5 ± 31.8 | 67.5 ± 31.8 |"
    assert "| DPO | 47.5 ± 31.8 | 52.5 ± 31.8 | 42.5 ± 31.8 |" in text and "| ILR's labels | 50.0 ± 0.0 | 60.0 ± 0.0 | 65.0 ± 0.0 |" in text
    # every seed gains the same: 12 - 8 and 7 - 8 of 20 problems
    assert "ILR after round 2 minus SFT: **+20.0 ± 0.0** points. The interval excludes 0." in text
    assert "DPO after round 2 minus SFT: **-5.0 ± 0.0** points." in text
    assert "its last round minus that one alone +0.0 ± 0.0 points." in text     # 7 and 9 of 20, after a start of 8
    assert "its last round): +25.0" in text and "its best round on these problems, 1, a choice in DPO's favor): +15.0" in text
    assert "| ilr_1 | 30 | 75.0 | 10.0 | 5.0 | 4 | 10.0 | 13.3 | 50.0 |" in text
    assert "accuracy 80.0%" in text and "| sft/train | 15 |" in text
    # deterministic: the same folder makes the same files
    before = {p.name: p.read_bytes() for p in run_folder.iterdir() if p.is_file()}
    run(evaluate, "report", run_folder)
    assert {p.name: p.read_bytes() for p in run_folder.iterdir() if p.is_file()} == before


def test_report_of_one_seed_and_an_unfinished_run(run_folder):
    shutil.rmtree(run_folder / "seed_1")
    shutil.rmtree(run_folder / "seed_0/dpo_2")
    run(evaluate, "report", run_folder)
    text = (run_folder / "report.md").read_text()
    ilr, dpo = ([line for line in text.splitlines() if line.startswith(f"| {m} |")][0] for m in ("ILR", "DPO"))
    assert ilr.endswith("| 65.0 [43.3, 81.9] |") and ilr.count("[") == 3        # 13 of 20: Wilson's 0.4329 to 0.8188
    assert dpo.count("[") == 2 and "Wilson" in text and "seed 0" not in text and "1 seed(s): 0" in text
    # whatever has been finished so far: no start, a later round alone, another's folder, models beside the methods only
    (run_folder / "seed_0.bak").mkdir()
    shutil.rmtree(run_folder / "seed_0/sft")
    shutil.rmtree(run_folder / "seed_0/ilr_1")
    run(evaluate, "report", run_folder)
    text = (run_folder / "report.md").read_text()
    assert "| ILR |  |  | 65.0 [43.3, 81.9] |" in text and "minus SFT" not in text and "(its last round): +15.0" in text
    for point in ("ilr_2", "dpo_1"):
        shutil.rmtree(run_folder / "seed_0" / point)
    run(evaluate, "report", run_folder)
    assert "ceiling" in (run_folder / "report.md").read_text()
    shutil.rmtree(run_folder / "seed_0")
    with pytest.raises(InputError, match="no graded answers"):
        run(evaluate, "report", run_folder)
