"""How far may DPO go? Accuracy and the judge's favour against the distance from the SFT model.

    python benchmarks/overoptimize.py runs/arithmetic/seed_0 --data validation \\
        --out benchmarks/results/overoptimization

Reads a finished run's SFT model, judge and the preferences of DPO's first round. Trains DPO on
them with every --beta for --epochs, and looks at --points checkpoints of each training:
- accuracy, greedy;
- KL(policy || SFT) in nats a completion: the mean of log policy - log SFT over the policy's own
  samples at temperature 1;
- favour: the judge's mean probability that the policy's sample is better than the SFT model's.
Writes OUT.json, OUT.md and OUT.png. What is complete in --work is not made again.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, about, in_words, save

from report.figures import as_shipped


def stage(out, *command):
    """Run a stage with --out `out` unless that exists; returns `out`."""
    if not Path(out).exists():
        words = [*map(str, command), "--out", str(out)]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return out


def logps(model_path, records):
    """Log-probability of each record's completion under a model, in nats: fp32 (N,)."""
    import torch

    from core.models import open_model
    from core.packing import completion_logps, pack
    from core.tokens import encode_completion, encode_prompt, open_tokenizer
    tokenizer = open_tokenizer(model_path)
    model = open_model(model_path, torch.device("cpu")).eval()
    sequences = []
    for r in records:
        prompt = encode_prompt(tokenizer, r["prompt"])
        completion = encode_completion(tokenizer, r["completion"])
        weights = [0.0] * len(prompt) + [1.0] * len(completion)
        sequences.append((prompt + completion, weights))
    total = torch.zeros(len(sequences))
    with torch.inference_mode():
        for batch in pack(sequences, 4096, model.device, model):
            found, _, owner = completion_logps(model, batch)
            total.index_add_(0, owner, found)
    return total


def look(work, name, model, run, args):
    """{accuracy, kl, favour} of one policy."""
    from core.records import read_jsonl
    data, sft = run / f"data/{args.data}.jsonl", run / "sft/model_1"

    def answers(out, model, *flags):
        return stage(work / out, "generate.py", "--model", model, "--data", data,
                     "--max-new-tokens", args.max_new_tokens, "--batch-size", 128,
                     "--device", "cpu", *flags)
    greedy = answers(f"{name}.greedy.jsonl", model)
    graded = stage(work / f"{name}.graded.jsonl", "evaluate.py", "grade", "--task", args.task,
                   "--data", greedy)
    sampling = "--temperature", 1, "--seed", 7
    of_sft = answers("sft.samples.jsonl", sft, *sampling)
    samples = answers(f"{name}.samples.jsonl", model, *sampling)
    favour = [0.5]
    if name != "sft":
        judged = stage(work / f"{name}.judged.jsonl", "compare.py", "score",
                       "--judge", run / "judge/model", "--task", args.task, "--a", of_sft,
                       "--b", samples, "--micro-tokens", 4096, "--device", "cpu")
        favour = [0.5 if c["agree"] else c["prob_b"] for c in read_jsonl(judged)]
    # the log-probability of a sample that was cut off would lack its end
    own = [r for r in read_jsonl(samples) if not r["truncated"]]
    correct = [r["correct"] for r in read_jsonl(graded)]
    return {"accuracy": sum(correct) / len(correct),
            "kl": (logps(model, own) - logps(sft, own)).mean().item(),
            "favour": sum(favour) / len(favour)}


@as_shipped()
def draw(curves, start, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    texts = {"accuracy": ("Accuracy", "accuracy, greedy (%)"),
             "favour": ("Judge's favour", "judge's favour over SFT's sample (%)")}
    for panel, (key, (title, label)) in zip(panels, texts.items(), strict=True):
        for k, (beta, points) in enumerate(curves.items()):
            points = [start, *points]
            panel.plot([p["kl"] for p in points], [100 * p[key] for p in points],
                       marker="osD^vP"[k % 6], ls=["-", "--", "-.", ":"][k % 4],
                       color=str(min(0.8, 0.1 + 0.12 * k)), label=f"beta {beta}")
        panel.set(xlabel="KL(policy || SFT model), nats a completion", ylabel=label,
                  title=f"{title} against distance")
        panel.set_xscale("symlog", linthresh=0.1)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=9)
    figure.savefig(f"{out}.png", dpi=130)


def settle_work(work, args):
    """The folder --work, refused if it was begun with other settings."""
    work.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("beta", "work", "out")}
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{work} was begun with other settings: {path.read_text().strip()}")
    path.write_text(json.dumps(settings) + "\n")


def main(args):
    run, work = Path(args.run).resolve(), Path(args.work or tempfile.mkdtemp()).resolve()
    settle_work(work, args)
    sft = run / "sft/model_1"
    start, curves = look(work, "sft", sft, run, args), {}
    percents = [round(100 * k / args.points) for k in range(1, args.points)]
    folders = [*(f"checkpoint-{p}" for p in percents), "."]
    save_at = ["--save-at", *(p / 100 for p in percents)] if percents else []
    for beta in args.beta:
        model = stage(work / f"beta_{beta}", "dpo.py", "--model", sft,
                      "--data", run / "dpo_1/preferences.jsonl", "--beta", beta, "--lr", args.lr,
                      "--epochs", args.epochs, *save_at, "--micro-tokens", 2048,
                      "--device", "cpu")
        with (model / "metrics.jsonl").open() as lines:
            steps = [json.loads(line)["step"] for line in lines][-1]
        curves[beta] = []
        for k, folder in enumerate(folders, 1):
            found = look(work, f"beta_{beta}_{k}", model / folder, run, args)
            curves[beta].append({"step": round(steps * k / args.points), **found})
        print(f"beta {beta}: " + "; ".join(f"{p['accuracy']:.1%} at KL {p['kl']:.3g}"
                                           for p in curves[beta]), file=sys.stderr)
    lines = [f"DPO from an SFT model of {start['accuracy']:.1%}, {args.epochs} epochs at learning "
             f"rate {args.lr:g}.", "",
             "| beta | step | KL, nats | accuracy (%) | judge's favour (%) |",
             "| --- | --- | --- | --- | --- |"]
    for beta, points in curves.items():
        for p in points:
            lines.append(f"| {beta} | {p['step']} | {p['kl']:.3g} | {100 * p['accuracy']:.1f} | "
                         f"{100 * p['favour']:.1f} |")
    text = "\n".join([*lines, "", in_words(about())])
    print(text)
    save(Path(args.out).resolve(), text, {"about": about(), "start": start, "curves": curves},
         indent=1)
    draw(curves, {"step": 0, **start}, args.out)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", metavar="RUN_DIR/seed_S")
    p.add_argument("--task", default="arithmetic")
    p.add_argument("--data", default="validation", help="which problems: validation or test")
    p.add_argument("--beta", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.3, 1.0])
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--points", type=int, default=4,
                   help="checkpoints looked at, evenly over the steps; a divisor of 100")
    p.add_argument("--max-new-tokens", type=int, default=56)
    p.add_argument("--work", help="folder for models and samples, kept (default: a temporary one)")
    p.add_argument("--out", required=True, help="names of the results, without .md, .json, .png")
    main(p.parse_args())
