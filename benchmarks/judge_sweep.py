"""Where do ILR and DPO cross? Final accuracy of both against the accuracy of one judge, made worse by turning its answers round.

    python benchmarks/judge_sweep.py --work runs/sweep --out benchmarks/results/judge_sweep

One ordinary run per seed with the best judge that training gives (JUDGE_ACCURACY=0) on validation problems; then the same run again, with the
same weak model, labels, judge and SFT model, for every share of --flips (JUDGE_FLIPS; FLIP_KIND by --kind). The accuracy on the horizontal
axis is the measured one, on the pairs with one right side that each method asked about in its first round. Writes OUT.md, .json, .png.
A run that is complete in --work is not made again.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from _bench import ROOT, about


def run(out, seeds, rounds, **settings):
    done = subprocess.run(["bash", ROOT / "run_ilr.sh"], stdout=sys.stderr, env={
        **os.environ, "PYTHON": sys.executable, "OUT": str(out), "SEEDS": seeds, "ROUNDS": str(rounds), "EVAL": "validation", "JUDGE_ACCURACY": "0", **settings})
    if done.returncode:
        sys.exit(f"{out}: run_ilr.sh failed (exit {done.returncode})")
    return json.loads((out / "report.json").read_text())


def mean(by_seed):
    per_seed = [sum(v) / len(v) if isinstance(v, list) else v for v in by_seed.values()]
    return 100 * sum(per_seed) / len(per_seed)


def main(args):
    work, points = Path(args.work).resolve(), []
    for flips in sorted({0.0, *args.flips}):
        out = work / f"flips_{flips}"
        if flips:
            for seed in args.seeds.split():
                for part in ("data", "weak", "judge", "sft", "gold"):
                    if not (out / f"seed_{seed}/{part}").exists():
                        half = out / f"seed_{seed}/.{part}.writing"
                        shutil.rmtree(half, ignore_errors=True)
                        shutil.copytree(work / f"flips_0.0/seed_{seed}/{part}", half, symlinks=True, copy_function=os.link)
                        half.rename(out / f"seed_{seed}/{part}")
        found = run(out, args.seeds, args.rounds, JUDGE_FLIPS=str(flips), FLIP_KIND=args.kind)
        points.append({"flips": flips, "sft": mean(found["tests"]["sft"]), **{
            m: {"judge": mean({s: c["accuracy"] for s, c in found["comparisons"][f"{m}_1"].items()}), "test": mean(found["tests"][f"{m}_{args.rounds}"])}
            for m in ("ilr", "dpo")}})
    lines = [f"Seeds {args.seeds}, {args.rounds} rounds, {args.kind} flips; SFT {points[0]['sft']:.1f}.", "",
             "| flipped | judge right, ILR's pairs (%) | ILR (%) | judge right, DPO's pairs (%) | DPO (%) |", "| --- | --- | --- | --- | --- |",
             *(f"| {p['flips']:.0%} | {p['ilr']['judge']:.1f} | {p['ilr']['test']:.1f} | {p['dpo']['judge']:.1f} | {p['dpo']['test']:.1f} |" for p in points), "",
             ", ".join(f"{k} {v}" for k, v in about().items())]
    print("\n".join(lines))
    Path(f"{args.out}.md").write_text("\n".join(lines) + "\n")
    Path(f"{args.out}.json").write_text(json.dumps({"about": about(), "points": points}, indent=1) + "\n")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for m, marker, dash, color in (("ilr", "o", "-", "0.1"), ("dpo", "s", "--", "0.5")):
        axes.plot([p[m]["judge"] for p in points], [p[m]["test"] for p in points], marker=marker, ls=dash, color=color, label=m.upper())
    axes.axhline(points[0]["sft"], color="0.3", ls=":", label="SFT")
    axes.set(xlabel="judge right on the pairs asked in round 1 (%)", ylabel=f"validation accuracy after round {args.rounds} (%)",
             title=f"A worse judge ({args.kind} flips, {len(args.seeds.split())} seeds)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{args.out}.png", dpi=130)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True, help="folder of the runs, kept")
    p.add_argument("--out", required=True, help="names of the results, without .md, .json, .png")
    p.add_argument("--seeds", default="103 104")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4], help="0 is always among them")
    p.add_argument("--kind", default="symmetric", choices=["symmetric", "systematic"])
    main(p.parse_args())
