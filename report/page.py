"""The page, report.md, section by section. report/tables.py makes its tables."""
from core.records import write_text
from report import curves, examples, lengths
from report.caveats import caveats_section
from report.claims import NO_GAIN, contrasts, findings, name_of, sentence
from report.methods import METHODS, labels_of, methods_of
from report.settings import settings_section
from report.tables import (
    accuracy_table,
    beside_table,
    budget_table,
    label_table,
    plain,
    price_table,
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
        f"# {plain(settings.get('TASK') or data['run'].name)}: {what}\n",
        *warning,
        f"{n_seeds} seed(s): {', '.join(map(str, data['seeds']))}. "
        f"{data['metric'].capitalize()} in percent on {data['n_test']:,} "
        f"{plain(settings.get('EVAL', 'test'))} problems a seed, {trainings}.\n"]


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
            "Two methods are compared at the last round that both have, or the line says that the "
            "rounds differ. In parentheses, 95% intervals of the paired difference, a point's "
            "trainings averaged. "
            f"Bootstrap (percentiles of 10,000 draws): {covers}"
            '"A beats B" is said where every interval excludes 0; none is corrected for their '
            f"number ({len(said)}).\n")
    if "gains.png" in drawn:
        text.append("![gain over SFT, by method](gains.png)\n")
    return text


def findings_section(data):
    rows = [[finding, f"{name_of(a)} minus {name_of(b)}: {difference}", verdict]
            for (_, a, b, _), (finding, difference, verdict)
            in zip(contrasts(data), findings(data), strict=True)]
    if not rows:
        return []
    ends = "the wider ends of the two 95% intervals" if len(data["seeds"]) > 1 else (
        "the 95% interval")
    text = (f"Differences in points, with {ends}. Where that includes 0, no difference is "
            "established.")
    if any(not better for *_, better in contrasts(data)):
        text += f" {NO_GAIN}"
    return ["## What the paper finds, here\n",
            table(["the paper finds", "here", "verdict"], rows), f"{text}\n"]


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


def write_report(data, said, price, drawn):
    """Write report.md. said: the claims; price: of report/prices.py; drawn: names of the figures.
    Returns what the console shows: the claims and the accuracy by round."""
    text = [*heading(data), *claims_section(data, said, drawn), *findings_section(data),
            *accuracy_section(data), *labels_section(data), *curves.section(data, drawn),
            *lengths.section(data, drawn), *examples.section(data),
            *price_section(data, price, drawn), *caveats_section(data, drawn),
            *settings_section(data)]
    write_text(data["run"] / "report.md", "\n".join(text))
    shown = [sentence(claim) for claim in said]
    if data["nothing"]:
        shown = [f"note: the {data['metric']} is 0 everywhere: {data['nothing']}"]
    return "\n".join([*shown, "", accuracy_table(data)])
