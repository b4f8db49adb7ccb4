"""What a run of the gsm8k chain has computed, computed again by plain transformers, peft and
bitsandbytes: one sequence at a time, and fp64 sums of the logits."""
import json
import math
from pathlib import Path


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def batches(records, size):
    """The first epoch's batches of a training with seed 0."""
    import numpy as np
    order = np.random.default_rng([0, 0]).permutation(len(records))
    return [[records[i] for i in order[k:k + size]] for k in range(0, len(order), size)]


class Plain:
    """A run's seed folder `run`, made from the model `base` by these settings of run_ilr.sh."""

    def __init__(self, base, run, settings):
        import torch
        from transformers import AutoTokenizer
        self.base, self.run, self.settings = base, run, settings
        self.dtype, self.new = getattr(torch, settings["DTYPE"]), settings["NEW"]
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.eos = self.tokenizer.eos_token_id

    def open(self, folder, auto="AutoModelForCausalLM", dtype=None):
        """A folder's model; adapters by peft. 4 bits, where the run has them, are not the judge's.
        """
        import transformers
        from peft import PeftModel
        more, adapters = {}, (folder / "adapter_config.json").exists()
        if "LOAD_IN_4BIT" in self.settings and auto == "AutoModelForCausalLM":
            more["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype)
        model = getattr(transformers, auto).from_pretrained(
            self.base if adapters else folder, dtype=dtype or self.dtype, **more)
        for layer in model.modules():       # a kernel that computes in bf16, in fp32 models too
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        if adapters:
            model = PeftModel.from_pretrained(model, folder)
            for name, p in model.named_parameters():
                if "lora_" in name:     # peft adds fp32 adapters to bf16 models
                    p.data = p.data.to(self.dtype)
        return model.eval()

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def completion(self, text):
        return [*self.ids(text), self.eos]

    def prompt(self, record):
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self.ids(record["prompt"])

    def logp(self, model, record, text):
        """Summed log-probability of a completion."""
        import torch
        prompt, target = self.prompt(record), self.completion(text)
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1:-1]
        return logits.double().log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()

    def sft(self):
        """(losses of SFT in its first epoch, ours and plain): of all steps if all weights are
        trained, else of the first. AdamW on fp32 copies of the weights, which are rounded to the
        run's type after each step."""
        import torch

        from tasks.gsm8k import is_well_formed
        ours, theirs = rows(self.run / "sft/model_1/metrics.jsonl"), []
        labels = [r for r in rows(self.run / "weak/labels.jsonl")
                  if is_well_formed(r["completion"])]
        full, model = self.settings["LORA_RANK"] == "0", self.open(self.base)
        if full:
            weights = list(model.parameters())
            copies = list(self.open(self.base, dtype=torch.float32).parameters())
            adam = torch.optim.AdamW(copies, betas=(0.9, 0.95), weight_decay=0.0)
        for batch, row in zip(batches(labels, int(self.settings["SFT_BATCH"])), ours, strict=False):
            tokens, loss = sum(len(self.completion(r["completion"])) for r in batch), 0.0
            for r in batch:
                with torch.set_grad_enabled(full):
                    part = -self.logp(model, r, r["completion"]) / tokens
                loss += part.item()
                if full:
                    part.backward()
            theirs.append(loss)
            if not full:
                break
            for copy, p in zip(copies, weights, strict=True):
                copy.grad, p.grad = p.grad.float(), None
            torch.nn.utils.clip_grad_norm_(copies, 1.0)
            adam.param_groups[0]["lr"] = row["lr"]
            adam.step()
            for copy, p in zip(copies, weights, strict=True):
                p.data.copy_(copy.data)
        return [r["loss"] for r in ours[:len(theirs)]], theirs

    def dpo(self):
        """(ours, plain): loss of DPO's first step, ln 2, and its mean log-probabilities."""
        import torch

        from tasks.gsm8k import is_well_formed
        ours = rows(self.run / "dpo_1/model_1/metrics.jsonl")[0]
        pairs = [r for r in rows(self.run / "dpo_1/preferences.jsonl")
                 if is_well_formed(r["chosen"])]
        batch = batches(pairs, int(self.settings["DPO_BATCH"]))[0]
        model = self.open(self.run / "sft/model_1")
        with torch.no_grad():
            theirs = [sum(self.logp(model, r, r[side]).item() for r in batch) / len(batch)
                      for side in ("chosen", "rejected")]
        names = "loss", "logps/chosen", "logps/rejected"
        return [ours[name] for name in names], [math.log(2), *theirs]

    def judge(self):
        """(ours, plain): P(change to B) of ILR's comparisons, in both orders."""
        import torch
        model = self.open(self.run / "judge/model", "AutoModelForSequenceClassification")
        ours, theirs = [], []
        for c in rows(self.run / "ilr_1/comparisons.jsonl"):
            a, b = (self.completion(c[f"completion_{side}"]) for side in "ab")
            for name, question in ("prob_b_ab", a + b), ("prob_b_ba", b + a):
                if not c["agree"]:
                    ids = torch.tensor([self.prompt(c) + question])
                    with torch.no_grad():
                        logits = model(input_ids=ids).logits[0].double()
                    ours.append(c[name])
                    theirs.append(logits.softmax(-1)[1].item())
        return ours, theirs

    def answers(self, path, folder, temperature=0, seed=0, beams=1):
        """(answers, how many are the same, how sure each other one was where it parts) of a model's
        `generate`, in batches of 16, and stopped by what its folder says ends an answer.

        How sure: by how much the best logit led; of sampled tokens, how far the noise was from the
        border to another token's share. Beams do not say.
        """
        import torch
        from transformers import LogitsProcessorList

        from core.decoding import padded
        records, model = rows(self.run / path), self.open(self.run / folder)
        same, parted = 0, []
        for start in range(0, len(records), 16):
            part = records[start:start + 16]
            ids, mask = padded([self.prompt(r) for r in part], "cpu")
            chooser = Chooser(ids.shape[1], part, self.new, temperature, seed)
            with torch.inference_mode():
                found = model.generate(
                    input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False,
                    logits_processor=LogitsProcessorList([chooser] if beams == 1 else []),
                    max_new_tokens=self.new, pad_token_id=self.eos)
            for k, (r, tokens) in enumerate(zip(part, found[:, ids.shape[1]:], strict=True)):
                tokens = tokens.tolist()
                ours, ended = r["completion"], self.eos in tokens
                texts = self.tokenizer.batch_decode(
                    [tokens[:n + 1] for n in range(len(tokens))], skip_special_tokens=True)
                if (texts[-1], ended) == (ours, not r["truncated"]):
                    same += 1
                elif beams == 1:
                    last = tokens.index(self.eos) if ended else len(tokens) - 1
                    at = next((n for n, t in enumerate(texts) if not ours.startswith(t)), last)
                    # the token before may be the beginning of ours
                    parted.append(min(step[k].item() for step in chooser.sure[:at + 1][-2:]))
        return len(records), same, parted


class Chooser:
    """A logits processor that leaves one token to choose, the best or by the noise of generate.py,
    and keeps how sure each step was."""

    def __init__(self, width, records, new, temperature, seed):
        import torch

        from core.decoding import sample_uniforms
        self.width, self.temperature, self.sure = width, temperature, []
        noise = [sample_uniforms(seed, r["id"], r.get("sample", 0), new).tolist() for r in records]
        self.noise = torch.tensor(noise, dtype=torch.float64).T.contiguous()

    def __call__(self, input_ids, scores):
        import torch
        if self.temperature:
            shares = (scores.double() / self.temperature).softmax(-1)
            ends, noise = shares.cumsum(-1), self.noise[input_ids.shape[1] - self.width, :, None]
            chosen = torch.searchsorted(ends, noise, right=True).clamp(max=scores.shape[1] - 1)
            above = ends.gather(1, chosen) - noise
            self.sure.append(torch.minimum(above, shares.gather(1, chosen) - above)[:, 0])
        else:
            best = scores.topk(2).values
            chosen = scores.argmax(-1, keepdim=True)        # in bf16 two are often equal
            self.sure.append(best[:, 0] - best[:, 1])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


# What rounding may make of them. fp32: metrics have 6 decimals; AdamW makes whole steps of what is
# rounding in small gradients. bf16: 3 digits, so logits of 16 and more are 0.125 apart. Where 12
# sampled answers on 4 bits parted, the same weights in bf16 and in fp32 were up to 2.1 apart in one
# logit and 0.10 in the shares that noise is compared with.
TOLERANCE = {
    "float32": {"SFT, first loss": 1e-5, "SFT, later losses": 1e-3, "DPO, first loss": 1e-5,
                "DPO, log-probabilities": 1e-3, "judge, P(change)": 1e-5,
                "greedy answers": 1e-3, "sampled answers": 1e-4},
    "bfloat16": {"SFT, first loss": 0.02, "SFT, later losses": 0.05, "DPO, first loss": 0.02,
                 "DPO, log-probabilities": 0.5, "judge, P(change)": 0.02,
                 "greedy answers": 0.25, "sampled answers": 0.15}}


def differs(checks, dtype):
    """Names of the checks whose difference is above the tolerance; beams may differ in bf16."""
    wrong = []
    for name, found in checks.items():
        allowed = TOLERANCE[dtype].get(name)
        if allowed is None:
            wrong += [name] if dtype == "float32" and found[0] != found[1] else []
        elif found and max([found[1]] if len(found) == 2 else found[2], default=0) > allowed:
            wrong.append(name)
    return wrong


def check(plain):
    """{what: [value of ours, greatest difference], or what `answers` returns}."""
    found = {}
    for names, (ours, theirs) in ((("SFT, first loss", "SFT, later losses"),
                                   plain.sft()),
                                  (("DPO, first loss", "DPO, log-probabilities"), plain.dpo()),
                                  (("judge, P(change)",), plain.judge())):
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        if len(names) == 2:
            found[names[0]] = [ours[0], gaps[0]]
            ours, gaps = ours[1:], gaps[1:]
        found[names[-1]] = [ours[-1], max(gaps)] if gaps else None
    return {**found,
            "greedy answers": plain.answers("sft/eval_1.jsonl", "sft/model_1"),
            "sampled answers": plain.answers("dpo_1/samples.jsonl", "sft/model_1", 0.7, 1000),
            **{f"4 beams, half {k}": plain.answers(f"ilr_1/proposals_{k}.jsonl", f"ilr_1/half_{k}",
                                                   beams=4) for k in (1, 2)}}
