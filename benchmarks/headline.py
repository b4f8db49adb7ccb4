"""The headline: ILR, DPO and baselines on several pairs of base models.

    for pair in 0 1 2 3 4 5; do python benchmarks/headline.py --pair $pair; done
    python evaluate.py report runs/headline/pair_*/test --out results

For a pair, first DPO's learning rate, on validation problems: full runs of DPO from the same SFT
models, one for each rate, and the rate with the best mean accuracy after the last round. Where the
best rate is at an end of those tried, the next one is tried too. Then one run on test problems with
that rate, on seeds that no other pair has. A pair of base models that is not there is made first.

All of this was fixed before any test problem was graded. A command that is cut off goes on where
it was. WORK/pair_B/dpo_lr.json has what the sweep found.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

from _bench import ROOT

from core.cli import make_parser, run_stage, whole

LADDER = ("3e-7", "1e-6", "3e-6", "1e-5", "3e-5", "1e-4", "3e-4")      # of learning rates
TRIED = LADDER[2:5]                 # always; the others where the best is at an end
VALIDATION = "110 111"              # seeds of the sweep, the same for every pair
SEEDS_PER_PAIR = 2                  # test seeds: pair 0 has 20 and 21, pair 1 has 22 and 23, ...
FIRST_SEED = 20
METHODS = "ilr dpo naive rft"
ROUNDS = 3


def run(out, **settings):
    """A run of run_ilr.sh with these settings, in the folder `out`."""
    done = subprocess.run(["bash", ROOT / "run_ilr.sh"],
                          env={**os.environ, "PYTHON": sys.executable, "OUT": str(out), **settings})
    if done.returncode:
        sys.exit(f"{out}: run_ilr.sh failed (exit {done.returncode})")


def sweep(work, ladder, tried, **settings):
    """({rate: accuracies by seed after the last round} of DPO, SFT's by seed) on validation
    problems: of the rates `tried`, and of the next one of the ladder while the best is at an end.
    """
    found, sft = {}, {}

    def measure(rate):
        out = work / f"dpo_lr_{rate}"
        run(out, EVAL="validation", METHODS="dpo", ROUNDS=str(ROUNDS), DPO_LR=rate, **settings)
        settings.update(FROM=str(work / f"dpo_lr_{tried[0]}"))
        tests = json.loads((out / "report.json").read_text())["tests"]
        found[rate] = {seed: shares[0] for seed, shares in tests[f"dpo_{ROUNDS}"].items()}
        sft.update({seed: shares[0] for seed, shares in tests["sft"].items()})

    for rate in tried:
        measure(rate)
    while True:
        done, at = [ladder.index(rate) for rate in found], ladder.index(best(found))
        beyond = at - 1 if at == min(done) else at + 1 if at == max(done) else -1
        if not 0 <= beyond < len(ladder):
            return found, sft
        measure(ladder[beyond])


def best(found):
    """The rate with the best mean; of equal ones the lowest."""
    return max(sorted(found, key=float), key=lambda rate: sum(found[rate].values()))


def main(args):
    work = Path(args.work).resolve() / f"pair_{args.pair}"
    found, sft = sweep(work, LADDER, TRIED, BASE_SEED=str(args.pair), SEEDS=VALIDATION)
    rate = best(found)
    (work / "dpo_lr.json").write_text(json.dumps({"chosen": rate, "sft": sft, "validation": found},
                                                 indent=1) + "\n")
    first = FIRST_SEED + SEEDS_PER_PAIR * args.pair
    run(work / "test", BASE_SEED=str(args.pair), METHODS=METHODS, ROUNDS=str(ROUNDS), DPO_LR=rate,
        SEEDS=" ".join(str(first + k) for k in range(SEEDS_PER_PAIR)))


if __name__ == "__main__":
    p = make_parser(__doc__, prog="headline.py")
    p.add_argument("--pair", type=whole, required=True, help="BASE_SEED of the pair of base models")
    p.add_argument("--work", default=ROOT / "runs/headline", help="folder of the runs, kept")
    run_stage(p, main)
