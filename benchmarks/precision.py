"""What 16 bits keep of what training changes: to nearest, stochastic, exact, against fp32.

    bash run_ilr.sh && python benchmarks/precision.py

Trainings of a finished run of the default task, with its files, flags and seed, computed in fp32
and in bf16. In bf16 the optimizer's fp32 result goes back into the weights rounded to nearest,
rounded stochastically, or exactly (core/precision.py: a remainder is kept beside it).

change kept: projection of the change of all weights on that of fp32, 1 if it is the same change.
loss, margin: means over the last 12 steps. bytes: weights, remainders, gradients and optimizer
state, for a weight. CPU-seconds: of the process, start included.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, about, in_words, save

MODES = ("fp32", "exact", "stochastic", "nearest")
# name: (stage of the run, script, further flags)
TRAININGS = {
    "DPO, lr 1e-5": ("dpo_1/train_1", "dpo", []),
    "DPO, lr 1e-6, 8-bit RMSprop": ("dpo_1/train_1", "dpo",
                                    ["--lr", "1e-6", "--optimizer", "rmsprop8bit"]),
    "SFT, lr 4e-3": ("sft/train_1", "sft", []),
    "SFT, lr 1e-5, 8-bit AdamW": ("sft/train_1", "sft",
                                  ["--lr", "1e-5", "--optimizer", "adamw8bit", "--epochs", "1"]),
    "judge, lr 3e-3, Muon": ("judge/train", "compare", []),
    "judge, lr 1e-6, 8-bit AdamW": ("judge/train", "compare",
                                    ["--lr", "1e-6", "--optimizer", "adamw8bit", "--epochs", "1",
                                     "--stop-accuracy", "0"])}


def words(run, bases, seed, stage):
    """The command line of a stage of the run, as its stages.jsonl has it. IndexError if the run
    has no such stage."""
    run = Path(run).resolve()
    with (run / "stages.jsonl").open() as lines:
        rows = map(json.loads, lines)
        rows = [row for row in rows if row["stage"] == f"seed_{seed}/{stage}"]
    places = {"OUT": str(run), "BASES": str(Path(bases).resolve())}
    found = []
    for flag, values in rows[-1]["arguments"].items():
        if flag.startswith("--") or flag == "words":
            values = [places[v.partition("/")[0]] + v[v.index("/"):]
                      if v.partition("/")[0] in places else v for v in values.split()]
            found += ([] if flag == "words" else [flag]) + values
    return found


# ---------------------------------------------------------------- one training, in its own process
def round_away(mode):
    """Let the optimizer's fp32 values go back into 16 bits rounded, without remainders."""
    import torch

    from core import precision

    def rounded(p, values):
        if mode == "stochastic":    # up with the probability of the distance
            noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32)
            values = ((values.view(torch.int32) + noise) >> 16 << 16).view(torch.float32)
        p.data.copy_(values.to(torch.bfloat16))
    precision.set_exact = rounded


def train(mode, script, argv):
    """Run one training and print the bytes that it keeps for a weight."""
    import importlib

    from core.models import count_weights
    stage, kept = importlib.import_module(script), {}
    original = stage.apply_gradients

    def size(tensor):
        return tensor.numel() * tensor.element_size()

    def counted(model, all_optimizers, *more):
        if kept:        # counted in the first step
            return original(model, all_optimizers, *more)
        params = list(model.parameters())
        if mode in ("stochastic", "nearest"):       # they start from the rounded weights
            for p in params:
                p.low_bits.zero_()
        held = params + [p.grad for p in params if p.grad is not None]
        if mode == "exact":
            held += [p.low_bits for p in params]
        used = sum(map(size, held))
        norm = original(model, all_optimizers, *more)
        state = sum(size(t) for o in all_optimizers for s in o.state.values()
                    for t in s.values() if hasattr(t, "element_size"))
        kept["bytes"] = (used + state) / count_weights(model)
        return norm
    stage.apply_gradients = counted
    if mode in ("stochastic", "nearest"):
        round_away(mode)
    stage.main(stage.parser().parse_args(argv))
    print(json.dumps(kept))


def child(mode, script, argv):
    """Run `train` in a process of its own, with one thread, and return what it prints of itself.
    CalledProcessError if it fails."""
    done = subprocess.run([sys.executable, __file__, "--child", mode, script, *argv], text=True,
                          stdout=subprocess.PIPE, cwd=ROOT, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def measure(args, name, mode, work):
    stage, script, more = TRAININGS[name]
    out = Path(work) / f"{mode}_{name.partition(',')[0]}_{len(more)}"
    dtype = "float32" if mode == "fp32" else "bfloat16"
    argv = [*words(args.run, args.bases, args.seed, stage), *more, "--dtype", dtype,
            "--out", str(out)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        kept = child(mode, script, argv)
    except subprocess.CalledProcessError as e:
        sys.exit(f"{name}, {mode}: exit {e.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    model = argv[argv.index("--model") + 1]
    auto = "AutoModelForSequenceClassification" if script == "compare" else "AutoModelForCausalLM"
    result = {"steps": len(steps), "loss": mean(steps, "loss"),
              "margin": mean(steps, "rewards/margins"),
              "stop_loss": [row["stop_loss"] for row in rows if "stop_loss" in row],
              "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
              **kept}
    return result, change(model, out, auto, mode)


def mean(steps, name):
    values = [row[name] for row in steps[-12:] if name in row]
    return sum(values) / len(values) if values else None


def change(before, after, auto, mode):
    """The change of all weights, a vector in float64, from what the training started with."""
    import torch

    from core.models import open_model
    device = torch.device("cpu")
    start = dict(open_model(before, device, auto, dtype=torch.float32,
                            **({"num_labels": 2} if "Sequence" in auto else {})).named_parameters())
    end = open_model(after, device, auto, dtype=torch.float32).named_parameters()
    parts = []
    for name, p in end:
        begin = start[name].data * (name != "score.weight")     # the head starts at 0
        if mode in ("stochastic", "nearest"):
            begin = begin.to(torch.bfloat16).float()
        parts.append((p.data.double() - begin.double()).flatten())
    return torch.cat(parts)


# ---------------------------------------------------------------- the table
def main(args):
    lines = ["| training | weights | change kept | weights moved | loss | margin | bytes | "
             "CPU-seconds |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    found = {}
    for name in TRAININGS:
        whole = None
        for mode in MODES:
            with tempfile.TemporaryDirectory() as work:
                result, moved = measure(args, name, mode, work)
            whole = moved if mode == "fp32" else whole
            result["kept"] = (moved @ whole / (whole @ whole)).item()
            result["moved"] = (moved != 0).double().mean().item()
            found[f"{name}: {mode}"] = result
            margin = "" if result["margin"] is None else f"{result['margin']:.4f}"
            lines.append(f"| {name} ({result['steps']} steps) | {mode} | {result['kept']:.3f} | "
                         f"{result['moved']:.1%} | {result['loss']:.4f} | {margin} | "
                         f"{result['bytes']:.1f} | {result['cpu_seconds']:.0f} |")
            print(lines[-1], flush=True)
    text = "\n".join([*lines, "", in_words(about())])
    print(text)
    save(Path(args.out).resolve(), text, {"about": about(), "found": found}, indent=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train(sys.argv[2], sys.argv[3], sys.argv[4:])
        sys.exit()
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default=ROOT / "runs/arithmetic", help="a finished run of the default")
    p.add_argument("--bases", default=ROOT / "bases", help="where its base models are")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default=ROOT / "benchmarks/results/precision",
                   help="names of the results, without .md and .json")
    main(p.parse_args())
