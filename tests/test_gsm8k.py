"""tasks/gsm8k.py: answers as numbers, the release's rule beside it, where the data come from."""
import hashlib
import json
import re
import time
from fractions import Fraction

import pytest
from conftest import ROOT, rows, run
from kill_test import PAIR, call

from core.records import InputError, write_jsonl
from tasks import gsm8k

DATA = ROOT.parent / "shared/data/gsm8k"
real = pytest.mark.skipif(not DATA.exists(), reason=f"needs the GSM8K files in {DATA}")


READINGS = {        # a family of forms: number -> what stands behind `####`; None: no answer
    "plain": {
        42: ["42", "  42", "\t42", "42.", "42.0", "42,", "42\r\n"],
        5: ["5.00"],
        0.5: [".5"],
        7: ["007"],
        0: ["0"],
        5.5: ["5.5."],
        None: ["#42", "", "forty", "no 5", ".", "5.5.5", "5..", "0.333...", "0.3…", "5. 6", "1 . 5",
               ". 5"],
    },
    "thousands": {
        1000: ["1,000", "1,000.", "1,000,"],
        9500: ["9,500", "9{,}500", r"9\,500", r"9,\!500", r"9\!500", r"9\;500", r"9\ 500",
               "9\u2009500", "9\u202f500", "9\xa0500", "9'500", "9’500", "9_500", r"9\_500"],
        9800: ["9{,}800"],
        1234567.89: ["1,234,567.89"],
        1234567: ["1{,}234{,}567", r"1\,234\,567"],
        12345678: ["12'345'678"],
        9: ["9\n500"],
        None: ["9 500", "9, 500", "9 ,500", "9,5", "9,50", "9,5000", "9{,}5", "9{,}50", "9{,}5 00",
               "9{,}{,}500", "9{", "9{,}", "{,}500", "{{,}500}", ",500", "9,,500", "1234,567",
               "1,234,56", "1,234'567", "0,500", "00,500", "1,00,000", "9\u200b500", "9~500",
               "9·500", "9;500", "9{.}500", "9'5", r"9\hspace{1pt}500", r"\num{9500}", "9`500",
               "9_5", "9*500"],
    },
    "european": {
        9.5: ["9.500"],
        1000.5: ["1,000.5"],
        None: ["9.500,00", "1.234.567", "3,5", "3,50 €", "1.000,5"],
    },
    "currency": {
        42: ["$42", r"\$42", "$ 42", "$42$", "$$42$$", r"$\$42$", "42$", "42 $", "€42", "42€",
             "42 €", "£42", "¥42", "₹42", "US$42", "USD 42", "EUR 42", "42 USD", "Rs. 42",
             "42 dollars", "42 cents"],
        50: ["50¢"],
        1234.5: ["$1,234.50"],
        9500: [r"\$9{,}500"],
        5.5: ["$5.50."],
        5: ["$5/hour"],
        0.5: ["$.50"],
        None: ["$5 or $6", "5 dollars and 50 cents", "$"],
    },
    "sign": {
        -42: ["-42", "−42", "－42", "-$42", "$-42", "$ -42", r"-\$42", r"\$-42", "$-$42", "**-42**",
              "(-42)", r"-\boxed{42}", "-**42**", "-(42)", r"-\text{42}", "-_42_"],
        42: ["+42"],
        -1000: ["-1,000"],
        -0.5: ["-.5"],
        0: ["-0"],
        None: ["- 42", "–42", "—42", "--42", "±42", "42-", "+-42", "42 minus", "minus 42",
               "negative 42", "~~42~~", "~~41~~ 42", "($42)", "$(42)", "-($42)", "(USD 42)",
               "(42 USD)", "(42 €)", "|-42|", "| $-42$ |", "-|42|", "-(-42)", "--(42)"],
    },
    "not exact": {
        42: ["42 books about cats", "42 laps around it", "42, though"],
        None: ["~42", "≈42", "≈ 42", "x ≈ 42", "100/3 ≈ 33.33", r"\approx 42", "42ish", "42-ish",
               "42 approx.", "42 (approximately)", "42 roughly", "42, about", "42 at least",
               "42?", "42 apples?", "about 42", "±42", "42±1", "33.3 repeating",
               "0.6 recurring", "0.6 (repeating)"],
    },
    "percent": {
        42: ["42%", "42 %", r"42\%", r"42 \%", "42 percent"],
        0.5: ["0.5%"],
        12.5: ["12.5%."],
        None: ["5‰", "50% = 0.5"],
    },
    "fraction": {
        "1/2": ["1/2", "½", "1⁄2", "1/2%", "0.5"],
        "3/4": ["3 / 4", "$3/4$", "3/4 cup", r"\frac{3}{4}", r"\dfrac{3}{4}",
                r"\boxed{\frac{3}{4}}"],
        3: ["12/4"],
        "-3/4": ["-3/4", r"-\frac{3}{4}"],
        "1/3": [r"$\tfrac{1}{3}$"],
        "-1/2": ["-½"],
        "5/2": ["2½", "2 ½ cups", "2 1/2", r"2\frac{1}{2}"],
        "-5/2": ["-2 1/2"],
        "2/3": ["⅔"],
        "21/2": ["21/2"],
        "1/4": ["1/4th"],
        None: ["3/", "1/0", "5 3/2", "1/2/3", "1.5/2", "3/-4", "2-1/2", "2 and 1/2", r"\frac{1}{x}",
               r"\frac{1}{2}{3}", r"\frac12", "½5", "½ ½", "10`1/2", "10<sup>1/2</sup>",
               "1/2 of 10", "5/x", "5/6/2020", "2 thirds", "half", "5 and a half", "2 quarters",
               "1/x", "2 millionths", "5ths", "5 twentieths", "5 eighteenths", "5 hundredths"],
    },
    "power": {
        1000: ["10^3", "10^{3}", "10³", "1e+3"],
        100000: ["1e5", "1E5"],
        1500: ["1.5e3", r"1.5 \times 10^{3}", r"1.5\cdot10^3", "1.5 × 10^3", "1.5 x 10^3",
               "1.5*10^3"],
        0.01: ["1e-2", "10^-2"],
        -1000: ["-10^3"],
        "1/10000000": ["1e-07"],
        None: ["2^5", "2³", "10**3", "10^", "10^x", "10^1000", "10¹²", "1e", "1e5.5", "1e100",
               "1e999999999", "10^999999999", "1e-999999999", "1.5 × 10", "1.5 × 10^3^2",
               "5×10^3 + 1", "10<sup>300</sup>", "5 squared", "110^3", "1,010^3", "5!", "(5)!",
               "5 times x", "5 to the power of x", "5 divided by n",
               r"\sqrt{16}", "√16", r"2\pi", "2π", "0x1F", "52_8", "101_2", "5i"],
    },
    "scale": {
        500: ["5 hundred"],
        3000: ["3 thousand"],
        1500000: ["1.5 million", "$1.5 million", "1.5 million dollars", "1.5 Million", "1.5M",
                  r"1.5\text{ million}", r"\$1.5\,\text{million}", "1.5  million"],
        2000000000: ["2 billion", "$2B"],
        20000: ["20k", "$20K"],
        1000000: ["1,000 thousand"],
        -2000000: ["-2 million"],
        5: ["5 mm", "5 miles", "5 milk cartons", "5 milligrams", "5 bills", "5 TVs", "5 DVDs",
            "5 points is the score", "5 is the gross pay", "5 lbs", "5 mph", "5 hrs", "5 kWh",
            "5 sq ft", "5 pcs", "5, which they'll eat", "5 months", "5 thoughts"],
        None: ["5 millions", "5 hundred thousand", "5 million 3", "5 dozen", "5 dozen eggs", "5m",
               "$5m", "$5 m", "5b", "5T", "5 K", "5 (in thousands)", "5, in millions", "5 bn",
               "5 mil", "5 lakh", "5 grand", "$5MM", "5 tn", "5 thou", "5万", "5 миллионов",
               "5 Millionen", "5 mille", "5 Mio", "twenty 5", "20 five", "$5 mm", "5 mlns", "5 bln",
               "5 trn", "5 Mrd.", "5 Tsd", "5 thsd", "5 tausend", "5 tousand", "5 milion",
               "5 bilion", "5 billon", "5 milliards", "5 zillion", "5 hunderd", "5 hndred",
               "1 milliondollars", "5 hundredfold", "5 doz", "5doz", "5 doz. eggs", "5 dz",
               "5 gross", "5 score", "5 lac", "5 lacs", "5 lakhs", "5 crores", "5 cr", "5 kk",
               "5 Gs", "5 th", "5 (in bln)", "5, in thsd"],
    },
    "result": {
        48: ["12*4 = 48", "12*4=48", "12 × 4 = 48", "12 x 4 = 48", r"12 \times 4 = 48",
             "$12*4 = $48", "x = 48", "x=48", "= 48", "Total cost = $48", r"\text{Total} = 48",
             "<<12*4=48>>48", "12*4=<<12*4=48>> 48", "$<<6*8=48>>48", "(3 + 5) * 6 = 8 * 6 = 48",
             "x = 12*4 = 48", "12*4 = 48 apples", "60 – 12 = 48", "12(4) = 48", "x = 12(4) = 48",
             "($6 + $6)*4 = $48", "50% of 96 = 48", "3/4 of 64 = 48"],
        9500: ["12*4 = 9{,}500"],
        0.5: ["1/2 = 0.5", r"\frac{1}{2} = 0.5", r"x = \frac{1}{2} = 0.5"],
        130000: ["80,000+50,000 = 130,000"],
        None: ["12*4", "12 * 4", "12+4", "12 - 4", "12 × 4", "3 + x", "12*4 =", "48 = 12*4",
               "12*4 = 48 + 2", "5 = 6", "5 = five", "x = 5, y = 6", "x = 5 or x = 6", "2x = 10",
               "12x = 48", "-x = 5", "x/2 = 5", "x + 1 = 5", "x^2 = 9", "half of x = 5",
               "twice x = 10", "x ≠ 5", "x != 5", "x >= 5", "x <= 5", "x ≥ 5", "x == 5", "x > 5",
               "5x", "5n", "5 x", "5*x", "5 * x", "5 * price", "48 - cost", "48 + tip",
               "48 since 5+5=10", "1 km = 1000 m", "48 (6*8 = 48)", "<<12*4=48>>", "<<12*4=48",
               "4<<2+2=4>>8", "8<<2+2=4>>", "- = 5", "-5 = 6", "- 5 = 6", "2:3 = 0.67",
               "12*4 -> 48", "5 - 3, 4 + 1 = 5", "= 5 = 6", "x = 5 = 6",
               "Total = 5 = 6", "x = 12*4 = 48 = 49", "5 hours + 3 hours = 8 hours"],
    },
    "marker": {
        5: [": 5", ":5", " : 5", "** 5", "**: 5", "Answer: 5", "answer: 5", "Final Answer: 5",
            "**Answer:** 5", "The answer is 5", "and the answer is 5.", "The final answer is: $5.",
            "So, the answer is 5", "Answer 5", "Answer = 5", "Total: 5", '{"answer": 5}',
            "Ans: 5", "Total cost: $5", "The total amount is $5", "It is 5"],
        None: ["Step 5", "Step 5: add", "Answer 1: 5", "Question: 5 cows", "1. Buy apples",
               "1) Buy apples", "1: Buy apples", "**1. Buy apples**", "**1.** Buy", "1 - Buy",
               "(1) Buy", "No. 5", "Confidence: 5", "Wrong: 5", "5 ####"],
    },
    "below": {
        42: ["\n42", "\n\n42\n", "\n**42**", " Answer:\n42", "\n$$\n42\n$$",
             "\n\\[\n\\boxed{42}\n\\]", "\n42%"],
        None: ["\n42 apples", "\n12*4 = 48", " Solution:\n16 - 3 = 13 eggs", "\n1. Buy", "\n- 42",
               "\nUSER:\n42"],
    },
    "markup": {
        42: [r"\boxed{42}", r"$\boxed{42}$", r"\boxed{\text{42}}", r"\boxed{\boxed{42}}",
             r"\boxed{\$42}", r"\boxed{42}.", r"\[\boxed{42}\]", r"\boxed{x = 42}",
             r"\boxed{42 \text{ apples}}", r"\(42\)", r"$\mathbf{42}$", r"\left(42\right)",
             r"\boxed{42", "**42**", "*42*", "__42__", "_42_", "`42`", "**42** apples", "42**",
             '"42"', "'42'", "“42”", "«42»", "(42)", "[42]", "{42}", "<b>42</b>",
             "<answer>42</answer>", "42</s>", "42<|im_end|>", "42 [/INST]", "**42**!", "42<eos>",
             "42<end_of_turn>", "42<br>", "42<br/>", "42<br />", r"\underline{42}", r"\emph{42}",
             "42\u200b", "\u200b42", "\ufeff42", "42\ufeff", "| 42 |", "42 |", "|42|",
             "| Total | 42 |"],
        9500: [r"\boxed{9{,}500}"],
        1234.5: ["**$1,234.50**"],
        None: [r"\boxed{}", r"\boxed{4}2", r"\boxed{4} \boxed{2}", r"\boxed{9}{,}500",
               r"\boxed{42}^2", r"\foo{42}", "**4**2", "**4** 2", "[4, 2]", "(4, 2)", "4<b>2</b>",
               "<42>", "> 42", "| 4 | 2 |", "4|2", "<del>42</del>", "<s>42</s>",
               "<strike>42</strike>", "<sup>2</sup>", "<sub>2</sub>", r"\cancel{42}",
               "<wrong>42</wrong>", "<msqrt><mn>16</mn></msqrt>", "4\u200b2"],
    },
    "units": {
        42: ["42 apples", "42 (apples)", "42, which is the total", "42 apples.", "42 apples!",
             "42 per day", "42 🎉"],
        48: ["48 km/h", "48km/h", "48-inch"],
        3: ["3 hours", "3h", "3 p.m."],
        5: ["5kg", "5 m", "5 m²", "5 cm^2", "5 m^{2}", r"5 \text{ cm}^2", "5 °C", "5'", '5"',
            "5 a day", "5 L", "5 times", "5th",
            "5m²", "5m^2", "5in²"],
        90: ["90°", r"90^\circ"],
        None: ["5 cm^2 2", "5 half-lives", "5 x^2", "5 m^4", "18. The farmer", "18 because 9*2=18"],
    },
    "several": {
        None: ["5 and 6", "5 or 6", "5 6", "5, 6", "5; 6", "5-6", "5–6", "5 - 6", "5 to 6", "2:3",
               "3:30", "3:30 pm", "5 or more", "5+", ">5", "≥5", "at least 5", "5 feet 3 inches",
               '5\'10"', "5 hours 30 minutes", "42 of 50", "42 in 3 boxes", "5²"],
    },
    "scripts": {
        None: ["٤٢", "४२", "４２", "𝟒𝟐", "4٢", "٤2", "⑤", "5₈", "Ⅴ", "XLII", "四十二", "5⃣", "5️⃣",
               "0.3̅", "NaN", "Infinity", "∞", "1_0"],
    },
}
WHOLE_TEXTS = {
    "####42": 42, "####: 5": 5, "**####** 5": 5, "**#### 5**": 5, "##### 42": 42,
    "so 6*7 #### 42": 42, "#### 1\n#### 2": 2, "#### 1\n####": None, "## 42": None, "42": None,
    "": None, r"\boxed{42}": None, "The answer is 42": None, "#### 42\n\nUSER:\nAnother 5": 42,
    "#### 18\n\nSome chatter with 3 numbers": 18}


def check_readings(forms):
    found = {text: gsm8k.final_answer(text) for text in forms}
    assert found == {t: None if n is None else Fraction(str(n)) for t, n in forms.items()}
    assert all(gsm8k.is_well_formed(text) == (n is not None) for text, n in forms.items())


@pytest.mark.parametrize("family", READINGS)
def test_each_form_has_one_reading_or_none(family):
    check_readings({f"#### {text}": number for number, texts in READINGS[family].items()
                    for text in texts})


def test_the_marker_is_the_last_four_hashes_and_nothing_else_is():
    check_readings(WHOLE_TEXTS)


def test_the_documented_table_is_what_is_read():
    table = (ROOT / "docs/gsm8k.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| (no answer|[-0-9/.]+) \| [^|]*\|$", table, re.M)
    forms = [(text, n) for cell, n in rows for text in re.findall("`(.+?)`", cell)]
    assert len(forms) > 100
    found = {text: gsm8k.final_answer(f"#### {text}") for text, _ in forms}
    assert found == {text: None if n == "no answer" else Fraction(n) for text, n in forms}


HOSTILE = ["\n", " ", "1", "{", "}", r"\boxed{", ",", "#", "####", "#### 1\n", "<<", "<<1", "1,",
           ",000", "{,}", "\\,", "\\", "$", "*", "_", "(", "the ", "=", "1=", "x=", "1 x ", "x",
           "^", r"\frac{", r"\frac{1}{", "1/", "- ", "1-1=", "e1", "10^3×", "½", "m^2 ", "a ", "or",
           "il", "l", "bln ", "mil", "of ", "5of ", "| ", "-(", "<br ", "\u2009000", "'000",
           "1.", "٤", "<a", "... "]


@pytest.mark.parametrize("before", ["#### ", "#### 5", "#### x = "])
def test_reading_is_linear_in_the_length_of_the_text(before):
    """All together take under a second of CPU. Were one quadratic, it alone would take minutes."""
    start = time.process_time()
    for unit in HOSTILE:
        text = before + unit * (50_000 // len(unit))
        for end in ("", "5", "\nx"):
            gsm8k.is_well_formed(text + end)
    assert time.process_time() - start < 10


def test_numbers_that_python_refuses_or_that_would_fill_the_memory_are_no_answer():
    for text in ("9" * 5000, "9" * 10**6, "1," + "000," * 2000 + "000", "0." + "1" * 5000,
                 "1e999999999", "1e-999999999", "10^999999999", "1/" + "9" * 5000, "5 \n" * 10**5):
        assert gsm8k.final_answer(f"#### {text}") in (None, 5)
    assert gsm8k.final_answer("#### " + "9" * 999) == 10**999 - 1
    assert gsm8k.grade({"id": 1, "completion": "#### " + "9" * 5000, "reference": "9"}) == 0


def test_unclear_answers_never_agree_by_accident():
    def same(a, b):
        a, b = {"completion": a}, {"completion": b}
        return gsm8k.agree(a, b) and gsm8k.agree(b, a)
    assert not same("#### 9{,}500", "#### 9{,}800") and not same("#### 9{,}5 00", "#### 9{,}8 00")
    assert not same("#### 9", "#### 9{,}5 00") and same("#### 9{,}500", "so #### $9,500.00")
    assert same("#### 9{,}5 00", "#### 9{,}5 00")       # the same text is the same answer
    assert not same("#### 1/3", "#### 0.333") and same("#### 1/2", "#### 0.5")
    assert not same("#### 50%", "#### 0.5") and same("#### 50%", "#### 50")


def test_a_reference_may_be_a_number_of_json():
    for completion, reference in (("#### 5", 5), ("#### 5.00", 5.0), ("#### 0.5", 0.5),
                                  ("#### 1e-7", 1e-07), ("#### -5", -5), ("#### 65960", "65,960")):
        record = {"id": 1, "completion": completion, "reference": reference}
        assert gsm8k.grade(record) == 1
    assert gsm8k.grade_release({"id": 1, "completion": "#### 5", "reference": 5}) == 1
    for bad in (True, None, float("nan"), "", "9{,}5 00", "5 and 6"):
        with pytest.raises(InputError, match="the reference of id 1 is .*: expected a number"):
            gsm8k.grade({"id": 1, "completion": "#### 5", "reference": bad})


def test_grades_and_agreement():
    def right(text, reference="65,960"):
        record = {"id": 1, "completion": text, "reference": reference}
        return gsm8k.grade(record), gsm8k.grade_release(record)
    assert right("so\n#### 65,960") == (1, 1) and right("so\n#### 65960") == (1, 0)
    assert right("#### 65961") == (0, 0)
    assert right("65,960") == (0, 0) and right("") == (0, 0) and right("#### 5 4", "5") == (0, 1)
    assert right("####5", "5") == (1, 0)
    with pytest.raises(InputError, match="reference of id 1 is 'five'"):
        right("#### 5", "five")
    assert gsm8k.agree({"completion": "a #### 1,000"}, {"completion": "b #### $1000.0"})
    assert not gsm8k.agree({"completion": "#### 1"}, {"completion": "#### 2"})
    assert gsm8k.agree({"completion": "x"}, {"completion": "x"})
    assert not gsm8k.agree({"completion": "x"}, {"completion": "y"})


def write_data(folder, train=20, test=4):
    folder.mkdir()
    for split, count in (("train", train), ("test", test)):
        rows = [{"question": f"{split} {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
                for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def test_files(tmp_path):
    write_data(tmp_path / "in")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(gsm8k, "--out", tmp_path / out, "--data-dir", tmp_path / "in", "--gt", 8,
            "--validation", 3, "--seed", seed)
    a, b, c = ({n: rows(tmp_path / out / f"{n}.jsonl")
                for n in ("train", "gt", "unlab", "validation", "test")} for out in "abc")
    assert a == b and a["gt"] != c["gt"] and a["test"] == c["test"]
    assert a["train"] == a["gt"] + a["unlab"]
    assert [len(a[n]) for n in ("gt", "unlab", "validation", "test")] == [8, 9, 3, 4]
    ids = sorted(r["id"] for r in a["train"] + a["validation"])
    assert ids == sorted(f"train-{i}" for i in range(20))
    assert a["test"][3] == {"id": "test-3", "prompt": "USER:\ntest 3?\n\nASSISTANT:\n",
                            "completion": "3+3=6\n#### 6", "reference": "6", "source": "gold"}
    with pytest.raises(InputError, match="--gt 20 must lie between 0 and the 20"):
        run(gsm8k, "--out", tmp_path / "d", "--data-dir", tmp_path / "in", "--gt", 20)


def test_missing_files_come_from_the_hub_or_the_authors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = tmp_path / "source"
    write_data(source)
    monkeypatch.setattr(gsm8k, "AUTHORS", source.as_uri() + "/")
    monkeypatch.setattr(gsm8k, "from_hub", lambda split: None)
    arguments = ["--out", tmp_path / "out", "--data-dir", tmp_path / "in", "--gt", 8]
    with pytest.raises(InputError, match="train.jsonl: it is not the file that is expected"):
        run(gsm8k, *arguments)
    assert not (tmp_path / "in").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(gsm8k, "SHA256",
                        {s: hashlib.sha256((source / f"{s}.jsonl").read_bytes()).hexdigest()
                         for s in ("train", "test")})
    run(gsm8k, *arguments)
    assert all((tmp_path / "in" / f).read_bytes() == (source / f).read_bytes()
               for f in ("train.jsonl", "test.jsonl"))
    monkeypatch.setattr(gsm8k, "from_hub",
                        lambda split: [{"question": "q?", "answer": "#### 7", "more": 1}])
    run(gsm8k, *arguments[:2], "--data-dir", tmp_path / "in", "--gt", 8, "--platinum")
    assert rows(tmp_path / "out/platinum.jsonl")[0]["reference"] == "7"
    assert len(rows(tmp_path / "in/platinum.jsonl")) == 1
    monkeypatch.setattr(gsm8k, "from_hub", lambda split: None)
    monkeypatch.setattr(gsm8k, "AUTHORS", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(InputError,
                       match="put train.jsonl into a folder and name it with --data-dir"):
        run(gsm8k, "--out", tmp_path / "x", "--data-dir", tmp_path / "empty")


@real
def test_real_gold_answers_are_right_and_their_neighbours_wrong(tmp_path):
    run(gsm8k, "--out", tmp_path, "--data-dir", DATA)
    train, test = rows(tmp_path / "train.jsonl"), rows(tmp_path / "test.jsonl")
    assert (len(train), len(test), len(rows(tmp_path / "gt.jsonl"))) == (7473, 1319, 3736)
    for records in (train, test):
        assert all(gsm8k.grade(r) == 1 == gsm8k.grade_release(r)
                   and gsm8k.is_well_formed(r["completion"]) for r in records)
        others = zip(records, records[1:] + records[:1], strict=True)
        other = [gsm8k.grade({**r, "completion": s["completion"]}) for r, s in others]
        assert 0 < sum(other) / len(other) < 0.02
        # every gold answer is read as its plain value, in other notations too
        for r in records:
            plain = Fraction(r["reference"].replace(",", ""))
            assert gsm8k.final_answer(r["completion"]) == plain
            for written in (f"${r['reference']}", f"{r['reference']} apples", f"{plain}.00",
                            rf"\boxed{{{r['reference'].replace(',', '{,}')}}}", f"x = {plain}"):
                assert gsm8k.final_answer(f"#### {written}") == plain, written
    # where the two rules part: the gold answer without its comma
    assert sum("," in r["reference"] for r in test) == 14
    plain = [{**r, "completion": r["completion"].replace(",", "")} for r in test]
    assert sum(map(gsm8k.grade, plain)) == 1319 and sum(map(gsm8k.grade_release, plain)) == 1305


@real
@pytest.mark.slow
def test_the_chain_on_64_real_problems(tmp_path):
    """SFT, judge and ILR of `run_ilr.sh gsm8k`, beams included, with the shipped base
    models. Their samples never reach `####`, without which DPO trains on nothing."""
    for split, count in (("train", 64), ("test", 16)):      # short ones: else no format is learned
        found = [r for r in rows(DATA / f"{split}.jsonl") if len(r["answer"]) < 100][:count]
        write_jsonl(tmp_path / f"in/{split}.jsonl", found)
    done = call(tmp_path / "run", tmp_path / "bases", "gsm8k", DATA_DIR=tmp_path / "in", TRAIN=64,
                GT=32, TEST=16, ROUNDS=1, METHODS="ilr", LORA_RANK=0, WEAK_MODEL=PAIR / "weak",
                STRONG_MODEL=PAIR / "strong", WEAK_LR="3e-3", WEAK_EPOCHS=60,
                PACKING="--micro-tokens 2048", WEAK_BATCH=8, SFT_LR="3e-3",
                SFT_EPOCHS=8, SFT_BATCH=8, JUDGE_LR="1e-3", JUDGE_EPOCHS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run/seed_0"
    labels = rows(run / "ilr_1/labels.jsonl")
    assert [r["id"] for r in labels] == [r["id"] for r in rows(run / "data/unlab.jsonl")]
    assert sum(r["accepted"] for r in labels)
    # they are small, but they learn the format
    assert sum(map(gsm8k.is_well_formed, (r["completion"] for r in labels))) > 8
    for point in ("weak", "sft", "gold", "ilr_1"):
        assert {r["correct"] for r in rows(run / point / "eval_1.graded.jsonl")} <= {0.0, 1.0}
    assert "| ILR |" in (tmp_path / "run/report.md").read_text()


def test_dry_run_names_every_stage_in_order(tmp_path):
    done = call(tmp_path / "run", tmp_path / "bases", "gsm8k", "--dry-run", EVAL="platinum")
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    stages = [command.split()[1] for command in commands]
    assert done.returncode == 0 and stages[0] == "tasks/gsm8k.py" and stages.count("sft.py") == 12
    assert stages.count("dpo.py") == 3
    assert "google/gemma-2b" in done.stdout and "mistralai/Mistral-7B-v0.1" in done.stdout
    assert not (tmp_path / "run").exists()
    assert commands[0].endswith("--data-dir data/gsm8k --platinum")
    assert "--num-beams 4" in done.stdout and "data/platinum.jsonl" in done.stdout


def test_exact_release_grades_by_the_raw_rule(tmp_path, capsys):
    import evaluate
    write_jsonl(tmp_path / "a.jsonl",
                [{"id": i, "completion": c, "reference": "1,000"}
                 for i, c in enumerate(("#### 1,000", "#### 1000"))])
    for more, share in (([], "100.0%"), (["--exact-release"], "50.0%")):
        run(evaluate, "grade", "--task", "gsm8k", "--data", tmp_path / "a.jsonl", *more)
        assert share in capsys.readouterr().out
    with pytest.raises(InputError, match="the release has no task arithmetic"):
        run(evaluate, "grade", "--task", "arithmetic", "--data", tmp_path / "a.jsonl",
            "--exact-release")
