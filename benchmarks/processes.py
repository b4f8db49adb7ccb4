"""Several processes: what a step costs with one and with two on this machine, and on paper what 2 to 64 GPUs would need.

    python benchmarks/processes.py [--sizes 3M 13M 60M]      # measures; writes results/processes.md and .json
    python benchmarks/processes.py --paper                   # prints the README's two tables; measures nothing

Measured: seconds of one SFT step (GSM8K texts, fused AdamW, fp32, gloo, one thread a process), the median over the steps after the first of
--repeats runs, one and two processes in turn. Two processes share the cores, the caches and the memory of one machine, so this says what
sharding costs, not what a second machine would bring.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, SIZES, about, make_model, problems, spread

RESULTS = Path(__file__).resolve().parent / "results"

# ---------------------------------------------------------------- on paper
# An H100 of 80 GB: bf16 operations a second at the 40% of its peak that large models are said to reach (an assumption; nothing here was
# measured on a GPU), bytes a second from its memory, NVLink in one direction, a node's eight 400 Gb/s links together, one such link,
# the disk that the first process reads and writes models on; and seconds until a stage that was started computes.
FLOPS, MEMORY, NVLINK, EIGHT_LINKS, ONE_LINK, DISK, START = 0.4 * 989e12, 3.35e12, 450e9, 400e9, 50e9, 2e9, 30
SHAPES = {
    "2B": ("gemma", dict(hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
                         head_dim=256, vocab_size=256000)),
    "7B": ("mistral", dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                           vocab_size=32000, tie_word_embeddings=False)),
    "70B": ("llama", dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                          vocab_size=128256, tie_word_embeddings=False))}
WEIGHTS = {"2B": 2.51e9, "7B": 7.24e9, "70B": 70.6e9}
# Operations for each weight and token (2 forward, 2 for the activations' gradients, 2 for the weights', 2 to recompute: checkpointing), and
# bytes for each weight and micro-batch: gathered in 16 bits forward and backward, and gradients scattered. Adapters are few.
FULL, LORA = (8, 6), (6, 4)
RECORD, ANSWER, PAIR = 200, 200, 450      # tokens of a GSM8K record, decoding steps of a batch of answers, tokens of a question to the judge


def link(gpus):
    """Bytes a second that each of `gpus` receives while all gather: a ring's share, within a node or between nodes of eight links."""
    return NVLINK if gpus <= 8 else EIGHT_LINKS


def step_seconds(size, gpus, sequences, tokens, kind, speed=None):
    """Seconds of one optimizer step: computing and communicating overlap, and a sequence stays on one GPU."""
    operations, transfer = kind
    own = math.ceil(sequences / gpus) * tokens
    computing = own * operations * WEIGHTS[size] / FLOPS
    communicating = math.ceil(own / 4096) * (gpus - 1) / gpus * transfer * WEIGHTS[size] / (speed or link(gpus))
    return max(computing, communicating)


def knee(kind, speed):
    """Tokens of a GPU's micro-batch at which computing takes as long as communicating, with many GPUs: any model's, for both grow with it."""
    return kind[1] / kind[0] * FLOPS / speed


def answer_seconds(size, gpus, prompts, rows, bits=16):
    """Seconds of decoding: batches of 256 prompts of `rows` rows each, fewer where that leaves GPUs idle, dealt out to the GPUs. A decoding step
    reads every weight (4-bit ones are read, written in 16 bits and read again) or computes, whichever takes longer."""
    batch = min(256, math.ceil(prompts / gpus))
    step = max((2 if bits == 16 else 4.5) * WEIGHTS[size] / MEMORY, 2 * WEIGHTS[size] * batch * rows / FLOPS)
    return math.ceil(math.ceil(prompts / batch) / gpus) * ANSWER * step


def hours(preset, gpus):
    """(training, answering, judging, starting and disk) hours of `run_ilr.sh gsm8k` or gsm8k-70b with its default rounds and methods, on `gpus` GPUs."""
    weak, strong, kind = ("2B", "7B", FULL) if preset == "gsm8k" else ("7B", "70B", LORA)
    bits = 16 if preset == "gsm8k" else 4
    epoch = math.ceil(3737 / 32)
    sft, dpo = 2 * epoch * (1 + 1 + 3 * 2), 3 * 2 * math.ceil(0.15 * 11211 / 32)     # SFT, ceiling, and a round's halves and retraining
    training = (sft * step_seconds(strong, gpus, 32, RECORD, kind) + dpo * step_seconds(strong, gpus, 32, 2 * RECORD, kind)
                + 2 * epoch * step_seconds(weak, gpus, 32, RECORD, kind) + 5 * math.ceil(2 * 6000 / 16) * step_seconds(weak, gpus, 16, PAIR, FULL))
    answering = (3 * 2 * answer_seconds(strong, gpus, 1868, 4, bits) + 3 * answer_seconds(strong, gpus, 6 * 3737, 1, bits)
                 + 8 * answer_seconds(strong, gpus, 1319, 1, bits) + 11 * answer_seconds(weak, gpus, 3737, 1) + answer_seconds(weak, gpus, 1319, 1))
    judging = 3 * 2 * (3737 / 2 + 11211) * PAIR * 2 * WEIGHTS[weak] / FLOPS / gpus
    models = 1 + 1 + 3 * 3 + 3      # of the strong size: SFT, ceiling, a round's halves and retraining, DPO
    disk = 2 * (models * 2 + 3 * 2 + 3 + 8) * WEIGHTS[strong] / DISK      # trained from one and saved as one; proposals, samples, test answers
    stages = 10 + 3 * 6 + 3 * 4      # those with a model: before the rounds, in a round of ILR, in a round of DPO
    return [seconds / 3600 for seconds in (training, answering, judging, disk + START * stages)]


def planned(size, gpus, rank):
    """GB a GPU, by the plan that a stage prints (tasks/_memory.py): micro-batches of 4,096 tokens, checkpointing, AdamW in 16 bits."""
    import contextlib
    import io
    import re
    import torch
    from tasks import _memory, _models
    from transformers import AutoConfig, AutoModelForCausalLM
    family, shape = SHAPES[size]
    kept = {key: os.environ.get(key) for key in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE")}
    os.environ.update(zip(kept, ("paper", str(gpus), "0", str(gpus))))
    have, said = _memory.device_bytes, io.StringIO()
    _memory.device_bytes = lambda device: math.inf
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.bfloat16)
            if rank:
                _models.add_lora(model, rank)
        assert abs(sum(p.numel() for n, p in model.named_parameters() if "lora" not in n) / WEIGHTS[size] - 1) < 0.01
        args = argparse.Namespace(micro_tokens=4096, row_tokens=2048, gradient_checkpointing=True, lora_rank=rank)
        with contextlib.redirect_stdout(said):
            _memory.check_memory(model, [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])], args, torch.device("cpu"), 0.6)
    finally:
        _memory.device_bytes = have
        for key, value in kept.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return float(re.search(r"= ([\d.e+]+) of", said.getvalue())[1])


def paper():
    """The README's tables: GB and hours for some numbers of GPUs; bytes, and where the knee is."""
    lines = ["| GPUs of 80 GB | `gsm8k`, GB | hours: training + answers + judge + starting and disk | `gsm8k-70b`, GB | hours |", "| --- | --- | --- | --- | --- |"]
    for gpus in (2, 4, 8, 64):
        cells = []
        for preset, size, rank in (("gsm8k", "7B", 0), ("gsm8k-70b", "70B", 64)):
            gb, parts = planned(size, gpus, rank), hours(preset, gpus)
            cells += [f"{gb:.0f}" + ("" if gb <= 80 else ", too much"), f"{' + '.join(f'{h:.1f}' for h in parts)} = {sum(parts):.1f}" if gb <= 80 else "-"]
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    lines += ["", "| a micro-batch | GB that each GPU receives | seconds at 450 / 400 / 50 GB/s | knee, tokens a GPU |", "| --- | --- | --- | --- |"]
    for name, size, kind in (("7B, every weight", "7B", FULL), ("70B, every weight", "70B", FULL), ("70B, LoRA", "70B", LORA)):
        volume, speeds = kind[1] * WEIGHTS[size], (NVLINK, EIGHT_LINKS, ONE_LINK)
        lines.append(f"| {name} | {volume / 1e9:.0f} | {' / '.join(f'{volume / s:.2g}' for s in speeds)} | {' / '.join(f'{knee(kind, s):,.0f}' for s in speeds)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- measured
def steps(folder, data, count, args, out):
    """Seconds of each optimizer step but the first, of `count` processes."""
    launch = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    subprocess.run([*launch, __file__, "--worker", "--model", folder, "--data", data, "--out", out / f"m{count}", "--batch-size", str(args.batch), "--epochs", "1",
                    "--row-tokens", "1", "--micro-tokens", "1024", "--lr", "1e-4", "--state-every", "1e9"],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)})
    marks = json.loads((out / f"m{count}.marks").read_text())
    return [b - a for a, b in zip(marks, marks[1:])]


def worker(argv):
    """sft.py, which also notes when each step ended."""
    import time
    import sft
    from tasks import run_stage
    from tasks._parallel import rank
    marks, log = [], sft.Training.log

    def noted(self, **row):
        marks.append(time.perf_counter())
        log(self, **row)

    def main(args):
        sft.main(args)
        if rank() == 0:
            Path(f"{args.out}.marks").write_text(json.dumps(marks))
    sft.Training.log = noted
    run_stage(sft.parser(), main, argv)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps a run, of which the first is not counted")
    parser.add_argument("--batch", type=int, default=16, help="records a step")
    args = parser.parse_args()
    if args.paper:
        print(paper())
        return
    from tasks import write_jsonl
    found, lines = {}, ["| weights | seconds a step, 1 process | 2 processes | ratio |", "| --- | --- | --- | --- |"]
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as top:
            top = Path(top)
            make_model(top / "model", size)
            write_jsonl(top / "d.jsonl", problems("train", args.batch * args.steps))
            medians = {1: [], 2: []}
            for k in range(args.repeats):
                for count in medians:
                    out = top / f"{k}"
                    out.mkdir(exist_ok=True)
                    medians[count].append(statistics.median(steps(top / "model", top / "d.jsonl", count, args, out)))
            found[size] = medians
            ratios = [a / b for a, b in zip(medians[1], medians[2])]
            lines.append(f"| {size} | {spread(medians[1])} | {spread(medians[2])} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |")
    where = about()
    text = "\n".join(["**Seconds of an SFT step with one and two processes** (medians over runs, lowest to highest; the ratio is one process's time over two's)", "",
                      *lines, "", ", ".join(f"{k} {v}" for k, v in {**where, "threads": "1 a process"}.items())])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "processes.md").write_text(text + "\n")
    (RESULTS / "processes.json").write_text(json.dumps({"about": where, "seconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
