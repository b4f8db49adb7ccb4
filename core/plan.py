"""A plan: the stages of a run, what each of them reads and writes, what its result depends on.

run_ilr.sh writes a plan, a line per stage: its name, its script and the script's arguments, with
the character 0x1f between. What a stage writes is what its --out names; what it reads are the
other paths among its arguments.
"""
import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

from core import settings
from core.judge import NO_MODEL
from core.records import InputError
from core.sources import fingerprint, sources_of

# Endings of the ILR_* variables, which stages read, that change no result.
NO_MATTER = ("_KEY", "_CACHE", "_CONCURRENCY", "_MAX_TOKENS")
LIGHT = ("refine.py", "evaluate.py", "tasks/", "baselines/", "core/")    # no model computes


class Stage:
    """One command of the plan."""

    def __init__(self, index, name, words):
        self.index, self.name, self.words = index, name, words
        self.script = words[0]
        self.light = self.script.startswith(LIGHT)
        self.args = args = parsed(name, words)
        outs = getattr(args, "out", None) or []
        self.outs = [outs] if isinstance(outs, str) else list(outs)
        # a judge that is no model of ours needs no launcher
        judge = getattr(args, "judge", None) or ""
        self.needs_model = not self.light and not (
            self.script == "compare.py" and (judge in NO_MODEL or judge.startswith("http")))
        self.task = getattr(args, "task", None)
        self.reads = [path for path in paths_of(args) if path not in self.outs]
        if hasattr(args, "method") and self.script.startswith("baselines/"):
            module = importlib.import_module("baselines").load(args.method)
            if hasattr(module, "reads"):
                files = module.reads(Path(args.run), args.round, Path(args.start))
                self.reads += [str(path) for _, path in files]
        if not self.outs:       # it reads what there is, whenever it runs
            self.reads = []
        self.needs = []         # stages that make what it reads
        self.depth = 0          # model stages on the longest way from here to the end of the plan

    def complete(self):
        return bool(self.outs) and all(os.path.lexists(out) for out in self.outs)

    def endpoints(self):
        """The endpoints that it asks, as its script says."""
        module = sys.modules.get(self.script.removesuffix(".py"))
        return module.endpoints(self.args) if hasattr(module, "endpoints") else []

    def inputs(self, place=lambda path: path):
        """{path as any run folder has it: digest} of what it reads; place(path): where it is."""
        return {portable(path): fingerprint(place(path)) for path in self.reads}

    def work(self, inputs):
        """What the result depends on, as `core.sources.changes` compares it."""
        words = list(self.words[1:])
        if "--state-every" in words:
            at = words.index("--state-every")
            del words[at:at + 2]
        arguments = {}
        for word in words:       # flag -> its values, in one text
            if word.startswith("--"):
                flag = word
                arguments[flag] = ""
            else:
                flag = flag if arguments else "words"
                arguments[flag] = f"{arguments.get(flag, '')} {portable(word)}".strip()
        arguments.update({name: value for name, value in sorted(os.environ.items())
                          if name.startswith("ILR_") and not name.endswith(NO_MATTER)
                          and (name != "ILR_DATE" or "--chat-template" in words)})
        if not self.light:
            arguments["threads"] = os.environ["THREADS"]
            arguments["processes"] = "one" if os.environ["NPROC"] == "1" else "several"
        return {"arguments": arguments, "versions": {} if self.light else settings.versions(),
                "sources": sources_of(self.script, self.task), "inputs": inputs}


def paths_of(args):
    """The values of a command's arguments that are paths, by a slash or a file that is there."""
    values = []
    for name, value in vars(args).items():
        if name not in ("task", "command", "method", "source"):
            values += value if isinstance(value, list) else [value]
    return [value for value in values if isinstance(value, str) and "://" not in value
            and ("/" in value or value.endswith(".jsonl") or os.path.exists(value))]


def parsed(name, words):
    """The arguments of a command, read and checked by its own script before anything runs."""
    script, said = words[0], io.StringIO()
    try:
        if not Path(script).is_file():
            raise InputError(f"there is no {script}")
        with contextlib.redirect_stderr(said):
            if script.startswith("baselines/"):     # they share one command line
                module = importlib.import_module("baselines")
                parser = module.parser(Path(script).stem.replace("_", "-"))
            else:
                module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
                parser = module.parser()
            args = parser.parse_args(words[1:])
        if hasattr(module, "check"):
            module.check(args)
        return args
    except SystemExit:
        text = said.getvalue().strip().partition("error: ")[2].removesuffix("; try --help")
        raise InputError(f"stage {name}: {script}: {text}") from None
    except (InputError, SyntaxError, ImportError, AttributeError) as e:
        raise InputError(f"stage {name}: {script}: {e}") from None


def portable(word):
    """A path of the run folder or of the base models as it is in every run."""
    for name in ("OUT", "BASES"):
        folder = os.environ[name]
        if word == folder or word.startswith(folder + "/"):
            return name + word[len(folder):]
    return word


def below(path, folder):
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def read_plan(text):
    """The stages of a plan, each with those it needs. Raises InputError for a plan with a hole."""
    stages, names = [], set()
    for line in filter(None, text.split("\n")):
        name, *words = line.split("\x1f")
        if name in names:
            raise InputError(f"two stages are called {name}")
        names.add(name)
        stages.append(Stage(len(stages), name, words))
    makers = {out: stage for stage in stages for out in stage.outs}
    for stage in stages:
        if not stage.outs:
            stage.needs = stages[:stage.index]
            continue
        # a folder that other stages fill (a run's --run) is no file that this one reads
        stage.reads = [path for path in stage.reads if path in makers
                       or not any(below(out, path) for out in makers)]
        for path in stage.reads:
            above = [makers.get(p) for p in (path, *map(str, Path(path).parents))]
            found = [maker for maker in above if maker and maker is not stage]
            stage.needs += found
            if not found and below(path, os.environ["OUT"]) and not there(path):
                raise InputError(f"stage {stage.name} reads {path}, which no stage makes")
    for stage in reversed(stages):
        own = 0 if stage.light else 1
        users = [s.depth for s in stages[stage.index + 1:] if stage in s.needs and s.outs]
        stage.depth = own + max(users, default=0)
    return stages


def there(path):
    return os.path.lexists(path)
