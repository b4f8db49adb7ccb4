"""How far may DPO go? Accuracy and the judge's favour against the distance from the SFT model, over steps and over beta.

    python benchmarks/overoptimize.py runs/arithmetic/seed_0 --data validation --out benchmarks/results/overoptimization

Reads a finished run's SFT model, judge and the preferences of DPO's first round, trains DPO on them with every --beta for --epochs, and looks
at --points checkpoints of each: accuracy (greedy); KL(policy || SFT) in nats a completion, estimated on the policy's own samples at
temperature 1 as the mean of log policy - log SFT; and the judge's mean probability that the policy's sample is better than the SFT model's.
Writes OUT.json, OUT.md and OUT.png. What is complete in --work is not made again.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, about


def stage(target, *command):
    if not Path(target).exists():
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return target


def logps(model_path, records):
    """Log-probability of each record's completion under a model, in nats."""
    import torch
    import dpo
    from sft import pack
    from tasks._models import encode_completion, encode_prompt, open_model, open_tokenizer
    tokenizer, model = open_tokenizer(model_path), open_model(model_path, torch.device("cpu")).eval()
    sequences = []
    for r in records:
        prompt, completion = encode_prompt(tokenizer, r["prompt"]), encode_completion(tokenizer, r["completion"])
        sequences.append((prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)))
    total = torch.zeros(len(sequences))
    with torch.inference_mode():
        for batch in pack(sequences, 256, 4096):
            total += dpo.sequence_logps(model, batch, len(sequences))
    return total


def look(work, name, model, run, args):
    """{accuracy, kl, favour} of one policy."""
    from tasks import read_jsonl
    decoding = ["--max-new-tokens", args.max_new_tokens, "--batch-size", 128, "--device", "cpu"]
    data, sft = run / f"data/{args.data}.jsonl", run / "sft/model_1"
    graded = stage(work / f"{name}.graded.jsonl", "evaluate.py", "grade", "--task", args.task, "--out", work / f"{name}.graded.jsonl",
                   "--data", stage(work / f"{name}.greedy.jsonl", "generate.py", "--model", model, "--data", data, "--out", work / f"{name}.greedy.jsonl", *decoding))
    samples = [stage(work / f"{n}.samples.jsonl", "generate.py", "--model", m, "--data", data, "--out", work / f"{n}.samples.jsonl", "--temperature", 1,
                     "--seed", 7, *decoding) for n, m in (("sft", sft), (name, model))]
    judged = stage(work / f"{name}.judged.jsonl", "compare.py", "score", "--judge", run / "judge/model", "--task", args.task, "--a", samples[0], "--b", samples[1],
                   "--out", work / f"{name}.judged.jsonl", "--row-tokens", 256, "--micro-tokens", 4096, "--device", "cpu") if name != "sft" else None
    own = [r for r in read_jsonl(samples[1]) if not r["truncated"]]        # the end of one that was cut off is not in its log-probability
    asked = [0.5 if c["agree"] else c["prob_b"] for c in read_jsonl(judged)] if judged else [0.5]
    correct = [r["correct"] for r in read_jsonl(graded)]
    return {"accuracy": sum(correct) / len(correct), "kl": (logps(model, own) - logps(sft, own)).mean().item(), "favour": sum(asked) / len(asked)}


def draw(curves, start, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for panel, key, label in zip(panels, ("accuracy", "favour"), ("accuracy, greedy (%)", "judge's favour over SFT's sample (%)")):
        for k, (beta, points) in enumerate(curves.items()):
            points = [start, *points]
            panel.plot([p["kl"] for p in points], [100 * p[key] for p in points], marker="osD^vP"[k % 6], ls=["-", "--", "-.", ":"][k % 4],
                       color=str(min(0.8, 0.1 + 0.12 * k)), label=f"beta {beta}")
        panel.set(xlabel="KL(policy || SFT model), nats a completion", ylabel=label, title=f"{label.partition(',')[0].partition(' over')[0]} against distance".capitalize())
        panel.set_xscale("symlog", linthresh=0.1)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=9)
    figure.savefig(f"{out}.png", dpi=130)


def main(args):
    run, work = Path(args.run).resolve(), Path(args.work or tempfile.mkdtemp()).resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("beta", "work", "out")}
    if (work / "settings.json").exists() and json.loads((work / "settings.json").read_text()) != settings:
        sys.exit(f"{work} was begun with other settings: {(work / 'settings.json').read_text().strip()}")
    (work / "settings.json").write_text(json.dumps(settings) + "\n")
    sys.path.insert(0, str(ROOT))
    start, curves = look(work, "sft", run / "sft/model_1", run, args), {}
    names = [*(f"checkpoint-{round(100 * k / args.points)}" for k in range(1, args.points)), "."]
    for beta in args.beta:
        model = stage(work / f"beta_{beta}", "dpo.py", "--model", run / "sft/model_1", "--data", run / "dpo_1/preferences.jsonl", "--out", work / f"beta_{beta}",
                      "--beta", beta, "--lr", args.lr, "--epochs", args.epochs, "--save-every", 1 / args.points, "--row-tokens", 128, "--micro-tokens", 2048, "--device", "cpu")
        steps = [json.loads(line)["step"] for line in (model / "metrics.jsonl").open()][-1]
        curves[beta] = [{"step": round(steps * (k + 1) / args.points), **look(work, f"beta_{beta}_{k + 1}", model / name, run, args)} for k, name in enumerate(names)]
        print(f"beta {beta}: " + "; ".join(f"{p['accuracy']:.1%} at KL {p['kl']:.3g}" for p in curves[beta]), file=sys.stderr)
    lines = [f"DPO from an SFT model of {start['accuracy']:.1%}, {args.epochs} epochs at learning rate {args.lr:g}.", "",
             "| beta | step | KL, nats | accuracy (%) | judge's favour (%) |", "| --- | --- | --- | --- | --- |",
             *(f"| {beta} | {p['step']} | {p['kl']:.3g} | {100 * p['accuracy']:.1f} | {100 * p['favour']:.1f} |" for beta, points in curves.items() for p in points), "",
             ", ".join(f"{k} {v}" for k, v in about().items())]
    print("\n".join(lines))
    Path(f"{args.out}.md").write_text("\n".join(lines) + "\n")
    Path(f"{args.out}.json").write_text(json.dumps({"about": about(), "start": start, "curves": curves}, indent=1) + "\n")
    draw(curves, {"step": 0, **start}, args.out)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", metavar="RUN_DIR/seed_S")
    p.add_argument("--task", default="arithmetic")
    p.add_argument("--data", default="validation", help="which problems: validation or test")
    p.add_argument("--beta", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.3, 1.0])
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--points", type=int, default=4, help="checkpoints looked at, evenly over the steps; a divisor of 100")
    p.add_argument("--max-new-tokens", type=int, default=56)
    p.add_argument("--work", help="folder for models and samples, kept (default: a temporary one)")
    p.add_argument("--out", required=True, help="names of the results, without .md, .json, .png")
    main(p.parse_args())
