"""BatchLog: whole batches are kept, an incomplete one is dropped."""
import json

import pytest

from core.unfinished import BatchLog


@pytest.mark.parametrize("kept, batches", [(0, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 3)])
def test_batch_log_drops_an_incomplete_batch(tmp_path, kept, batches):
    sizes, path = [3, 2, 1], tmp_path / "log"
    path.write_text("".join(f"[{i}]\n" for i in range(kept)) + "[9")     # the last line was cut
    log = BatchLog(path, sizes)
    whole = sum(sizes[:batches])
    assert log.batches_done == batches and log.results == [[i] for i in range(whole)]
    for size in sizes[batches:]:
        log.append([["é"]] * size)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == log.results
    assert len(log.results) == 6 and BatchLog(path, sizes).batches_done == 3
