"""DPO: dpo.py against TRL's DPOTrainer, on real GSM8K prompts.

    pip install -r benchmarks/requirements.txt
    python benchmarks/dpo_vs_trl.py [--size 3M|60M]
    python benchmarks/dpo_vs_trl.py --size 135M --weights FOLDER      # SmolLM2, real weights

Pairs: a GSM8K answer over another problem's. Both sides have the same weights, token ids, order,
optimizer (fused AdamW in fp32) and pairs a step. Both compute the reference's log-probabilities
beforehand, which is not counted. TRL 1.16 has no padding-free mode for DPO; it runs with three
sizes of micro-batch, above 3M weights with two: the largest was never the best. Counted: pairs per
second from the end of the first step to the end of the last. Loss and gradients of the first step
must agree before anything is timed.
"""
import argparse
import statistics
import tempfile
from pathlib import Path

from _bench import (
    add_flags,
    floor,
    model_folder,
    operations,
    preferences,
    problems,
    race,
    report,
    settle,
    tolerance_of,
    train,
)
from sft_vs_trl import TRL, trl_clock

SIDES = "chosen", "rejected"


def theirs(folder, dataset, batch, micro):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class SameTokens(DPOTrainer):        # our token ids, in our order
        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)
    marks, first, clock = trl_clock()
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(output_dir=out, per_device_train_batch_size=micro,
                           gradient_accumulation_steps=batch // micro, max_length=None, beta=0.1,
                           precompute_ref_log_probs=True, gradient_checkpointing=False, **TRL)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        SameTokens(model=model, args=config, train_dataset=dataset, callbacks=[clock],
                   processing_class=AutoTokenizer.from_pretrained(folder)).train()
    return marks, first


def tokenized(folder, pairs):
    """Rows for TRL: our token ids, in the order in which dpo.py reads the pairs."""
    import numpy as np

    from core.tokens import encode_completion, encode_prompt, open_tokenizer
    tokenizer, rows = open_tokenizer(folder), []
    for i in np.random.default_rng([0, 0]).permutation(len(pairs)):
        row = {"prompt_ids": encode_prompt(tokenizer, pairs[i]["prompt"])}
        row.update({f"{k}_ids": encode_completion(tokenizer, pairs[i][k]) for k in SIDES})
        rows.append(row)
    return rows


def main(args):
    from datasets import Dataset

    import dpo
    from core.records import write_jsonl
    settle(args)
    mine = ["--micro-tokens", str(args.micro_tokens)]
    with tempfile.TemporaryDirectory() as top:
        data = Path(top) / "data.jsonl"
        folder, title = model_folder(args, f"{top}/model")
        pairs = preferences(problems("train", args.batch * args.steps))
        write_jsonl(data, pairs)
        rows = tokenized(folder, pairs)
        dataset = Dataset.from_list(rows)

        def loop(micro):
            return lambda: theirs(folder, dataset, args.batch, micro)
        micros = (1, 2, 8) if args.size == "3M" else (1, 2)
        rates = race(args, lambda: train(dpo, folder, data, args.batch, mine),
                     {f"TRL, {micro} pairs a pass": loop(micro) for micro in micros},
                     args.batch * (args.steps - 1))
    counted = rows[args.batch:]
    lengths = [len(r["prompt_ids"]) + len(r[f"{k}_ids"]) for k in SIDES for r in counted]
    predicted = sum(len(r[f"{k}_ids"]) for k in SIDES for r in counted)
    # the tokens of a prompt but the last count once
    shared = [len(r["prompt_ids"]) - 1 for r in counted]
    needed = operations(args.size, lengths, predicted, shared=shared) / len(counted)
    report(f"dpo_{args.size}", f"DPO, {title}", "pairs per second",
           {"DPO": rates},
           f"{len(pairs)} pairs of GSM8K answers, {args.batch} a step, {' '.join(mine)}; loss of "
           f"the first step within {tolerance_of(args)}, its gradients within "
           f"{tolerance_of(args)} of the largest. "
           + floor(needed, "pair", statistics.median(rates["ours"])))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p, real=True)
    main(p.parse_args())
