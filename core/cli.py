"""The command line of every stage: argument types, errors in one line, exit codes."""
import argparse
import gc
import math
import sys
import traceback
from pathlib import Path

from core.distributed import give_way, is_loss_of_another, leave, lost, processes, rank, world
from core.records import InputError


def bounded(kind, low, high, what):
    """An argparse type: `kind` (int or float) between `low` and `high`, else "expected `what`"."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected {what}")
        return value
    return parse


positive = bounded(int, 1, math.inf, "a whole number above 0")
whole = bounded(int, 0, math.inf, "a whole number")
share = bounded(float, 0, 1, "a share between 0 and 1")
rate = bounded(float, sys.float_info.min, sys.float_info.max, "a number above 0")
amount = bounded(float, 0, sys.float_info.max, "0 or a number above it")


def short(path):
    """The last two parts of a path, for a progress bar."""
    return "/".join(Path(path).parts[-2:])


def printable(text):
    """The text with control characters replaced, so that it cannot control the terminal."""
    text = text.replace("\t", "    ")
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text)


def run_stage(parser, main, argv=None):
    """Parse the arguments and run main(args). Errors that a user can cause end in one line.

    Exit codes: 0; 1 for a run-time failure; 2 for bad arguments or bad input; 130 for Ctrl-C.
    Anything else is a bug and shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):     # a letter that a locale lacks ends no stage
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    gc.disable()       # until open_tokenizer: the objects made by importing torch stay anyway
    try:
        if sys.flags.optimize > 1:
            raise InputError("PYTHONOPTIMIZE=2 removes what transformers reads: unset it")
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                raise InputError(f"--{name.replace('_', '-')} is empty: leave it out, or say what "
                                 "it is")
        with processes(parser.prog):
            main(args)
    except InputError as e:
        sys.exit(_fail(parser, e, 2))
    except (OSError, ArithmeticError, MemoryError) as e:
        sys.exit(_fail(parser, e, 1))
    except Exception as e:
        text = str(e).split("\n")[0]
        # what torch and safetensors say when the disk is full
        if any(s in text for s in ("No space left", "file write failed", "unexpected pos")):
            message = f"cannot write a model or state, the disk may be full ({text})"
            sys.exit(_fail(parser, message, 1))
        if "out of memory" in text:
            message = (f"{text} (lower --micro-tokens or --batch-size, "
                       "or see --help for what else saves memory)")
            sys.exit(_fail(parser, message, 1))
        if is_loss_of_another(e):
            lost(parser.prog, text)
        raise
    except KeyboardInterrupt:
        sys.exit(_fail(parser, "interrupted; the same command continues where it stopped", 130))


def _fail(parser, message, code):
    """Print the one line of an error and return the exit code. One of several processes exits."""
    traceback.clear_frames(sys.exc_info()[2])       # closes an open progress bar and ends its line
    give_way()
    which = f"process {rank()} of {world()}: " if rank() else ""
    print(f"{parser.prog}: error: {which}{message}", file=sys.stderr)
    leave(code)
    return code


def make_parser(doc, **kwargs):
    """An ArgumentParser whose --help is the stage's docstring and every default."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, message):     # one line, as for every other bad input
            give_way()
            self.exit(2, f"{self.prog}: error: {message}; try --help\n")
    return Parser(description=doc, formatter_class=Formatter, **kwargs)
