"""What a result depends on besides its arguments: the source files behind it and its input files.

Used by `core.unfinished` (may a killed stage's work be continued?) and by `core.stages` (may a
finished stage be taken over from another run?).
"""
import ast
import functools
import hashlib
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGE = 256 << 20       # bytes; of a larger file that is no text, blocks all over it stand for it
TEXT = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".py")
BLOCKS, BLOCK = 256, 1 << 16        # how many, and their size
ADAPTER_CONFIG = "adapter_config.json"     # of a folder of adapters (core/adapters.py)
REPORT = "report"       # this package only reads what a run has made: no result depends on it


@functools.cache
def imports_of(path):
    """The files of this project that a source file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            # `from a import b`: b may be a module of the package a
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == REPORT:
                continue
            for depth in range(1, len(parts) + 1):
                module = ROOT.joinpath(*parts[:depth])
                found.update({module.with_suffix(".py"), module / "__init__.py"})
    return sorted(file for file in found if file.is_file())


def sources_of(script, task=None):
    """{path below the project's folder: digest} of a script, all that it imports, and its task
    with the data that lies beside it (tasks/NAME.json, tasks/NAME_words.txt).

    The digest is the first 12 hex digits of the file's SHA-256. `report/` is left out.
    """
    waiting, seen = [Path(script).resolve()], set()
    if task:
        waiting += (ROOT / "tasks").glob(f"{task}[._]*")
    while waiting:
        path = waiting.pop()
        if path not in seen and path.is_file():
            seen.add(path)
            waiting += imports_of(path) if path.suffix == ".py" else []
    return {str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path):
            hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(seen)}


def files_of(folder):
    """The files of a folder in order, those behind links to folders too, each such folder once.

    Hidden ones are other programs' notes (.DS_Store, .cache, .git) or work that is not finished."""
    files, seen = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(top) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        files += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(files)


def fingerprint(path):
    """12 hex digits that tell the content of a file or of a folder, names in it included; "" where
    there is neither. When a file was written or who owns it is no content, nor what is hidden in a
    folder (`files_of`)."""
    path = Path(path)
    files = files_of(path) if path.is_dir() else [path]
    digest, any_file = hashlib.sha256(), False
    for file in files:
        if not file.is_file():
            continue
        any_file, size = True, file.stat().st_size
        if file.name == ADAPTER_CONFIG:     # where the base lies is no content
            digest.update(re.sub(rb'"base_model_name_or_path": ".*"', b"", file.read_bytes()))
            continue
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with open(file, "rb") as f:
            if size <= LARGE or file.suffix in TEXT:
                while block := f.read(LARGE):
                    digest.update(block)
                continue
            for k in range(BLOCKS):
                f.seek(k * max(0, size - BLOCK) // (BLOCKS - 1))
                digest.update(f.read(BLOCK))
    return digest.hexdigest()[:12] if any_file else ""


def brief(value):
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def elsewhere(before, now):
    """`now` with the inputs that are those of `before` at another place named as there."""
    old, new = before.get("inputs") or {}, now.get("inputs") or {}
    places = {}
    for path, digest in new.items():
        left = [p for p in old if p not in new and p not in places.values() and old[p] == digest]
        if digest and path not in old and left:
            places[path] = left[0]

    def named(value):
        if isinstance(value, list):
            return [named(v) for v in value]
        if not isinstance(value, str):
            return value
        return places.get(value) or " ".join(places.get(w, w) for w in value.split(" "))
    if not places:
        return now
    return {**now, "inputs": {named(path): digest for path, digest in new.items()},
            "arguments": {k: named(v) for k, v in (now.get("arguments") or {}).items()}}


def changes(before, now):
    """What differs between two descriptions of work, in words; "" where nothing does.

    A description: {"arguments": {name: value}, "versions": {library: version}, "sources":
    {file: digest}, "inputs": {path: digest}}. An input may lie elsewhere: its content counts.
    """
    now, said = elsewhere(before, now), []
    for kind in ("arguments", "versions", "sources", "inputs"):
        old, new = before.get(kind) or {}, now.get(kind) or {}
        for name in {**old, **new}:
            if old.get(name) == new.get(name):
                continue
            if kind in ("arguments", "versions"):
                said.append(f"{name} was {brief(old.get(name))}, is {brief(new.get(name))}")
            elif kind == "sources" and name not in new:
                said.append(f"{name} is imported no more")
            else:
                said.append(f"{name} {'has changed' if name in old else 'is new'}")
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")
