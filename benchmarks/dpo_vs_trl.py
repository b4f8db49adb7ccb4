"""DPO: this repository's loop against TRL's DPOTrainer, on real GSM8K prompts.

    pip install -r benchmarks/requirements.txt && python benchmarks/dpo_vs_trl.py [--size 3M|60M]

Pairs: a GSM8K answer over another problem's. Same weights, token ids, order, optimizer (fused AdamW in fp32), pairs a step; reference
log-probabilities precomputed on both sides and not counted. TRL 1.16 has no padding-free mode for DPO; it runs with three sizes
of micro-batch. Counted: pairs per second from the end of the first step to the end of the last. First, loss and gradient of the first
step must agree.
"""
import argparse
import statistics
import tempfile
from pathlib import Path

from _bench import add_flags, floor, make_model, operations, problems, race, report, settle
from sft_vs_trl import TRL, trl_clock, watch


def ours(folder, data, batch, more):
    import dpo
    import sft
    marks, first, restore = watch(sft)
    apply, dpo.apply_gradients = dpo.apply_gradients, sft.apply_gradients
    with tempfile.TemporaryDirectory() as out:
        try:
            dpo.main(dpo.parser().parse_args(["--model", str(folder), "--data", str(data), "--out", f"{out}/m", "--batch-size", str(batch), "--epochs",
                                              "1", "--lr", "1e-4", "--optimizer", "adamw", "--state-every", "1e9", *more]))
        finally:
            restore()
            dpo.apply_gradients = apply
    return marks, first


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
        config = DPOConfig(output_dir=out, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro, max_length=None, beta=0.1,
                           precompute_ref_log_probs=True, gradient_checkpointing=False, **TRL)
        SameTokens(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config, train_dataset=dataset,
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
        pairs = [{"id": r["id"], "prompt": r["prompt"], "chosen": r["completion"], "rejected": other["completion"]}
                 for r, other in zip(records, records[1:] + records[:1])]
        write_jsonl(data, pairs)
        tokenizer = sft.open_tokenizer(folder)
        dataset = Dataset.from_list([{"prompt_ids": sft.encode_prompt(tokenizer, p["prompt"]), **{f"{k}_ids": sft.encode_completion(tokenizer, p[k])
                                      for k in ("chosen", "rejected")}} for p in (pairs[i] for i in np.random.default_rng([0, 0]).permutation(len(pairs)))])
        mine = ["--row-tokens", str(args.row_tokens), "--micro-tokens", str(args.micro_tokens)]
        variants = {f"TRL, {micro} pairs a pass": dict(micro=micro) for micro in (1, 2, 8)}
        rates = race(args, lambda: ours(folder, data, args.batch, mine),
                     {name: lambda kwargs=kwargs: theirs(folder, dataset, args.batch, **kwargs) for name, kwargs in variants.items()}, args.batch * (args.steps - 1))
    counted = dataset[args.batch:]
    needed = operations(args.size, [len(p) + len(c) for k in ("chosen", "rejected") for p, c in zip(counted["prompt_ids"], counted[f"{k}_ids"])],
                        sum(len(c) for k in ("chosen", "rejected") for c in counted[f"{k}_ids"])) / len(counted["prompt_ids"])
    report(f"dpo_{args.size}", f"DPO, Llama of {weights / 1e6:.1f}M weights", "pairs per second", {"DPO": rates},
           f"{len(pairs)} pairs of GSM8K answers, {args.batch} a step, {' '.join(mine)}; loss of the first step within 1e-4, its gradients within "
           "1e-4 of the largest. " + floor(needed, "pair", statistics.median(rates["ours"])))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    p.add_argument("--row-tokens", type=int, default=1)
    p.add_argument("--micro-tokens", type=int, default=1024)
    main(p.parse_args())
