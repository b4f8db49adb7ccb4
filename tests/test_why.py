"""benchmarks/why.py and rounding.py on run folders whose answers are known."""
import json
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT, everything, preferences

sys.path.insert(0, str(ROOT / "benchmarks"))
import _seeds  # noqa: E402
import _why  # noqa: E402
import precision  # noqa: E402
import rounding  # noqa: E402
import why  # noqa: E402

import dpo  # noqa: E402
from core.records import InputError, write_json, write_jsonl  # noqa: E402
from tasks import arithmetic  # noqa: E402

GOLD = "3+4=7\n7*2=14\n#### 14"
SHORT, LONG = "3+4=7\n#### 7", "3+4=7\n7*2=14\n14-1=13\n#### 13"       # both wrong
TWO = "7*2=14\n#### 14"                                             # right, one line shorter


def comparison(i, a, b, prob_b):
    return {"id": i, "completion_a": a, "completion_b": b, "agree": prob_b is None,
            "prob_b": prob_b, "reference": "14"}


def pairs_of(*comparisons):
    return [(c, c["completion_a"], c["completion_b"], c["prob_b"]) for c in comparisons]


def label(i, text, accepted=False, prob_b=None):
    return {"id": i, "completion": text, "reference": "14", "accepted": accepted, "prob_b": prob_b}


def graded(*grades, text=GOLD):
    return [{"id": i, "completion": text, "correct": g} for i, g in enumerate(grades)]


def make_run(run, shift=0):
    """A run of two seeds: ILR, naive and DPO, one round each. shift: how many test problems more
    ILR gets right."""
    write_json(run / "config.json", {"settings": {"TASK": "arithmetic", "EVAL": "test"}})
    for seed in (0, 1):
        top = run / f"seed_{seed}"
        write_jsonl(top / "data/test.jsonl", [label(i, GOLD) for i in range(4)])
        write_jsonl(top / "data/unlab.jsonl", [label(i, GOLD) for i in range(4)])
        write_jsonl(top / "weak/labels.jsonl", [label(i, [SHORT, GOLD][i % 2]) for i in range(4)])
        write_jsonl(top / "weak/labels.graded.jsonl", graded(0, 1, 0, 1))
        compared = [comparison(0, SHORT, GOLD, 0.9), comparison(1, GOLD, LONG, 0.8),
                    comparison(2, SHORT, LONG, 0.7), comparison(3, GOLD, GOLD, None)]
        for method in ("ilr", "dpo"):
            write_jsonl(top / f"{method}_1/comparisons.jsonl", compared)
        write_jsonl(top / "dpo_1/preferences.jsonl", [
            {"id": i, "prompt": "3, 4?", "chosen": chosen, "rejected": SHORT}
            for i, chosen in enumerate((LONG, GOLD))])
        write_jsonl(top / "ilr_1/labels.jsonl", [
            label(0, GOLD, True, 0.9), label(1, LONG, True, 0.8), label(2, LONG, True, 0.7),
            label(3, GOLD)])
        write_jsonl(top / "ilr_1/labels.graded.jsonl", graded(1, 0, 0, 1))
        write_jsonl(top / "naive_1/labels.jsonl", [
            label(0, SHORT), label(1, GOLD, True), label(2, SHORT), label(3, GOLD)])
        write_jsonl(top / "naive_1/labels.graded.jsonl", graded(1, 1, 1, 0))
        for point, right in (("sft", 1), ("ilr_1", 1 + shift), ("naive_1", 2), ("dpo_1", 2)):
            write_jsonl(top / point / "eval_1.graded.jsonl", graded(
                *([1] * right + [0] * (4 - right)), text=LONG if point == "dpo_1" else SHORT))
    return run


def test_a_judge_that_prefers_the_longer_side():
    pairs = pairs_of(comparison(0, SHORT, GOLD, 0.9), comparison(1, LONG, GOLD, 0.1),
                     comparison(2, TWO, LONG, 0.6), comparison(3, SHORT, LONG, 0.99),
                     comparison(4, GOLD, TWO, 0.3))
    found = _why.preference(arithmetic, pairs)
    assert found["prefers"] == found["rest"] == 1       # by its length in every pair
    assert found["right"] == pytest.approx(1 / 3) and found["excess"] == pytest.approx(2 / 3)
    assert (found["if_longer"], found["if_shorter"], found["pairs"]) == (1, 0, (3, 2))


def test_a_judge_that_knows_what_is_right_has_no_preference():
    pairs = pairs_of(comparison(0, SHORT, GOLD, 0.9), comparison(1, LONG, GOLD, 0.9),
                     comparison(2, SHORT, LONG, 0.5), comparison(3, SHORT, SHORT + " ", 0.1))
    found = _why.preference(arithmetic, pairs)
    assert (found["prefers"], found["right"], found["excess"], found["rest"]) == (0.5, 0.5, 0, 0.5)
    assert found["pairs"] == (2, 1)                     # equal lengths are left out
    assert set(_why.preference(arithmetic, []).values()) == {None, (0, 0)}


def test_a_length_counts_calculations():
    assert [_why.length(t) for t in (GOLD, "\n 1+1=2 \n\n####2", "", "words\nmore")] == [2, 1, 0, 2]


@pytest.mark.parametrize(("text", "kind"), [
    ("3+4=7\n7*2=14", "cannot be parsed"), (SHORT, "too few steps"), (LONG, "too many steps"),
    ("3+4=7\n7*2=15\n#### 15", "wrong arithmetic"), ("3+4=7\nsix\n#### 6", "wrong arithmetic"),
    ("3+4=7\n7*2=14\n#### 15", "wrong arithmetic"), ("3+4=7\n7/0=7\n#### 7", "wrong arithmetic"),
    ("3+4=7\n7-2=5\n#### 5", "another number or operation"),
    ("3+4=7\n8/4=2\n#### 2", "another number or operation")])
def test_kinds_of_error(text, kind):
    assert _why.error_kind(arithmetic, text, GOLD) == kind


def test_replacements_are_counted_by_hand(tmp_path):
    seed = next(iter(_why.measure(0, make_run(tmp_path / "run"))))
    ilr, chance, naive = (seed["labels"][m] for m in ("ilr", "chance", "naive"))
    assert (ilr["n"], chance["n"], naive["n"]) == (3, 3, 1)
    third = pytest.approx(1 / 3)
    assert ilr["changes"] == {"wrong to right": third, "right to wrong": third,
                              "wrong to wrong": third, "right to right": 0}
    assert naive["changes"]["right to right"] == 1 and naive["wrong"] == 0
    assert ilr["kinds"] == {"right": 1, "too many steps": 2}
    assert ilr["errors"]["too many steps"] == 1 and naive["errors"]["too many steps"] is None
    assert ilr["scores"] == {"right": 0.9, "too many steps": 0.75}
    assert ilr["longer"] == {"right": 1, "wrong": 1}
    assert seed["labels"]["less"]["wrong"] == 0 and seed["accepted"]["too many steps"] == 1


def test_slope_and_its_interval():
    def seeds(noise):
        return [{"run": k // 2, "xy": [(x, 10 * k + 0.5 * x + noise * (-1) ** (x + k // 3))
                                       for x in range(4)]} for k in range(12)]
    exact = _seeds.fit(seeds(0), lambda s: s["xy"], within=True)
    assert exact["slope"] == pytest.approx((0.5, 0.5, 0.5)) and exact["points"] == 48
    assert exact["correlation"] == pytest.approx((1, 1, 1))
    slope, low, high = _seeds.fit(seeds(1), lambda s: s["xy"], within=True)["slope"]
    assert low < slope < high
    across = _seeds.fit(seeds(0), lambda s: s["xy"])        # between seeds x says nothing of y
    assert across["slope"][0] == pytest.approx(0.5) and across["correlation"][0] < 0.1
    four = _seeds.fit(seeds(0)[:8], lambda s: s["xy"], within=True)["slope"]
    assert four == (pytest.approx(0.5), None, None)     # too few runs to draw from
    assert _seeds.fit([{"run": 0, "xy": [(1, 2)]}], lambda s: s["xy"]) is None


def test_seeds_and_runs_have_intervals_of_their_own():
    seeds = [{"run": k // 2, "a": {"b": v}} for k, v in enumerate((1, 3, 5, 7))]
    found = _seeds.at(seeds, "a", "b", scale=10)
    assert found["seeds"] == (40, pytest.approx(3.182 * 25.8199 / 2, rel=1e-4), 4)
    assert found["runs"] == (40, pytest.approx(12.706 * 28.2843 / 2 ** 0.5, rel=1e-4), 2)
    assert _seeds.at(seeds, "a", "c") is None and _seeds.at(seeds, "c", "b") is None


def test_labels_and_lengths_of_a_seed(tmp_path):
    seed = next(iter(_why.measure(0, make_run(tmp_path / "run", shift=2))))
    assert seed["carried"] == {"sft": (50, 25), "ilr_1": (50, 75), "naive_1": (75, 50)}
    assert seed["lines"] == {"references": 2, "sft": 1, "dpo_1": 3, "ilr_1": 1, "chosen": 2.5,
                             "rejected": 1}
    assert seed["moved"] == {"lines": 2, "accuracy": 25, "taught": 1.5}
    gaps = why.at_equal_labels([seed])
    # the least-squares slope of the three points is 0: labels explain none of the 25 points
    assert [row[0]["seeds"][0] for row in gaps.values()] == pytest.approx([25, 25])


def test_why_writes_its_files_and_leaves_the_runs_alone(tmp_path):
    def why_args(runs, out):
        return Namespace(runs=[str(run) for run in runs], out=str(out))
    runs = [make_run(tmp_path / "runs" / name, shift) for shift, name in enumerate("abc")]
    before, texts = everything(tmp_path / "runs"), []
    for out in ("one", "two"):
        why.main(why_args(runs, tmp_path / out))
        texts.append((tmp_path / f"{out}.md").read_text().partition("\ncpu ")[0])
        assert (tmp_path / f"{out}.png").stat().st_size > 10_000
    assert everything(tmp_path / "runs") == before and texts[0] == texts[1]
    assert "| one right side: the judge prefers the longer | 100.0 ± 0.0 | 100.0 ± 0.0" in texts[0]
    assert "Seeds: 6; pairs of base models: 3." in texts[0]
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["runs"] == ["runs/a", "runs/b", "runs/c"] and len(found["seeds"]) == 6
    for names in (("naive_1", "dpo_1"), ("ilr_1", "weak")):       # a run that has less
        for seed in runs[0].glob("seed_*"):
            for name in names:
                shutil.rmtree(seed / name)
        why.main(why_args(runs[:1], tmp_path / "less"))
        assert ("| ilr_1 |" in (tmp_path / "less.md").read_text()) == ("dpo_1" in names)
    assert "dpo_1" not in (tmp_path / "less.md").read_text()


@pytest.mark.parametrize("script", ["why", "rounding"])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, script):
    done = subprocess.run([sys.executable, f"benchmarks/{script}.py", tmp_path, "--out",
                           tmp_path / "x"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "no run folder" in done.stderr and list(tmp_path.iterdir()) == []


def test_steps_that_bf16_cannot_hold_are_lost_to_nearest_and_kept_by_exact(
        tiny, problems, tmp_path, monkeypatch):
    from core import precision as exactly
    data = tmp_path / "pairs.jsonl"
    write_jsonl(data, preferences(problems[:8]))
    rounding.round_model(tiny / "model", tmp_path / "start")
    assert not (tmp_path / "start/exact").exists()
    moved = {}
    for way in ("exact", "nearest"):
        with monkeypatch.context() as m:        # `train` replaces these
            m.setattr(exactly, "set_exact", exactly.set_exact)
            m.setattr(dpo, "apply_gradients", dpo.apply_gradients)
            precision.train(way, "dpo", [
                "--model", str(tmp_path / "start"), "--data", str(data), "--out",
                str(tmp_path / way), "--lr", "1e-6", "--batch-size", "4", "--epochs", "1",
                "--dtype", "bfloat16", "--device", "cpu", "--micro-tokens", "4096"])
        change = precision.change(tmp_path / "start", tmp_path / way, "AutoModelForCausalLM", way)
        moved[way] = (change != 0).double().mean().item()
    assert moved["nearest"] < 0.1 < 0.5 < moved["exact"]


def test_what_is_complete_is_not_made_again(tmp_path, monkeypatch):
    for name in ("model", "pairs", "test"):
        (tmp_path / name).write_text(name)
    train = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs"), "--lr", "1e-5"]
    answer, made = ["--data", str(tmp_path / "test"), "--batch-size", "8"], []
    def child(way, script, argv):       # the last of equal flags counts
        made.append((way, argv[-4:-1]))
        rounding.Path(argv[-1]).mkdir()
    def run(argv, **_):
        made.append("answers")
        rounding.Path(argv[argv.index("--out") + 1]).write_text("{}")
    monkeypatch.setattr(precision, "child", child)
    monkeypatch.setattr(rounding.subprocess, "run", run)
    first = rounding.make("run nearest", train, answer, tmp_path / "work")
    assert made == [("nearest", ["--dtype", "bfloat16", "--out"]), "answers"]
    assert rounding.make("run nearest", train, answer, tmp_path / "work") == first
    assert len(made) == 2
    (tmp_path / "pairs").write_text("other")        # another run's pairs: another folder
    assert rounding.make("run nearest", train, answer, tmp_path / "work") != first
    rounding.make("paper fp32", train, answer, tmp_path / "work")
    assert len(made) == 6 and made[4] == ("fp32", ["--dtype", "float32", "--out"])


def test_differences_are_paired_over_seeds_and_over_runs():
    def seed(k, sft, nearest, exact):
        ways = dict(zip(("SFT", "rounded SFT", "run fp32", "run nearest", "run exact"),
                        (sft, sft, exact, nearest, exact), strict=True))
        grades = {w: {"grades": {i: float(i < n) for i in range(10)}} for w, n in ways.items()}
        return {"run": k // 2, "name": f"seed {k}", "ways": grades}
    seeds = [seed(0, 5, 5, 6), seed(1, 5, 5, 7), seed(2, 4, 5, 7), seed(3, 4, 4, 8)]
    found = rounding.difference(seeds, "run exact", "run nearest")
    assert found["per_seed"] == pytest.approx([10, 20, 20, 40])
    assert found["runs"] == pytest.approx((22.5, 12.706 * 10.6066 / 2 ** 0.5), rel=1e-4)
    text, rows = rounding.page(seeds, ["run"])
    assert "| run exact less run nearest | +22.50 | " in text
    assert rows["run exact less run fp32"]["mean"] == 0


def test_adapters_are_not_rounded(tmp_path):
    argv = ["--model", "m", "--lora-rank", "8"], []
    with pytest.raises(InputError, match="trains adapters"):
        rounding.of_seed(arithmetic, tmp_path, 0, argv, tmp_path, ["run"])


def test_gains_are_of_ilrs_last_round_and_the_judge_is_weighted_by_pairs(tmp_path):
    accuracy = {"sft": 50, "dpo_1": 51, "dpo_2": 49}
    carried = {"sft": (40, 50), "ilr_1": (45, 56), "ilr_2": (50, 60), "naive_2": (41, 53)}
    found = _why.gains(accuracy, carried)
    assert found == {"ilr sft": 10, "ilr dpo": 11, "ilr naive": 7, "dpo sft": -1}
    assert _why.gains({"sft": 50}, {"sft": (40, 50)}) == {}
    for k, (right, pairs) in enumerate([(0.5, 100), (0.9, 300)], 1):
        write_json(tmp_path / f"ilr_{k}/comparisons.jsonl.summary",
                   {"accuracy": right, "decisive": pairs})
    assert _why.judged_right(tmp_path, "ilr") == pytest.approx((50 + 270) / 400)     # rounding only
    assert _why.judged_right(tmp_path, "dpo") is None
