"""results/ is one run's report; the tables of README.md and docs/evidence.md are its tables.

`PYTHONPATH=. python tests/test_results.py` writes them there.
"""
import json
import re
from pathlib import Path

import pytest

from report.claims import sentence
from report.methods import METHODS, points_of
from report.tables import cell

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/evidence.md"]
TABLE = re.compile(r"(?<=<!-- results: )(.*?) -->\n.*?<!-- end -->", re.S)


def table_under(heading):
    """The first table below a heading of results/report.md."""
    below = (ROOT / "results/report.md").read_text().partition(f"## {heading}\n")[2]
    return re.search(r"(?:^\|.*\n)+", below, re.M)[0]


def filled(text):
    """The text with every `<!-- results: HEADING -->` filled anew."""
    def block(match):
        return f"{match[1]} -->\n{table_under(match[1])}<!-- end -->"
    return TABLE.sub(block, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_the_tables_of_the_report(page):
    text = page.read_text()
    anew = "PYTHONPATH=. python tests/test_results.py writes the tables anew"
    assert TABLE.search(text) and filled(text) == text, anew


def test_the_report_has_the_numbers_of_its_json():
    found = json.loads((ROOT / "results/report.json").read_text())
    assert len(found["seeds"]) >= 5
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", table_under("Accuracy by round"), re.M))
    for m in {p.rpartition("_")[0] for p in found["tests"]} & set(METHODS):
        cells = [cell(found["tests"][p]) for p in points_of(found, m).values()]
        assert rows[METHODS[m].NAME].split(" | ")[:len(cells)] == cells
    for claim in found["claims"]:
        assert sentence(claim) in (ROOT / "results/report.md").read_text()


def test_the_page_needs_nothing_beside_it():
    html = (ROOT / "results/report.html").read_text()
    assert re.findall(r'src="(?!data:image/png;base64,)', html) == []
    assert html.count("<img ") == len(list((ROOT / "results").glob("*.png"))) >= 4


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
