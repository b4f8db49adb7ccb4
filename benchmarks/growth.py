"""How cost grows: with the model's size, a text's length, the number of records, and of samples.

    pip install -r benchmarks/requirements.txt
    python benchmarks/growth.py [size length records samples]

Every measurement is the median of --repeats. A slope is that of the least-squares line through the
logarithms: cost grows with the slope-th power. For records it is that of the last tenfold step,
beyond which starting up is small. Sizes, lengths and samples are timed in one process on GSM8K's
texts. Records go through every stage as its own process, as a user starts it, with a model of one
small layer on arithmetic problems; the largest resident memory of the process is noted.
Writes results/growth.md, .json and .png. Axes that are not named keep what they had.
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

from _bench import (
    RESULTS,
    ROOT,
    SIZES,
    about,
    in_words,
    make_model,
    matrix_rate,
    operations,
    preferences,
    problems,
    save,
    settle,
    train,
)

from report.figures import as_shipped

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


def opened(folder):
    import torch

    from core.models import open_model
    from core.tokens import open_tokenizer
    return open_tokenizer(folder), open_model(Path(folder), torch.device("cpu"))


# ---------------------------------------------------------------- in one process
def of_size(args):
    """Seconds per 1,000 tokens against weights.

    Tokens that SFT and DPO read and learn, that the judge reads, that generation writes.
    """
    curves = {name: [] for name in ("SFT", "DPO", "judge", "generation", "SFT, floor",
                                    "judge, floor")}
    rate = matrix_rate()
    for size in SIZES:
        with tempfile.TemporaryDirectory() as top:
            weights = make_model(Path(top, "model"), size)
            for name, per_token in of_one_size(Path(top), size, rate, args).items():
                curves[name].append((weights, 1000 * per_token))
    return curves


def of_one_size(top, size, rate, args):
    """{curve: seconds per token} of the model in `top`."""
    import torch

    import dpo
    import sft
    from core.decoding import decode
    from core.judge import encode_pair, probabilities
    from core.models import open_model
    from core.records import write_jsonl
    from core.tokens import encode_prompt
    batch, steps, found = 8, 3, {}
    records = problems("train", batch * steps)
    pairs = preferences(records)
    write_jsonl(top / "sft.jsonl", records)
    write_jsonl(top / "dpo.jsonl", pairs)
    tokenizer, model = opened(top / "model")

    def count(record, *fields):
        texts = [record[field] for field in fields]
        return sum(len(tokenizer(t, add_special_tokens=False).input_ids) + 1 for t in texts)

    def per_token(stage, data, tokens):
        times = []
        for _ in range(args.repeats):
            marks, _ = train(stage, top / "model", data, batch,
                             ["--micro-tokens", "1024"])
            times.append((marks[-1] - marks[0]) * steps / (steps - 1) / tokens)
        return statistics.median(times)
    lengths = [count(r, "prompt", "completion") for r in records]
    found["SFT"] = per_token(sft, top / "sft.jsonl", sum(lengths))
    tokens = sum(count(p, "prompt", "chosen", "prompt", "rejected") for p in pairs)
    found["DPO"] = per_token(dpo, top / "dpo.jsonl", tokens)

    labelled = sum(count(r, "completion") for r in records)
    found["SFT, floor"] = operations(size, lengths, labelled) / rate / sum(lengths)

    questions = [encode_pair(tokenizer, p["prompt"], p["chosen"], p["rejected"]) for p in pairs]
    judge = open_model(top / "model", torch.device("cpu"), "AutoModelForSequenceClassification",
                       num_labels=2).eval()
    packing = argparse.Namespace(micro_tokens=2048)
    took = seconds(lambda: probabilities(judge, questions, packing, "cpu"), args.repeats)
    lengths = [len(q) for q in questions]
    found["judge"] = took / sum(lengths)
    needed = operations(size, lengths, 0, backward=False)
    found["judge, floor"] = needed / rate / sum(lengths)

    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in problems("test", 64)]
    model.eval()
    took = seconds(lambda: decode(model, prompts, [-1], 64), args.repeats)
    found["generation"] = took / (64 * 64)
    return found


def of_length(args):
    """Seconds per 1,000 tokens against a sequence's length, at 4,096 tokens a step."""
    from core.attention import join, separate
    from core.decoding import decode
    from core.packing import completion_logps, pack
    single, one_row = "SFT, one sequence a row", "SFT, one row, attention by sequences"
    generation = "generation, after a prompt"
    curves = {name: [] for name in (single, one_row, generation)}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, "3M")
        tokenizer, model = opened(folder)
    stream = []
    for r in problems("train", 2000):
        text = r["prompt"] + r["completion"]
        stream += tokenizer(text, add_special_tokens=False).input_ids

    def step(sequences):
        for micro in pack(sequences, 2048, model.device, model):
            logps, weights, _ = completion_logps(model, micro)
            (logps * weights).sum().backward()
        model.zero_grad()

    def decoding(prompts, count):
        return seconds(lambda: decode(model, prompts, [-1], count), args.repeats)
    for length in (64, 128, 256, 512, 1024, 2048):
        half = length // 2
        weights = [0.0] * half + [1.0] * (length - half)
        starts = range(0, 4096, length)
        sequences = [(stream[start:start + length], weights) for start in starts]
        for name, way in ((one_row, separate), (single, join)):
            way(model)
            took = seconds(lambda s=sequences: step(s), args.repeats)
            curves[name].append((length, 1000 * took / 4096))
        prompts = [stream[k * 50:k * 50 + length] for k in range(16)]
        prefill = decoding(prompts, 1)
        took = decoding(prompts, 33) - prefill
        curves[generation].append((length, 1000 * took / (16 * 32)))
    return curves


def of_samples(args):
    """Seconds per prompt against samples per prompt: 64 new tokens each, one batch."""
    import torch
    from transformers import GenerationConfig

    from core.decoding import decode, padded
    from core.tokens import encode_prompt
    curves = {"generate.py": [], "transformers generate": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, "3M")
        tokenizer, model = opened(folder)
    model.eval()
    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in problems("test", 16)]
    ids, mask = padded(prompts, "cpu")

    def ours(batch, uniforms):
        return decode(model, batch, [-1], 64, 0.7, uniforms)

    def theirs(samples):
        config = GenerationConfig(max_new_tokens=64, min_new_tokens=64, do_sample=True,
                                  temperature=0.7, top_k=0, eos_token_id=2, pad_token_id=0,
                                  num_return_sequences=samples)
        with torch.inference_mode():
            return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    for samples in (1, 2, 4, 8, 16):
        batch = [p for p in prompts for _ in range(samples)]
        uniforms = torch.rand(len(batch), 64)
        for name, run in (("generate.py", lambda b=batch, u=uniforms: ours(b, u)),
                          ("transformers generate", lambda s=samples: theirs(s))):
            took = seconds(run, args.repeats)
            curves[name].append((samples, took / len(prompts)))
    return curves


# ---------------------------------------------------------------- whole processes
PEAK = r"""import atexit, re, runpy, sys
def peak():
    print("peak", re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
atexit.register(peak)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def measured(*command):
    """(wall seconds, peak resident megabytes) of a process: `python command`, run from the
    repository's root."""
    command, start = [str(x) for x in command], time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


def commands(top, here):
    """{stage: command} of every stage on the records in `here`."""
    packing = ["--micro-tokens", 4096]
    learn = ["--epochs", 1, "--batch-size", 256, *packing]
    task = ["--task", "arithmetic"]
    labels, samples = here / "labels.jsonl", here / "samples.jsonl"
    proposals, comparisons = here / "proposals.jsonl", here / "comparisons.jsonl"
    return {
        "sft.py": ["sft.py", "--init-config", top / "tiny.json", "--tokenizer",
                   top / "base/tokenizer", "--data", labels, "--out", here / "sft", *learn],
        "generate.py": ["generate.py", "--model", here / "sft", "--data", labels, "--out",
                        proposals, "--max-new-tokens", 16],
        "compare.py train": ["compare.py", "train", "--model", here / "sft", *task, "--gold",
                             labels, "--data", samples, "--out", here / "judge", *learn],
        "compare.py score": ["compare.py", "score", "--judge", here / "judge", *task, "--a",
                             labels, "--b", proposals, "--out", comparisons, *packing],
        "refine.py": ["refine.py", "--labels", labels, "--method", "ilr", "--comparisons",
                      comparisons, *task, "--max-replace", 0.15, "--round", 1, "--out",
                      here / "refined.jsonl"],
        "dpo.py": ["dpo.py", "--model", here / "sft", "--data", here / "pairs.jsonl", "--out",
                   here / "dpo", *learn],
        "evaluate.py grade": ["evaluate.py", "grade", *task, "--data", labels, "--out",
                              here / "graded.jsonl"]}


def of_records(args):
    """{stage: [(records, seconds)]} and {stage: [(records, peak resident megabytes)]}."""
    from core.records import read_jsonl, write_json, write_jsonl
    times, memory = {}, {}
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        measured("tasks/arithmetic.py", "--out", top / "base", "--pretrain", 50, 50)
        measured("tasks/arithmetic.py", "--out", top / "data", "--train", max(COUNTS), "--gt", 1,
                 "--test", 10, "--seed", 100)
        weak = json.loads((top / "base/weak.json").read_text())
        write_json(top / "tiny.json", {
            **weak, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})
        everything = []
        for name in ("gt", "unlab"):
            path = top / f"data/{name}.jsonl"
            everything += read_jsonl(path, ("id", "prompt", "completion"))
        for n in COUNTS:
            here, records = top / str(n), everything[:n]
            pairs = preferences(records)
            samples = [{**r, "completion": p["rejected"] if i % 2 else r["completion"]}
                       for i, (r, p) in enumerate(zip(records, pairs, strict=True))]
            write_jsonl(here / "labels.jsonl", records)
            write_jsonl(here / "samples.jsonl", samples)
            write_jsonl(here / "pairs.jsonl", pairs)
            for stage, command in commands(top, here).items():
                took, peak = measured(*command)
                print(f"{n} records, {stage}: {took:.1f} s, {peak:.0f} MB", file=sys.stderr)
                times.setdefault(stage, []).append((n, took))
                memory.setdefault(stage, []).append((n, peak))
    return times, memory


# ---------------------------------------------------------------- results
# axis: (function, x, y, title of its panel)
AXES = {"size": (of_size, "weights of the model", "seconds per 1,000 tokens",
                 "Larger models: about in proportion to their weights"),
        "length": (of_length, "tokens of a sequence", "seconds per 1,000 tokens",
                   "Longer texts, the same tokens a step"),
        "records": (of_records, "records", "seconds, whole process",
                    "More records: in proportion or less"),
        "memory": (None, "records", "peak resident MB, whole process", "Memory per record"),
        "samples": (of_samples, "samples of a prompt", "seconds per prompt",
                    "More samples of a prompt")}


@as_shipped()
def draw(results):
    """results/growth.png: a panel per axis, both scales logarithmic, slopes in the legend."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = math.ceil(len(results) / 2)
    figure, panels = plt.subplots(rows, 2, figsize=(11, 4.2 * rows), squeeze=False)
    for panel in panels.flat[len(results):]:
        panel.axis("off")
    for panel, (axis, curves) in zip(panels.flat, results.items(), strict=False):
        _, x, y, title = AXES[axis]
        for (name, points), marker in zip(curves.items(), "os^Dv<>", strict=False):
            floor = "floor" in name
            panel.loglog([px for px, _ in points], [py for _, py in points],
                         marker=None if floor else marker, linestyle=":" if floor else "-",
                         label=f"{name}: slope {slope(axis, points):.2f}")
        panel.set(xlabel=x, ylabel=y, title=title)
        panel.set_xticks([px for px, _ in points], [f"{px:,}" for px, _ in points])
        panel.xaxis.set_minor_locator(plt.NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "growth.png", dpi=110)


def table(axis, curves):
    """The lines of an axis's Markdown table."""
    _, x, y, _ = AXES[axis]
    points = [px for px, _ in next(iter(curves.values()))]
    lines = [f"**{y[0].upper() + y[1:]} against {x}**", "",
             f"| | {' | '.join(f'{px:,}' for px in points)} | slope |",
             "| --- " * (len(points) + 2) + "|"]
    for name, curve in curves.items():
        values = " | ".join(f"{py:.3g}" for _, py in curve)
        lines.append(f"| {name} | {values} | {slope(axis, curve):.2f} |")
    return lines


def main(args):
    settle(args)
    path = RESULTS / "growth.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for axis in args.axes:
        found = AXES[axis][0](args)
        if axis == "records":
            kept["records"] = {"about": about(), "curves": found[0]}
            kept["memory"] = {"about": about(), "curves": found[1]}
        else:
            kept[axis] = {"about": about(), "curves": found}
    kept = {axis: kept[axis] for axis in AXES if axis in kept}
    lines = []
    for axis, r in kept.items():
        lines += [*table(axis, r["curves"]), "", in_words(r["about"]), ""]
    print("\n".join(lines))
    save("growth", "\n".join(lines[:-1]), kept, indent=1)
    draw({axis: r["curves"] for axis, r in kept.items()})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("axes", nargs="*", metavar="AXIS", choices=[a for a in AXES if a != "memory"],
                   default=["size", "length", "records", "samples"])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    main(p.parse_args())
