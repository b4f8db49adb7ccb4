"""The page, report.md, section by section. report/tables.py makes its tables."""
from core.records import write_text
from report.claims import findings, sentence
from report.methods import METHODS, labels_of, last_of, methods_of
from report.statistics import paired
from report.tables import (
    accuracy_table,
    asked_table,
    beside_table,
    budget_table,
    label_table,
    price_table,
    supervision_table,
    table,
)


def heading(data):
    settings, n_seeds = data["settings"], len(data["seeds"])
    retrains = max(len(v) for by_seed in data["tests"].values() for v in by_seed.values())
    trainings = "one training a point"
    if retrains > 1:
        trainings = f"mean of up to {retrains} trainings a point"
    what = "ILR and its alternatives under unreliable supervision"
    warning = []
    if data["nothing"]:
        what = f"nothing was learnt, the {data['metric']} is 0 everywhere"
        warning = [f"No comparison on this page says anything: {data['nothing']}.\n"]
    return [
        f"# {settings.get('TASK', data['run'].name)}: {what}\n",
        *warning,
        f"{n_seeds} seed(s): {', '.join(map(str, data['seeds']))}. "
        f"{data['metric'].capitalize()} in percent on {data['n_test']:,} "
        f"{settings.get('EVAL', 'test')} problems a seed, {trainings}.\n"]


def claims_section(data, said, drawn):
    text = ["## Claims\n", "".join(f"{sentence(claim)}\n" for claim in said)
            or "None: of two points that are compared, this run has at most one.\n"]
    covers = ("problems are drawn again; it covers which problems there were, and neither other "
              "seeds nor other trainings. ")
    if len(data["seeds"]) > 1:
        covers = ("seeds are drawn again and, within each, problems; it covers which of both there "
                  "were. Student's t, over the seeds' mean differences, covers whatever differs "
                  "from seed to seed, taken for normal. ")
    if said:
        text.append(
            "In parentheses, 95% intervals of the paired difference, a point's trainings averaged. "
            f"Bootstrap (percentiles of 10,000 draws): {covers}"
            '"A beats B" is said where every interval excludes 0; none is corrected for their '
            f"number ({len(said)}).\n")
    if "gains.png" in drawn:
        text.append("![gain over SFT, by method](gains.png)\n")
    return text


def findings_section(data):
    found = findings(data)
    if not found:
        return []
    return ["## What the paper finds, here\n",
            table(["finding", "points, last rounds", "here"], found),
            "In parentheses, the wider ends of the two intervals. That something does not help "
            "holds where it is established to harm; where no gain is established, how large one "
            "may be all the same is the interval's upper end.\n"]


def accuracy_section(data):
    methods, metric = methods_of(data), data["metric"]
    interval = "Brackets: Wilson's 95% interval over problems, not seeds or trainings"
    if len(data["seeds"]) > 1:
        interval = "± is Student's 95% interval over the seeds"
    text = [f"## {metric.capitalize()} by round\n", accuracy_table(data),
            f"{interval}; SFT, on the unreliable labels, is round 0 of every method.\n",
            "".join(f"- {METHODS[m].NAME}: {METHODS[m].WHAT}.\n" for m in methods),
            beside_table(data)]
    if methods:
        text.append(f"![{metric} per round](test_accuracy.png)\n")
    return text


def labels_section(data):
    if not labels_of(data):
        return []
    return ["## Label accuracy by round\n", label_table(data),
            "![label accuracy per round](label_accuracy.png)\n"]


def without_judge():
    """'naive, DPO-coin, ensemble and SPIN': the methods that ask for no comparisons."""
    names = [m.NAME for m in METHODS.values()
             if not any(path.endswith("comparisons.jsonl") for path in m.price(1))]
    return " and ".join([", ".join(names[:-1]), names[-1]])


def price_section(data, price, drawn):
    whole_run = ""
    if data["whole_run"] is not None:
        whole_run = f"; the whole run took {data['whole_run']:,.0f}"
    text = ["## Price\n", price_table(data, price),
            "Mean over seeds; blank: not recorded. A method's rows are cumulative, on top of what "
            f"is shared ({without_judge()} need no judge). Training on labels counts once, for "
            "the last round; a chain of policies counts whole; what a method takes over from "
            "another (half-models, samples, comparisons) counts too. FLOPs: 2 a weight for each "
            "token read or generated, 4 for each token trained on and 2 more a trained weight, "
            "without attention's own part (Kaplan et al. 2020, arXiv 2001.08361). Not counted: "
            "base models, test answers (the ensemble's too), a point's further trainings. Seconds: "
            "wall time of each stage's last start, beside others of higher or lower priority: no "
            f"price{whole_run}.\n"]
    if "price.png" in drawn:
        text.append(f"![{data['metric']} against price](price.png)\n\nEach line begins at SFT, "
                    "whose price is in all of them; the judge's is in none.\n")
    if {"ilr", "dpo"} <= set(methods_of(data)):
        text += ["### At equal budgets\n",
                 f"Beside each round, the {data['metric']} of the other method's last round that "
                 "costs no more.\n", budget_table(data, price)]
    return text


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
        text = settings.get(key)
        used = text and (float(text) > 0 or key == "LABEL_NOISE")      # without noise: references
        if used and key not in unused:
            found.append(what.format(float(text)))
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
    for key, value, what in (
            ("TASK", "arithmetic", "All seeds share one pair of base models, trained here: no "
             "interval says anything of other base models."),
            ("JUDGE", "oracle", "The judge is an oracle, which reads the references."),
            ("JUDGE", "simulated", "The judge is simulated: it reads the references, and errs."),
            ("CLEAN_START", "1",
             "Labels that are wrong by their references were dropped before SFT."),
            ("EVAL", "validation",
             "These are validation problems, on which settings may have been chosen.")):
        if settings.get(key) == value:
            said.append(what)
    for seed, judge in data["judges"].items():
        if judge.get("held_out_accuracy", 1) <= 0.5:
            said.append(f"The judge of seed {seed} is right on {judge['held_out_accuracy']:.0%} of "
                        "its held-out pairs, no better than a coin: it has learnt nothing.")
    if parts := dialed(settings):
        said.append(f"Supervision is dialed: {'; '.join(parts)}. How unreliable it came out is a "
                    "setting, not a finding.")
    loss = settings.get("DPO_LOSS") or "sigmoid"
    if loss != "sigmoid":
        said.append(f"DPO, wherever it says so, is trained with the loss {loss}.")
    if missing := [f"{p} has {len(tests[p])}" for p in sorted(tests) if len(tests[p]) < n]:
        said.append(f"Not every point has all {n} seeds: {', '.join(missing)}.")
    return said + retraining(data)


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


def write_report(data, said, price, drawn):
    """Write report.md. said: the claims; price: of report/prices.py; drawn: names of the figures.
    Returns what the console shows: the claims and the accuracy by round."""
    text = [*heading(data), *claims_section(data, said, drawn), *findings_section(data),
            *accuracy_section(data), *labels_section(data), *price_section(data, price, drawn),
            *caveats_section(data, drawn)]
    write_text(data["run"] / "report.md", "\n".join(text))
    shown = [sentence(claim) for claim in said]
    if data["nothing"]:
        shown = [f"note: the {data['metric']} is 0 everywhere: {data['nothing']}"]
    return "\n".join([*shown, "", accuracy_table(data)])
