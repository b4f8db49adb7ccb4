"""Run a plan of stages: skip what is complete, continue what was cut off, side by side.

    python -m core.stages run <plan          # what run_ilr.sh does, its settings exported

A stage starts when all that it reads is there. A stage without --out (the report) runs when all
before it are done. OUT/stages.jsonl has a row per finished stage: name, cost, outs, and what its
result depends on (arguments, versions, sources, inputs). FROM names another run folder: a stage
whose row there says the same is taken over, not run.

The cost is that of the process that finished the stage: wall seconds, CPU-seconds and, of a stage
with a model, GB of resident memory at most. A killed stage that went on has a row `begun` for each
start, and the cost of the last one only.
"""
import fcntl
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

from core import settings
from core.jobs import NEWS, STOPS, Failure, Job, launcher, set_environment
from core.made import Made, stale, take_over, would_be
from core.plan import below, portable, read_plan, there
from core.records import InputError, dumps, write_json, write_jsonl
from core.sources import changes, fingerprint
from core.unfinished import remove


class InUse(InputError):
    """Another run holds a lock."""


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
        os.set_inheritable(file.fileno(), True)
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
        self.try_endpoints(again)
        write_json(self.out / "config.json", config)
        for stage, why in again.items():
            self.say(f"note: {stage.name} is made again: {why}")
            self.before[stage] = [fingerprint(out) for out in stage.outs]
            for out in stage.outs:
                remove(out)

    def try_endpoints(self, again):
        """Ask every endpoint that a stage will ask one question, before anything is trained."""
        coming = outlook(self.stages, again, self.source)
        asked = [e for stage, what in coming.items()
                 if not what.startswith(("complete", "taken over")) for e in stage.endpoints()]
        for endpoint in {(e.url, e.model, e.prefix): e for e in asked}.values():
            try:
                endpoint.try_out()
            except OSError as e:
                raise OSError(f"asked once before anything is trained: {e}") from None

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
        self.record({**row, **work, "from": self.source.run})
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
            self.record({"stage": stage.name, **job.cost,
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
        deadline = time.monotonic() + 20
        for job in self.running.values():
            job.send(signal.SIGTERM)
        for job in self.running.values():
            job.wait(deadline)
            job.send(signal.SIGKILL)
            job.wait()

    def tidy(self):
        """All files are made: say how long that took, if nothing came between, and remove what a
        stage left that was killed between its last two steps."""
        if self.undisturbed:
            used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            self.record({"stage": "whole run", "seconds": int(time.monotonic() - self.began),
                         "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 1)})
            self.undisturbed = False
        for pattern in (".*.partial", ".*.partial.json", ".*.writing", ".*.taking"):
            for path in list(self.out.rglob(pattern)):
                remove(path)


# ---------------------------------------------------------------- what run_ilr.sh calls
def outlook(stages, again, source):
    """{stage: what will become of it}: complete, made again, with FROM taken over; "" if it runs.
    """
    settled, found = {}, {}     # settled: path -> where its content is found now
    for stage in stages:
        found[stage] = ""
        if stage in again:
            found[stage] = f"would be made again: {again[stage]}"
        elif stage.complete():
            found[stage] = "complete"
            settled.update({out: out for out in stage.outs})
        elif source and stage.outs and below(stage.outs[0], os.environ["OUT"]):
            found[stage] = would_be(stage, source, settled)
    return found


def dry_run(stages):
    """Print every stage's name and command; with FROM, whether it would be taken over."""
    made, source = Made(os.environ["OUT"]), None
    settings.check_config(os.environ["OUT"], settings.configuration(os.environ["PRESET"]))
    again = stale(stages, made)
    if os.environ["FROM"]:
        source = Made(os.environ["FROM"])
    for stage, what in outlook(stages, again, source).items():
        print(f"# [{stage.index + 1}/{len(stages)}] {stage.name}{what and ': '}{what}")
        print(shlex.join([*launcher(stage), *stage.words]))


def execute(stages):
    run, interrupted = Run(stages), []
    try:
        run.start()
    except KeyboardInterrupt:       # while a judge is tried
        return settings.fail("interrupted; the same command continues from here", 130)
    # only noted: an exception in the midst of starting a process would lose it
    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:       # nohup
            signal.signal(number, lambda *_: interrupted.append(True))
    try:
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
    result = run.out if stages[-1].outs else f"{run.out}/report.md"
    run.say(f"done in {seconds // 60} min {seconds % 60} s: {result}")
    return 0


def main(action, card=""):
    set_environment()       # before the plan imports the stages: an edited one may import torch
    try:
        source = os.environ["FROM"]
        if source and not there(Path(source) / "stages.jsonl"):
            raise InputError(f"FROM is '{source}': expected a run folder with a stages.jsonl")
        if source and Path(source).resolve() == Path(os.environ["OUT"]).resolve():
            raise InputError("FROM and OUT are the same folder: give OUT a new one")
        settings.settle_date()
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
