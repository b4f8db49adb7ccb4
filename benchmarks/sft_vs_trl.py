"""SFT: sft.py against TRL's SFTTrainer and against the release's settings, on real GSM8K texts.

    pip install -r benchmarks/requirements.txt
    python benchmarks/sft_vs_trl.py [--size 3M|60M]
    python benchmarks/sft_vs_trl.py --size 135M --weights FOLDER      # SmolLM2, real weights

Both sides have the same weights, token ids, order of records, optimizer (fused AdamW in fp32) and
records a step. TRL runs with the settings that were fastest on two cores, and padded, its default.
The release's settings are one record a forward pass, accumulation and gradient checkpointing; they
and the padded run are left out above 3M, where a run takes minutes and they were never the best.
Counted: completion tokens per second from the end of the first step to the end of the last, so
neither loading nor tokenizing. Loss and gradients of the first step must agree before anything is
timed.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _bench import (
    add_flags,
    floor,
    model_folder,
    operations,
    problems,
    race,
    report,
    settle,
    tolerance_of,
    train,
)

TRL = dict(num_train_epochs=1, learning_rate=1e-4, optim="adamw_torch_fused", adam_beta2=0.95,
           max_grad_norm=1e9, bf16=False, use_cpu=True, save_strategy="no", logging_steps=1,
           report_to=[], disable_tqdm=True, dataloader_pin_memory=False)


def trl_clock():
    """What `_bench.train` returns, and a callback of transformers that fills it."""
    from transformers import TrainerCallback
    marks, first = [], {}

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if "gradients" not in first:
                first["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters()}

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                first.setdefault("loss", float(logs["loss"]))
    return marks, first, Clock()


def theirs(folder, dataset, batch, micro, checkpointing=False, padding_free=False):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    marks, first, clock = trl_clock()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(output_dir=out, per_device_train_batch_size=micro,
                           gradient_accumulation_steps=batch // micro, max_length=None,
                           padding_free=padding_free, gradient_checkpointing=checkpointing, **TRL)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        InOrder(model=model, args=config, train_dataset=dataset, callbacks=[clock],
                processing_class=AutoTokenizer.from_pretrained(folder)).train()
    return marks, first


def tokenized(folder, records):
    """Rows for TRL: our token ids, in the order in which sft.py reads the records."""
    import numpy as np

    from core.tokens import encode_completion, encode_prompt, open_tokenizer
    tokenizer, rows = open_tokenizer(folder), []
    for i in np.random.default_rng([0, 0]).permutation(len(records)):
        prompt = encode_prompt(tokenizer, records[i]["prompt"])
        completion = encode_completion(tokenizer, records[i]["completion"])
        rows.append({"input_ids": prompt + completion,
                     "labels": [-100] * len(prompt) + completion})
    return rows


def main(args):
    from datasets import Dataset

    import sft
    from core.records import write_jsonl
    settle(args)
    mine = ["--micro-tokens", str(args.micro_tokens)]
    variants = {"TRL, one record a pass": dict(micro=1),
                "TRL, padding-free, 2 records a pass": dict(micro=2, padding_free=True)}
    if args.size == "3M":
        variants |= {"TRL, padded, 8 records a pass": dict(micro=8),
                     "the release's settings": dict(micro=1, checkpointing=True)}
    with tempfile.TemporaryDirectory() as top:
        data = Path(top) / "data.jsonl"
        folder, title = model_folder(args, f"{top}/model")
        records = problems("train", args.batch * args.steps)
        write_jsonl(data, records)
        rows = tokenized(folder, records)
        dataset, counted = Dataset.from_list(rows), rows[args.batch:]
        completion_tokens = sum(x != -100 for r in counted for x in r["labels"])

        def loop(settings):
            return lambda: theirs(folder, dataset, args.batch, **settings)
        rates = race(args, lambda: train(sft, folder, data, args.batch, mine),
                     {name: loop(settings) for name, settings in variants.items()},
                     completion_tokens)
    needed = operations(args.size, [len(r["input_ids"]) for r in counted], completion_tokens)
    mean = sum(len(r["input_ids"]) for r in rows) / len(rows)
    report(f"sft_{args.size}", f"SFT, {title}",
           "completion tokens per second", {"SFT": rates},
           f"{len(rows)} GSM8K records of {mean:.0f} tokens on average, {args.batch} a step, "
           f"{' '.join(mine)}; loss of the first step within {tolerance_of(args)}, its gradients "
           f"within {tolerance_of(args)} of the largest. " + floor(needed / completion_tokens,
                                   "completion token with its share of prompt",
                                   statistics.median(rates["ours"])))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p, real=True)
    main(p.parse_args())
