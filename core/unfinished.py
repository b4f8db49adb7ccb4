"""Unfinished work: what a killed stage leaves behind, and what its next start continues.

A stage that makes `out` keeps its work in `.{out}.partial` until it is complete, and beside it
`.{out}.partial.json`, which says what the work is: arguments, sources, inputs. Work of another
description is never continued.
"""
import fcntl
import json
import os
import shutil
from pathlib import Path

from core.distributed import first, rank
from core.records import InputError, dumps, write_text
from core.sources import changes, fingerprint, sources_of

UNKEYED = ("state_every",)      # arguments that change no result
locks = {}      # path of a description -> its open file, whose lock says that somebody is at work


def refuse_existing(out):
    if os.path.lexists(out):
        raise InputError(f"--out {out} exists: delete it, or choose another name")


def partial_path(script, out, args, inputs):
    """Where a stage keeps its unfinished work for `out`; what other work left there is removed.

    script: the stage's `__file__`; args: its arguments as a dict; inputs: the paths that it reads.
    The number of processes is no part of the description: another number continues.
    Raises InputError if `out` exists, or if another process is making it.
    """
    return first(lambda: _partial_path(script, out, args, inputs))


def _partial_path(script, out, args, inputs):
    refuse_existing(out)
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial")
    arguments = {f"--{k.replace('_', '-')}": json.loads(json.dumps(v, default=str))
                 for k, v in args.items() if k not in UNKEYED}
    now = {"arguments": arguments, "sources": sources_of(script, args.get("task")),
           "inputs": {str(path): fingerprint(path) for path in inputs}}
    note = describe(partial)
    out.parent.mkdir(parents=True, exist_ok=True)
    if note in locks:       # this process began it: only tests come back
        locks.pop(note).close()
    file = open(note, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"--out {out}: another process is making it") from None
    locks[note] = file
    file.seek(0)
    try:
        before = json.loads(file.read() or "{}")
    except ValueError:
        before = {}
    if before != now:
        if os.path.lexists(partial):
            why = changes(before, now) or "nothing says what it was"
            print(f"note: {out}: unfinished work is not continued, and removed: {why}")
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        file.truncate(0)
        file.write(json.dumps(now))
        file.flush()
    return partial


def describe(partial):
    """The file beside unfinished work that says what it is."""
    return partial.with_name(f"{partial.name}.json")


def finished(partial):
    """Forget the work that `partial_path` began: its result has its name now."""
    note = describe(partial)
    if note in locks:
        note.unlink(missing_ok=True)
        locks.pop(note).close()


class BatchLog:
    """Results appended batch by batch to a file; opened again, it keeps whole batches only.

    sizes: number of results in each batch, in the fixed order in which batches are made.
    `self.results` holds what is there already, `self.batches_done` how many batches that is.
    """

    def __init__(self, path, sizes):
        def read():
            if not path.exists():
                return []
            # errors="replace": a kill may have cut the last line, which is dropped, in a character
            return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        lines = first(read)
        self.batches_done = count = 0
        while self.batches_done < len(sizes) and count + sizes[self.batches_done] <= len(lines):
            count += sizes[self.batches_done]
            self.batches_done += 1
        self.results = [json.loads(line) for line in lines[:count]]
        self.path = path
        first(lambda: write_text(path, "".join(line + "\n" for line in lines[:count])))

    def append(self, results):
        """Results of one batch; all processes know them, the first writes them."""
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write("".join(dumps(r) + "\n" for r in results))
        self.results += results
