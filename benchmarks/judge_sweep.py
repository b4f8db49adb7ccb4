"""Where do ILR and DPO cross? Final accuracy of both against the accuracy of a judge made worse.

    python benchmarks/judge_sweep.py --work runs/sweep --out benchmarks/results/judge_sweep

Makes one ordinary run of all seeds with the best judge that training gives (JUDGE_ACCURACY=0), on
validation problems. Then, for every share of --flips, the same run again with that share of the
judge's answers turned round (JUDGE_FLIPS; --kind is FLIP_KIND); it takes over what the flips leave
unchanged, so the weak model, labels, judge and SFT model are the same. The horizontal axis is the
measured accuracy on the pairs with one right side that each method asked about in its first round.
Writes OUT.md, OUT.json, OUT.png. A run that is complete in --work is not made again.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from _bench import ROOT, about, in_words, save

from report.figures import as_shipped


def run(out, **settings):
    """A run of run_ilr.sh with its settings; returns its report.json."""
    command = ["bash", ROOT / "run_ilr.sh"]
    fixed = {"PYTHON": sys.executable, "OUT": str(out), "EVAL": "validation",
             "JUDGE_ACCURACY": "0"}
    done = subprocess.run(command, stdout=sys.stderr, env={**os.environ, **fixed, **settings})
    if done.returncode:
        sys.exit(f"{out}: run_ilr.sh failed (exit {done.returncode})")
    return json.loads((out / "report.json").read_text())


def mean(by_seed):
    """The mean over seeds, in percent, of numbers or of lists of numbers."""
    per_seed = [sum(v) / len(v) if isinstance(v, list) else v for v in by_seed.values()]
    return 100 * sum(per_seed) / len(per_seed)


def point(flips, found, rounds):
    """What one run says, in percent."""
    result = {"flips": flips, "sft": mean(found["tests"]["sft"])}
    for m in ("ilr", "dpo"):
        asked = found["comparisons"][f"{m}_1"]
        result[m] = {"judge": mean({seed: c["accuracy"] for seed, c in asked.items()}),
                     "test": mean(found["tests"][f"{m}_{rounds}"])}
    return result


@as_shipped()
def draw(points, args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for m, marker, dash, color in (("ilr", "o", "-", "0.1"), ("dpo", "s", "--", "0.5")):
        axes.plot([p[m]["judge"] for p in points], [p[m]["test"] for p in points], marker=marker,
                  ls=dash, color=color, label=m.upper())
    axes.axhline(points[0]["sft"], color="0.3", ls=":", label="SFT")
    axes.set(xlabel="judge right on the pairs asked in round 1 (%)",
             ylabel=f"validation accuracy after round {args.rounds} (%)",
             title=f"A worse judge ({args.kind} flips, {len(args.seeds.split())} seeds)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{args.out}.png", dpi=130)


def main(args):
    work, points = Path(args.work).resolve(), []
    for flips in sorted({0.0, *args.flips}):
        source = {"FROM": str(work / "flips_0.0")} if flips else {}
        found = run(work / f"flips_{flips}", SEEDS=args.seeds, ROUNDS=str(args.rounds),
                    JUDGE_FLIPS=str(flips), FLIP_KIND=args.kind, **source)
        points.append(point(flips, found, args.rounds))
    lines = [f"Seeds {args.seeds}, {args.rounds} rounds, {args.kind} flips; "
             f"SFT {points[0]['sft']:.1f}.", "",
             "| flipped | judge right, ILR's pairs (%) | ILR (%) | judge right, DPO's pairs (%) | "
             "DPO (%) |", "| --- | --- | --- | --- | --- |"]
    for p in points:
        cells = [f"{p[m][what]:.1f}" for m in ("ilr", "dpo") for what in ("judge", "test")]
        lines.append(f"| {p['flips']:.0%} | {' | '.join(cells)} |")
    text = "\n".join([*lines, "", in_words(about())])
    print(text)
    save(Path(args.out).resolve(), text, {"about": about(), "points": points}, indent=1)
    draw(points, args)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True, help="folder of the runs, kept")
    p.add_argument("--out", required=True, help="names of the results, without .md, .json, .png")
    p.add_argument("--seeds", default="103 104")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4],
                   help="0 is always among them")
    p.add_argument("--kind", default="symmetric", choices=["symmetric", "systematic"])
    main(p.parse_args())
