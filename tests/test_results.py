"""results/ is a report over runs; the tables of README.md and docs/evidence.md are its tables.

`PYTHONPATH=. python tests/test_results.py` writes them there.
"""
import json
import re
import sys
from pathlib import Path

import pytest

from report.methods import METHODS, points_of
from report.side_tables import over_runs
from report.statistics import pooled

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import make_map  # noqa: E402

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
    runs = found["runs"]
    seeds = [seed for run in runs for seed in run["seeds"]]
    assert len(runs) >= 4 and len(set(seeds)) == len(seeds) >= 12 and found["own_base_models"]
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", table_under("Accuracy by round"), re.M))
    for m in {p.rpartition("_")[0] for run in runs for p in run["tests"]} & set(METHODS):
        points = points_of({"tests": runs[0]["tests"]}, m)
        assert rows[METHODS[m].NAME].split(" | ") == [over_runs(runs, p) for p in points.values()]
    for c in found["contrasts"]:
        again = pooled([list(of_run["per_seed"].values()) for of_run in c["runs"].values()])
        assert {k: c[k] for k in again} == again


def test_the_map_is_what_its_numbers_say():
    found = json.loads((ROOT / "results/map.json").read_text())
    assert (ROOT / "results/map.md").read_text() == make_map.as_text(found) + "\n"


def test_the_page_needs_nothing_beside_it():
    html = (ROOT / "results/report.html").read_text()
    assert re.findall(r'src="(?!data:image/png;base64,)', html) == []
    figures = (ROOT / "results/report.md").read_text().count("![")
    assert html.count("<img ") == figures >= 2


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
