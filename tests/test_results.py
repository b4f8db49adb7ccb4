"""results/ is one run's report; README's tables are its tables. `PYTHONPATH=. python tests/test_results.py` writes them into README."""
import json
import re
from pathlib import Path

import evaluate
from tasks._methods import METHODS, points_of

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(?<=<!-- results: )(.*?) -->\n.*?<!-- end -->", re.S)


def table_under(heading):
    """The first table below a heading of results/report.md."""
    below = (ROOT / "results/report.md").read_text().partition(f"## {heading}\n")[2]
    return re.search(r"(?:^\|.*\n)+", below, re.M)[0]


def filled(readme):
    return TABLE.sub(lambda block: f"{block[1]} -->\n{table_under(block[1])}<!-- end -->", readme)


def test_readme_has_the_tables_of_the_report():
    readme = (ROOT / "README.md").read_text()
    assert TABLE.search(readme) and filled(readme) == readme, "PYTHONPATH=. python tests/test_results.py writes README's tables anew"


def test_the_report_has_the_numbers_of_its_json():
    found = json.loads((ROOT / "results/report.json").read_text())
    assert len(found["seeds"]) >= 5
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", table_under("Accuracy by round"), re.M))
    for m in {p.rpartition("_")[0] for p in found["tests"]} & set(METHODS):
        cells = [evaluate.cell(found["tests"][p]) for p in points_of(found, m).values()]
        assert rows[METHODS[m][0]].split(" | ")[:len(cells)] == cells
    for claim in found["claims"]:
        assert evaluate.sentence(claim) in (ROOT / "results/report.md").read_text()


def test_the_page_needs_nothing_beside_it():
    html = (ROOT / "results/report.html").read_text()
    assert re.findall(r'src="(?!data:image/png;base64,)', html) == [] and html.count("<img ") == len(list((ROOT / "results").glob("*.png"))) >= 4


if __name__ == "__main__":
    (ROOT / "README.md").write_text(filled((ROOT / "README.md").read_text()))
