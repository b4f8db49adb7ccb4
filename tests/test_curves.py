"""report/curves.py: what it reads of the training logs, the curves, the figure and its table."""
import json
import math

import pytest
from conftest import preferences, run

import dpo
from report import curves
from report.collect import collect
from report.figures import as_shipped
from report.methods import METHODS


def log(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def sft(folder, *losses):
    log(folder, *({"step": k, "epoch": 0, "loss": loss} for k, loss in enumerate(losses, 1)))


def pairs(folder, *rows):
    """rows: (loss, margin, accuracy)."""
    log(folder, *({"step": k, "loss": loss, "rewards/margins": margin, "rewards/accuracies": right}
                  for k, (loss, margin, right) in enumerate(rows, 1)))


@pytest.fixture()
def small(tmp_path):
    """A run of two seeds whose means are easy: weak model, judge, SFT, a round of ILR, of DPO."""
    for seed, more in ((0, 0.0), (1, 1.0)):
        at = tmp_path / f"seed_{seed}"
        sft(at / "weak/model", 4 + more, 2 + more)
        log(at / "judge/model", {"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5},
            {"step": 2, "stop_loss": 0.6 + more, "stop_accuracy": 0.7},
            {"step": 4, "stop_loss": 0.4 + more, "stop_accuracy": 0.8})
        sft(at / "sft/model_1", 1, 0.5)
        sft(at / "gold/model_1", 1, 0.25)
        sft(at / "ilr_1/half_1", 3, 2)
        sft(at / "ilr_1/half_2", 5, 2)
        sft(at / "ilr_1/model_1", 1 + more, 0.5)
        pairs(at / "dpo_1/model_1", (0.75, 0, 0), (0.5, 0.25 + more, 0.5))
    return tmp_path


def drawn(run, monkeypatch):
    """{title: axes} of the figure."""
    kept = []
    with as_shipped(), monkeypatch.context() as m:
        m.setattr(curves, "save", lambda figure, path, handles: kept.append((figure, handles)))
        names = curves.draw(collect(run))
    if not kept:
        return {}, {}
    assert names == ["curves.png"]
    figure, handles = kept[0]
    return {axes.get_title(): axes for axes in figure.axes}, handles


# ---------------------------------------------------------------- what is read
def test_lines_that_cannot_be_read_are_passed_over(tmp_path):
    log(tmp_path, {"step": 1, "loss": 2.0}, "", "{broken", "[1]", "3", '{"step": 2, "loss": NaN}',
        {"step": 3, "loss": None, "rewards/margins": 1}, {"loss": 5.0}, {"step": "4", "loss": 5.0},
        {"step": 5, "loss": "high", "lr": 1}, {"step": 6, "loss": True}, {"step": 7, "loss": 1})
    assert curves.read_curve(tmp_path / "metrics.jsonl") == {
        "loss": [(1, 2.0), (7, 1)], "rewards/margins": [(3, 1)]}
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\xfe{"step": 1}\n')
    assert curves.read_curve(tmp_path / "metrics.jsonl") == {}


def test_only_finished_models_count_and_each_once(small):
    at = small / "seed_0"
    sft(at / "ilr_2/.model_1.partial", 9)
    log(at / "naive_1/model_1")                     # empty
    (at / "weak/labeler").symlink_to("model")
    sft(at / "weak/model/checkpoint-50", 9)
    sft(at / "judge/safety", 3)
    sft(at / "sft/model_2", 1, 0.5)
    found = curves.trainings(small)
    assert {key: [len(c) for c in by_seed.values()] for key, by_seed in found.items()} == {
        ("weak", "model"): [1, 1], ("judge", "model"): [1, 1], ("judge", "part"): [1],
        ("sft", "model"): [2, 1], ("gold", "model"): [1, 1], ("ilr_1", "half"): [2, 2],
        ("ilr_1", "model"): [1, 1], ("dpo_1", "model"): [1, 1]}


def test_a_stage_logs_what_is_read(tiny, problems, tmp_path):
    from core.records import write_jsonl
    write_jsonl(tmp_path / "p.jsonl", preferences(problems[:4]))
    run(dpo, "--model", tiny / "model", "--data", tmp_path / "p.jsonl", "--out",
        tmp_path / "seed_0/dpo_1/model_1", "--task", "arithmetic", "--epochs", 1,
        "--batch-size", 2)
    (curve,), = curves.trainings(tmp_path)["dpo_1", "model"].values()
    assert {c: [step for step, _ in line] for c, line in curve.items()} == {
        c: [1, 2] for c in ("loss", "rewards/margins", "rewards/accuracies")}
    assert curve["loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)


def test_which_methods_train_on_preferences():
    found = {m: curves.prefers(m) for m in METHODS}
    assert all(found[m] for m in ("dpo", "dpo-coin", "dpo-labels", "spin"))
    assert not any(found[m] for m in ("ilr", "naive", "rft", "sft-chosen", "ensemble"))


# ---------------------------------------------------------------- what is computed
@pytest.mark.parametrize("n", [1, 2, 7, 19, 20, 40, 333])
def test_smooth_is_the_mean_over_a_window(n):
    values = [(7 * i) % 11 + 0.5 for i in range(n)]
    half = int(n * 0.1 / 2)
    expected = []
    for i in range(n):
        window = values[max(0, i - half):i + min(half, i) + 1]
        expected.append(sum(window) / len(window))
    assert curves.WINDOW == 0.1
    assert curves.smooth(values).tolist() == pytest.approx(expected, rel=1e-12)
    assert curves.smooth(values)[0] == values[0]


def test_mean_of_lines():
    steps, values = curves.mean_curve([[(1, 1.0), (2, 3.0)], [(1, 2.0), (2, 5.0)]])
    assert steps.tolist() == [1, 2] and values.tolist() == [1.5, 4]


def test_mean_of_lines_of_different_lengths():
    """Two ramps from 0 to 1, of 3 and of 5 steps: at every share of the training both agree."""
    three = [(1, 0.0), (2, 0.5), (3, 1.0)]
    five = [(1, 0.0), (2, 0.25), (3, 0.5), (4, 0.75), (5, 1.0)]
    steps, values = curves.mean_curve([three, five])
    assert steps.tolist() == [1, 1.75, 2.5, 3.25, 4]
    assert values.tolist() == [0, 0.25, 0.5, 0.75, 1]
    steps, values = curves.mean_curve([[(1, 4.0)], [(1, 2.0), (2, 0.0)]])      # a single step
    assert steps.tolist() == [1, 1.5] and values.tolist() == [3, 2]


# ---------------------------------------------------------------- the figure
def test_every_model_is_drawn(small, monkeypatch):
    axes, handles = drawn(small, monkeypatch)
    assert list(axes) == ["weak model: SFT", "judge", "strong model: SFT", "ILR", "DPO: loss",
                          "DPO: margin", "DPO: accuracy"]
    assert list(handles) == ["round 1", "half-models", "SFT", "SFT on gold labels",
                             "judge's stopping loss"]

    def values(title):
        return [line.get_ydata().tolist() for line in axes[title].lines]
    # thin lines of the seeds, then their mean
    assert values("weak model: SFT") == [[4, 2], [5, 3], [4.5, 2.5]]
    assert values("judge") == [[0.7, 0.5], [0.7, 0.5], [0.6, 0.4, 1.6, 1.4]]
    assert axes["judge"].lines[2].get_xdata().tolist() == [2, 4, 2, 4]
    # SFT for comparison; the mean of two halves of two seeds; the mean of two models
    assert values("ILR") == [[1, 0.5], [4, 2], [1.5, 0.5]]
    assert values("DPO: margin")[-1] == [0, 0.75] and values("DPO: accuracy")[-1] == [0, 0.5]
    assert axes["ILR"].get_yscale() == "log" and axes["DPO: margin"].get_yscale() == "linear"
    assert axes["ILR"].get_ylim() == axes["strong model: SFT"].get_ylim()


def test_dpo_without_margins_and_a_loss_of_0(tmp_path, monkeypatch):
    sft(tmp_path / "seed_4/dpo_1/model_1", 0.7, 0.6)
    sft(tmp_path / "seed_4/sft/model_1", 1, 0.0)
    axes, _ = drawn(tmp_path, monkeypatch)
    assert list(axes) == ["strong model: SFT", "DPO: loss"]
    assert axes["strong model: SFT"].get_yscale() == "linear"


def test_rounds_go_from_light_to_dark(tmp_path, monkeypatch):
    for k in range(1, 7):
        sft(tmp_path / f"seed_0/naive_{k}/model_1", k, k)
    axes, handles = drawn(tmp_path, monkeypatch)
    lines = axes["naive"].lines
    assert [line.get_ydata()[0] for line in lines] == [1, 2, 3, 4, 5, 6]
    brightness = [sum(line.get_color()) for line in lines]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 6
    assert list(handles) == ["round 1", "round 6"]


def test_every_method_has_its_panels(tmp_path, monkeypatch):
    for m in METHODS:
        pairs(tmp_path / f"seed_0/{m}_1/model_1", (0.7, 0.1, 0.5))
    sft(tmp_path / "seed_0/retired_1/model_1", 1)
    axes, _ = drawn(tmp_path, monkeypatch)
    expected = [m.NAME for k, m in METHODS.items() if not curves.prefers(k)]
    expected += [f"{m.NAME}: {column}" for k, m in METHODS.items() if curves.prefers(k)
                 for column in ("loss", "margin", "accuracy")]
    assert list(axes) == expected


def test_the_figure_is_the_same_twice(small):
    found = []
    for _ in range(2):
        with as_shipped():
            assert curves.draw(collect(small)) == ["curves.png"]
        found.append((small / "curves.png").read_bytes())
    assert found[0][:4] == b"\x89PNG" and found[0] == found[1]


@pytest.mark.parametrize("files", [{}, {"seed_0/data/x": ""}, {"seed_0/sft/model_1/x": ""},
                                   {"seed_0/sft/model_1/metrics.jsonl": "{}\n"},
                                   {"seed_0/retired_1/model_1/metrics.jsonl":
                                    '{"step": 1, "loss": 1}\n'}], ids=str)
def test_nothing_trained(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    data = collect(tmp_path)
    with as_shipped():
        assert curves.draw(data) == []
    assert curves.section(data, []) == [] and not (tmp_path / "curves.png").exists()


# ---------------------------------------------------------------- the section
def test_the_table(small):
    pairs(small / "seed_0/dpo_2/model_1", *[(0.5, k, 1) for k in range(1, 21)])
    text = curves.section(collect(small), ["curves.png"])
    assert text[0] == "## Training curves\n" and text[1].endswith("(curves.png)\n")
    # the end: of 20 steps the last 2, (19 + 20) / 2; of 2 steps the last
    assert text[3] == """\
|  | trainings | loss, first step | loss, end | margin, end | accuracy, end | lowest stopping loss |
| --- | --- | --- | --- | --- | --- | --- |
| weak model | 2 | 4.5 | 2.5 |  |  |  |
| judge | 2 | 0.7 | 0.5 |  |  | 0.9 |
| SFT | 2 | 1 | 0.5 |  |  |  |
| SFT on gold labels | 2 | 1 | 0.25 |  |  |  |
| ILR: half-models | 4 | 4 | 2 |  |  |  |
| ILR | 2 | 1.5 | 0.5 |  |  |  |
| DPO | 3 | 0.75, 0.5 | 0.5, 0.5 | 0.75, 19.5 | 0.5, 1 |  |
"""


def test_a_table_with_gaps(tmp_path):
    sft(tmp_path / "seed_0/dpo_1/model_1", 0.7)
    pairs(tmp_path / "seed_0/dpo_2/model_1", (0.6, 0.1, 0.5))
    assert curves.section(collect(tmp_path), ["curves.png"])[3].split("\n")[2:3] == [
        "| DPO | 2 | 0.7, 0.6 | 0.7, 0.6 | –, 0.1 | –, 0.5 |"]
