"""What every training keeps: its metrics, its last resumable state, its flags."""
import argparse
import json
import math
import os
import time

from core.cli import amount, positive, rate, share, whole
from core.distributed import first, gathered, placed, rank, world
from core.models import add_device_flags, count_weights
from core.optimizers import restore
from core.precision import exact_value, set_exact
from core.records import InputError, dumps, write_json, write_text
from core.unfinished import claim, finished


def checkpoint_steps(total, shares):
    """{folder name: step after which it is saved}, for `shares` of a run of `total` steps.

    shares: in whole percents, for instance 0.3, whose folder is checkpoint-30. A run of fewer
    steps than checkpoints saves several of them after the same step.
    """
    percents = [round(100 * share) for share in shares]
    return {f"checkpoint-{p}": max(1, round(total * p / 100)) for p in percents}


def significant(value):
    """A float rounded to the 7 significant digits of fp32; None for NaN and infinity, which JSON
    lacks."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


class Training:
    """The unfinished folder of a training run: its metrics and its last resumable state.

    `state` is what was restored, {} at the start. All randomness of a run comes from (seed,
    epoch), so weights, optimizers and the step number are all that must be restored; torch's
    generator is kept too, for edited scripts. Weights, exact in fp32, and optimizers are saved
    unsharded, so any number of processes can continue; the first process writes.
    """

    def __init__(self, folder, model, optimizers, seconds):
        self.folder, self.model, self.optimizers = folder, model, optimizers
        self.seconds, self.saved_at = seconds, time.monotonic()
        first(lambda: claim(folder))
        folder.mkdir(parents=True, exist_ok=True)
        self.state, kept = {}, []
        metrics = folder / "metrics.jsonl"
        if (folder / "state.pt").exists():
            self._restore()
            kept = metrics.read_text().splitlines()[:self.state["rows"]]
            print(f"continuing after step {self.state['step']}")
        self.rows = len(kept)
        # written as a whole, so that it is complete whenever the process is killed
        first(lambda: write_text(metrics, "".join(line + "\n" for line in kept)))
        # line-buffered: every row can be read as soon as it is logged
        self.metrics = open(os.devnull if rank() else metrics, "a", buffering=1, encoding="utf-8")
        print(f"metrics: {metrics}")

    def _restore(self):
        import torch
        self.state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True,
                                mmap=world() > 1)
        if self.state["kinds"] != [type(o).__name__ for o in self.optimizers]:
            raise InputError(f"{self.folder}: begun with {' and '.join(self.state['kinds'])}, by "
                             "one process: give that --optimizer, or delete the folder")
        weights = dict(self.model.named_parameters())
        for name, value in self.state.pop("model").items():
            set_exact(weights[name], placed(value, weights[name]))
        states = self.state.pop("optimizers")
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(params):
                if i in saved["state"]:
                    saved["state"][i] = {key: placed(value, p)
                                         for key, value in saved["state"][i].items()}
            restore(optimizer, saved)
        torch.set_rng_state(self.state.pop("rng"))

    def log(self, **row):
        """Append a row to metrics.jsonl, floats to 7 significant digits; null for no number."""
        self.metrics.write(dumps({k: significant(v) for k, v in row.items()}) + "\n")
        self.rows += 1

    def save_state(self, step, always=False, **more):
        """Write the resumable state if `seconds` have passed since the last one."""
        import torch
        if not always and first(lambda: time.monotonic() - self.saved_at < self.seconds):
            return
        self.metrics.flush()
        # one after the other into main memory: in full, they can be more than the device holds
        trained = {name: exact_value(p).cpu() if hasattr(p, "low_bits") else p.data
                   for name, p in self.model.named_parameters() if p.requires_grad}
        state = gathered({"model": trained,
                          "optimizers": [o.state_dict() for o in self.optimizers]})
        if rank() == 0:
            kinds = [type(o).__name__ for o in self.optimizers]
            torch.save({**state, "kinds": kinds, "rng": torch.get_rng_state(), "step": step,
                        "rows": self.rows, **more}, self.folder / "state.writing")
            (self.folder / "state.writing").replace(self.folder / "state.pt")
        self.saved_at = time.monotonic()

    def finish(self, out, read_tokens=0):
        """Write price.json and give the folder its name `out`.

        price.json: weights of the model, trained weights, tokens trained on, tokens only read.
        """
        self.metrics.close()
        first(lambda: self._finish(out, read_tokens))

    def _finish(self, out, read_tokens):
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        write_json(self.folder / "price.json", {
            "weights": count_weights(self.model),
            "trained_weights": count_weights(self.model, trained=True),
            "trained_tokens": sum(row.get("tokens", 0) for row in rows),
            "read_tokens": read_tokens})
        (self.folder / "state.pt").unlink(missing_ok=True)
        (self.folder / "state.writing").unlink(missing_ok=True)
        self.folder.rename(out)
        finished(self.folder)


def percent(text):
    """An argparse type: a share in whole percents, neither none nor all."""
    value = share(text)
    if not 0.005 < value < 0.995 or not math.isclose(100 * value, round(100 * value)):
        raise argparse.ArgumentTypeError(f"{text}: expected a share in whole percents, as 0.3")
    return value


def add_training_flags(p, lr, batch_size, epochs):
    p.add_argument("--lr", type=rate, default=lr, help="peak learning rate")
    p.add_argument("--epochs", type=positive, default=epochs, help="passes over the data")
    p.add_argument("--batch-size", type=positive, default=batch_size,
                   help="records per optimizer step")
    p.add_argument("--optimizer", default="auto",
                   choices=["auto", "adamw", "adamw8bit", "rmsprop", "rmsprop8bit", "muon"],
                   help="auto: adamw8bit on CUDA, fused adamw on CPU and with several processes")
    p.add_argument("--warmup", type=share, default=0.05,
                   help="share of the steps with a rising learning rate")
    p.add_argument("--micro-tokens", type=positive, default=4096,
                   help="tokens per forward pass; lower it to save memory")
    p.add_argument("--gradient-checkpointing", action="store_true",
                   help="recompute activations to save memory")
    p.add_argument("--chat-template", action="store_true",
                   help="prompts in the model's own chat format instead of plain text")
    p.add_argument("--state-every", type=amount, default=300,
                   help="seconds between resumable states")
    p.add_argument("--seed", type=whole, default=0,
                   help="of the order of the data, which is the file's, shuffled")
    add_device_flags(p)


def add_lm_flags(p):
    """The flags of trainings of language models, which those of judges do not have."""
    p.add_argument("--save-at", type=percent, nargs="+", default=[], metavar="SHARE",
                   help="also keep checkpoints after these shares of the run: 0.3 is kept as "
                   "OUT/checkpoint-30")
    p.add_argument("--lora-rank", type=whole, default=0,
                   help="train adapters of this rank, or those of --model on (0: every weight)")
    p.add_argument("--load-in-4bit", action="store_true",
                   help="with --lora-rank: keep the frozen weights in 4 bits (NF4)")


def check_lm_flags(args):
    if args.load_in_4bit and not (args.lora_rank and args.model):
        raise InputError("--load-in-4bit goes with --model and --lora-rank: weights in 4 bits "
                         "cannot be trained")
