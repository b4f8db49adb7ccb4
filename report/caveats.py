"""The caveats of the page: how far it can be trusted, and how unreliable the supervision was."""
from report.methods import last_of, methods_of
from report.statistics import paired
from report.tables import asked_table, plain, supervision_table


def dialed(settings):
    """What the settings, and no measurement, made of the supervision: a list of sentences' parts.
    A setting that the run did not use says nothing."""
    unused = set()
    if settings.get("LABEL_NOISE"):
        unused.add("WEAK_ACCURACY")
    judge = settings.get("JUDGE", "trained")
    if judge not in ("trained", "simulated"):
        unused.add("JUDGE_ACCURACY")
    found = []
    for key, what in (
            ("WEAK_ACCURACY",
             "the demonstrator is the checkpoint whose samples come nearest to {:.0%} right"),
            ("JUDGE_ACCURACY", "the judge's training stops at {:.0%} of its stopping pairs"
             if judge == "trained" else "the judge is right on {:.0%} of the pairs with one right "
             "side"),
            ("JUDGE_FLIPS", "{:.0%} of the judge's answers are turned round"),
            ("LABEL_NOISE",
             "{:.0%} of the demonstrations are made wrong, the others references")):
        try:
            share = float(settings.get(key) or "nan")
        except ValueError:      # config.json was edited by hand
            continue
        used = share > 0 or (share == 0 and key == "LABEL_NOISE")      # without noise: references
        if used and key not in unused:
            found.append(what.format(share))
    return found


def caveats(data):
    """How far the page can be trusted, as far as the run folder says it: a list of sentences."""
    settings, tests, n = data["settings"], data["tests"], len(data["seeds"])
    if n == 1:
        said = ["One seed, one draw of data, weak model and judge: nothing here says what another "
                "would give."]
    else:
        few = (" They are few: a bootstrap over them is too narrow, and Student's t leans on the "
               "normal.") if n < 10 else ""
        said = [f"{n} seeds, each with data, a weak model and a judge of its own.{few}"]
    said += base_models(settings, n)
    for key, value, what in (
            ("JUDGE", "oracle", "The judge is an oracle, which reads the references."),
            ("JUDGE", "simulated", "The judge is simulated: it reads the references, and errs."),
            ("CLEAN_START", "1",
             "Labels that are wrong by their references were dropped before SFT."),
            ("EVAL", "validation",
             "These are validation problems, on which settings may have been chosen.")):
        if settings.get(key) == value:
            said.append(what)
    for seed, right in coins(data["judges"]):
        said.append(f"The judge of seed {seed} is right on {right:.0%} of its held-out pairs, "
                    "no better than a coin: it has learnt nothing.")
    if parts := dialed(settings):
        said.append(f"Supervision is dialed: {'; '.join(parts)}. How unreliable it came out is a "
                    "setting, not a finding.")
    loss = settings.get("DPO_LOSS") or "sigmoid"
    if loss != "sigmoid":
        said.append(f"DPO, wherever it says so, is trained with the loss {loss}.")
    if missing := [f"{p} has {len(tests[p])}" for p in sorted(tests) if len(tests[p]) < n]:
        said.append(f"Not every point has all {n} seeds: {', '.join(missing)}.")
    if data["unknown"]:
        said.append("Not on this page are folders with graded answers that belong to no method "
                    f"that this code knows: {', '.join(map(plain, data['unknown']))}.")
    return said + retraining(data)


def coins(judges):
    """[(seed, share of held-out pairs that it is right on)] of the judges no better than a coin."""
    right = {seed: judge.get("held_out_accuracy") for seed, judge in judges.items()}
    return [(seed, share) for seed, share in right.items() if share is not None and share <= 0.5]


def base_models(settings, n):
    """Which pair of base models n seeds share, as far as the settings say it: a list of one
    sentence or none."""
    which = [plain(settings[k]) for k in ("WEAK_MODEL", "STRONG_MODEL") if settings.get(k)]
    if len(which) < 2 and settings.get("PRETRAIN") and settings.get("BASE_SEED"):
        which.append(f"bases/, BASE_SEED={plain(settings['BASE_SEED'])}")
    if not which and settings.get("TASK") != "arithmetic":
        return []
    pair = "All seeds share one pair of base models" if n > 1 else "One pair of base models"
    named = f" ({', '.join(which)})" if which else ""
    return [f"{pair}{named}: no interval says anything of other base models."]


def retraining(data):
    """What is known of how much retraining alone changes a number: a list of one sentence or none.

    DPO starts from SFT's first training, while SFT's point is the mean of its trainings."""
    tests = data["tests"]
    if {len(v) for by_seed in tests.values() for v in by_seed.values()} == {1}:
        return ["One training a point: how much retraining alone would change a number is not "
                "measured."]
    if "dpo" not in methods_of(data):
        return []
    first = {seed: retrains[:1] for seed, retrains in data["answers"].get("sft", {}).items()}
    found = paired({**data["answers"], "start": first}, last_of(data)["dpo"][1], "start")
    if not found:
        return []
    low, high = found["bootstrap"]
    return ["DPO starts from SFT's first training: its last round minus that one alone is "
            f"{found['mean']:+.1f} points (bootstrap {low:+.1f} to {high:+.1f})."]


def caveats_section(data, drawn):
    text = ["## Caveats\n", "".join(f"- {caveat}\n" for caveat in caveats(data))]
    if found := supervision_table(data):
        text += ["### How unreliable was the supervision\n", found,
                 "In percent, by round where a cell has several. Judge error: of the pairs with "
                 "one right side, those decided wrongly. Order flips: answers that change with the "
                 "order of the two. Precision: of the labels replaced, those that got better (DPO: "
                 "of the pairs kept, those whose chosen side is the better). Recall: of the labels "
                 "whose proposal was better, those replaced.\n"]
    if "judge.png" in drawn:
        text.append("![the judge on the pairs asked about](judge.png)\n")
    if found := asked_table(data):
        text.append(found)
    return text
