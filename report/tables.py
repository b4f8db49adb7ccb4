"""The tables of report.md, as Markdown. Numbers are in percent unless a heading says otherwise."""
import re
import unicodedata

from report.methods import (
    METHODS,
    labels_name,
    labels_of,
    methods_of,
    points_of,
    rounds_of,
)
from report.prices import PRICES, number, within
from report.statistics import average, over_seeds, wilson


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


# What Markdown or HTML could read as its own, each as both write it as a plain character. "@" alone
# in a code span: GitHub makes a link of an address that it finds in plain text.
PLAIN = {ord(c): f"&#{ord(c)};" for c in "\\`|~$"} | {
    ord(c): f"\\{c}" for c in "*[]"} | {
    ord("&"): "&amp;", ord("<"): "&lt;", ord("@"): "`@`"}
OPEN_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")      # within a word it is plain


def shown(character):
    """A character that could be unseen or turn the text around, as \\u202e; others as they are."""
    joiners = "\u200c\u200d"          # several languages write with them
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"):
        return character if character in joiners else f"\\u{ord(character):04x}"
    return character


def plain(text, limit=None):
    """Text of a model or a file for a table's cell: one line, nothing in it works as Markdown or
    HTML, line ends are ⏎. Of more than `limit` characters the middle is left out: [...]."""
    text = str(text).replace("\r\n", "\n").strip()
    if limit and len(text) > limit:
        half = limit // 2
        text = f"{text[:half].rstrip()} [...] {text[-half:].lstrip()}"
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = " ⏎ ".join("".join(map(shown, line)) for line in lines if line)
    text = text.translate(PLAIN).replace("://", "&#58;//").replace("www.", "&#119;ww.")
    text = text.replace('="', "=&quot;")        # report/html.py looks for src="..."
    return OPEN_UNDERSCORE.sub(r"\\_", text) or "*empty*"


def cell(by_seed, n=0):
    """'72.7 ± 2.1' in percent from {seed: [shares]}. One seed: Wilson's interval over n problems,
    or none where n is 0."""
    mean, half = over_seeds(by_seed)
    if half is not None:
        return f"{mean:.1f} ± {half:.1f}"
    if not n:
        return f"{mean:.1f}"
    low, high = wilson(mean / 100, n)
    return f"{mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def some(text, found, of, what):
    """A cell that says where it is not of all: '61.0 (1 of 2 seeds)'."""
    return text if len(found) == len(of) else f"{text} ({len(found)} of {len(of)} {what})"


def percent(summaries, key, error=False):
    """'63.7' from {seed: summary}, mean over seeds; '' where none has the number."""
    mean = average(summaries, key, error)
    return "" if mean is None else f"{100 * mean:.1f}"


def count(summaries, key):
    """'1,970' from {seed: summary}, mean over seeds; '' where none has the number."""
    mean = average(summaries, key)
    return "" if mean is None else f"{mean:,.0f}"


def round_headings(first, last):
    return [f"round {k}" for k in range(first, last + 1)]


def accuracy_table(data):
    """Test accuracy of each method by round."""
    methods = methods_of(data)
    last = max((max(points_of(data, m)) for m in methods), default=0)
    rows = []
    for m in methods:
        points = points_of(data, m)
        cells = [some(cell(data["tests"][points[k]], data["n_test"]), data["tests"][points[k]],
                      data["seeds"], "seeds") if k in points else "" for k in range(last + 1)]
        rows.append([METHODS[m].NAME, *cells])
    if not methods:
        sft = data["tests"].get("sft")
        rows = [["SFT", cell(sft, data["n_test"]) if sft else "not graded yet"]]
    return table(["method", "SFT", *round_headings(1, last)], rows)


def beside_table(data):
    """Test accuracy of the weak model and of SFT on gold labels."""
    rows = [[name, cell(data["tests"][point], data["n_test"])] for point, name in (
        ("weak", "weak model alone"), ("gold", "ceiling: SFT on gold labels of the same problems"))
        if point in data["tests"]]
    return table(["beside it", data["metric"]], rows) if rows else ""


def label_table(data):
    """Accuracy of the labels of each method that refines them, by round."""
    series = labels_of(data)
    last = max(max(rounds) for rounds in series.values())
    rows = []
    for m, rounds in series.items():
        cells = [cell(rounds[k]) if k in rounds else "" for k in range(last + 1)]
        rows.append([labels_name(m, rounds), *cells])
    return table(["", *round_headings(0, last)], rows)


def price_table(data, price):
    """What all methods share, then each method through each round."""
    rows = [("weak", "shared: weak side"), ("judge", "shared: judge"), ("sft", "shared: SFT start")]
    for m in methods_of(data):
        for k, point in rounds_of(data, m).items():
            rows.append((point, f"{METHODS[m].NAME}, through round {k}"))
    cells = [[name, *(number(c, price[point][c]) for c in PRICES)]
             for point, name in rows if point in price]
    return table(["", *PRICES.values()], cells)


def budget_table(data, price):
    """ILR and DPO: beside each round, the other's last round that costs no more."""
    def accuracy(point):
        return f"{over_seeds(data['tests'][point])[0]:.1f}"

    def of_other(other, column, budget):
        k = within(data, price, other, column, budget)
        if k is None:
            return ""
        return f"{accuracy(f'{other}_{k}')} (round {k})" if k else "none"

    rows = []
    for m, other in (("ilr", "dpo"), ("dpo", "ilr")):
        for k, point in rounds_of(data, m).items():
            cells = [of_other(other, c, price[point][c]) for c in ("asked", "flops")]
            rows.append([f"{METHODS[m].NAME}, round {k}", accuracy(point), *cells])
    return table(["", data["metric"], "the other, for no more comparisons",
                  "the other, for no more FLOPs"], rows)


def supervision_columns(data):
    """[(heading, a summary {seed: ...} of each round, its key, whether 1 minus it is shown)] of
    the columns that have a number."""
    start = next(iter(labels_of(data).values()), {0: {}})[0]
    labels = {seed: {"correct": share} for seed, (share,) in start.items()}
    columns = [("label error", [labels], "correct", True),
               ("judge error, held-out pairs", [data["judges"]], "held_out_accuracy", True),
               ("order flips, held-out pairs", [data["judges"]], "held_out_flip_rate", False)]
    for m in ("ilr", "dpo"):
        points = rounds_of(data, m).values()
        asked = [data["comparisons"].get(p, {}) for p in points]
        refined = [data["refinements"].get(p, {}) for p in points]
        name = METHODS[m].NAME
        columns += [(f"judge error, {name}", asked, "accuracy", True),
                    (f"order flips, {name}", asked, "flip_rate", False),
                    (f"precision, {name}", refined, "precision", False),
                    (f"recall, {name}", refined, "recall", False)]
    return [column for column in columns if any(percent(s, column[2]) for s in column[1])]


def supervision_table(data):
    """How unreliable the supervision was: a row for each seed, then their mean. '' where nothing
    is known. A cell with several numbers has them by round."""
    columns = supervision_columns(data)
    if not columns:
        return ""
    groups = [(str(seed), [seed]) for seed in data["seeds"]]
    if len(groups) > 1:
        groups.append(("mean", data["seeds"]))
    rows = []
    for name, seeds in groups:
        cells = []
        for _, rounds, key, error in columns:
            of_seeds = [{s: v for s, v in summaries.items() if s in seeds} for summaries in rounds]
            cells.append(", ".join(percent(s, key, error) or "–" for s in of_seeds))
        rows.append([name, *cells])
    return table(["seed", *(heading for heading, *_ in columns)], rows)


def asked_table(data):
    """The judge's pairs, and what came of them, for each point with comparisons; '' if none."""
    rows = []
    for m in methods_of(data):
        for point in rounds_of(data, m).values():
            if asked := data["comparisons"].get(point):
                made = data["refinements"].get(point, {})
                rows.append([point, count(asked, "asked"), percent(asked, "position_bias"),
                             count(made, "kept"), percent(made, "share_of_all"),
                             percent(made, "share_of_asked")])
    header = ["", "pairs asked about", "position bias (%)", "labels replaced, pairs kept",
              "% of all", "% of disagreements"]
    return table(header, rows) if rows else ""
