"""Records: JSON Lines in, JSON Lines out, and the error for input that the user must correct.

A file is JSON Lines: one object per line, UTF-8, joined with other files by `id` and nothing else.
"""
import hashlib
import json
import os
from pathlib import Path


class InputError(Exception):
    """Bad arguments or bad input (exit 2): one line: file, line number, what was expected."""


TEXT, WHOLE = ((str,), "a string"), ((int,), "a whole number")
KINDS = {       # field -> (types allowed, their name in an error message); other fields are free
    "id": ((str, int), "a string or a whole number"),
    "sample": WHOLE, "pair": WHOLE,
    "agree": ((bool,), "true or false"),
    "prob_b": ((int, float, type(None)), "a probability or null"),
    "prompt": TEXT, "completion": TEXT, "completion_a": TEXT, "completion_b": TEXT,
    "chosen": TEXT, "rejected": TEXT, "question": TEXT, "answer": TEXT, "db_name": TEXT}


def not_json(name):
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no number")


def read_lines(path):
    """The lines of a text file. Only a line feed ends a line: JSON strings may hold U+2028."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read().split("\n")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None


def check_fields(record, fields, where):
    """Raise InputError unless the record holds every one of `fields`, each of its type in KINDS."""
    for name in fields:
        if name not in record:
            raise InputError(f"{where}: field {name!r} is missing")
        if name in KINDS and type(record[name]) not in KINDS[name][0]:
            raise InputError(f"{where}: field {name!r} must be {KINDS[name][1]}")
    if "prob_b" in fields:
        prob_b = record["prob_b"]
        if not (record["agree"] if prob_b is None else 0 <= prob_b <= 1):
            raise InputError(f"{where}: field 'prob_b' must be a probability, "
                             "or null where the two agree")


def read_jsonl(path, fields=("id",), key=("id",)):
    """Read a file of records. Each must hold `fields`, and no two may have the same `key` values.

    Raises InputError with file and line for: a missing or empty file, malformed JSON (NaN and
    Infinity included), a missing field, a field of the wrong type (KINDS), a repeated key.
    """
    records, seen = [], {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=not_json)
            # half of a surrogate pair, as it is or written \ud800, cannot be encoded
            (dumps(record) if "\\u" in line else line).encode()
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{number}: not JSON ({e})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, "
                             f"found {type(record).__name__}")
        check_fields(record, fields, f"{path}:{number}")
        if key:
            values = tuple(json.dumps(record.get(k)) for k in key)
            if values in seen:
                where = ", ".join(f"{k} {v}" for k, v in zip(key, values, strict=True))
                raise InputError(f"{path}:{number}: {where} stands already in line {seen[values]}")
            seen[values] = number
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


def dumps(record):
    """One line of JSON; letters beyond ASCII stay as they are."""
    return json.dumps(record, ensure_ascii=False)


def half_of(seed, round_, id_):
    """1 or 2: the half of a problem in cross-labelling. Depends on its id, not its position."""
    return 1 + hashlib.sha256(dumps([seed, round_, id_]).encode()).digest()[0] % 2


def write_text(path, text):
    """Write to a file beside `path`, flush it to disk, rename it to `path`.

    After a crash or on a full disk, `path` is what it was before, or missing if it was missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_jsonl(path, records):
    """Write records, one JSON object per line."""
    write_text(path, "".join(dumps(r) + "\n" for r in records))


def write_json(path, value):
    """Write one JSON value, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """The object in a JSON file, or {} if there is no such file. Raises InputError for others."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value
