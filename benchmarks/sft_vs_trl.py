"""SFT: this repository's loop against TRL's SFTTrainer and the release's settings, on real GSM8K texts.

    pip install -r benchmarks/requirements.txt && python benchmarks/sft_vs_trl.py [--size 3M|60M]

Same weights, token ids, order of records, optimizer (fused AdamW in fp32), records a step. TRL runs in the settings that were fastest on
two cores, and padded as by default; the release's settings are one record a forward pass, accumulation and gradient checkpointing. Counted: completion tokens
per second from the end of the first step to the end of the last, so neither loading nor tokenizing. Before anything is timed, loss and
gradient of the first step must agree.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _bench import add_flags, floor, make_model, operations, problems, race, report, settle


def watch(stage):
    """A stage that notes the time of every step in the list returned, and in the dict the first step's loss and gradients."""
    marks, first = [], {}
    log, apply = stage.Training.log, stage.apply_gradients

    def timed(self, **row):
        marks.append(time.perf_counter())
        first.setdefault("loss", row["loss"])
        return log(self, **row)

    def spy(model, *args):
        if not first:
            first["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        return apply(model, *args)
    stage.Training.log, stage.apply_gradients = timed, spy

    def restore():
        stage.Training.log, stage.apply_gradients = log, apply
    return marks, first, restore


def ours(folder, data, batch, more):
    import sft
    marks, first, restore = watch(sft)
    with tempfile.TemporaryDirectory() as out:
        try:
            sft.main(sft.parser().parse_args(["--model", str(folder), "--data", str(data), "--out", f"{out}/m", "--batch-size", str(batch), "--epochs",
                                              "1", "--lr", "1e-4", "--optimizer", "adamw", "--state-every", "1e9", *more]))
        finally:
            restore()
    return marks, first


def trl_clock():
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


TRL = dict(num_train_epochs=1, learning_rate=1e-4, optim="adamw_torch_fused", adam_beta2=0.95, max_grad_norm=1e9, bf16=False, use_cpu=True,
           save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False)


def theirs(folder, dataset, batch, micro, checkpointing=False, padding_free=False):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    marks, first, clock = trl_clock()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(output_dir=out, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro, max_length=None,
                           padding_free=padding_free, gradient_checkpointing=checkpointing, **TRL)
        InOrder(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config, train_dataset=dataset,
                processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[clock]).train()
    return marks, first


def main(args):
    import numpy as np
    from datasets import Dataset
    import sft
    from tasks import write_jsonl
    settle(args)
    with tempfile.TemporaryDirectory() as top:
        folder, data = Path(top) / "model", Path(top) / "data.jsonl"
        weights = make_model(folder, args.size)
        records = problems("train", args.batch * args.steps)
        write_jsonl(data, records)
        tokenizer = sft.open_tokenizer(folder)
        rows = []
        for i in np.random.default_rng([0, 0]).permutation(len(records)):
            prompt, completion = sft.encode_prompt(tokenizer, records[i]["prompt"]), sft.encode_completion(tokenizer, records[i]["completion"])
            rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        dataset, counted = Dataset.from_list(rows), sum(x != -100 for r in rows[args.batch:] for x in r["labels"])
        mine = ["--row-tokens", str(args.row_tokens), "--micro-tokens", str(args.micro_tokens)]
        variants = {"TRL, one record a pass": dict(micro=1), "TRL, padding-free, 2 records a pass": dict(micro=2, padding_free=True),
                    "TRL, padded, 8 records a pass": dict(micro=8), "the release's settings": dict(micro=1, checkpointing=True)}
        rates = race(args, lambda: ours(folder, data, args.batch, mine),
                     {name: lambda kwargs=kwargs: theirs(folder, dataset, args.batch, **kwargs) for name, kwargs in variants.items()}, counted)
    needed = operations(args.size, [len(r["input_ids"]) for r in rows[args.batch:]], counted) / counted
    mean = sum(len(r["input_ids"]) for r in rows) / len(rows)
    report(f"sft_{args.size}", f"SFT, Llama of {weights / 1e6:.1f}M weights", "completion tokens per second",
           {"SFT": rates}, f"{len(rows)} GSM8K records of {mean:.0f} tokens on average, {args.batch} a step, {' '.join(mine)}; "
           "loss of the first step within 1e-4, its gradients within 1e-4 of the largest. "
           + floor(needed, "completion token with its share of prompt", statistics.median(rates["ours"])))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    p.add_argument("--row-tokens", type=int, default=1)
    p.add_argument("--micro-tokens", type=int, default=1024)
    main(p.parse_args())
