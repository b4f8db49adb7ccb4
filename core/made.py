"""What a run folder holds: the rows of its stages.jsonl, what of it is stale, taking it over."""
import contextlib
import json
import os
import shutil
from pathlib import Path

from core.adapters import carry_over
from core.plan import below, there
from core.records import InputError
from core.sources import ADAPTER_CONFIG, changes
from core.unfinished import remove

SIDES = (".price", ".summary")      # what stands beside a file that a stage writes
LARGE = 1 << 20                     # bytes; a larger file is taken over by a hard link


class Made:
    """The rows of a run folder's stages.jsonl, by stage; of several the last."""

    def __init__(self, run):
        self.run = run
        self.path = Path(run) / "stages.jsonl"
        self.rows, self.torn = {}, False
        text = self.path.read_text("utf-8", "replace") if there(self.path) else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self.rows[row["stage"]] = row
            except (ValueError, TypeError, KeyError):       # a full disk or a kill has cut it
                self.torn = True

    def place(self, path):
        """The same file in this run folder."""
        return self.run + path[len(os.environ["OUT"]):] if below(path, os.environ["OUT"]) else path


def stale(stages, made):
    """{stage: why} of the stages of this run folder that have to be made again: what evaluate.py
    made with other source, and what was cut off between its files.

    Another stage whose command or source is another one now: InputError, which says how to go on.
    """
    again, refused = {}, []
    for stage in stages:
        row = made.rows.get(stage.name)
        if not row or "arguments" not in row or not any(there(out) for out in stage.outs):
            continue
        now = stage.work(row["inputs"])
        why = changes(row, now)
        if not why:
            continue
        grades = stage.script == "evaluate.py" and row["arguments"] == now["arguments"]
        if grades or not stage.complete():
            again[stage] = why
        else:
            refused.append(f"{stage.name} ({why})")
    if refused:
        more = f" and {len(refused) - 1} more stages" if refused[1:] else ""
        out = os.environ["OUT"]
        raise InputError(f"{out} holds {refused[0]}{more}: restore what changed, or take over what "
                         f"did not: FROM={out} OUT={out}_2 bash run_ilr.sh")
    return again


def take_over(stage, source):
    """Bring what a stage made in another run folder here: large files linked, small ones copied."""
    for out in stage.outs:
        old = source.place(out)
        for side in SIDES:
            remove(out + side)
            if there(old + side):
                bring(old + side, out + side, source.run)
        bring(old, out, source.run)


def bring(old, new, run):
    """A copy of a file, a folder or a link of a run; `new` has its name only when it is complete.
    """
    def copy(a, b):
        if os.path.basename(a) == ADAPTER_CONFIG:
            return carry_over(a, b, run)
        if os.path.getsize(a) > LARGE:
            with contextlib.suppress(OSError):       # another file system, or one without links
                os.link(a, b)
                return
        shutil.copy2(a, b)
    new = Path(new)
    if there(new):
        return
    partial = new.with_name(f".{new.name}.taking")
    new.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    if os.path.islink(old):
        os.symlink(os.readlink(old), partial)
    elif os.path.isdir(old):
        shutil.copytree(old, partial, symlinks=True, copy_function=copy)
    else:
        copy(old, partial)
    partial.replace(new)


def would_be(stage, source, settled):
    row = source.rows.get(stage.name)
    if not row or "seconds" not in row:
        return f"new, {source.run} has no such stage"

    def place(path):
        for folder in (path, *map(str, Path(path).parents)):
            if folder in settled:
                return settled[folder] + path[len(folder):]
        return path
    open_ones = [n.name for n in stage.needs if not any(out in settled for out in n.outs)]
    inputs = row["inputs"] if open_ones else stage.inputs(place)
    why = changes(row, stage.work(inputs))
    if why:
        return f"would run: {why}"
    if open_ones:
        return f"taken over if {open_ones[0]} comes out as it was"
    settled.update({out: source.place(out) for out in stage.outs})
    return f"taken over from {source.run}"
