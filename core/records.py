"""Records: JSON Lines in, JSON Lines out, and the error for input that the user must correct.

A file is JSON Lines: one object per line, UTF-8, joined with other files by `id` and nothing else.
"""
import hashlib
import json
import math
import os
from pathlib import Path

from core.conversations import folded, unfolded


class InputError(Exception):
    """Bad arguments or bad input (exit 2): one line: file, line number, what was expected."""


TEXT, WHOLE = ((str,), "a string"), ((int,), "a whole number")
KINDS = {       # field -> (types allowed, their name in an error message); other fields are free
    "id": ((str, int), "a string or a whole number"),
    "sample": WHOLE, "pair": WHOLE,
    "agree": ((bool,), "true or false"),
    "reference": ((str,), "a string or a number"),
    "prob_b": ((int, float, type(None)), "a probability or null"),
    "prompt": TEXT, "completion": TEXT, "completion_a": TEXT, "completion_b": TEXT,
    "chosen": TEXT, "rejected": TEXT, "question": TEXT, "answer": TEXT, "db_name": TEXT}
FLAGS = ("truncated", "chosen_truncated", "rejected_truncated", "truncated_a", "truncated_b")
# What a file may be that lacks a field: (the field, one that it has, what to do).
OTHER_KINDS = [
    ("prompt", "text", "language modelling: write the text as `completion`, and an empty `prompt`"),
    ("prompt", "chosen", "preferences, which dpo.py trains on"),
    ("completion", "chosen", "preferences, which dpo.py trains on"),
    ("completion", "completions", "stepwise supervision, which no stage trains on"),
    ("chosen", "completion", "demonstrations, which sft.py trains on"),
    ("prompt", "messages", "demonstrations, which sft.py trains on")]


class Record(dict):
    """A line of a file; `place` is FILE:LINE, for error messages."""

    def __init__(self, record, place):
        super().__init__(record)
        self.place = place


def not_json(name):
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is no number")


def read_lines(path):
    """The lines of a text file. Only a line feed ends a line: JSON strings may hold U+2028."""
    try:
        with open(path, encoding="utf-8-sig") as f:     # without a byte order mark
            return f.read().split("\n")
    except OSError as e:
        what = ": expected a file of JSON Lines" if isinstance(e, IsADirectoryError) else ""
        raise InputError(f"{path}: {e.strerror}{what}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}): unpack it, or "
                         "write it as JSON Lines in UTF-8") from None


def check_fields(record, fields, where):
    """Raise InputError unless the record holds every one of `fields`, each of its type in KINDS."""
    for name in fields:
        if name not in record:
            what = next((f"; this is {what}" for lacks, has, what in OTHER_KINDS
                         if lacks == name and has in record and has not in fields), "")
            raise InputError(f"{where}: field {name!r} is missing{what}")
        conversation = name == "prompt" and isinstance(record[name], list)      # `unfolded` did it
        if name in KINDS and type(record[name]) not in KINDS[name][0] and not conversation:
            raise InputError(f"{where}: field {name!r} must be {KINDS[name][1]}")
    for name in FLAGS:
        if not isinstance(record.get(name), (bool, type(None))):
            raise InputError(f"{where}: field {name!r} must be true or false")
    if "prob_b" in fields:
        prob_b = record["prob_b"]
        if not (record["agree"] if prob_b is None else 0 <= prob_b <= 1):
            raise InputError(f"{where}: field 'prob_b' must be a probability, "
                             "or null where the two agree")


def as_text(reference):
    """A reference that is a number as text: the JSON numbers 42, 42.0 and 4.2e1 are all "42"."""
    if type(reference) is float and reference.is_integer() and abs(reference) < 1e16:
        reference = int(reference)
    number = type(reference) in (int, float) and math.isfinite(reference)
    return str(reference) if number else reference


def one_form(record, first):
    """Refuse a record that has no id, or no conversation, while the first of its file has one; or
    the other way round."""
    for what, form in (("id", lambda r: "id" in r),
                       ("messages", lambda r: isinstance(r.get("prompt"), list))):
        if form(record) != form(first):
            has = "has" if form(record) else "has no"
            raise InputError(f"{record.place}: {has} {what}, unlike {first.place}: give all "
                             "records one form")


def read_jsonl(path, fields=("id",), key=("id",)):
    """Read a file of records. Each must hold `fields`, and no two may have the same `key` values.

    Where no record has an id, the number of its line is its id; null is none. Conversations are
    read as core/conversations.py says, and a reference that is a number as text.
    Raises InputError with file and line for: a missing or empty file, malformed JSON (NaN and
    Infinity included), a missing field, a field of the wrong type (KINDS), a repeated key, records
    of two forms.
    """
    records, seen, first = [], {}, None
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line, parse_constant=not_json)
            # half of a surrogate pair, as it is or written \ud800, cannot be encoded
            (dumps(record) if "\\u" in line else line).encode()
        except (ValueError, RecursionError) as e:
            raise InputError(f"{place}: not JSON ({e}): write one object per line") from None
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(record).__name__}: "
                             "write one object per line")
        try:
            record = Record(unfolded(record, fields), place)
        except ValueError as e:
            raise InputError(f"{place}: {e}") from None
        if "id" in fields:
            for name in ("id", "reference"):
                if record.get(name) is None:
                    record.pop(name, None)
            first = first or record
            one_form(record, first)
            if "id" not in record:
                record = Record({"id": number, **record}, place)
            if "reference" in record:
                record["reference"] = as_text(record["reference"])
        check_fields(record, fields, place)
        if key:
            values = tuple(json.dumps(record.get(k)) for k in key)
            if values in seen:
                where = ", ".join(f"{k} {v}" for k, v in zip(key, values, strict=True))
                raise InputError(f"{place}: {where} stands already in line {seen[values]}")
            seen[values] = number
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


def read_by_id(paths, fields):
    """{id: record} of several files. InputError if an id stands in two of them."""
    found = {}
    for r in (r for path in paths for r in read_jsonl(path, fields)):
        if r["id"] in found:
            raise InputError(f"{r.place}: id {r['id']} stands already in {found[r['id']].place}")
        found[r["id"]] = r
    return found


def same_prompt(a, b):
    """Refuse two records of one id if both have a prompt and these differ: the files are not of the
    same problems, or not in one order where line numbers are ids."""
    if "prompt" in a and "prompt" in b and a["prompt"] != b["prompt"]:
        raise InputError(f"{b.place}: id {b['id']} has another prompt than in {a.place}: give each "
                         "problem one `id` in both files")


def complete(records, flag, what):
    """The records whose answer was not cut off at a token limit, which `flag` says; tells how many
    of these, `what`, were."""
    kept = [r for r in records if not r.get(flag)]
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} of {len(records)} {what}")
    return kept


def marks(**flags):
    """{name: True} of those flags that are true: marks of completions that were cut off, which are
    written only where they hold."""
    return {name: True for name, flag in flags.items() if flag}


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
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno and not e.filename:   # a full disk names no file
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise


def write_jsonl(path, records):
    """Write records, one JSON object per line; the answers to conversations as messages."""
    write_text(path, "".join(dumps(folded(r)) + "\n" for r in records))


def write_json(path, value):
    """Write one JSON value, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """The object in a JSON file, or {} if there is no such file. Raises InputError for others."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if Path(path).exists() else "{}"
        value = json.loads(text)
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value
