"""Several processes: a step with one and with two on this machine; 2 to 64 GPUs on paper.

    python benchmarks/processes.py [--sizes 3M 13M 60M]      # measures; writes results/processes.*
    python benchmarks/processes.py --paper                   # two tables; measures nothing

Measured: seconds of one SFT step (GSM8K texts, fused AdamW, fp32, gloo, one thread a process), the
median over the steps after the first of --repeats runs, one and two processes in turn. Two
processes share the cores, the caches and the memory of one machine, so this says what sharding
costs, not what a second machine would bring.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _bench import ROOT, SIZES, about, in_words, make_model, problems, ratio_cell, save, spread

from core.roofline import KNOWN

# ---------------------------------------------------------------- on paper
# An H100 of 80 GB. Nothing here was measured on a GPU.
FLOPS = 0.4 * 989e12        # bf16 operations a second: 40% of the peak, assumed for large models
MEMORY = 3.35e12            # bytes a second from its memory
NVLINK = 450e9              # bytes a second of NVLink in one direction
EIGHT_LINKS = 400e9         # of a node's eight 400 Gb/s links together
ONE_LINK = 50e9             # of one such link
DISK = 2e9                  # of the disk that the first process reads and writes models on
START = 30                  # seconds until a stage that was started computes

SHAPES = {"2B": KNOWN["gemma-2b"], "7B": KNOWN["Mistral-7B-v0.1"],
          "70B": KNOWN["Meta-Llama-3-70B"]}
WEIGHTS = {"2B": 2.51e9, "7B": 7.24e9, "70B": 70.6e9}

# (operations for each weight and token, bytes for each weight and micro-batch).
# Operations: 2 forward, 2 to recompute (checkpointing), 2 for the activations' gradients and,
# unless only adapters learn, 2 for the weights'. Bytes: weights gathered in 16 bits forward and
# backward and, unless only adapters learn, gradients scattered in 32. Adapters themselves are few.
FULL, LORA = (8, 8), (6, 4)

RECORD = 200                # tokens of a GSM8K record
ANSWER = 200                # decoding steps of a batch of answers
PAIR = 450                  # tokens of a question to the judge
PROBLEMS, TEST = 3737, 1319     # of D_gt and of D_unlab; test problems


def link(gpus):
    """Bytes a second that each of `gpus` receives while all gather.

    That is a ring's share, within a node or between nodes of eight links.
    """
    return NVLINK if gpus <= 8 else EIGHT_LINKS


def step_seconds(size, gpus, sequences, tokens, kind):
    """Seconds of one optimizer step. Computing and communicating overlap; a sequence stays on one
    GPU."""
    operations, transfer = kind
    own = math.ceil(sequences / gpus) * tokens
    computing = own * operations * WEIGHTS[size] / FLOPS
    received = (gpus - 1) / gpus * transfer * WEIGHTS[size]
    communicating = math.ceil(own / 4096) * received / link(gpus)
    return max(computing, communicating)


def knee(kind, speed):
    """Tokens of a GPU's micro-batch at which computing takes as long as communicating.

    For many GPUs. Both scale with the number of weights, so it does not depend on the model.
    """
    return kind[1] / kind[0] * FLOPS / speed


def answer_seconds(size, gpus, prompts, rows, bits=16):
    """Seconds of decoding: batches of 256 prompts of `rows` rows each, dealt out to the GPUs.

    Batches are smaller where GPUs would idle. A decoding step reads every weight (4-bit weights
    are read, written in 16 bits and read again) or computes, whichever takes longer.
    """
    batch = min(256, math.ceil(prompts / gpus))
    reading = (2 if bits == 16 else 4.5) * WEIGHTS[size] / MEMORY
    step = max(reading, 2 * WEIGHTS[size] * batch * rows / FLOPS)
    return math.ceil(math.ceil(prompts / batch) / gpus) * ANSWER * step


def hours(preset, gpus):
    """(training, answering, judging, starting and disk) hours of a run of three rounds.

    preset: gsm8k, every weight trained, or gsm8k-70b; with its default methods.
    """
    if preset == "gsm8k":
        weak, strong, kind, bits = "2B", "7B", FULL, 16
    else:
        weak, strong, kind, bits = "7B", "70B", LORA, 4
    rounds = 3
    epoch = math.ceil(PROBLEMS / 32)
    sft_steps = 2 * epoch * (1 + 1 + rounds * 2)        # SFT, ceiling; halves and retraining
    dpo_steps = rounds * 2 * math.ceil(0.15 * 3 * PROBLEMS / 32)
    judge_steps = 5 * math.ceil(2 * 6000 / 16)
    training = (sft_steps * step_seconds(strong, gpus, 32, RECORD, kind)
                + dpo_steps * step_seconds(strong, gpus, 32, 2 * RECORD, kind)
                + 2 * epoch * step_seconds(weak, gpus, 32, RECORD, kind)
                + judge_steps * step_seconds(weak, gpus, 16, PAIR, FULL))

    half = math.ceil(PROBLEMS / 2) - 1
    proposals = rounds * 2 * answer_seconds(strong, gpus, half, 4, bits)
    samples = rounds * answer_seconds(strong, gpus, 6 * PROBLEMS, 1, bits)
    tests = 8 * answer_seconds(strong, gpus, TEST, 1, bits)
    of_weak = 11 * answer_seconds(weak, gpus, PROBLEMS, 1) + answer_seconds(weak, gpus, TEST, 1)
    answering = proposals + samples + tests + of_weak

    questions = rounds * 2 * (PROBLEMS / 2 + 3 * PROBLEMS)      # both orders
    judging = questions * PAIR * 2 * WEIGHTS[weak] / FLOPS / gpus

    models = 1 + 1 + rounds * 3 + rounds        # SFT, ceiling; halves and retraining; DPO
    opened = rounds * 2 + rounds + 8            # for proposals, samples, test answers
    # trained from 2 bytes a weight; saved as 4, with the remainders, or as adapters
    bytes_a_weight = 2 * (models + opened) + (4 * models if kind is FULL else 0)
    disk = bytes_a_weight * WEIGHTS[strong] / DISK
    stages = 10 + rounds * 6 + rounds * 4       # with a model: before the rounds, of ILR, of DPO
    return [s / 3600 for s in (training, answering, judging, disk + START * stages)]


def planned(size, gpus, rank):
    """GB a GPU by the plan that a stage prints (core/memory.py): micro-batches of 4,096 tokens,
    checkpointing, AdamW with fp32 state."""
    import contextlib
    import io
    import re
    from unittest import mock

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from core import adapters, memory
    family, shape = SHAPES[size]
    launched = {"TORCHELASTIC_RUN_ID": "paper", "WORLD_SIZE": str(gpus), "RANK": "0",
                "LOCAL_WORLD_SIZE": str(gpus)}
    args = argparse.Namespace(micro_tokens=4096, gradient_checkpointing=True, lora_rank=rank)
    record = [5] * 200, [0.0] * 80 + [1.0] * 120
    said = io.StringIO()
    with (mock.patch.dict(os.environ, launched), contextlib.redirect_stdout(said),
          mock.patch.object(memory, "device_bytes", lambda device: math.inf)):
        with torch.device("meta"):
            config = AutoConfig.for_model(family, **shape)
            # what is sharded and trained is fp32, computed in 16 bits
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if rank else torch.float32)
            model.compute_dtype = torch.bfloat16
            if rank:
                adapters.add_lora(model, rank)
        weights = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
        assert abs(weights / WEIGHTS[size] - 1) < 0.01
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        memory.check_memory(model, [optimizer], args, torch.device("cpu"), [record])
    return float(re.search(r"= ([\d.e+]+) of", said.getvalue())[1])


def paper():
    """Two tables: GB and hours for some numbers of GPUs; bytes, and where the knee is."""
    lines = ["| GPUs of 80 GB | `LORA_RANK=0 gsm8k`, GB | hours | `gsm8k-70b`, GB | hours |",
             "| --- | --- | --- | --- | --- |"]
    for gpus in (2, 4, 8, 64):
        cells = []
        for preset, size, rank in (("gsm8k", "7B", 0), ("gsm8k-70b", "70B", 64)):
            gb, parts = planned(size, gpus, rank), hours(preset, gpus)
            if gb <= 80:
                sums = " + ".join(f"{h:.1f}" for h in parts)
                cells += [f"{gb:.0f}", f"{sums} = {sum(parts):.1f}"]
            else:
                cells += [f"{gb:.0f}, too much", "-"]
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    lines += ["", "| a micro-batch | GB received per GPU | seconds at 450 / 400 / 50 GB/s | "
              "break-even, tokens a GPU |", "| --- | --- | --- | --- |"]
    speeds = NVLINK, EIGHT_LINKS, ONE_LINK
    for name, size, kind in (("7B, every weight", "7B", FULL), ("70B, every weight", "70B", FULL),
                             ("70B, LoRA", "70B", LORA)):
        volume = kind[1] * WEIGHTS[size]
        took = " / ".join(f"{volume / s:.2g}" for s in speeds)
        knees = " / ".join(f"{knee(kind, s):,.0f}" for s in speeds)
        lines.append(f"| {name} | {volume / 1e9:.0f} | {took} | {knees} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- measured
def steps(folder, data, count, args, out):
    """Seconds of each optimizer step but the first, of `count` processes."""
    launch = [sys.executable]
    if count > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    flags = ["--batch-size", str(args.batch), "--epochs", "1", "--micro-tokens", "1024",
             "--lr", "1e-4", "--state-every", "1e9"]
    target = out / f"m{count}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
                   "PYTHONPATH": str(ROOT)}
    subprocess.run([*launch, __file__, "--worker", "--model", folder, "--data", data,
                    "--out", target, *flags], check=True, cwd=ROOT, env=environment,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marks = json.loads(Path(f"{target}.marks").read_text())
    return [b - a for a, b in itertools.pairwise(marks)]


def worker(argv):
    """sft.py, which also notes when each step ended."""
    import time

    import sft
    from core.cli import run_stage
    from core.distributed import rank
    from core.training import Training
    marks, log = [], Training.log

    def noted(self, **row):
        marks.append(time.perf_counter())
        log(self, **row)

    def main(args):
        sft.main(args)
        if rank() == 0:
            Path(f"{args.out}.marks").write_text(json.dumps(marks))
    Training.log = noted
    run_stage(sft.parser(), main, argv)


def measure(size, args):
    """{processes: [median seconds of a step in each run]} of one model size."""
    from core.records import write_jsonl
    medians = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as top:
        model, data = Path(top) / "model", Path(top) / "d.jsonl"
        make_model(model, size)
        write_jsonl(data, problems("train", args.batch * args.steps))
        for k in range(args.repeats):
            out = Path(top) / str(k)
            out.mkdir()
            for count, found in medians.items():
                found.append(statistics.median(steps(model, data, count, args, out)))
    return medians


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6,
                        help="optimizer steps a run, of which the first is not counted")
    parser.add_argument("--batch", type=int, default=16, help="records a step")
    args = parser.parse_args()
    if args.paper:
        print(paper())
        return
    found = {}
    lines = ["**Seconds of an SFT step with one and two processes** (medians over runs, lowest to "
             "highest; the ratio is one process's time over two's)", "",
             "| weights | seconds a step, 1 process | 2 processes | ratio |",
             "| --- | --- | --- | --- |"]
    for size in args.sizes:
        found[size] = measure(size, args)
        one, two = found[size].values()
        ratios = [a / b for a, b in zip(one, two, strict=True)]
        lines.append(f"| {size} | {spread(one)} | {spread(two)} | {ratio_cell(ratios)} |")
    where = about()
    text = "\n".join([*lines, "", in_words({**where, "threads": "1 a process"})])
    print(text)
    save("processes", text, {"about": where, "seconds": found}, indent=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
