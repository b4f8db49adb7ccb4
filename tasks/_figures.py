"""What evaluate.py's report draws: numbers in percent -> PNG files of 150 dpi that can be told apart in grey, and one HTML page."""
import base64
import re

from tasks import InputError, write_text

# colour (light and dark in turn), marker and dash of each method, no two alike in any of the three
STYLES = {"ilr": ("#12427e", "o", "-"), "dpo": ("#d9722e", "s", "--"), "naive": ("#2f7d4f", "^", "-."), "dpo-labels": ("#c9a227", "D", ":"),
          "sft-chosen": ("#8c1d40", "v", (0, (6, 1, 1, 1, 1, 1))), "filter": ("#5ab4c5", "P", (0, (2, 1))), "rft": ("#5b3a8c", "X", (0, (7, 2))),
          "ensemble": ("#8f8f8f", "*", (0, (4, 1, 1, 1))), "steer": ("#111111", "<", (0, (1, 1))), "spin": ("#e08fb4", ">", (0, (5, 4))),
          "dpo-release": ("#7a4a1e", "p", (0, (3, 2, 1, 2))), "dpo-coin": ("#b5b56a", "h", (0, (1, 4)))}

MANY = 5        # series of a figure from which on only their means are drawn: with intervals they could not be told apart


def canvas(panels, title, width=6.4, height=4.6):
    """(figure, axes) with a title; matplotlib is loaded where something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, panels, squeeze=False, layout="constrained", figsize=(width if panels == 1 else 10.5, height))
    figure.suptitle(title, fontsize=12)
    for a in axes[0]:
        a.grid(axis="y", alpha=0.3)
    return figure, axes[0]


def save(figure, path, handles):
    """handles: {name: what is drawn for it}, the legend below the panels."""
    import matplotlib.pyplot as plt
    if handles:
        columns = int(figure.get_figwidth() / (0.7 + 0.065 * max(map(len, handles))))       # inches of a line sample and of 9 pt letters
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3.4)
    figure.savefig(path.with_suffix(".writing.png"), dpi=150, metadata={"Software": None})
    plt.close(figure)
    path.with_suffix(".writing.png").replace(path)


def by_round(path, title, ylabel, series, lines):
    """series: (name, method, {round: (mean, half width or None, values of the seeds)}), whose round 0 is one and the same; lines:
    horizontal, (name, value). Of MANY series only the means, and no line far from them."""
    few, handles = len(series) < MANY, {}
    figure, (axes,) = canvas(1, title, *((6.4, 4.6) if few else (8, 6)))
    for k, (name, method, rounds) in enumerate(series):
        color, marker, dash = STYLES[method]
        shift = min(0.1, 0.7 / len(series)) * (k + 0.5 - len(series) / 2)        # side by side, so that no bar hides another
        at = {x: x + shift if x else 0 for x in rounds}
        for x, (_, half, seeds) in rounds.items():
            if half is not None and (x or not k) and few:
                axes.plot([at[x]] * len(seeds), seeds, marker, color=color, ms=3, alpha=0.4, mew=0)
        halves = [half or 0 if few and (x or not k) else 0 for x, (_, half, _) in rounds.items()]
        handles[name] = axes.errorbar(at.values(), [mean for mean, _, _ in rounds.values()], halves, color=color, marker=marker, ls=dash, lw=1.6,
                                      elinewidth=1, capsize=2 if any(halves) else 0, zorder=3 - 0.1 * k)
    low, high = axes.get_ylim()
    for (name, value), (dash, shade) in zip(lines, ((":", "0.35"), ("-.", "0.55"))):
        if few or low < value < high:
            handles[name] = axes.axhline(value, color=shade, ls=dash, lw=1.2)
        else:
            handles[f"{name.partition(' (')[0]} {value:.1f}"] = axes.plot([], [], color=shade, ls=dash, lw=1.2)[0]
    axes.set_xticks(range(1 + max(x for _, _, rounds in series for x in rounds)))
    axes.set(xlabel="round (0: before any refinement)", ylabel=ylabel)
    low, high = axes.get_ylim()
    axes.set_ylim(max(-2, min(low, high - 10)), min(102, max(high, low + 10)))      # never finer than a point can be
    save(figure, path, handles)


def gains(path, title, xlabel, rows):
    """rows: (name, mean, low, high, values of the seeds), one below the other, the largest mean on top."""
    figure, (axes,) = canvas(1, title, 7)
    rows = sorted(rows, key=lambda row: row[1])
    for y, (_, mean, low, high, seeds) in enumerate(rows):
        axes.errorbar([mean], [y], xerr=[[mean - low], [high - mean]], color="0.1", marker="o", capsize=3, lw=1.4)
        if len(seeds) > 1:
            axes.plot(seeds, [y - 0.25] * len(seeds), "|", color="0.45", ms=5)
    axes.axvline(0, color="0.35", ls=":", lw=1.2)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.grid(axis="x", alpha=0.3)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=xlabel + (" (strokes: the seeds)" if len(rows[0][4]) > 1 else ""))
    save(figure, path, {})


def price(path, title, ylabel, panels):
    """panels: (xlabel, [(name, method, [(price, accuracy)])]), a line's points: SFT, then the rounds."""
    figure, axes = canvas(len(panels), title)
    handles = {}
    for a, (xlabel, lines) in zip(axes, panels):
        for name, method, points in lines:
            color, marker, dash = STYLES[method]
            handles[name], = a.plot(*zip(*points), color=color, marker=marker, ls=dash, lw=1.6, markevery=slice(1, None))
        handles["SFT"], = a.plot(*lines[0][2][0], "o", color="white", mec="black", ms=9, mew=1.5, zorder=5)
        a.set(xlabel=xlabel, ylabel=ylabel)
        a.margins(0.06, 0.08)
        a.ticklabel_format(axis="x", style="sci", scilimits=(-3, 6), useMathText=True)
    save(figure, path, handles)


def judge(path, title, calibration, lines):
    """calibration: (name, method, [(prob_b, share of B right, half widths below and above)]), in shares; lines: (name, method,
    whether filled, {round: percent}). Each panel only where there is something to draw."""
    figure, axes = canvas(bool(calibration) + bool(lines), title)
    handles = {}
    if calibration:
        handles["calibrated"], = axes[0].plot([0, 1], [0, 1], color="0.5", lw=1, ls=":")
        for name, method, points in calibration:
            color, marker, dash = STYLES[method]
            x, y, low, high = zip(*points)
            handles[name] = axes[0].errorbar(x, y, [low, high], color=color, marker=marker, ls=dash, lw=1.6, capsize=3, elinewidth=1)
        axes[0].set(xlabel="judge's probability that B is better", ylabel="share of pairs whose B is better", xlim=(0, 1), ylim=(0, 1))
        axes[0].set_title("calibration (bars: 95%)", fontsize=10)
    for name, method, filled, rounds in lines:
        color, marker, dash = STYLES[method]
        handles[name], = axes[-1].plot(list(rounds), list(rounds.values()), color=color, marker=marker, ls=dash if filled else ":",
                                       mfc=color if filled else "white", lw=1.6)
    if lines:
        axes[-1].set_xticks(range(1, 1 + max(x for *_, rounds in lines for x in rounds)))
        axes[-1].set(xlabel="round", ylabel="percent")
        axes[-1].set_title("accuracy, and precision of what was replaced or kept", fontsize=10)
        handles["accuracy of a coin"] = axes[-1].axhline(50, color="0.35", lw=1.2, ls="-.")
        axes[-1].margins(0.05, 0.08)
    save(figure, path, handles)


# ---------------------------------------------------------------- the page
STYLE = """body { font: 16px/1.5 Georgia, serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111 }
h1, h2, h3, table { font-family: Helvetica, Arial, sans-serif } h1, h2, h3 { line-height: 1.2 }
table { border-collapse: collapse; font-size: 0.8rem; margin: 1rem 0; border-top: 1.5px solid; border-bottom: 1.5px solid }
th, td { padding: 0.2rem 0.6rem; text-align: left; vertical-align: top } th { border-bottom: 1px solid }
tr:nth-child(even) td { background: #f3f3f3 } img { max-width: 100% }
@media print { body { font-size: 10pt; margin: 0; max-width: none } table, img { break-inside: avoid } h2, h3 { break-after: avoid } }"""


def html(path):
    """A Markdown file -> the same page beside it as one HTML file, figures inside."""
    try:
        import markdown
    except ImportError:
        raise InputError("report.html needs the package markdown (pip install -r requirements.txt); the rest of the report is written") from None

    def inline(match):
        return f'src="data:image/png;base64,{base64.b64encode((path.parent / match[1]).read_bytes()).decode()}"'
    text = path.read_text(encoding="utf-8")
    title, body = text.partition("\n")[0].lstrip("# "), markdown.markdown(text, extensions=["tables"])
    write_text(path.with_suffix(".html"), f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>\n{STYLE}\n'
               "</style>\n" + re.sub(r'src="([^":]+\.png)"', inline, body) + "\n</html>\n")
