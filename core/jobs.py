"""A stage's process: how it starts, what it says, how it ends, what it cost.

Importing torch and transformers takes longer than many stages work. So the runner imports them once
and begins every stage with a model as a copy of itself (os.fork), in which the stage's script runs
as `python SCRIPT` would run it: from the source that is on disk now, with arguments, output and
signals of its own. Where that is not safe (`can_fork`), and for stages without a model, a new
interpreter starts.
"""
import atexit
import contextlib
import functools
import gc
import importlib
import os
import re
import runpy
import shlex
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from core.cli import short
from core.sources import ROOT
from core.unfinished import remove

NEWS = ("note: ", "metrics: ")      # lines of a stage that are shown while it runs
# What a stage of several processes says itself, among torchrun's words: its one-line error, the end
# of a trace, a signal.
OWN_WORDS = re.compile(r"[a-z]+\.py: error: |[A-Za-z]+Error: |  traceback : Signal")
BAD_INPUT = re.compile(r"^ +exitcode +: 2 ", re.M)       # in torchrun's words
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)   # what ends a run, and its stages
# Parts of transformers that every stage with a model imports.
SHARED = ("AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast", "PreTrainedModel",
          "GenerationMixin", "ProcessorMixin")


def set_environment():
    """What every stage finds in its environment. Before torch is imported: OpenMP reads it then."""
    os.environ.update(OMP_NUM_THREADS=os.environ["THREADS"], TOKENIZERS_PARALLELISM="false",
                      HF_HUB_DISABLE_TELEMETRY="1", PYTHONUNBUFFERED="1")


class Job:
    """A stage's process. When it has ended, `cost` has its seconds, CPU-seconds and peak memory."""

    def __init__(self, run, stage, slot):
        self.stage, self.slot = stage, slot
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
        nice = 10 if stage.depth <= 2 else 0    # only its own test answers wait for this training
        self.out, self.err, self.shown = tempfile.TemporaryFile(), tempfile.TemporaryFile(), 0
        files, variables = {1: self.out.fileno(), 2: self.err.fileno()}, {}
        if run.on_terminal:
            del files[2]
            variables = {"TQDM_POSITION": str(slot), "TQDM_LEAVE": ""}
        forks = stage.needs_model and can_fork()
        self.began, self.code, self.cost = time.monotonic(), None, {}
        if forks:
            self.pid = fork(words, nice, variables, files, stage.name)
        else:
            self.pid = spawn(command, nice, variables, files)

    def poll(self):
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.cost = {"seconds": round(time.monotonic() - self.began, 1),
                             "cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}
                if self.stage.needs_model:      # else Linux reports the runner's own peak
                    unit = 1 if sys.platform == "darwin" else 1024
                    self.cost["peak_gb"] = round(used.ru_maxrss * unit / 1e9, 3)
        return self.code

    def send(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, deadline=float("inf")):
        """Wait until it has ended, or until time.monotonic() is `deadline`."""
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

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


class Failure(Exception):
    """A stage has ended with another exit code than 0."""

    def __init__(self, stage, job):
        super().__init__(stage.name)
        self.stage, self.job = stage, job


def read_all(file):
    """The text of a file that another process writes: its place in the file stays where it is."""
    fd = file.fileno()
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


def launcher(stage):
    """The words that start a stage: the interpreter, or what starts several processes."""
    python, nproc = os.environ["PYTHON"], os.environ["NPROC"]
    if nproc == "1" or not stage.needs_model:
        return [python]
    if os.environ["LAUNCH"]:
        return shlex.split(os.environ["LAUNCH"])
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", nproc]


# ---------------------------------------------------------------- a new interpreter
def spawn(command, nice, variables, files):
    """Start a command; returns its process id.

    variables: more of the environment; files: {1 or 2: the open file that it writes to}.
    """
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
               *((os.POSIX_SPAWN_DUP2, file, fd) for fd, file in files.items())]
    return os.posix_spawnp(
        "nice", ["nice", "-n", str(nice), *command], {**os.environ, **variables},
        file_actions=actions, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])   # Python ignores them


# ---------------------------------------------------------------- a copy of this one
@functools.cache
def can_fork():
    """Whether stages with a model may start as copies of this process; if so, it imports what
    they need.

    Only on Linux, since macOS's libraries do not survive a fork, and without an accelerator, since
    its driver does not. Importing starts no thread of OpenMP: they come with the first large
    operation, of which there is none before the fork.
    """
    if sys.platform != "linux" or os.environ["NPROC"] != "1":
        return False
    if "torch" in sys.modules:      # a stage imports it at its top, and may have started threads
        return False
    gc.disable()        # what is imported stays anyway
    try:
        import torch
        if torch.accelerator.is_available():
            return False
        import transformers
        return all(getattr(transformers, name) for name in SHARED) and threading.active_count() == 1
    except Exception:       # the stage says what is wrong
        return False
    finally:
        gc.freeze()     # a collection would write to, and so copy, the memory that copies share
        gc.enable()


def fork(words, nice, variables, files, name):
    """Run a script with its arguments, `words`, in a copy of this process; returns its id.

    name: what `ps` and `top` call it; the others as `spawn`.
    """
    sys.stdout.flush()      # else the copy writes it too
    # signals are held back until the copy has its own handlers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = exit_code(lambda: become(words, nice, variables, files, name, before))
        finally:
            os._exit(code & 255)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def become(words, nice, variables, files, name, mask):
    """In the copy: run the script as `python SCRIPT` does."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for fd, file in {0: os.open(os.devnull, os.O_RDONLY), **files}.items():
        os.dup2(file, fd)
    sys.stdout.reconfigure(line_buffering=True)
    os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(short(name))
    os.environ.update(variables)
    for module in list(filter(rereads, sys.modules)):
        del sys.modules[module]
    importlib.invalidate_caches()
    script = os.path.abspath(words[0])
    sys.argv, sys.path[0] = words, os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def rereads(name):
    """Whether the copy imports a module anew: this project's, whose source may have changed, and
    tqdm, which reads TQDM_POSITION when it is imported."""
    path, file = f"{ROOT}/{name.replace('.', '/')}", getattr(sys.modules[name], "__file__", None)
    return file in (f"{path}.py", f"{path}/__init__.py") or name.partition(".")[0] == "tqdm"


def exit_code(run):
    """run() to its end, then what Python does at its own: the code that it would exit with."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()       # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
