"""How cost grows: with the model's size, the length of a text, the number of records, the samples of a prompt.

    pip install -r benchmarks/requirements.txt && python benchmarks/growth.py [size length records samples]

Every measurement is the median of --repeats; a slope is that of the least-squares line through the logarithms, so cost grows with the
slope-th power (records: of the last tenfold step, beyond which starting up is small). Sizes, lengths and samples are timed in one process on GSM8K's texts; records go through every stage as its own process,
started as a user would, with a model of one small layer on arithmetic problems, and its largest resident memory is noted.
Writes results/growth.md, .json and .png; axes that are not named keep what they had.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _bench import ROOT, SIZES, about, make_model, matrix_rate, operations, problems, settle

RESULTS = Path(__file__).resolve().parent / "results"
COUNTS = 1_000, 10_000, 100_000


def seconds(run, repeats):
    """Median time of run(), after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def slope(axis, points):
    """b of log y = a + b log x, by least squares; points: [(x, y)]."""
    import numpy as np
    points = points[-2:] if axis in ("records", "memory") else points
    return float(np.polyfit(*np.log(np.array(points, float)).T, 1)[0])


def of_size(args):
    """Seconds per 1,000 tokens against weights: read and learned by SFT and DPO, read by the judge, written by generation."""
    import torch
    import compare
    import generate
    from dpo_vs_trl import ours as dpo
    from sft_vs_trl import ours as sft
    from tasks import write_jsonl
    curves = {name: [] for name in ("SFT", "DPO", "judge", "generation", "SFT, floor", "judge, floor")}
    rate = matrix_rate()
    for size in SIZES:
        with tempfile.TemporaryDirectory() as top:
            weights, batch, steps = make_model(Path(top, "model"), size), 8, 3
            records = problems("train", batch * steps)
            pairs = [{"id": r["id"], "prompt": r["prompt"], "chosen": r["completion"], "rejected": o["completion"]} for r, o in zip(records, records[1:] + records[:1])]
            write_jsonl(Path(top, "sft.jsonl"), records)
            write_jsonl(Path(top, "dpo.jsonl"), pairs)
            tokenizer = generate.open_tokenizer(Path(top, "model"))
            count = lambda *texts: sum(len(tokenizer(t, add_special_tokens=False).input_ids) + 1 for t in texts)
            for name, run, tokens in (("SFT", sft, sum(count(r["prompt"], r["completion"]) for r in records)),
                                      ("DPO", dpo, sum(count(p["prompt"], p["chosen"], p["prompt"], p["rejected"]) for p in pairs))):
                def per_token():
                    marks, _ = run(Path(top, "model"), Path(top, f"{name.lower()}.jsonl"), batch, ["--row-tokens", "1", "--micro-tokens", "1024"])
                    return (marks[-1] - marks[0]) * steps / (steps - 1) / tokens
                curves[name].append((weights, 1000 * statistics.median(per_token() for _ in range(args.repeats))))
            questions = [compare.encode_pair(tokenizer, p["prompt"], p["chosen"], p["rejected"]) for p in pairs]
            judge = compare.open_model(Path(top, "model"), torch.device("cpu"), "AutoModelForSequenceClassification", num_labels=2).eval()
            packing = argparse.Namespace(row_tokens=1, micro_tokens=2048)
            curves["judge"].append((weights, 1000 * seconds(lambda: compare.probabilities(judge, questions, packing, "cpu"), args.repeats) / sum(map(len, questions))))
            model = generate.open_model(Path(top, "model"), torch.device("cpu")).eval()
            prompts = [generate.encode_prompt(tokenizer, r["prompt"]) for r in problems("test", 64)]
            curves["generation"].append((weights, 1000 * seconds(lambda: generate.decode(model, prompts, -1, 64), args.repeats) / (64 * 64)))
            lengths, labelled = [count(r["prompt"], r["completion"]) for r in records], sum(count(r["completion"]) for r in records)
            curves["SFT, floor"].append((weights, 1000 * operations(size, lengths, labelled) / rate / sum(lengths)))
            lengths = list(map(len, questions))
            curves["judge, floor"].append((weights, 1000 * operations(size, lengths, 0, backward=False) / rate / sum(lengths)))
    return curves


def of_length(args):
    """Seconds per 1,000 tokens against a sequence's length, at 4,096 tokens a step."""
    import torch
    import generate
    import sft
    curves = {name: [] for name in ("SFT, one sequence a row", "SFT, packed rows of 2,048", "generation, after a prompt")}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, "3M")
        tokenizer, model = generate.open_tokenizer(folder), generate.open_model(Path(folder), torch.device("cpu"))
    stream = [t for r in problems("train", 2000) for t in tokenizer(r["prompt"] + r["completion"], add_special_tokens=False).input_ids]

    def step(sequences, row_tokens):
        for micro in sft.pack(sequences, row_tokens, 2048):
            logps, weights, _ = sft.completion_logps(model, micro)
            (logps * weights).sum().backward()
        model.zero_grad()
    for length in (64, 128, 256, 512, 1024, 2048):
        texts = [stream[k * length:(k + 1) * length] for k in range(4096 // length)]
        sequences = [(ids, [0.0] * (length // 2) + [1.0] * (length - length // 2)) for ids in texts]
        for name, row in (("SFT, one sequence a row", 1), ("SFT, packed rows of 2,048", 2048)):
            curves[name].append((length, 1000 * seconds(lambda: step(sequences, row), args.repeats) / 4096))
        prompts = [stream[k * 50:k * 50 + length] for k in range(16)]
        prefill = seconds(lambda: generate.decode(model, prompts, -1, 1), args.repeats)
        curves["generation, after a prompt"].append((length, 1000 * (seconds(lambda: generate.decode(model, prompts, -1, 33), args.repeats) - prefill) / (16 * 32)))
    return curves


def of_samples(args):
    """Seconds per prompt against samples per prompt, 64 new tokens each, the whole batch at once."""
    import torch
    import generate
    from transformers import GenerationConfig
    curves = {"generate.py": [], "transformers generate": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, "3M")
        tokenizer, model = generate.open_tokenizer(folder), generate.open_model(Path(folder), torch.device("cpu")).eval()
    prompts = [generate.encode_prompt(tokenizer, r["prompt"]) for r in problems("test", 16)]
    width = max(map(len, prompts))
    config = dict(max_new_tokens=64, min_new_tokens=64, do_sample=True, temperature=0.7, top_k=0, eos_token_id=2, pad_token_id=0)
    ids, mask = (torch.tensor([[x] * (width - len(p)) + y for p in prompts for y in [f(p)]]) for x, f in ((0, list), (0, lambda p: [1] * len(p))))
    for samples in (1, 2, 4, 8, 16):
        batch = [p for p in prompts for _ in range(samples)]
        uniforms = torch.rand(len(batch), 64)
        curves["generate.py"].append((samples, seconds(lambda: generate.decode(model, batch, -1, 64, 0.7, uniforms), args.repeats) / len(prompts)))
        with torch.inference_mode():
            curves["transformers generate"].append((samples, seconds(lambda: model.generate(
                input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(num_return_sequences=samples, **config)), args.repeats) / len(prompts)))
    return curves


def of_records(args):
    """{stage: [(records, seconds)]} and {stage: [(records, peak resident megabytes)]} of whole processes."""
    from tasks import read_jsonl, write_json, write_jsonl
    times, memory = {}, {}
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        measured("tasks/arithmetic.py", "--out", top / "base", "--pretrain", 50, 50)
        measured("tasks/arithmetic.py", "--out", top / "data", "--train", max(COUNTS), "--gt", 1, "--test", 10, "--seed", 100)
        tiny = {**json.loads((top / "base/weak.json").read_text()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 16}
        write_json(top / "tiny.json", tiny)
        everything = [r for name in ("gt", "unlab") for r in read_jsonl(top / f"data/{name}.jsonl", ("id", "prompt", "completion"))]
        packing = ["--row-tokens", 128, "--micro-tokens", 4096]
        for n in COUNTS:
            here = top / str(n)
            records = everything[:n]
            others = [r["completion"] for r in records[1:] + records[:1]]
            write_jsonl(here / "labels.jsonl", records)
            write_jsonl(here / "samples.jsonl", [{**r, "completion": o if i % 2 else r["completion"]} for i, (r, o) in enumerate(zip(records, others))])
            write_jsonl(here / "pairs.jsonl", [{"id": r["id"], "prompt": r["prompt"], "chosen": r["completion"], "rejected": o} for r, o in zip(records, others)])
            learn = ["--epochs", 1, "--batch-size", 256, *packing]
            for stage, command in {
                    "sft.py": ["sft.py", "--init-config", top / "tiny.json", "--tokenizer", top / "base/tokenizer", "--data", here / "labels.jsonl", "--out", here / "sft", *learn],
                    "generate.py": ["generate.py", "--model", here / "sft", "--data", here / "labels.jsonl", "--out", here / "proposals.jsonl", "--max-new-tokens", 16],
                    "compare.py train": ["compare.py", "train", "--model", here / "sft", "--task", "arithmetic", "--gold", here / "labels.jsonl",
                                         "--data", here / "samples.jsonl", "--out", here / "judge", *learn],
                    "compare.py score": ["compare.py", "score", "--judge", here / "judge", "--task", "arithmetic", "--a", here / "labels.jsonl",
                                         "--b", here / "proposals.jsonl", "--out", here / "comparisons.jsonl", *packing],
                    "refine.py": ["refine.py", "--labels", here / "labels.jsonl", "--method", "ilr", "--comparisons", here / "comparisons.jsonl", "--task", "arithmetic",
                                  "--max-replace", 0.15, "--round", 1, "--out", here / "refined.jsonl"],
                    "dpo.py": ["dpo.py", "--model", here / "sft", "--data", here / "pairs.jsonl", "--out", here / "dpo", *learn],
                    "evaluate.py grade": ["evaluate.py", "grade", "--task", "arithmetic", "--data", here / "labels.jsonl", "--out", here / "graded.jsonl"]}.items():
                took, peak = measured(*command)
                print(f"{n} records, {stage}: {took:.1f} s, {peak:.0f} MB", file=sys.stderr)
                times.setdefault(stage, []).append((n, took))
                memory.setdefault(stage, []).append((n, peak))
    return times, memory


PEAK = """import atexit, re, runpy, sys
atexit.register(lambda: print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def measured(*command):
    """(wall seconds, peak resident megabytes) of `python command` run from the repository's root, in a process of its own."""
    command, start = [str(x) for x in command], time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


AXES = {"size": (of_size, "weights of the model", "seconds per 1,000 tokens", "Larger models: about in proportion to their weights"),
        "length": (of_length, "tokens of a sequence", "seconds per 1,000 tokens", "Longer texts, the same tokens a step"),
        "records": (of_records, "records", "seconds, whole process", "More records: in proportion or less"),
        "memory": (None, "records", "peak resident MB, whole process", "Memory per record"),
        "samples": (of_samples, "samples of a prompt", "seconds per prompt", "More samples of a prompt")}


def draw(results):
    """results/growth.png: one panel per axis, both scales logarithmic, the slope of every curve in the legend."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(math.ceil(len(results) / 2), 2, figsize=(11, 4.2 * math.ceil(len(results) / 2)), squeeze=False)
    for panel in panels.flat[len(results):]:
        panel.axis("off")
    for panel, (axis, curves) in zip(panels.flat, results.items()):
        _, x, y, title = AXES[axis]
        for (name, points), marker in zip(curves.items(), "os^Dv<>"):
            panel.loglog(*zip(*points), marker=None if "floor" in name else marker, linestyle=":" if "floor" in name else "-", label=f"{name}: slope {slope(axis, points):.2f}")
        panel.set(xlabel=x, ylabel=y, title=title)
        panel.set_xticks([px for px, _ in points], [f"{px:,}" for px, _ in points])
        panel.xaxis.set_minor_locator(plt.NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "growth.png", dpi=110)


def main(args):
    settle(args)
    kept = json.loads((RESULTS / "growth.json").read_text()) if (RESULTS / "growth.json").exists() else {}
    for axis in args.axes:
        found = AXES[axis][0](args)
        for name, curves in (zip(("records", "memory"), found) if axis == "records" else [(axis, found)]):
            kept[name] = {"about": about(), "curves": curves}
    kept = {axis: kept[axis] for axis in AXES if axis in kept}
    lines = []
    for axis, r in kept.items():
        _, x, y, _ = AXES[axis]
        points = [p[0] for p in next(iter(r["curves"].values()))]
        lines += [f"**{y[0].upper() + y[1:]} against {x}**", "", f"| | {' | '.join(f'{p:,}' for p in points)} | slope |", "| --- " * (len(points) + 2) + "|",
                  *(f"| {name} | {' | '.join(f'{v:.3g}' for _, v in curve)} | {slope(axis, curve):.2f} |" for name, curve in r["curves"].items()), "",
                  ", ".join(f"{k} {v}" for k, v in r["about"].items()), ""]
    print("\n".join(lines))
    (RESULTS / "growth.md").write_text("\n".join(lines))
    (RESULTS / "growth.json").write_text(json.dumps(kept, indent=1) + "\n")
    draw({axis: r["curves"] for axis, r in kept.items()})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("axes", nargs="*", metavar="AXIS", choices=[a for a in AXES if a != "memory"], default=["size", "length", "records", "samples"])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    main(p.parse_args())
