"""Read what the files of a run folder say. What a run has not made yet is absent."""
import re

from core.records import InputError, read_json, read_jsonl
from report.methods import POINTS, method_and_round
from tasks import TASKS, get_task, unparsed


def seed_folders(run):
    """{seed: folder}, in order of the seeds."""
    folders = {int(p.name[5:]): p for p in run.glob("seed_*")
               if re.fullmatch("seed_[0-9]+", p.name) and p.is_dir()}
    return dict(sorted(folders.items()))


def grades(path, fields=("id", "correct"), key=("id",)):
    """[(record, its grade)] of a graded file. Raises InputError for a grade that is none."""
    found = []
    for r in read_jsonl(path, fields, key):
        grade = r["correct"]
        if not isinstance(grade, (int, float)) or not 0 <= grade <= 1:
            raise InputError(f"{path}: correct is {grade!r}: expected a number from 0 to 1")
        found.append((r, grade))
    return found


def graded_answers(seeds):
    """{point: {seed: [{id: correct} of each retrain]}} from seed_S/POINT/eval_K.graded.jsonl."""
    answers = {}
    for seed, folder in seeds.items():
        for path in graded_files(folder):
            retrains = answers.setdefault(path.parent.name, {}).setdefault(seed, [])
            retrains.append({r["id"]: grade for r, grade in grades(path)})
    return answers


def is_known(point):
    """Whether a folder of a seed is a point of every run, or of a method that there is."""
    return point in POINTS or method_and_round(point) is not None


def graded_files(folder):
    """The files eval_K.graded.jsonl of a seed's folder, in order of point and K. What the report
    does not know is left out."""
    found = []
    for path in folder.glob("*/eval_*.graded.jsonl"):
        retrain = re.fullmatch(r"eval_([0-9]+)\.graded\.jsonl", path.name)
        if retrain and is_known(path.parent.name):      # else somebody's copy
            found.append((path.parent.name, int(retrain[1]), path))
    return [path for *_, path in sorted(found)]


def unknown_folders(seeds):
    """Names of the folders with graded answers that are no point of a run or of a known method."""
    names = {path.parent.name for folder in seeds.values()
             for path in folder.glob("*/eval_*.graded.jsonl")}
    return sorted(name for name in names if not is_known(name) and not name.startswith("."))


def why_nothing(seeds, tests, task):
    """Why no answer of any point is right, in words; "" where one is."""
    if any(share for by_seed in tests.values() for shares in by_seed.values() for share in shares):
        return ""
    rows = [row for folder in seeds.values() for path in graded_files(folder)
            for row in read_jsonl(path, ("id", "completion"))]
    return task and unparsed(task, rows) or "its answers can be parsed, and all of them are wrong"


def graded_labels(seeds):
    """{point: {seed: [share correct]}} from seed_S/POINT/labels.graded.jsonl."""
    labels = {}
    for seed, folder in seeds.items():
        for path in sorted(folder.glob("*/labels.graded.jsonl")):
            found = [grade for _, grade in grades(path, ("correct",), ())]
            share = sum(found) / len(found)
            labels.setdefault(path.parent.name, {})[seed] = [share]
    return labels


def summaries(seeds, *names):
    """{point: {seed: summary}} from seed_S/POINT/NAME.jsonl.summary of any of the names."""
    found = {}
    for seed, folder in seeds.items():
        for name in names:
            for path in sorted(folder.glob(f"*/{name}.jsonl.summary")):
                found.setdefault(path.parent.name, {})[seed] = read_json(path)
    return found


def stage_seconds(run):
    """({path below the run folder: (stage that wrote it, its seconds)}, seconds of the whole run
    or None) from stages.jsonl: of several rows for a path the first one that has seconds. Nothing
    where the file cannot be read: a kill may have torn it."""
    made, whole_run = {}, None
    try:
        rows = read_jsonl(run / "stages.jsonl", ("stage",), ())
    except InputError:
        rows = []
    for row in rows:
        if "seconds" not in row:
            continue
        if row["stage"] == "whole run" and whole_run is None:
            whole_run = row["seconds"]
        for out in row.get("outs", []):
            made.setdefault(out, (row["stage"], row["seconds"]))
    return made, whole_run


def collect(run):
    """Everything that the report is computed from, as one dict:

    run          the folder (Path)
    seeds        the seeds in order
    answers      {point: {seed: [{id: correct} of each retrain]}}
    tests        {point: {seed: [share correct of each retrain]}}
    labels       {point: {seed: [share correct]}}
    comparisons  {point: {seed: summary of comparisons.jsonl}}
    refinements  {point: {seed: summary of labels.jsonl or preferences.jsonl}}
    judges       {seed: judge.json of the trained judge}
    seconds, whole_run   as `stage_seconds` gives them
    config       config.json: settings, commit, versions
    settings     those of config.json
    unknown      names of the folders that `unknown_folders` finds
    metric       what the task calls its grade ("accuracy")
    n_test       number of test problems, the largest of any point
    nothing      why no answer at all is right, in words; "" where one is
    """
    seeds = seed_folders(run)
    answers = graded_answers(seeds)
    tests, n_test = {}, 0
    for point, by_seed in answers.items():
        tests[point] = {}
        for seed, retrains in by_seed.items():
            tests[point][seed] = [sum(c.values()) / len(c) for c in retrains]
            n_test = max(n_test, *map(len, retrains))
    judges = {s: read_json(folder / "judge/model/judge.json") for s, folder in seeds.items()}
    seconds, whole_run = stage_seconds(run)
    config = read_json(run / "config.json")
    settings = config.get("settings")
    settings = {k: str(v) for k, v in settings.items()} if isinstance(settings, dict) else {}
    name = settings.get("TASK") if settings.get("TASK") in TASKS else ""
    return {"run": run, "seeds": list(seeds), "answers": answers, "tests": tests,
            "labels": graded_labels(seeds), "comparisons": summaries(seeds, "comparisons"),
            "refinements": summaries(seeds, "labels", "preferences"),
            "judges": {s: judge for s, judge in judges.items() if judge},
            "seconds": seconds, "whole_run": whole_run, "config": {**config, "settings": settings},
            "settings": settings, "unknown": unknown_folders(seeds),
            "metric": getattr(name and get_task(name), "METRIC", "accuracy"), "n_test": n_test,
            "nothing": why_nothing(seeds, tests, name)}
