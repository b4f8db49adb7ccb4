"""The page of runs side by side, section by section. report/side_tables.py makes its tables."""
from core.records import write_json, write_text
from report.caveats import coins, dialed
from report.claims import NO_GAIN, verdict
from report.html import write_html
from report.side import against, all_contrasts, are_draws, differing, numbers, shortened
from report.side_figures import PANELS, draw
from report.side_tables import (
    against_table,
    all_methods,
    beside_table,
    differences_table,
    equal_table,
    interval,
    levels_table,
    mean_table,
    names,
    own,
    runs_table,
    supervision_table,
)
from report.tables import plain, some, table


def heading(runs):
    settings, differ = runs[0]["settings"], differing(runs)
    rows = {"problems a seed": [f"{run['n_test']:,}" for run in runs],
            "commit": [run["commit"][:9] for run in runs]}
    for key in dict.fromkeys(["METHODS", "ROUNDS", *differ]):
        rows[key] = differ.get(key) or [shortened(run["settings"].get(key, "")) for run in runs]
    seeds = ["seeds", *(", ".join(map(str, run["seeds"])) for run in runs)]
    unlike = [[plain(key), *(plain(v) if v else "" for v in values)] for key, values in rows.items()
              if len(set(values)) > 1]
    shared = [f"{plain(key)}: {plain(values[0])}" for key, values in rows.items()
              if len(set(values)) == 1 and values[0]]
    what = ("Each has base models of its own. A mean is over the runs, each the mean of its seeds."
            if are_draws(runs) else "Base models are shared, so no mean is taken over the runs.")
    return [f"# {plain(settings.get('TASK') or 'Runs')}: {len(runs)} runs side by side\n",
            f"{what} {runs[0]['metric'].capitalize()} in percent on "
            f"{plain(settings.get('EVAL') or 'test')} problems.\n",
            table(["", *names(runs)], [seeds, *unlike]),
            f"The same in all: {'; '.join(shared)}. Other settings, and library versions, are "
            "shown where they differ.\n"]


# ---------------------------------------------------------------- differences
def intervals_text(runs, contrasts):
    """What the two intervals of runs that are draws are."""
    few = ""
    if any(len(c["runs"]) == 2 for c in contrasts):
        few += (" Over two runs Student's t is 12.7 standard errors: hardly anything can be "
                "established over base models.")
    if any(c["over"] is None for c in contrasts):
        few += " One run alone has no interval over base models, and establishes nothing."
    if any(c["within"] is None for c in contrasts):
        few += (" Where no run has two seeds, what other seeds would give is not known apart from "
                "what other base models would.")
    return ("*Other seeds*: 95% interval for the same base models under other data, weak models, "
            "judges and trainings; Student's t, with the scatter of the seeds around their run's "
            "mean, pooled over the runs. *Other base models*: Student's t over the "
            f"{len(runs)} runs' means. Their scatter has that of the seeds in it, so that this "
            f"interval covers seeds too, and is normally the wider one.{few}\n")


def pooled_findings(runs, found):
    """The findings over runs that are draws."""
    rows = []
    for finding, c, better in found:
        mean = some(f"{c['mean']:+.1f}", c["runs"], runs, "runs")
        rows.append([finding, mean, interval(c["mean"], c["within"]),
                     interval(c["mean"], c["over"]), verdict(c, better)])
    header = ["the paper finds", "here, points", "95%, other seeds", "95%, other base models",
              "verdict"]
    return [table(header, rows),
            "Compared is the last round that both methods have. A difference is established where "
            f"both intervals exclude 0. {NO_GAIN}\n",
            intervals_text(runs, [c for _, c, _ in found])]


def findings_section(runs, found):
    if not found:
        return []
    if are_draws(runs):
        return ["## What the paper finds, here\n", *pooled_findings(runs, found)]
    rows = []
    for finding, c, better in found:
        of_runs = [c["runs"].get(run["name"]) for run in runs]
        rows.append([finding, *(f"{own(f)}: {verdict(f, better)}" if f else "" for f in of_runs)])
    return ["## What the paper finds, here\n", table(["finding", *names(runs)], rows),
            "Compared is the last round that both methods have. In parentheses, the wider ends of "
            "the run's own 95% intervals: a bootstrap over its problems and seeds, and of several "
            "seeds Student's t.\n"]


def differences_section(runs, every, equal, drawn):
    if not every:
        return []
    text = ["## Every difference, by run\n", differences_table(runs, every),
            "Bold: every interval excludes 0.\n"]
    if "gains.png" in drawn:
        text.append("![mean differences with both intervals, and each run's](gains.png)\n")
    if equal:
        text += ["## At equal comparisons\n", differences_table(runs, [equal]),
                 equal_table(runs, equal),
                 "ILR's last round against DPO's last round that asked for no more comparisons in "
                 "the same run; against SFT where no round of DPO did.\n"]
    return text


def against_section(runs, versus, drawn):
    """Each run that shares base models against the first; [] of runs that are draws."""
    if not versus:
        return []
    first, text = runs[0], ["## The second against the first\n" if len(runs) == 2
                            else "## Every run against the first\n"]
    for run in runs[1:]:
        found = versus[run["name"]]
        two = f"{plain(run['name'])} against {plain(first['name'])}"
        if len(runs) > 2:
            text.append(f"### {two}\n")
        text.append(against_table(first, run, found) if found else
                    f"{two}: no seed with graded problems in common.\n")
        left_out = sorted((run["tests"].keys() & first["tests"].keys()) - found.keys())
        if found and left_out:
            text.append("Not compared, for want of the same seeds and problems: "
                        f"{', '.join(left_out)}.\n")
    if "differences.png" in drawn:
        text.append("![difference from the first run, by point](differences.png)\n")
    if any(versus.values()):
        text.append("Of the seeds that both have, on the same problems: 95% intervals of the "
                    "paired difference, as in a run's own report. Bold: every interval excludes 0. "
                    "Where both were trained, the difference has the chance of two trainings in "
                    "it; the bootstrap of one seed, over problems, does not cover that.\n")
    return text


# ---------------------------------------------------------------- levels
def accuracy_section(runs, drawn):
    metric = runs[0]["metric"]
    if are_draws(runs):
        tables = [mean_table(runs),
                  "Mean over the runs ± Student's 95% interval over their means: other base models "
                  "and seeds. SFT, on the unreliable labels, is round 0 of every method. The "
                  "methods of one run go up and down together: whether they differ is in the "
                  "differences.\n", beside_table(runs)]
    else:
        tables = [runs_table(runs),
                  "± is Student's 95% interval over a run's seeds; brackets, of one seed: Wilson's "
                  "over problems.\n"]
    text = [f"## {metric.capitalize()} by round\n", *tables, "### Of each run\n",
            levels_table(runs), "Means over a run's seeds; a method's by round.\n"]
    if "accuracy.png" in drawn:
        text.append(f"![{metric} of each run by round](accuracy.png)\n")
    if len(all_methods(runs)) > PANELS:
        text.append(f"The figure has the first {PANELS} methods.\n")
    return text


def supervision_section(runs):
    found = supervision_table(runs)
    if not found:
        return []
    return ["## Labels and judge\n", found,
            "In percent, by round where a cell has several, labels from round 0 on; means over a "
            "run's seeds. Judge's accuracy: of the pairs with one right side.\n"]


# ---------------------------------------------------------------- the page
def caveats(runs, contrasts):
    """How far the page can be trusted: a list of sentences."""
    seeds = [seed for run in runs for seed in run["seeds"]]
    if are_draws(runs):
        said = [f"{len(runs)} runs and {len(seeds)} seeds are few: Student's t leans on the "
                "normal, and the interval for other seeds on runs whose seeds scatter alike."]
        if len(set(seeds)) < len(seeds):
            said.append("Runs have seeds in common, hence the same problems: no interval says "
                        "what other problems would give.")
        others = [k for k in differing(runs) if k not in ("BASE_SEED", "METHODS", "ROUNDS")]
        if others:
            said.append("The runs differ in more than base models and seeds: "
                        f"{', '.join(map(plain, others))}. A mean over the runs is over these "
                        "too.")
    else:
        said = ["Runs that share base models say nothing of other base models, and runs that share "
                "seeds nothing of other seeds."]
    if len({run["commit"] for run in runs}) > 1:
        said.append("The runs are of different commits: the code may differ too.")
    said.append(f"No interval is corrected for their number ({len(contrasts)} differences).")
    for run in runs:
        said += caveats_of(run, {point for other in runs for point in other["tests"]})
    for parts in dict.fromkeys(tuple(dialed(run["settings"])) for run in runs):
        if parts:
            said.append(f"Supervision is dialed: {'; '.join(parts)}. How unreliable it came out is "
                        "a setting, not a finding.")
    if {len(v) for run in runs for by in run["tests"].values() for v in by.values()} == {1}:
        said.append("One training a point: how much retraining alone would change a number is not "
                    "measured.")
    return ["## Caveats\n", "".join(f"- {sentence}\n" for sentence in said)]


def caveats_of(run, points):
    """What one run lacks. points: of all runs."""
    name, tests = plain(run["name"]), run["tests"]
    if not tests:
        return [f"{name}: nothing is graded yet."]
    said = [f"{name}: nothing was learnt: {plain(run['nothing'])}."] if run["nothing"] else []
    for seed, right in coins(run["judges"]):
        said.append(f"{name}: the judge of seed {seed} is right on {right:.0%} of its held-out "
                    "pairs, no better than a coin.")
    lacking = [p for p in sorted(points) if len(tests.get(p, ())) < len(run["seeds"])]
    if lacking:
        said.append(f"{name} lacks points, of some seeds or of all: {', '.join(lacking)}.")
    if run["unknown"]:
        said.append(f"{name}: folders that the report does not know, so they are left out: "
                    f"{', '.join(map(plain, run['unknown']))}.")
    return said


def write_side(runs, folder):
    """Write report.md, report.html, report.json and figures into a folder (Path), which is made.
    Returns what the console shows: the first tables of differences, and the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    found, every, equal = all_contrasts(runs)
    versus = {} if are_draws(runs) else {run["name"]: against(run, runs[0]) for run in runs[1:]}
    contrasts = every + [equal] * bool(equal)
    drawn = draw(folder, runs, contrasts, versus)
    first, findings = against_section(runs, versus, drawn), findings_section(runs, found)
    text = [*heading(runs), *first, *findings, *differences_section(runs, every, equal, drawn),
            *accuracy_section(runs, drawn), *supervision_section(runs), *caveats(runs, contrasts)]
    write_text(folder / "report.md", "\n".join(text))
    write_json(folder / "report.json", numbers(runs, found, every, equal, versus))
    write_html(folder / "report.md")
    shown = [part for part in first or findings if part.startswith("|")]
    return "\n".join([*shown, f"{folder}/report.md, report.html, report.json"
                      + "".join(f", {name}" for name in drawn)])
