"""The kill test at its smallest: two kills, one of the whole run and one of run_ilr.sh alone."""
import pytest
from kill_test import TINY, contents, differences, finished_run, killed_run, print_table

pytestmark = pytest.mark.slow


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    out, bases = finished_run()
    rows = killed_run(tmp_path / "run", tmp_path / "bases", kills=2, seed=3, wait=4.0,
                      leader_every=2, **TINY, STATE_EVERY=0.2)
    print_table(rows)
    assert [row[1] for row in rows] == ["everything", "run_ilr.sh alone"]
    assert "NOT" not in rows[1][3]
    assert differences(contents(out), contents(tmp_path / "run")) == []
    assert differences(contents(bases), contents(tmp_path / "bases")) == []
