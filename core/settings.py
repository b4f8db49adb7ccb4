"""The settings of a run: their meaning, what they may be, and config.json.

    python -m core.settings help gsm8k       # every variable of a preset, its value and meaning
    python -m core.settings check gsm8k      # refuse what cannot work; print a line per baseline
    python -m core.settings inherit runs/a   # NAME=VALUE of every setting of a run

run_ilr.sh calls this once it has read presets/NAME.sh and presets/generic.sh, which export every
variable. A variable is documented by the comment behind its value there, and nowhere else.
"""
import ast
import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from core.records import InputError, read_json
from core.sources import ROOT

LINE = re.compile(r'^ *([A-Z][A-Z0-9_]*)="?\$\{\1:?-.*?(?:\s#\s*(.*))?$')
# Variables that change no result: they are not in config.json.
OF_THE_MACHINE = ("OUT", "FROM", "JOBS", "NPROC", "LAUNCH", "STATE_EVERY", "BASES", "PYTHON")
MAY_GROW = ("ROUNDS", "SEEDS", "METHODS", "RETRAINS")      # they add work and change none
PAPER = ("ilr", "dpo", "naive")     # methods of run_ilr.sh; the others are files of baselines/

URL = r"https?://[^/@?#\s]+(/[^@?#\s]*)?"
COUNT = (r"[1-9][0-9]*", "a whole number above 0")
WHOLE = (r"0|[1-9][0-9]*", "a whole number")
SHARE = (r"0|0?\.[0-9]*[1-9][0-9]*|1(\.0+)?", "a share between 0 and 1")
NUMBER = (r"[0-9]*\.?[0-9]+([eE]-?[0-9]+)?", "a number")
POSITIVE = r"[0-9]*\.?[0-9]*[1-9][0-9]*"
SWITCH = (r"[01]", "0 or 1")
KINDS = {
    "SEEDS": (rf"({WHOLE[0]})(\s+({WHOLE[0]}))*", "whole numbers with spaces between"),
    "DPO_SAMPLES": (r"[2468]|[1-9][0-9]*[02468]", "an even number above 0"),
    "CHECKPOINTS": (r"[1-9]?[0-9](\s+[1-9]?[0-9])*", "percents below 100, ascending"),
    "JUDGE": (rf"trained|oracle|simulated|human|{URL}",
              "trained, oracle, simulated, human or a URL, http://..., without a user or a key"),
    "FLIP_KIND": (r"symmetric|systematic", "symmetric or systematic"),
    "BETA": (rf"({POSITIVE}([eE]-?[0-9]+)?)?", "a number above 0, or nothing"),
    "DTYPE": (r"(float32|bfloat16)?", "float32, bfloat16 or nothing"),
    "SECONDS_PER_PAIR": (POSITIVE, "seconds"),
    "JOBS": (r"[1-9]", "a digit from 1 to 9"),
    "LABEL_NOISE": (rf"({SHARE[0]})?", "a share between 0 and 1, or nothing"),
    "ILR_JUDGE_URL": (f"({URL})?", "a URL, http://..., without a user or a key in it"),
    "ILR_DATE": (r"([0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]))?",
                 "a day such as 2026-01-31, or nothing"),
    **dict.fromkeys("ROUNDS RETRAINS THREADS NPROC TRAIN TEST WEAK_EPOCHS WEAK_BATCH SFT_EPOCHS "
                    "SFT_BATCH JUDGE_EPOCHS JUDGE_BATCH JUDGE_WRONG DPO_EPOCHS "
                    "DPO_BATCH".split(), COUNT),
    **dict.fromkeys("ALPHA DPO_ALPHA WEAK_ACCURACY JUDGE_ACCURACY JUDGE_FLIPS".split(), SHARE),
    **dict.fromkeys("DPO_NLL WEAK_LR SFT_LR JUDGE_LR CHOSEN_LR DPO_LR STATE_EVERY "
                    "DPO_TEMPERATURE".split(), NUMBER),
    **dict.fromkeys("CLEAN_START LOAD_IN_4BIT CHAT_TEMPLATE GRADE_LABELS".split(), SWITCH),
    **dict.fromkeys("LORA_RANK GT BASE_SEED".split(), WHOLE),
    **dict.fromkeys("PRETRAIN PRETRAIN_WEAK".split(),
                    (rf"({COUNT[0]})?", f"{COUNT[1]}, or nothing")),
}


def meanings(preset):
    """{variable: its meaning} of a preset, in the order of presets/generic.sh, then its own."""
    found = {}
    for name in ("generic", *reads(preset)):
        for line in (ROOT / "presets" / f"{name}.sh").read_text(encoding="utf-8").splitlines():
            match = LINE.match(line)
            if match and (match[2] or match[1] not in found):
                found[match[1]] = match[2] or ""
    return found


def known():
    """Every variable of any preset."""
    return {name for path in (ROOT / "presets").glob("[a-z]*.sh") for name in meanings(path.stem)}


def reads(preset):
    """The files of presets/ that a preset consists of, the most general first: its own is last."""
    path = ROOT / "presets" / f"{preset}.sh"
    if not path.exists():
        return []
    more = re.findall(r"^\. presets/([\w-]+)\.sh$", path.read_text(encoding="utf-8"), re.M)
    return [*more, preset]


def methods():
    """{method: {constant: value}} of the files of baselines/ that say what a round is."""
    found = {}
    for path in sorted((ROOT / "baselines").glob("[a-z]*.py")):
        try:
            body = ast.parse(path.read_bytes()).body
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"baselines/{path.name}: not Python ({e})") from None
        constants = {node.targets[0].id: node.value.value for node in body
                     if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                     and isinstance(node.targets[0], ast.Name)}
        if "ROUND" in constants:
            found[path.stem.replace("_", "-")] = constants
    return found


# ---------------------------------------------------------------- checks
def refuse(name, value, expected):
    raise InputError(f"{name} is '{value}': expected {expected}")


def near_misses(names):
    """Refuse a variable of the environment whose name is one edit away from a setting's."""
    def edits(word):
        for i in range(len(word) + 1):
            yield word[:i] + word[i + 1:]
            if i + 1 < len(word):
                yield word[:i] + word[i + 1] + word[i] + word[i + 2:]
    short = {}       # what is left of a setting when a letter is dropped, or two change places
    for name in names:
        for word in {name, *edits(name)}:
            short.setdefault(word, name)
    for word in os.environ:
        if word in names or not re.fullmatch("[A-Za-z_]{4,}", word):
            continue
        loud = word.upper()
        meant = next((short[w] for w in (loud, *edits(loud)) if w in short), None)
        if not meant or len(meant) < 4 or (word != loud and len(meant) < 5):
            continue
        if len(meant) > 4 or loud in (f"{meant}S", meant[:-1]):      # of TEST, TESTS and not REST
            raise InputError(f"{word} is no setting; {meant} is. Unset it if it is not for this")


def check(preset):
    """Refuse a setting that is mistyped or cannot work with the others, by name."""
    now, others = settings(preset), methods()
    near_misses([*meanings(preset), "TASK"])
    for name in ("OUT", "FROM", "BASES"):
        if "\n" in os.environ[name] or (os.path.exists(os.environ[name])
                                        and not os.path.isdir(os.environ[name])):
            refuse(name, os.environ[name], "a folder")
    if len(set(now["SEEDS"].split())) < len(now["SEEDS"].split()):
        refuse("SEEDS", now["SEEDS"], "each seed once")
    for name, value in now.items():
        regex, expected = KINDS.get(name, ("", ""))
        if regex and not re.fullmatch(regex, value):
            refuse(name, value, expected)
    wanted = now["METHODS"].split()
    for method in wanted:
        if method not in (*PAPER, *others):
            refuse("METHODS", now["METHODS"],
                   f"some of these, with spaces between: {' '.join([*PAPER, *others])}")
        needed = others.get(method, {}).get("NEEDS")
        if needed and needed not in wanted:
            raise InputError(f"METHODS: {method} needs {needed} beside it")
    if now["EVAL"] not in now["EVALS"].split():
        refuse("EVAL", now["EVAL"], f"one of {', '.join(now['EVALS'].split())}")
    points = [int(x) for x in now["CHECKPOINTS"].split()]
    if points != sorted(set(points)) or points[0] == 0:
        refuse("CHECKPOINTS", now["CHECKPOINTS"], KINDS["CHECKPOINTS"][1])
    for name in ("WEAK_MODEL", "STRONG_MODEL"):
        if not now[name] and not now["PRETRAIN"]:
            refuse(name, "", "a hub name or a folder")
    if now["JUDGE"].startswith("http") and not now["JUDGE_MODEL"]:
        refuse("JUDGE_MODEL", "", "the model behind the URL of JUDGE")
    if now["EMBEDDER"].startswith("http") and not re.fullmatch(URL, now["EMBEDDER"]):
        refuse("EMBEDDER", now["EMBEDDER"], "a URL without a user or a key in it")
    if now["GRADE_LABELS"] == "0":
        if float(now["WEAK_ACCURACY"]):
            refuse("WEAK_ACCURACY", now["WEAK_ACCURACY"], "0 (its grades cost money)")
        if now["LABEL_NOISE"] and now["FLIP_KIND"] == "systematic":
            refuse("FLIP_KIND", "systematic", "symmetric with LABEL_NOISE (its grades cost money)")
    if now["EMBEDDER"] and "ensemble" in wanted:
        raise InputError("METHODS: ensemble votes, and this task has no rule for when two answers "
                         "agree")
    if now["LABEL_NOISE"] and now["CLEAN_START"] == "1":
        raise InputError("CLEAN_START=1 drops what LABEL_NOISE makes")
    if now["LOAD_IN_4BIT"] == "1" and now["LORA_RANK"] == "0":
        refuse("LORA_RANK", "0", "a rank above 0 with LOAD_IN_4BIT=1, whose weights cannot be "
               "trained")
    if now["PRETRAIN"] and not now["WEAK_MODEL"] and now["CHAT_TEMPLATE"] == "1":
        refuse("CHAT_TEMPLATE", "1", "0: the models trained here know no chat")
    if os.environ["LAUNCH"] and os.environ["NPROC"] == "1":
        raise InputError("LAUNCH starts several processes: say how many, NPROC")
    for method in wanted:
        if method in others:
            constants = others[method]
            print(method, min(int(now["ROUNDS"]), constants.get("ROUNDS", 10**6)),
                  constants.get("SAMPLES", now["DPO_SAMPLES"]), constants["ROUND"])


def settings(preset):
    """{variable: value} of the present environment, for every variable of a preset."""
    return {"TASK": os.environ["TASK"],
            **{name: os.environ.get(name, "") for name in meanings(preset)}}


def show(preset):
    print("Variables and their present values:")
    for name, meaning in {"TASK": "a file of tasks/", **meanings(preset)}.items():
        print(f"  {name:<16} {os.environ.get(name, '')}" + (f"   # {meaning}" if meaning else ""))


# ---------------------------------------------------------------- config.json
def settle_date():
    """Chat templates may write the day: give them one for all starts of a run, its first one's."""
    given = os.environ.get("ILR_DATE")
    try:
        datetime.date.fromisoformat(given or "2026-01-31")
    except ValueError:
        raise InputError(f"ILR_DATE is '{given}': there is no such day") from None
    if os.environ.get("CHAT_TEMPLATE") == "1" and not given:
        kept = read_json(Path(os.environ["OUT"]) / "config.json").get("settings", {})
        os.environ["ILR_DATE"] = kept.get("ILR_DATE") or str(datetime.date.today())


def inherit(run):
    """Print NAME=VALUE of every setting that a run was made with."""
    path = Path(run) / "config.json"
    if not path.exists():
        refuse("FROM", run, "a run folder, which has a config.json")
    for name, value in read_json(path).get("settings", {}).items():
        if name == "TASK" or name in known() and name not in OF_THE_MACHINE:
            print(f"{name}={' '.join(str(value).split())}")


def configuration(preset):
    """What config.json says of a run: settings, versions, commit."""
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True,
                             text=True).stdout.strip()
    except OSError:     # no git here
        git = ""
    values = {k: v for k, v in settings(preset).items() if k not in OF_THE_MACHINE}
    if os.environ["NPROC"] != "1":      # a run folder is of one process or of several
        values["PROCESSES"] = "several"
    return {"settings": values, "commit": git or None, "versions": versions()}


@functools.cache
def versions():
    """{library: version} of what computes the results."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "bitsandbytes", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_config(run, now):
    """Refuse a folder whose config.json differs, naming the difference; else what to write."""
    path = Path(run) / "config.json"
    made = any(Path(run).glob("seed_*/*/*"))        # else nothing was made under old settings
    if path.exists() and made:
        before = read_json(path)
        old, new = ({**c.get("settings", {}), **c.get("versions", {})} for c in (before, now))
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in {**old, **new}
                   if old.get(k) != new.get(k) and k not in MAY_GROW]
        if changed:
            raise InputError(f"{run} was begun under another configuration: {'; '.join(changed)}. "
                             "Set OUT to a new folder, or restore what changed")
        for name in MAY_GROW:       # a start that asks for less takes nothing back
            now["settings"][name] = larger(name, old.get(name), new[name])
    return now


def larger(name, old, new):
    """What a setting that may grow is, after a start with `old` and one with `new`."""
    values = f"{old or ''} {new}".split()
    if name in ("SEEDS", "METHODS"):
        return " ".join(dict.fromkeys(values))
    return str(max(map(int, values)))


def main(words):
    try:
        {"help": show, "check": check, "inherit": inherit}[words[0]](words[1])
    except InputError as e:
        sys.exit(fail(e))


def fail(error, code=2):
    print(f"run_ilr.sh: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main(sys.argv[1:])
