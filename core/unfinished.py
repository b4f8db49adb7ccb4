"""Unfinished work: what a killed stage leaves behind, and what its next start continues.

A stage that makes `out` keeps its work in `.{out}.partial` until it is complete, and beside it
`.{out}.partial.json`, which says what the work is: arguments, sources, inputs. Work of another
description is never continued.
"""
import datetime
import fcntl
import json
import os
import shutil
from pathlib import Path

from core.distributed import first, rank
from core.records import InputError, dumps, write_text
from core.sources import changes, fingerprint, sources_of

UNKEYED = ("state_every", "out")        # arguments that change no result
begun = {}      # unfinished work of this process -> what it is
locks = {}      # unfinished work that this process writes -> the open, locked file that says so


def refuse_existing(out):
    if os.path.lexists(out):
        raise InputError(f"--out {out} exists: delete it, or choose another name")


def partial_path(script, out, args, inputs):
    """Where a stage keeps its unfinished work for `out`; what other work left there is removed.

    script: the stage's `__file__`; args: its arguments as a dict; inputs: the paths that it reads.
    The number of processes is no part of the description: another number continues. Nothing is
    written before the stage has something to keep (`claim`).
    Raises InputError if `out` exists, or if another process is making it.
    """
    partial, day = first(lambda: _partial_path(script, out, args, inputs))
    if day:
        os.environ["ILR_DATE"] = day
    return partial


def _partial_path(script, out, args, inputs):
    refuse_existing(out)
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial")
    arguments = {f"--{k.replace('_', '-')}": json.loads(json.dumps(v, default=str))
                 for k, v in args.items() if k not in UNKEYED}
    given = os.environ.get("ILR_DATE")
    if args.get("chat_template"):       # the template may write the day
        arguments["ILR_DATE"] = given or str(datetime.date.today())
    now = {"arguments": arguments, "sources": sources_of(script, args.get("task")),
           "inputs": {str(path): fingerprint(path) for path in inputs}}
    begun[partial] = now
    release(partial)        # of an earlier start in this process
    if os.path.lexists(partial) or description(partial).exists():
        before = read_description(lock(partial))
        if "ILR_DATE" in arguments and not given:       # goes on with the day of its beginning
            day = before.get("arguments", {}).get("ILR_DATE")
            now = {**now, "arguments": {**arguments, "ILR_DATE": day}}
        why = changes(before, now) if before else "nothing says what it was"
        if not why:
            begun[partial] = before     # inputs may lie elsewhere than they did
        elif os.path.lexists(partial):
            print(f"note: {out}: unfinished work is not continued, and removed: {why}")
            remove(partial)
    return partial, begun[partial]["arguments"].get("ILR_DATE")


def claim(path):
    """Before a stage writes to its unfinished work, the file or folder `path` or a file in it: say
    beside it what it is, and hold it against other processes."""
    partial = path if path in begun else path.parent
    if partial not in begun:        # no stage's: a log of its own
        return
    file = lock(partial)
    if read_description(file) != begun[partial]:
        remove(partial)     # another command began and ended while this one was starting
        file.truncate(0)
        file.write(json.dumps(begun[partial]))
        file.flush()


def remove(path):
    """Delete a file, a link or a folder, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finished(partial):
    """Forget unfinished work: its result has its name now."""
    begun.pop(partial, None)
    description(partial).unlink(missing_ok=True)
    release(partial)


def description(partial):
    """The file beside unfinished work that says what it is."""
    return partial.with_name(f"{partial.name}.json")


def read_description(file):
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:      # new, or cut by a full disk
        return {}


def lock(partial):
    """The open description of unfinished work, locked until this process ends or releases it."""
    if partial not in locks:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = open(description(partial), "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"{partial}: another process is at work on it") from None
        locks[partial] = file
    return locks[partial]


def release(partial):
    if partial in locks:
        locks.pop(partial).close()


class BatchLog:
    """Results appended batch by batch to a file; opened again, it keeps whole batches only.

    sizes: number of results in each batch, in the fixed order in which batches are made.
    `self.results` holds what is there already, `self.batches_done` how many batches that is.
    """

    def __init__(self, path, sizes):
        def read():
            claim(path)
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
