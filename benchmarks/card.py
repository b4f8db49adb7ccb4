"""A 7B model on a real card: what each stage reaches, against the card, transformers and TRL.

    python benchmarks/card.py [CHECK ...]         # all: 6 minutes on an H200, 80 GB of its memory

Random weights of the shapes of Mistral-7B-v0.1 and gemma-2b, drawn on the card in bf16, and real
GSM8K texts, by a tokenizer of 8,192 tokens that is trained on them. The main functions of sft.py
and dpo.py run as they are, but neither read nor write weights. Each check has a process of its own;
one that fails, as TRL's where it is not installed, or takes longer than --seconds says so in its
row.

Share: floating-point operations that the layers and the head need at least (without attention, and
without what checkpointing computes again), of those that an 8192 x 8192 product in bf16 reaches on
the same card. Plan: the memory that the stage said it would need; peak: what was allocated.
"""
import argparse
import contextlib
import functools
import io
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
import traceback
from unittest import mock

from _bench import about, in_words, make_tokenizer, preferences, problems, run_main, save

from core.cli import make_parser, positive, run_stage
from report.tables import table

POLICY, JUDGE = "Mistral-7B-v0.1", "gemma-2b"
SMALL = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=64, vocab_size=8192)
LORA, AGAIN, DPO = ["--lora-rank", 64], ["--gradient-checkpointing"], ["--optimizer", "rmsprop8bit"]
WARM = 2            # steps that are not counted
SIDES = "chosen", "rejected"


# ---------------------------------------------------------------- models and texts
def write_folder(folder, name, small):
    """Config and tokenizer of a model whose weights `on_card` draws."""
    from transformers import AutoConfig

    from core.roofline import KNOWN
    family, shape = KNOWN[name]
    tokenizer = make_tokenizer(folder)
    tokens = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("pad", "bos", "eos")}
    AutoConfig.for_model(family, **{**shape, **(SMALL if small else {}), **tokens},
                         dtype="bfloat16").save_pretrained(folder)


def on_card(path, auto_class, dtype, kwargs):
    """In place of `core.models.read_model`: random weights, drawn on the card."""
    import torch
    from transformers import AutoConfig
    torch.manual_seed(0)
    with torch.device("cuda"):
        return auto_class.from_config(AutoConfig.from_pretrained(path, **kwargs), dtype=dtype)


def open_random(folder, auto="AutoModelForCausalLM", **kwargs):
    import torch

    import core.models
    with mock.patch.object(core.models, "read_model", on_card):
        return core.models.open_model(folder, core.models.pick_device(None), auto,
                                      dtype=torch.bfloat16, **kwargs).eval()


def records_of(args, stage):
    """(records of a training, {tokens, labelled} of its counted steps, the rows for TRL)"""
    import dpo_vs_trl
    import sft_vs_trl
    records = problems("train", args.batch * args.steps)
    if stage == "sft":
        rows = sft_vs_trl.tokenized(FOLDERS[POLICY], records)
        counted = [(len(r["input_ids"]), sum(x != -100 for x in r["labels"])) for r in rows]
    else:
        records = preferences(records)
        rows = dpo_vs_trl.tokenized(FOLDERS[POLICY], records)
        counted = [(sum(len(r["prompt_ids"]) + len(r[f"{s}_ids"]) for s in SIDES),
                    sum(len(r[f"{s}_ids"]) for s in SIDES)) for r in rows]
    counted = counted[args.batch * WARM:]
    tokens, labelled = map(sum, zip(*counted, strict=True))
    return records, {"tokens": tokens, "labelled": labelled, "records": len(counted)}, rows


def seconds(run):
    """What run() returns, and how long it takes with what the card then still has to do."""
    import torch
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return found, time.perf_counter() - start


# ---------------------------------------------------------------- checks: each returns numbers
def ceiling(args):
    """What the card reaches: operations a second in a product, bytes a second in a copy."""
    import torch
    n, m = (1024, 1 << 20) if args.small else (8192, 1 << 30)
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.randn(m, device="cuda") for _ in range(2))

    def median(run):
        return statistics.median([seconds(run)[1] for _ in range(13)][3:])
    return {"matrix": 2 * n ** 3 / median(lambda: a @ b),
            "memory": 8 * m / median(lambda: y.copy_(x)),
            "card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def train(args, name, *words):
    """sft.py or dpo.py with these flags."""
    import importlib

    import torch

    import core.models
    from core.records import write_jsonl
    from core.training import Training
    stage, marks, rows, log = importlib.import_module(name), [], [], Training.log
    records, work, _ = records_of(args, name)

    def timed(self, **row):
        torch.cuda.synchronize()
        if not rows:        # what drawing the weights took does not count
            torch.cuda.reset_peak_memory_stats()
        marks.append(time.perf_counter())
        rows.append(row)
        return log(self, **row)
    said = io.StringIO()
    with (tempfile.TemporaryDirectory() as top, contextlib.redirect_stdout(said),
          mock.patch.object(core.models, "read_model", on_card),
          mock.patch.object(stage, "save_model"), mock.patch.object(Training, "log", timed)):
        write_jsonl(f"{top}/data.jsonl", records)
        run_main(stage, "--model", FOLDERS[POLICY], "--data", f"{top}/data.jsonl", "--epochs", 1,
                 "--out", f"{top}/m", "--batch-size", args.batch, "--state-every", 1e9, *words)
    print(said.getvalue())
    plan = re.search(r"= ([\d.e+]+) of", said.getvalue())
    return {**work, "seconds": marks[-1] - marks[WARM - 1], "plan": plan and float(plan[1]),
            "losses": [row["loss"] for row in rows], "backward": 1 if "--lora-rank" in words else 2}


def trl(args, name, micro):
    """TRL's trainer: the same token ids, order and records a step; weights in bf16 alone."""
    import torch
    import transformers
    import trl as library
    from datasets import Dataset
    from sft_vs_trl import TRL, trl_clock
    _, work, rows = records_of(args, name)
    marks, first, clock = trl_clock()
    kind = name.upper()
    trainer, config = getattr(library, f"{kind}Trainer"), getattr(library, f"{kind}Config")
    more = ({"padding_free": micro > 1} if name == "sft" else
            {"precompute_ref_log_probs": True, "beta": 0.1})

    class InOrder(trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset if name == "dpo" else super()._prepare_dataset(dataset, *args, **kwargs)

    def synchronized(*args, **kwargs):
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
    clock.on_step_end = synchronized
    clock.on_pre_optimizer_step = lambda *args, **kwargs: None
    with tempfile.TemporaryDirectory() as out:
        settings = {**TRL, "use_cpu": False, "bf16": True, "max_length": None, "output_dir": out,
                    "optim": "adamw_bnb_8bit", "gradient_checkpointing": True,
                    "per_device_train_batch_size": micro,
                    "gradient_accumulation_steps": args.batch // micro, **more}
        folder = FOLDERS[POLICY]
        InOrder(model=on_card(folder, transformers.AutoModelForCausalLM, torch.bfloat16, {}),
                args=config(**settings), train_dataset=Dataset.from_list(rows), callbacks=[clock],
                processing_class=transformers.AutoTokenizer.from_pretrained(folder)).train()
    return {**work, "seconds": marks[-1] - marks[WARM - 1], "losses": [first.get("loss")],
            "backward": 2}


def policy():
    """(model, its EOS, the token ids of 252 prompts, the longest first)"""
    from core.tokens import encode_prompt, open_tokenizer
    tokenizer = open_tokenizer(FOLDERS[POLICY])
    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in problems("test", 252)]
    return (open_random(FOLDERS[POLICY]), tokenizer.eos_token_id,
            sorted(prompts, key=len, reverse=True))


def answer(args, side, how):
    """Tokens of answers: all are as long as they may be, since random weights write no EOS."""
    import torch
    from generate_vs_transformers import Sides
    model, eos, prompts = policy()
    settings = argparse.Namespace(batch_size=252, every=6, new=4, blocks=512, batch_tokens=1024)
    sides = Sides(model, eos, prompts, settings)
    with torch.no_grad():
        getattr(sides, side)(how)           # warms up
        settings.new = 8 if args.small else 128
        found, spent = seconds(lambda: getattr(sides, side)(how))
    return {"seconds": spent, "tokens": sum(map(len, found.values())), "answers": len(found)}


def profile(args):
    """What the card does while tokens of 252 rows are decoded, and for how much of the time."""
    import torch
    from torch.profiler import ProfilerActivity

    from core.decoding import decode
    model, eos, prompts = policy()

    def answers(new):
        return seconds(lambda: decode(model, prompts, [eos], new))[1]

    def kernels(new):
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
            answers(new)
        return {row.key: row.self_device_time_total / 1e6 for row in found.key_averages()}
    answers(4)      # warms up
    few, many = answers(4), answers(36)
    before, after = kernels(4), kernels(36)
    spent = {name: (value - before.get(name, 0)) / 32 for name, value in after.items()}
    return {"token": (many - few) / 32, "busy": sum(spent.values()),
            "kernels": dict(sorted(spent.items(), key=lambda x: -x[1])[:12])}


def judge(args, side):
    """The judge's scores of pairs in both orders: ours, or a question a pass as the release."""
    import torch

    from core.judge import encode_pair, new_head, probabilities, probe_judge, set_padding
    from core.tokens import open_tokenizer
    tokenizer = open_tokenizer(FOLDERS[JUDGE])
    model = open_random(FOLDERS[JUDGE], "AutoModelForSequenceClassification", num_labels=2)
    new_head(model)
    set_padding(model, tokenizer)
    torch.nn.init.normal_(model.score.weight, std=model.config.hidden_size ** -0.5)
    pairs = preferences(problems("train", 256 if side == "ours" else 64))
    questions = [encode_pair(tokenizer, p["prompt"], *sides) for p in pairs for sides in (
        (p["chosen"], p["rejected"]), (p["rejected"], p["chosen"]))]
    packing = argparse.Namespace(micro_tokens=16384)
    if side == "ours":
        probe_judge(model, questions, packing, model.device)

    def release():
        for ids in questions:
            model(input_ids=torch.tensor([ids], device=model.device)).logits.softmax(-1).tolist()
    run = (release if side == "release" else
           lambda: probabilities(model, questions, packing, model.device))
    with torch.inference_mode():
        run()       # warms up
        return {"seconds": seconds(run)[1], "records": len(pairs)}


CHECKS = {
    "ceiling": (ceiling,),
    "SFT, all weights, checkpointing": (train, "sft", *AGAIN),
    "SFT, all weights": (train, "sft"),
    "SFT, LoRA 64, checkpointing": (train, "sft", *LORA, *AGAIN),
    "SFT, LoRA 64 on 4 bits, checkpointing": (train, "sft", *LORA, *AGAIN, "--load-in-4bit"),
    "SFT by TRL, all weights, checkpointing, padding-free": (trl, "sft", 8),
    "SFT by TRL, all weights, checkpointing, 1 record a pass": (trl, "sft", 1),
    "DPO, all weights, checkpointing": (train, "dpo", *DPO, *AGAIN),
    "DPO, LoRA 64, checkpointing": (train, "dpo", *DPO, *LORA, *AGAIN),
    "DPO by TRL, all weights, checkpointing, 8 pairs a pass": (trl, "dpo", 8),
    **{f"{how}, {words}": (answer, side, how)
       for how in ("greedy", "six samples a prompt", "4 beams")
       for side, words in (("ours", "ours"), ("generate", "transformers generate"))},
    "greedy, transformers generate_batch": (answer, "generate_batch", "greedy"),
    "where a token's time goes": (profile,),
    "judge": (judge, "ours"),
    "judge, a question a pass": (judge, "release"),
}


# ---------------------------------------------------------------- processes, table
def in_process(name, args, pipe):
    import torch
    import transformers
    try:
        transformers.utils.logging.set_verbosity_error()
        function, *more = CHECKS[name]
        found = function(args, *more)
        found["peak"] = torch.cuda.max_memory_allocated() / 1e9
    except BaseException as e:      # SystemExit too: a row says so
        traceback.print_exc()
        found = {"failed": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
    pipe.send(found)


def run_check(name, args):
    """What a check returns in a process of its own; {"failed": why} if it returns nothing."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=in_process,
                                                          args=(name, args, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(args.seconds) else {"failed": f"over {args.seconds} s"}
    except EOFError:
        return {"failed": "the process ended"}
    finally:
        process.kill()
        process.join()


@functools.cache
def shape():
    """(weights of the inner layers, of the head) of the policy."""
    from core.roofline import Made, Model
    model = Model(Made(POLICY, 0), False, None, False)
    return model.inner, model.shape.h * model.shape.vocabulary


def rate(found):
    """The rate of a check in words: what it does a second."""
    if "failed" in found:
        return found["failed"]
    if "matrix" in found:
        return (f"{found['card']}: {found['matrix'] / 1e12:.0f} TFLOP/s, "
                f"{found['memory'] / 1e12:.2f} TB/s copied")
    if "kernels" in found:
        return (f"{1e3 * found['token']:.1f} ms a token of 252 rows, the card busy for "
                f"{1e3 * found['busy']:.1f}: " + ", ".join(
                    f"{name[:40]} {1e3 * value:.1f}" for name, value in found["kernels"].items()))
    tokens = f"{found['tokens'] / found['seconds']:,.0f} tokens" if "tokens" in found else ""
    records = f"{found['records'] / found['seconds']:.1f} records" if "records" in found else ""
    return ", ".join(filter(None, (tokens, records)))


def as_text(args, where, results):
    lines, best = [], results.get("ceiling", {}).get("matrix")
    for name, found in results.items():
        share = ""
        if best and "labelled" in found:
            inner, head = shape()
            needed = 2 * (1 + found["backward"]) * (inner * found["tokens"]
                                                    + head * found["labelled"])
            share = f"{needed / found['seconds'] / best:.0%}"
        plan, losses = found.get("plan"), found.get("losses")
        lines.append([name, rate(found), share,
                      f"{found['peak']:.1f}" if "peak" in found else "",
                      f"{plan:.1f}" if plan else "", f"{losses[0]:.5f}" if losses else ""])
    return "\n".join([
        "# On a card\n", table(["", "a second", "share", "peak, GB", "plan, GB", "first loss"],
                               lines),
        f"{args.batch} records or pairs a step, {args.steps - WARM} counted steps; answers of 128 "
        f"tokens. Random weights.{' Small shapes: this says nothing.' if args.small else ''}\n",
        in_words(where)])


FOLDERS = {}        # of the models


def main(args):
    import transformers  # noqa: F401  before the processes divide: each starts with it
    args.batch, args.steps = (4, 3) if args.small else (32, 8)
    results = {}
    with tempfile.TemporaryDirectory() as top:
        for name in (POLICY, JUDGE):
            FOLDERS[name] = f"{top}/{name}"
            write_folder(FOLDERS[name], name, args.small)
        for name in args.checks or CHECKS:
            start = time.perf_counter()
            results[name] = run_check(name, args)
            print(f"{name}: {rate(results[name])} "
                  f"({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
            save(args.out, as_text(args, about(), results),
                 {"about": about(), "results": results}, indent=1)
    print(as_text(args, about(), results))


def parser():
    p = make_parser(__doc__, prog="card.py")
    p.add_argument("checks", nargs="*", metavar="CHECK", choices=[[], *CHECKS])
    p.add_argument("--small", action="store_true", help="small shapes, to try this script")
    p.add_argument("--seconds", type=positive, default=90, help="for each check")
    p.add_argument("--out", default="card", help="name below results/, or an absolute one")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
