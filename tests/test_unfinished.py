"""Unfinished work: what is continued, what is not and why, and who may work on it."""
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from core import sources, unfinished
from core.records import InputError
from core.unfinished import BatchLog, claim, finished, partial_path

SCRIPT = str(ROOT / "sft.py")


@pytest.fixture
def files(tmp_path):
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    data.write_text("{}\n")
    model.mkdir()
    (model / "config.json").write_text("{}")
    return tmp_path / "out", data, model


def begin(out, data, model, **args):
    """Unfinished work for `out`, as a killed stage leaves it."""
    partial = partial_path(SCRIPT, out, {"lr": 1, "state_every": 5, **args}, [data, model])
    claim(partial)
    partial.mkdir(exist_ok=True)
    return partial


def test_the_same_work_is_continued(files, capsys):
    partial = begin(*files)
    (partial / "state").write_text("x")
    assert begin(*files, state_every=9) == partial and (partial / "state").exists()
    files[1].touch()        # content counts, not time
    assert begin(*files) == partial and (partial / "state").exists()
    assert capsys.readouterr().out == ""


def test_work_is_continued_where_a_copy_of_it_lies(files, capsys):
    """The run folder was moved, and its inputs with it."""
    partial = begin(*files, where=str(files[1]))
    (partial / "state").write_text("x")
    top = files[0].parent
    shutil.copytree(top, top / "copy", copy_function=shutil.copyfile)
    copies = [top / "copy" / path.name for path in files]
    for path in files[1:]:
        path.rename(path.with_name(f"old_{path.name}"))
    moved = begin(*copies, where=str(copies[1]))
    assert (moved / "state").exists() and capsys.readouterr().out == ""
    finished(moved)
    copies[1].write_text("[]\n")        # as long as it was
    begin(*copies, where=str(copies[1]))
    assert not (moved / "state").exists() and "is not continued" in capsys.readouterr().out


@pytest.mark.parametrize("change, why", [
    (lambda out, data, model: {"lr": 2}, "--lr was 1, is 2"),
    (lambda out, data, model: {"new_flag": "x"}, "--new-flag was None, is x"),
    (lambda out, data, model: data.write_text("{} \n") and {}, "data.jsonl has changed"),
    (lambda out, data, model: (model / "config.json").write_text("{1}") and {},
     "model has changed")], ids=["argument", "new argument", "data", "model"])
def test_other_work_is_not_continued_and_says_why(change, why, files, capsys):
    partial = begin(*files)
    (partial / "state").write_text("x")
    begin(*files, **change(*files))
    assert list(partial.iterdir()) == []
    said = capsys.readouterr().out
    assert said.startswith(f"note: {files[0]}: unfinished work is not continued, and removed: ")
    assert why in said and len(said.splitlines()) == 1
    (partial / "state").write_text("y")
    begin(*files, **change(*files))         # and now that work is what is continued
    assert (partial / "state").exists()


def test_work_of_other_sources_is_not_continued(files, capsys, monkeypatch):
    begin(*files)
    real = sources.sources_of(SCRIPT)
    edited = {**real, "core/packing.py": "0" * 12}
    monkeypatch.setattr(unfinished, "sources_of", lambda *_: edited)
    begin(*files)
    assert "core/packing.py has changed" in capsys.readouterr().out


def test_a_leftover_that_nothing_describes_is_removed(files, capsys):
    partial = begin(*files)
    (partial / "state").write_text("x")
    note = partial.with_name(f"{partial.name}.json")
    note.write_text('{"argum')      # cut by a full disk
    begin(*files)
    assert not (partial / "state").exists() and "is not continued" in capsys.readouterr().out
    assert json.loads(note.read_text())["arguments"] == {"--lr": 1}


def test_nobody_works_on_what_another_process_is_making(files):
    out, data, model = files
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from core.unfinished import *;"
            "claim(partial_path(*sys.argv[2:4], {'lr': 1}, sys.argv[4:]));"
            "print('at work', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, ROOT, SCRIPT, out, data, model], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "at work\n"
        with pytest.raises(InputError, match="another process is at work on it"):
            begin(*files)
        other.stdin.close()
    begin(*files)


def test_bad_input_leaves_nothing(files):
    out, data, model = files
    partial_path(SCRIPT, out.parent / "new/folder/out", {}, [data])      # and then the data is bad
    assert sorted(p.name for p in out.parent.iterdir()) == ["data.jsonl", "model"]


def test_nothing_is_left_when_the_work_is_finished(files):
    partial = begin(*files)
    partial.rename(files[0])
    finished(partial)
    assert sorted(p.name for p in files[0].parent.iterdir()) == ["data.jsonl", "model", "out"]
    with pytest.raises(InputError, match="exists"):
        begin(*files)


# ---------------------------------------------------------------- what a result depends on
def test_sources_are_the_files_that_a_stage_really_imports():
    found = sources.sources_of(SCRIPT, "arithmetic")
    assert {"sft.py", "core/packing.py", "core/records.py", "tasks/__init__.py",
            "tasks/arithmetic.py"} <= set(found)
    assert not {"dpo.py", "evaluate.py", "tasks/bird.py", "core/human.py"} & set(found)
    assert "tasks/arithmetic.py" not in sources.sources_of(SCRIPT)
    assert not any(name.startswith("report") for name in sources.sources_of(ROOT / "evaluate.py"))
    assert "refine.py" in sources.sources_of(ROOT / "baselines/filter.py")
    assert all(len(digest) == 12 for digest in found.values())


def test_data_beside_a_task_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "tasks").mkdir()
    for name in ("mine.py", "mine.json", "mine_words.txt", "mineral.py"):
        (tmp_path / "tasks" / name).write_text("")
    (tmp_path / "x.py").write_text("")
    assert set(sources.sources_of(tmp_path / "x.py", "mine")) == {
        "x.py", "tasks/mine.py", "tasks/mine.json", "tasks/mine_words.txt"}


def test_fingerprints_tell_content_and_names(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "x").mkdir(parents=True)
        (folder / "x/file").write_text("1")
    assert sources.fingerprint(a) == sources.fingerprint(b) != ""
    (b / "x/file").rename(b / "file")
    assert sources.fingerprint(a) != sources.fingerprint(b)
    assert sources.fingerprint(tmp_path / "none") == ""
    (b / "file").write_text("2")
    assert sources.fingerprint(b / "file") != sources.fingerprint(a / "x/file")


def test_fingerprints_follow_links_and_leave_out_what_is_hidden(tmp_path):
    """A folder of data may link to others; .DS_Store and a hub's .cache come and go."""
    real, folder = tmp_path / "elsewhere", tmp_path / "data"
    real.mkdir()
    folder.mkdir()
    (real / "db.sqlite").write_text("1")
    (folder / "databases").symlink_to(real)
    (real / "loop").symlink_to(folder)
    before = sources.fingerprint(folder)
    (folder / ".cache").mkdir()
    for name in (".DS_Store", ".cache/metadata"):
        (folder / name).write_text("x")
    assert sources.fingerprint(folder) == before
    (real / "db.sqlite").write_text("2")
    assert sources.fingerprint(folder) != before


def test_every_line_of_a_large_file_of_records_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 1)
    monkeypatch.setattr(sources, "BLOCK", 1)
    path = tmp_path / "x.jsonl"
    path.write_bytes(bytes(2000))
    before = sources.fingerprint(path)
    path.write_bytes(bytes(1001) + b"1" + bytes(998))
    assert sources.fingerprint(path) != before


def test_what_lies_elsewhere_is_the_same_input_and_a_hub_name_is_not():
    def work(path, digest, **more):
        return {"arguments": {"--data": f"{path} OUT/x", "--model": path, **more},
                "inputs": {path: digest, "OUT/x": "2"}}
    assert sources.changes(work("/a", "1"), work("/b", "1")) == ""
    assert "--data was /a OUT/x, is /b OUT/x" in sources.changes(work("/a", "1"), work("/b", "3"))
    assert sources.changes(work("hub/a", ""), work("hub/b", "")) != ""
    # two that have changed places
    both = [{"arguments": {"--a": f"/{x}", "--b": f"/{y}"}, "inputs": {f"/{x}": m, f"/{y}": n}}
            for x, y, m, n in (("p", "q", "1", "2"), ("r", "s", "2", "1"))]
    assert sources.changes(*both) != ""


def test_a_large_file_is_known_by_blocks_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 1)
    monkeypatch.setattr(sources, "BLOCK", 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(2000))
    before = sources.fingerprint(path)
    path.touch()
    assert sources.fingerprint(path) == before
    for content in (bytes(2001), b"1" + bytes(1999), bytes(1999) + b"1"):
        path.write_bytes(content)
        assert sources.fingerprint(path) != before


# ---------------------------------------------------------------- batches
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
