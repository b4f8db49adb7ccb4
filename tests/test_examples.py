"""The examples, the settings and the caveats of the report; text of models stays harmless there."""
import json
from html.parser import HTMLParser

import markdown
import pytest

from core.records import write_json, write_jsonl
from report import examples
from report.collect import collect
from report.html import write_html
from report.settings import given_variables, preset_values, settings_section
from report.tables import plain, table

HOSTILE = [
    "<script>alert(1)</script>", "</td></tr></table><b>x</b>", "<!-- x", "&lt;b&gt;", "a | b | c",
    "![x](http://e.example/a.png)", "[l](javascript:alert(1))", "<http://a.example>",
    "[a][b]\n[b]: http://e.example", "`x` ``y`` `", "*a* **b** _c_ __d__ ~~e~~ $f$", "\\| \\` \\\\",
    "# h\n---\n- x\n> y\n\n    code\n```\nz\n```", "x\r\ny\rz\tw",
    "a\x00b\x02klzzwxh:0\x03\x1b[31m", "\u202eright to left\u2066", "line\u2028para\u2029end\x85",
    "| --- | --- |", "10*2*3=60 a_b_c"]


class Live(HTMLParser):
    """Tags of a page, the texts of its cells, and how many cells each row has."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.cells, self.rows, self.in_cell = [], [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.cells.append("")
            self.rows[-1] += 1
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.cells[-1] += data


def as_html(text):
    page = Live()
    page.feed(markdown.markdown(text, extensions=["tables"]))
    return page


# ---------------------------------------------------------------- text that is not ours
@pytest.mark.parametrize("text", HOSTILE)
def test_a_models_text_is_text_and_nothing_else(text):
    page = as_html(table(["a", "b"], [[plain(text), "end"], ["next", plain(text)]]))
    assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", *["tr", "td", "td"] * 2]
    a, end, following, b = page.cells[2:]
    assert (end, following) == ("end", "next") and a == b
    # to read it is what it was: line ends and control characters are shown
    assert a.replace(" ⏎ ", "").isprintable()
    seen = "".join(c for c in text if c.isprintable() and not c.isspace())
    left = iter("".join(a.split()))
    assert all(c in left for c in seen)


def test_what_github_makes_a_link_of_is_broken_up():
    """Its Markdown finds bare addresses; the package markdown does not."""
    found = plain("see http://e.example, www.e.example, HTTPS://x.example and me@e.example")
    assert "://" not in found and "www." not in found and "e@" not in found
    page = as_html(table([found], [["x"]]))
    assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}


def test_a_text_that_names_a_figure_gets_none(tmp_path):
    """The HTML page holds its figures: it looks for src="NAME.png"."""
    (tmp_path / "r.md").write_text("# x\n\n" + table([plain('src="secret.png"')], []))
    write_html(tmp_path / "r.md")
    assert "secret.png" in (tmp_path / "r.html").read_text()


def test_long_texts_keep_both_ends():
    text = "begin" + "x" * 1000 + "end"
    assert plain(text, 20) == "beginxxxxx \\[...\\] xxxxxxxend"
    assert plain("x" * 20, 20) == "x" * 20 and plain(" \n ") == "*empty*"


# ---------------------------------------------------------------- examples
def test_examples_are_spread_over_all():
    assert examples.spread(list(range(10)), 5) == [1, 3, 5, 7, 9]
    assert examples.spread(list(range(87)), 5) == [8, 26, 43, 60, 78]
    assert examples.spread([1, 2], 5) == [1, 2] and examples.spread([], 5) == []
    assert examples.spread([1, 2], 0) == []


def answer(i, right, **more):
    return {"id": f"t-{i:02}", "prompt": f"How many is {i}?\n", "completion": f"#### {i}\n",
            "reference": str(i), "correct": float(right), **more}


@pytest.fixture()
def folder(tmp_path):
    """A run of two seeds: of seed 0 SFT is right on 20 of 40 test problems, ILR on 12 others and
    on 14 of these; ILR's two rounds replace 12 and 3 labels."""
    write_json(tmp_path / "config.json", {"settings": {"TASK": "arithmetic"}})
    for seed in (0, 1):
        at = tmp_path / f"seed_{seed}"
        write_jsonl(at / "sft/eval_1.graded.jsonl", [answer(i, i < 20) for i in range(40)])
        write_jsonl(at / "sft/eval_2.graded.jsonl", [answer(i, False) for i in range(40)])
        for k in (1, 2):
            write_jsonl(at / f"ilr_{k}/eval_1.graded.jsonl",
                        [answer(i, 6 <= i < 32) for i in reversed(range(40))])
    at = tmp_path / "seed_0"
    labels = [answer(i, i < 10) for i in range(40)]
    write_jsonl(at / "weak/labels.graded.jsonl", labels)
    # a right label and a wrong one replaced by wrong ones, ten wrong ones by right ones
    new = {9: 0, 10: 0, **dict.fromkeys(range(20, 30), 1)}
    labels = [{**r, "completion": f"#### new {i}", "accepted": True, "prob_b": 0.5 + i / 100,
               "correct": float(new[i])} if i in new else {**r, "accepted": False, "prob_b": None}
              for i, r in enumerate(labels)]
    write_jsonl(at / "ilr_1/labels.graded.jsonl", labels)
    labels = [{**r, "completion": "#### newer", "accepted": True, "prob_b": 0.9, "correct": 0.0}
              if i in (1, 9, 20) else {**r, "accepted": False} for i, r in enumerate(labels)]
    write_jsonl(at / "ilr_2/labels.graded.jsonl", labels)
    return tmp_path


def tables(text):
    """{what: (n, total, the rows as lists of cells)} of the tables of the examples."""
    found, pieces = {}, text.split("\n\n")
    for what, below in zip(pieces, pieces[1:], strict=False):
        if below.startswith("| "):
            name, _, counts = what.strip().rstrip(".").rpartition(": ")
            n, total = map(int, counts.split(" of "))
            rows = [line.strip("| ").split(" | ") for line in below.strip().split("\n")[2:]]
            found[name] = n, total, rows
    return found


def section(run):
    return "\n".join(examples.section(collect(run)))


def test_labels_that_were_replaced_rightly_and_wrongly(folder):
    text = section(folder)
    assert ("Of 15 replacements in all rounds, 10 made a wrong label right and 3 a right one "
            "wrong; 2 put a wrong label in the place of a wrong one.") in text
    found = tables(text)
    n, total, right = found["Replaced rightly (wrong before, right after)"]
    assert (n, total) == (5, 10)
    assert right[0] == ["t-21", "1", "How many is 21?", "21", "wrong: #### 21", "#### new 21",
                        "0.71"]
    assert [row[0] for row in right] == ["t-21", "t-23", "t-25", "t-27", "t-29"]
    n, total, wrong = found[
        "Replaced wrongly (wrong after; those that were right before come first)"]
    assert (n, total) == (5, 5)
    assert [(row[0], row[1], row[4].partition(":")[0]) for row in wrong] == [
        ("t-09", "1", "right"), ("t-01", "2", "right"), ("t-20", "2", "right"),
        ("t-10", "1", "wrong"), ("t-09", "2", "wrong")]
    # the label that round 2 replaced is that of round 1
    assert wrong[2][4:6] == ["right: #### new 20", "#### newer"]


def test_answers_that_a_method_turned(folder):
    text, found = section(folder), tables(section(folder))
    n, total, rows = found["ILR (round 2), from wrong to right"]
    # in order of ids, whatever the order of the file: 20 to 31
    assert (n, total) == (5, 12) and [r[0] for r in rows] == ["t-21", "t-23", "t-26", "t-28",
                                                              "t-30"]
    n, total, rows = found["ILR (round 2), from right to wrong"]
    assert (n, total) == (5, 6) and rows[0] == ["t-00", "How many is 0?", "0", "#### 0", "#### 0"]
    assert "ILR (round 1)" not in text
    assert "all of seed 0, the first; test answers of a point's first training" in text
    assert section(folder) == text


def test_a_grade_that_is_a_probability_is_shown(folder):
    for point, grade in (("sft", 0.5), ("ilr_2", 0.73)):
        write_jsonl(folder / f"seed_0/{point}/eval_1.graded.jsonl",
                    [{**answer(i, False), "correct": grade if i == 3 else 0.2} for i in range(40)])
    n, total, rows = tables(section(folder))["ILR (round 2), from wrong to right"]
    assert (n, total) == (1, 1)
    assert rows[0][3:] == ["(0.50) #### 3", "(0.73) #### 3"]


def test_what_is_not_there_is_left_out(folder):
    for seed in (0, 1):         # without references and prompts, without graded labels
        for path in (folder / f"seed_{seed}").glob("*/eval_1.graded.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            write_jsonl(path, [{k: r[k] for k in ("id", "completion", "correct")} for r in rows])
    for path in folder.glob("*/*/labels.graded.jsonl"):
        path.unlink()
    text = section(folder)
    assert "Labels that ILR replaced" not in text and "| id | SFT | ILR |" in text
    (folder / "seed_0/sft/eval_1.graded.jsonl").unlink()
    (folder / "seed_0/sft/eval_2.graded.jsonl").unlink()
    assert section(folder) == ""


@pytest.mark.parametrize("settings, said", [
    ({"TASK": "arithmetic"}, True), ({"TASK": "arithmetic", "GRADE_LABELS": "0"}, False),
    ({"TASK": "saferpaca"}, False), ({"TASK": "nothing like it"}, False), ({}, False)])
def test_pairs_that_dpo_kept(folder, settings, said):
    write_json(folder / "config.json", {"settings": settings})
    at = folder / "seed_0/dpo_1"
    write_jsonl(at / "eval_1.graded.jsonl", [answer(i, i < 20) for i in range(40)])
    # the chosen side is right, both are wrong, the rejected one is right, both are right
    sides = {0: (0, 9), 1: (9, 9), 2: (9, 2), 3: (3, 3)}
    pairs = [{"id": f"p-{i}", "pair": 0, "prompt": f"How many is {i}?", "reference": str(i),
              "chosen": f"#### {a}", "rejected": f"#### {b}", "prob_chosen": 0.9 + i / 100}
             for i, (a, b) in sides.items()]
    write_jsonl(at / "preferences.jsonl", pairs)
    text = section(folder)
    assert ("Pairs that DPO kept, round 1" in text) == said
    if said:
        assert ("Of its 4 pairs, graded for this, 2 have a right chosen answer; in 1 the chosen "
                "answer is wrong and the rejected one right.") in text
        found = tables(text)
        assert found["The chosen answer is right"] == (2, 2, [
            ["p-0", "How many is 0?", "0", "#### 0", "wrong: #### 9", "0.90"],
            ["p-3", "How many is 3?", "3", "#### 3", "right: #### 3", "0.93"]])
        misled = found["The chosen answer is wrong (those whose rejected one is right come first)"]
        assert [row[0] for row in misled[2]] == ["p-2", "p-1"]
        # of many, some are graded, which is said
        write_jsonl(at / "preferences.jsonl",
                    [{**p, "pair": k} for p in pairs for k in range(100)])
        write_json(at / "preferences.jsonl.summary", {"kept": 400})
        assert "Of 200 of its 400 pairs, graded for this, 100 have" in section(folder)
    write_jsonl(at / "preferences.jsonl", [{k: v for k, v in p.items() if k != "reference"}
                                           for p in pairs])
    assert "Pairs that DPO kept" not in section(folder)


def test_hostile_answers_stay_in_their_cells(folder):
    for point in ("sft", "ilr_2"):
        path = folder / f"seed_0/{point}/eval_1.graded.jsonl"
        write_jsonl(path, [{**answer(i, point == "sft"), "id": f"{text} {i}", "prompt": text,
                            "completion": text, "reference": text}
                           for i, text in enumerate(HOSTILE)])
    page = as_html(section(folder))
    assert set(page.tags) == {"h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td"}
    # of labels seven columns, of answers five
    assert page.rows == [7] * 12 + [5] * 6


# ---------------------------------------------------------------- settings and caveats
def test_the_command_sets_what_neither_presets_nor_other_settings_do():
    values = preset_values("gsm8k", {"LORA_RANK": "0", "EVAL": "validation"})
    assert values["SFT_LR"] == "1e-5" and values["TRAIN"] == "7473"
    settings = {"TASK": "gsm8k", **values, "SEEDS": "3 4"}
    assert given_variables(settings) == {"SEEDS": "3 4", "LORA_RANK": "0", "EVAL": "validation"}
    # a setting that this code does not have sets nothing, nor can it reach the shell
    assert given_variables({"TASK": "arithmetic", "OLD": "1", "PATH": "/nowhere"}) == {}
    assert preset_values("arithmetic", {})["PRETRAINING"].startswith("--optimizer muon")


def test_settings_are_on_the_page_with_what_differs_first(folder):
    config = {"settings": {"TASK": "arithmetic", **preset_values("arithmetic", {}),
                           "ROUNDS": "2", "JUDGE_MODEL": "a | <b>", "OLD": "x"},
              "commit": "c0ffee", "versions": {"torch": "2.0"}}
    write_json(folder / "config.json", config)
    text = "\n".join(settings_section(collect(folder)))
    assert "Commit c0ffee; whether files had uncommitted changes is not recorded. " in text
    assert "torch 2.0.\n" in text
    assert ("\n    ROUNDS=2 \\\n    JUDGE_MODEL='a | <b>' \\\n    bash run_ilr.sh arithmetic\n"
            in text)
    page = as_html(text)
    assert set(page.tags) == {"h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td",
                              "em"}
    names = page.cells[4::4]
    assert names[:3] == ["ROUNDS", "JUDGE_MODEL", "TASK"]
    assert set(names) == set(config["settings"])
    assert page.cells[5:8] == ["2", "3", "rounds of every method"]
    # of a task that has no preset, and without a config.json
    write_json(folder / "config.json", {"settings": {"TASK": "../x", "SEEDS": "0"}})
    text = "\n".join(settings_section(collect(folder)))
    assert "| SEEDS | 0 |" in text and "run_ilr.sh" not in text and "not recorded" in text
    (folder / "config.json").unlink()
    assert settings_section(collect(folder)) == []
