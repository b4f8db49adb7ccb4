"""Run a plan of stages: skip what is complete, continue what was cut off, side by side.

    python -m core.stages run <plan          # what run_ilr.sh does, its settings exported

A stage starts when all that it reads is there. A stage without --out (the report) runs when all
before it are done. OUT/stages.jsonl has a row per finished stage: name, seconds, outs, and what
its result depends on (arguments, versions, sources, inputs). FROM names another run folder: a
stage whose row there says the same is taken over, not run.
"""
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core import settings
from core.adapters import carry_over
from core.plan import below, portable, read_plan, there
from core.records import InputError, dumps, write_json, write_jsonl
from core.sources import ADAPTER_CONFIG, changes, fingerprint
from core.unfinished import remove

SIDES = (".price", ".summary")      # what stands beside a file that a stage writes
LARGE = 1 << 20                     # bytes; a larger file is taken over by a hard link
NEWS = ("note: ", "metrics: ")      # lines of a stage that are shown while it runs
# What a stage of several processes says itself, among torchrun's words: its one-line error, the end
# of a trace, a signal.
OWN_WORDS = re.compile(r"[a-z]+\.py: error: |[A-Za-z]+Error: |  traceback : Signal")
BAD_INPUT = re.compile(r"^ +exitcode +: 2 ", re.M)       # in torchrun's words


# ---------------------------------------------------------------- what runs have made
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


# ---------------------------------------------------------------- running
class Run:
    """The plan at work: what is done, what runs, what is said."""

    def __init__(self, stages):
        self.stages, self.out = stages, Path(os.environ["OUT"])
        self.jobs = int(os.environ["JOBS"])
        if os.environ["NPROC"] != "1" or os.environ["JUDGE"] == "human":
            self.jobs = 1       # all GPUs are taken; a person answers one stage at a time
        self.began, self.said = time.monotonic(), 0
        self.running, self.slots = {}, list(range(1, self.jobs + 1))
        self.waiting = list(stages)
        self.made = Made(str(self.out))
        self.undisturbed = not self.made.rows
        self.source = Made(os.environ["FROM"]) if os.environ["FROM"] else None
        self.before = {}        # stages that are made again -> digests of what they had made
        self.own = set()        # stages that are not taken over
        self.on_terminal = sys.stderr.isatty()
        self.locks = []

    def say(self, text):
        if sys.stdout.isatty():       # wipe the bars below; they draw themselves again
            text = f"\r\033[J{text}"
        print(text, flush=True)

    def announce(self, stage, what=""):
        self.said += 1
        seconds = int(time.monotonic() - self.began)
        place = f"[{self.said}/{len(self.stages)} {seconds // 60}:{seconds % 60:02d}]"
        self.say(f"{place} {stage.name}{what}")

    def lock(self, path, refusal):
        """Hold a lock until this process and all that it has started are gone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InUse(refusal) from None
        self.locks.append(file)

    def start(self):
        """Everything that must be right before the first stage."""
        self.lock(self.out / ".lock", f"{self.out} is in use by another run (or a stage that one "
                  "left behind)")
        bases = {Path(s.outs[0]).parent for s in self.stages
                 if s.outs and not below(s.outs[0], str(self.out)) and not s.complete()}
        for folder in bases:
            self.lock(folder / ".lock", f"another run is training {folder}; start this one when "
                      "it has")
        if self.made.torn:
            write_jsonl(self.made.path, self.made.rows.values())
        now = settings.configuration(os.environ["PRESET"])
        config = settings.check_config(self.out, now)
        again = stale(self.stages, self.made)
        write_json(self.out / "config.json", config)
        for stage, why in again.items():
            self.say(f"note: {stage.name} is made again: {why}")
            self.before[stage] = [fingerprint(out) for out in stage.outs]
            for out in stage.outs:
                remove(out)

    def ready(self):
        """The stages that can start now, those on the longest way first."""
        unfinished = {*self.waiting, *self.running}
        found = [s for s in self.waiting if not any(n in unfinished for n in s.needs)]
        return sorted(found, key=lambda s: (-s.depth if self.jobs > 1 else 0, s.index))

    def advance(self):
        """Start or finish what can be. Returns whether anything is left."""
        for stage in self.ready():
            if stage.complete():
                self.check_inputs(stage)
                self.announce(stage, ": complete")
            elif self.taken_over(stage):
                pass
            elif self.has_room(stage):
                self.begin(stage)
            else:
                continue
            self.waiting.remove(stage)
        for stage, job in list(self.running.items()):
            for line in job.news():
                self.say(f"    {line}")
            if job.poll() is not None:
                del self.running[stage]
                self.end(stage, job)
        return bool(self.waiting or self.running)

    def check_inputs(self, stage):
        """Refuse what is complete and was made from other files than there are now."""
        inputs = self.made.rows.get(stage.name, {}).get("inputs")
        why = inputs is not None and changes({"inputs": inputs}, {"inputs": stage.inputs()})
        if why:
            raise InputError(f"{stage.name} was made from other files: {why}. Delete "
                             f"{' '.join(stage.outs)} to make it again, or restore them")

    def has_room(self, stage):
        if self.jobs == 1:      # strictly one after the other
            return not self.running
        return stage.light or bool(self.slots)

    def taken_over(self, stage):
        row = self.source and self.source.rows.get(stage.name)
        if not row or "seconds" not in row or stage in self.own:
            return False
        if not below(stage.outs[0], str(self.out)):     # base models are kept where they are
            return False
        work = stage.work(stage.inputs())
        why = changes(row, work)
        if not why and not all(there(self.source.place(out)) for out in stage.outs):
            why = "its files are gone"
        if why:
            self.say(f"note: {stage.name} is not taken over: {why}")
            self.own.add(stage)
            return False
        take_over(stage, self.source)
        self.undisturbed = False
        self.record({**row, "from": self.source.run})
        self.announce(stage, f": taken over from {self.source.run}")
        return True

    def begin(self, stage):
        if not stage.outs:
            self.tidy()
        slot = 0 if stage.light else self.slots.pop(0)
        self.announce(stage)
        self.running[stage] = job = Job(self, stage, slot)
        if stage.outs:      # what it is, should it outlive this process
            self.record({"stage": stage.name, "begun": True, **job.work})

    def end(self, stage, job):
        if job.slot:
            self.slots.append(job.slot)
            self.slots.sort()
        text = job.output()
        lines = text.splitlines()
        if stage.outs:      # its summary; log.txt has all
            self.log(text)
            lines = [f"    {line}" for line in lines[-1:] if not line.startswith(NEWS)]
        for line in lines:
            self.say(line)
        if job.poll() != 0:
            raise Failure(stage, job)
        if stage.script.startswith("tasks/"):
            os.replace(job.folder, stage.outs[0])
            job.work = stage.work(stage.inputs())       # it may have filled its own --data-dir
        now = [fingerprint(out) for out in stage.outs]
        if self.before.get(stage, now) != now and any(stage in s.needs and s.complete()
                                                      for s in self.stages):
            raise InputError(f"{stage.name} comes out otherwise than what {self.out} was made "
                             f"from: FROM={self.out} OUT={self.out}_2 bash run_ilr.sh")
        if stage.outs:
            self.record({"stage": stage.name, "seconds": round(job.seconds(), 1),
                         "outs": [portable(out).removeprefix("OUT/") for out in stage.outs],
                         **job.work})

    def log(self, text):
        with open(self.out / "log.txt", "a", encoding="utf-8") as f:
            f.write(text)

    def record(self, row):
        with open(self.out / "stages.jsonl", "a", encoding="utf-8") as f:
            f.write(dumps(row) + "\n")

    def stop(self):
        """End what still runs."""
        for job in self.running.values():
            job.process.terminate()
        deadline = time.monotonic() + 20
        for job in self.running.values():
            try:
                job.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()

    def tidy(self):
        """All files are made: say how long that took, if nothing came between, and remove what a
        stage left that was killed between its last two steps."""
        if self.undisturbed:
            self.record({"stage": "whole run", "seconds": int(time.monotonic() - self.began)})
            self.undisturbed = False
        for pattern in (".*.partial", ".*.partial.json", ".*.writing", ".*.taking"):
            for path in list(self.out.rglob(pattern)):
                remove(path)


class Job:
    """A stage's process."""

    def __init__(self, run, stage, slot):
        self.stage, self.slot, self.began = stage, slot, time.monotonic()
        self.work = stage.work(stage.inputs()) if stage.outs else {}
        words = list(stage.words)
        if stage.script.startswith("tasks/"):       # a task writes a folder: named when complete
            out = Path(stage.outs[0])
            self.folder = out.with_name(f".{out.name}.partial")
            remove(self.folder)
            words = [str(self.folder) if w == stage.outs[0] else w for w in words]
        command = [*launcher(stage), *words]
        if stage.outs:
            run.log(f"$ {shlex.join(command)}\n")
        nice = 10 if stage.depth <= 2 else 0        # a training that only its test answers await
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ["THREADS"],
                       "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
                       "PYTHONUNBUFFERED": "1"}
        if run.on_terminal:
            environment.update(TQDM_POSITION=str(slot), TQDM_LEAVE="")
        self.out, self.err, self.shown = tempfile.TemporaryFile(), tempfile.TemporaryFile(), 0
        self.process = subprocess.Popen(
            ["nice", "-n", str(nice), *command], stdin=subprocess.DEVNULL, stdout=self.out,
            stderr=None if run.on_terminal else self.err, env=environment,
            pass_fds=[file.fileno() for file in run.locks])

    def poll(self):
        return self.process.poll()

    def seconds(self):
        return time.monotonic() - self.began

    def output(self):
        return read_all(self.out)

    def news(self):
        """The lines since the last call that are shown at once."""
        lines = self.output().split("\n")[:-1]
        start, self.shown = self.shown, len(lines)
        return [line for line in lines[start:] if line.startswith(NEWS)]

    def errors(self):
        """The last lines of what it said; of several processes their own words, not torchrun's."""
        lines = read_all(self.err).replace("\r", "\n").splitlines()
        own = [line for line in lines if OWN_WORDS.match(line)]
        return own if own and os.environ["NPROC"] != "1" else lines[-5:]

    def status(self):
        """The exit code; torchrun's own is always 1."""
        several = os.environ["NPROC"] != "1"
        if several and BAD_INPUT.search(read_all(self.err)):
            return 2
        return self.poll() if self.poll() >= 0 else 1

    def ending(self):
        """How it ended, in words."""
        code = self.poll()
        if code >= 0:
            return f"failed (exit {self.status()})"
        return f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")


def read_all(file):
    """The text of a file that another process writes: its place in the file stays where it is."""
    fd = file.fileno()
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


class Failure(Exception):
    """A stage has ended with another exit code than 0."""

    def __init__(self, stage, job):
        super().__init__(stage.name)
        self.stage, self.job = stage, job


class InUse(InputError):
    """Another run holds a lock."""


def launcher(stage):
    """The words that start a stage: the interpreter, or what starts several processes."""
    python, nproc = os.environ["PYTHON"], os.environ["NPROC"]
    if nproc == "1" or not stage.needs_model:
        return [python]
    if os.environ["LAUNCH"]:
        return shlex.split(os.environ["LAUNCH"])
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc]


# ---------------------------------------------------------------- what run_ilr.sh calls
def dry_run(stages):
    """Print every stage's name and command; with FROM, whether it would be taken over."""
    made, source = Made(os.environ["OUT"]), None
    settings.check_config(os.environ["OUT"], settings.configuration(os.environ["PRESET"]))
    again = stale(stages, made)
    if os.environ["FROM"]:
        source = Made(os.environ["FROM"])
    settled = {}        # path -> where its content is found now
    for stage in stages:
        what = ""
        if stage in again:
            what = f": would be made again: {again[stage]}"
        elif stage.complete():
            what = ": complete"
            settled.update({out: out for out in stage.outs})
        elif source and stage.outs and below(stage.outs[0], os.environ["OUT"]):
            what = f": {would_be(stage, source, settled)}"
        print(f"# [{stage.index + 1}/{len(stages)}] {stage.name}{what}")
        print(shlex.join([*launcher(stage), *stage.words]))


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


def execute(stages):
    run, interrupted = Run(stages), []
    # only noted: an exception in the midst of starting a process would lose it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: interrupted.append(True))
    try:
        run.start()
        while run.advance() and not interrupted:
            time.sleep(0.02)
        if interrupted:
            run.stop()
            return settings.fail("interrupted; the same command continues from here", 130)
        run.tidy()
    except Failure as failure:
        job, status = failure.job, failure.job.status()
        if not run.on_terminal and not interrupted:
            print("\n".join(job.errors()), file=sys.stderr)
        run.stop()
        again = "" if status == 2 else "; the same command continues from here"
        if interrupted or status == 130:
            return settings.fail(f"interrupted{again}", 130)
        return settings.fail(f"stage {failure.stage.name} {job.ending()}{again}", status)
    except BaseException:
        run.stop()
        raise
    seconds = int(time.monotonic() - run.began)
    run.say(f"done in {seconds // 60} min {seconds % 60} s: {run.out}/report.md")
    return 0


def main(action, card=""):
    try:
        source = os.environ["FROM"]
        if source and not there(Path(source) / "stages.jsonl"):
            raise InputError(f"FROM is '{source}': expected a run folder with a stages.jsonl")
        if source and Path(source).resolve() == Path(os.environ["OUT"]).resolve():
            raise InputError("FROM and OUT are the same folder: give OUT a new one")
        stages = read_plan(sys.stdin.read())
        if action == "dry-run":
            return dry_run(stages)
        if action == "estimate":
            from core.estimate import estimate
            return estimate(stages, card)
        if os.environ["JUDGE"] == "human":
            try:
                open("/dev/tty").close()
            except OSError:
                raise InputError("JUDGE=human needs a terminal") from None
        return execute(stages)
    except InputError as e:
        return settings.fail(e, 1 if isinstance(e, InUse) else 2)
    except BrokenPipeError:     # `| head`: nobody reads on
        sys.stdout = open(os.devnull, "w")
        return 1
    except OSError as e:
        return settings.fail(e, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
