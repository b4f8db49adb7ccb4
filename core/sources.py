"""What a result depends on besides its arguments: the source files behind it and its input files.

Used by `core.unfinished` (may a killed stage's work be continued?) and by `core.stages` (may a
finished stage be taken over from another run?).
"""
import ast
import functools
import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGE = 256 << 20       # bytes; of a larger file, blocks all over it stand for its content
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


def fingerprint(path):
    """12 hex digits that tell a file's or a folder's content; "" where there is neither."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
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
            if size <= LARGE:
                digest.update(f.read())
            for k in range(BLOCKS if size > LARGE else 0):
                f.seek(k * max(0, size - BLOCK) // (BLOCKS - 1))
                digest.update(f.read(BLOCK))
    return digest.hexdigest()[:12] if any_file else ""


def brief(value):
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def changes(before, now):
    """What differs between two descriptions of work, in words; "" where nothing does.

    A description: {"arguments": {name: value}, "versions": {library: version}, "sources":
    {file: digest}, "inputs": {path: digest}}.
    """
    said = []
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
