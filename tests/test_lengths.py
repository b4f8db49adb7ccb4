"""report/lengths.py, word_counts.py: lengths in words, and the judge's preference by length."""
import json

import pytest

from core.records import write_jsonl
from report import lengths, word_counts
from report.collect import collect
from report.figures import as_shipped
from report.methods import METHODS
from tasks import arithmetic


def answer(n, words, number):
    """An arithmetic answer of so many words."""
    return {"id": n, "completion": "1+1=2\n" * (words - 2) + f"#### {number}", "reference": "2"}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, records)


def graded(path, *words):
    write(path, [{**answer(i, n, 2), "correct": 1.0} for i, n in enumerate(words)])


def comparison(n, a, b, prob_b, agree=False):
    return {"id": n, "prompt": "", "completion_a": answer(n, *a)["completion"],
            "completion_b": answer(n, *b)["completion"], "reference": "2", "agree": agree,
            "prob_b": prob_b}


RIGHT, WRONG = 2, 5
PAIRS = [      # (words, number) of A and of B, prob_b
    comparison(1, (2, RIGHT), (4, WRONG), 0.8),     # the longer, and it is wrong
    comparison(2, (2, WRONG), (3, RIGHT), 0.9),     # the longer, and it is right
    comparison(3, (3, RIGHT), (2, WRONG), 0.1),     # the longer, and it is right
    comparison(4, (2, RIGHT), (2, WRONG), 0.3),     # equal lengths
    comparison(5, (2, WRONG), (3, WRONG), 0.2),     # the shorter of two wrong ones
    comparison(6, (2, RIGHT), (9, RIGHT), None, agree=True),
    comparison(7, (2, RIGHT), (9, WRONG), 0.5),     # not decided
    comparison(8, (2, RIGHT), (4, WRONG), 0.4)]     # the shorter, and it is right
COUNTS = {"decided": 6, "preferred": 16, "other": 15, "differ": 5, "longer": 3}
RIGHT_COUNTS = {"one_right": 5, "right": 12, "wrong": 14, "right_longer": 2, "found_longer": 2,
                "right_shorter": 2, "found_shorter": 1}


def settings(run, **more):
    (run / "config.json").write_text(json.dumps({"settings": {"TASK": "arithmetic", **more}}))


@pytest.fixture()
def small(tmp_path):
    """A run of one seed with a round of ILR and of DPO."""
    settings(tmp_path)
    at = tmp_path / "seed_3"
    write(at / "data/test.jsonl", [answer(1, 5, 2), answer(2, 6, 2)])
    write(at / "data/unlab.jsonl", [answer(1, 4, 2), answer(2, 5, 2)])
    write(at / "weak/labels.jsonl", [answer(1, 7, 2), answer(2, 8, 2)])
    graded(at / "weak/eval_1.graded.jsonl", 9, 9)
    graded(at / "sft/eval_1.graded.jsonl", 4, 6)
    graded(at / "sft/eval_2.graded.jsonl", 5, 7)
    write(at / "ilr_1/labels.jsonl", [answer(1, 3, 2), answer(2, 4, 2)])
    write(at / "ilr_1/proposals_1.jsonl", [answer(1, 2, 2), answer(3, 3, 2)])
    write(at / "ilr_1/proposals_2.jsonl", [answer(2, 7, 2)])
    write(at / "ilr_1/comparisons.jsonl", PAIRS)
    graded(at / "ilr_1/eval_1.graded.jsonl", 6, 7)
    sides = {"prompt": "", "chosen": "a b c", "rejected": "a"}
    write(at / "dpo_1/preferences.jsonl", [{"id": 1, **sides}, {"id": 2, **sides, "chosen": "a"}])
    write(at / "dpo_1/comparisons.jsonl", PAIRS[:3])
    graded(at / "dpo_1/eval_1.graded.jsonl", 5, 5)
    return tmp_path


def table(piece):
    """{first cell: {heading: cell}} of a table."""
    header, _, *lines = [[c.strip() for c in line.split("|")[1:-1]]
                         for line in piece.strip().split("\n")]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}


def draw(run):
    data = collect(run)
    with as_shipped():
        return data, lengths.draw(data)


# ---------------------------------------------------------------- the judge's pairs
def test_counts_of_pairs():
    assert word_counts.judged(PAIRS, arithmetic.grade) == COUNTS | RIGHT_COUNTS
    assert word_counts.judged(PAIRS, None) == COUNTS
    # the other way round in the file, every pair says the same
    turned = [{**c, "completion_a": c["completion_b"], "completion_b": c["completion_a"],
               "prob_b": c["prob_b"] and 1 - c["prob_b"]} for c in PAIRS]
    assert word_counts.judged(turned, arithmetic.grade) == COUNTS | RIGHT_COUNTS


def test_shares_of_pairs():
    judge = word_counts.judged(PAIRS, arithmetic.grade)
    assert lengths.shares(judge) == [60, 50, 100, 50, 50]
    assert lengths.shares(word_counts.judged(PAIRS, None)) == [60, None, None, None, None]
    assert lengths.shares(word_counts.judged([], None)) == [None] * 5


def test_errors_that_do_not_depend_on_length_are_no_lean():
    """A judge that is right on 3 of 4 pairs of either kind; the right side is mostly the longer."""
    pairs = [comparison(i, (4, RIGHT), (2, WRONG), 0.9 if i % 4 == 0 else 0.2) for i in range(40)]
    pairs += [comparison(i, (2, RIGHT), (3, WRONG), 0.9 if i % 4 == 0 else 0.2)
              for i in range(100, 108)]
    prefers, right, *_, lean = lengths.shares(word_counts.judged(pairs, arithmetic.grade))
    assert prefers == pytest.approx(100 * 32 / 48) and right == pytest.approx(100 * 40 / 48)
    assert lean == 0


@pytest.mark.parametrize("change", [
    {"prob_b": None}, {"prob_b": "0.8"}, {"prob_b": True}, {"prob_b": float("nan")},
    {"prob_b": 1.5}, {"completion_a": None}, {"completion_b": 7}, {"completion_b": []}], ids=str)
def test_a_broken_pair_counts_nowhere(change):
    assert word_counts.judged([{**PAIRS[0], **change}], arithmetic.grade) == {}


@pytest.mark.parametrize("change", [{"reference": "two"}, {"reference": None}])
def test_a_pair_that_cannot_be_graded_has_no_right_side(change):
    assert set(word_counts.judged([{**PAIRS[0], **change}], arithmetic.grade)) == {
        "decided", "preferred", "other", "differ", "longer"}


def test_conversations():
    pair = {**PAIRS[0], **{side: [{"role": "assistant", "content": PAIRS[0][side]}]
                           for side in ("completion_a", "completion_b")}}
    expected = word_counts.judged(PAIRS[:1], arithmetic.grade)
    assert word_counts.judged([pair], arithmetic.grade) == expected


def test_only_cheap_tasks_are_graded():
    assert word_counts.cheap_grade({"TASK": "arithmetic"}) is arithmetic.grade
    assert word_counts.cheap_grade({"TASK": "gsm8k"}).__module__ == "tasks.gsm8k"
    for task in ("bird", "saferpaca", "nothing", None):
        assert word_counts.cheap_grade({"TASK": task}) is None


# ---------------------------------------------------------------- the section
def test_mean_lengths(small):
    data, names = draw(small)
    assert names == ["lengths.png"] and (small / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    text = lengths.section(data, names)
    assert text[0] == "## Lengths\n"
    found = table(text[2])
    blank = dict.fromkeys(found["SFT"], "")
    assert found == {
        "references": {**blank, "labels": "4.50", "answers": "5.50",
                       "answers minus SFT's": "+0.00"},
        "weak model alone": {**blank, "answers": "9.00", "answers minus SFT's": "+3.50",
                             "accuracy": "100.0"},
        "SFT": {**blank, "labels": "7.50", "answers": "5.50", "accuracy": "100.0"},
        "SFT on gold labels": {**blank, "labels": "4.50"},
        "ILR, round 1": {**blank, "labels": "3.50", "proposals": "4.00", "judge's choice": "2.67",
                         "the other": "2.50", "answers": "6.50", "answers minus SFT's": "+1.00",
                         "accuracy": "100.0"},
        # of the pairs 1 to 3: 4, 3 and 3 words over 2 each
        "DPO, round 1": {**blank, "judge's choice": "3.33", "the other": "2.00",
                         "DPO's chosen": "2.00", "DPO's rejected": "1.00", "answers": "5.00",
                         "answers minus SFT's": "-0.50", "accuracy": "100.0"}}


def test_the_judges_preference(small):
    data, names = draw(small)
    *_, judge, _, follow, _ = lengths.section(data, names)
    found = [*table(judge)["ILR, round 1"].values()]
    assert found == ["5", "60.0", "4", "50.0", "100.0", "50.0", "+50.0"]
    # pairs 1 to 3: the longer thrice; it is right in 2 of 3; found in 2 of these, in none of one
    found = [*table(judge)["DPO, all rounds"].values()]
    assert found == ["3", "100.0", "3", "66.7", "100.0", "0.0", "+100.0"]
    assert table(follow) == {"3": {
        "lean on DPO's pairs": "+100.0", "DPO, round 1": "-0.50",
        "lean on ILR's pairs": "+50.0", "ILR, round 1": "+1.00"}}


def test_what_sft_learns(small):
    at = small / "seed_3"
    write(at / "clean/labels.jsonl", [answer(1, 11, 2)])
    assert word_counts.measure(collect(small))["sft"][3]["labels"] == 11
    write(at / "noise/labels.jsonl", [answer(1, 13, 2)])
    assert word_counts.measure(collect(small))["sft"][3]["labels"] == 13


def test_seeds_are_averaged_and_compared_in_pairs(tmp_path):
    settings(tmp_path)
    for seed, more in ((0, 1), (1, 3)):
        at = tmp_path / f"seed_{seed}"
        graded(at / "sft/eval_1.graded.jsonl", 4 + 10 * seed)
        graded(at / "naive_1/eval_1.graded.jsonl", 4 + 10 * seed + more)
    graded(tmp_path / "seed_2/sft/eval_1.graded.jsonl", 6)      # its naive ILR is yet to come
    data, names = draw(tmp_path)
    found = table(lengths.section(data, names)[2])
    assert found["SFT"]["answers"] == "8.00"                # (4 + 14 + 6) / 3
    # differences 1 and 3: t(1 df) = 12.706, times sqrt(2) / sqrt(2)
    assert found["naive, round 1"] == {"answers": "11.00", "answers minus SFT's": "+2.00 ± 12.71",
                                       "accuracy": "100.0"}
    assert len(lengths.section(data, names)) == 4           # no judge: no section of it


def test_rounds_of_a_method_are_pooled(small):
    write(small / "seed_3/ilr_10/comparisons.jsonl", PAIRS[3:])     # pairs 5 and 8 differ
    write(small / "seed_3/ilr_2/comparisons.jsonl", PAIRS[:1])
    data, names = draw(small)
    found = table(lengths.section(data, names)[-4])
    assert [name for name in found if name.startswith("ILR")] == [
        "ILR, round 1", "ILR, round 2", "ILR, round 10", "ILR, all rounds"]
    # longer: 3 of 5, 1 of 1, 0 of 2
    assert found["ILR, all rounds"]["it prefers the longer"] == "50.0"
    assert found["ILR, all rounds"]["pairs"] == "8"


# ---------------------------------------------------------------- what is missing or broken
def test_broken_lines_and_hostile_texts(small):
    path = small / "seed_3/ilr_1/labels.jsonl"
    path.write_bytes(path.read_bytes() + b'{broken\n[1]\n7\n\xff\n{"id": 3}\n{"completion": 7}\n'
                     + b"[" * 100_000 + b"\n")
    text = {"id": 9, "completion": "| <script> ![x](y)"}
    write(small / "seed_3/ilr_1/proposals_3.jsonl", [text])
    data, names = draw(small)
    found = lengths.section(data, names)
    assert table(found[2])["ILR, round 1"]["labels"] == "3.50"
    assert "script" not in "".join(found)


def test_every_method(tmp_path):
    for m in METHODS:
        graded(tmp_path / f"seed_0/{m}_1/eval_1.graded.jsonl", 3)
        write(tmp_path / f"seed_0/{m}_1/comparisons.jsonl", PAIRS)
    graded(tmp_path / "seed_0/retired_1/eval_1.graded.jsonl", 3)
    data, names = draw(tmp_path)
    text = lengths.section(data, names)
    assert list(table(text[2])) == [f"{m.NAME}, round 1" for m in METHODS.values()]
    assert "arithmetic" not in text[3] and "one right side" not in text[5]     # no task is known


@pytest.mark.parametrize("files, panels", [
    ({}, 0), ({"weak/eval_1.graded.jsonl"}, 0), ({"sft/eval_1.graded.jsonl"}, 0),
    ({"dpo_1/comparisons.jsonl"}, 1), ({"ilr_1/eval_1.graded.jsonl"}, 1),
    ({"ilr_1/eval_1.graded.jsonl", "ilr_1/comparisons.jsonl", "sft/eval_1.graded.jsonl"}, 2)])
def test_what_there_is_is_drawn(files, panels, tmp_path, monkeypatch):
    (tmp_path / "seed_0").mkdir()
    for name in files:
        if "comparisons" in name:
            write(tmp_path / "seed_0" / name, PAIRS)
        else:
            graded(tmp_path / "seed_0" / name, 3)
    kept = []
    monkeypatch.setattr(lengths, "save", lambda figure, *rest: kept.append(figure))
    data, names = draw(tmp_path)
    assert [len(figure.axes) for figure in kept] == [panels] * bool(panels)
    assert bool(names) == bool(panels) and bool(lengths.section(data, names)) == bool(panels)


def test_what_the_figure_shows(small, monkeypatch):
    kept = []
    monkeypatch.setattr(lengths, "save", lambda figure, path, handles: kept.extend(
        [figure.axes, handles]))
    draw(small)
    (answers, choices), handles = kept
    assert [list(line.get_ydata()) for line in answers.lines] == [[5.5, 6.5], [5.5, 5], [5.5, 5.5]]
    assert [list(line.get_ydata()) for line in choices.lines[:4]] == [
        [pytest.approx(1 / 6)], [pytest.approx(4 / 3)],             # ILR's, DPO's choice
        [pytest.approx(-2 / 5)], [pytest.approx(0)]]                # and the right sides
    assert list(handles) == ["ILR", "DPO", "references", "the judge's choice", "the right side"]


def test_the_figure_is_the_same_twice(small):
    found = [draw(small) and (small / "lengths.png").read_bytes() for _ in range(2)]
    assert found[0] == found[1]


def test_each_file_is_read_once(small, monkeypatch):
    read, original = [], word_counts.rows
    monkeypatch.setattr(word_counts, "rows", lambda *paths: read.extend(paths) or original(*paths))
    data, names = draw(small)
    lengths.section(data, names)
    assert len(read) > 10 and len(read) == len(set(read))


def test_small_differences_look_small(tmp_path, monkeypatch):
    """The axis of answers is at least a tenth of their length high; next to nothing has no sign."""
    for point in ("sft", "naive_1"):
        graded(tmp_path / f"seed_0/{point}/eval_1.graded.jsonl", *[20] * 99, 20 + len(point))
    kept = []
    monkeypatch.setattr(lengths, "save", lambda figure, *rest: kept.extend(figure.axes))
    draw(tmp_path)
    low, high = kept[0].get_ylim()
    assert high - low == pytest.approx((high + low) / 20) and low < 20.03 < 20.07 < high
    assert lengths.signed([-0.001], 2) == "+0.00" and lengths.signed([-0.01], 2) == "-0.01"
