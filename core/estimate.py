"""What a plan would cost on a card: memory, disk and hours of each stage. It runs nothing.

    bash run_ilr.sh gsm8k --dry-run --estimate       # on an H100; or --estimate=A100, =4090

Memory is what the stages themselves print or go by (core/needs.py), time is core/roofline.py's.
"""
import functools
import importlib.util
import math
import os
from collections import namedtuple
from pathlib import Path

from core.needs import plan, reading_bytes, row_bytes, rows_that_fit, state_bytes
from core.plan import parsed
from core.records import InputError, read_jsonl
from core.roofline import CARDS, Made, Model

DISK, START = 2e9, 30       # bytes a second; seconds until a stage that was started computes
STEP_TRAFFIC = {2: 110, 4: 30}      # bytes that a step moves for a weight of 2 bytes, and of 4

# (mean prompt, mean answer, longest prompt) in tokens, measured on the tasks' own data (BIRD's and
# SaferPaca's test problems) with the tokenizer of SmolLM2, which like Mistral's reads single digits
LENGTHS = {"gsm8k": (71, 126, 234), "bird": (460, 63, 773), "saferpaca": (55, 73, 321)}
OTHER = (100, 100, 200)     # of a task without data

Cost = namedtuple("Cost", "memory disk seconds state words", defaults=(0, 0, 0, 0, ""))
OPTIMIZERS = {"auto": "AdamW8bit", "adamw8bit": "AdamW8bit", "adamw": "AdamW", "muon": "Muon",
              "rmsprop8bit": "RMSprop8bit", "rmsprop": "RMSprop"}


class Estimate:
    """The stages of a plan, one after the other: what each costs and what it leaves behind."""

    def __init__(self, card):
        self.card, self.made, self.counts, self.problems = card, {}, {}, 0
        self.lengths, self.words, self.fetched = OTHER, "assumed", {}
        self.model = functools.cache(Model)

    def of(self, stage):
        """The Cost of a stage; notes how many records it writes, or which model."""
        args = parsed(stage.name, stage.words)
        kind = stage.script.removesuffix(".py")
        known = [self.counts[path] for path in stage.reads if path in self.counts]
        self.counts.update({out: known[0] for out in stage.outs if known})
        if stage.script.startswith("tasks/"):
            if getattr(args, "pretrain", None):
                for name, count in zip(("strong", "weak"), args.pretrain, strict=True):
                    self.counts[f"{args.out}/corpus_{name}.jsonl"] = count
            else:
                self.data(args, kind.partition("/")[2])
            return Cost()
        if kind == "evaluate" and args.command == "pick":
            self.made[args.out] = self.made_by(args.models[-1])
        if kind == "refine" and args.method == "pairs":
            self.counts[args.out] = math.ceil(args.max_replace * known[0])
        if not stage.needs_model:
            return Cost()
        costs = {"sft": self.training, "dpo": self.training, "generate": self.answers,
                 "compare": self.judging if getattr(args, "command", "") == "score"
                 else self.training}
        return costs[kind](args, kind)

    def data(self, args, task):
        """Note how many records the task's files have, and how long these are."""
        gt = args.gt or args.train // 2
        self.problems = args.train - gt
        for name, count in (("gt", gt), ("unlab", self.problems), ("test", args.test)):
            self.counts[f"{args.out}/{name}.jsonl"] = count
        parts = os.environ["JUDGE_PARTS"].split()
        self.counts.update({f"{args.out}/gt_{part}.jsonl": gt // len(parts) for part in parts})
        file = Path(getattr(args, "data_dir", None) or "") / "test.jsonl"
        self.lengths, self.words = LENGTHS.get(task, OTHER), "as measured on the task's data"
        if task not in LENGTHS and file.is_file():
            rows = read_jsonl(file, (), ())
            texts = [(len(str(r.get("question"))), len(str(r.get("answer")))) for r in rows]
            questions, answers = zip(*texts, strict=True)
            self.lengths = (sum(questions) // len(rows) // 3, sum(answers) // len(rows) // 3,
                            max(questions) // 3)
            self.words = f"from {file} at 3 characters a token"
        elif task not in LENGTHS:
            self.words = "assumed"

    def count(self, path):
        if Path(path).is_file():
            with open(path, encoding="utf-8") as f:
                return sum(1 for _ in f)
        return self.counts.get(path, self.problems)

    def made_by(self, path):
        """The Made of a folder, or of what it is in."""
        found = [self.made[p] for p in (path, *map(str, Path(path).parents)) if p in self.made]
        return found[0] if found else Made(path, 0)

    def opened(self, made, four, dtype, judge=False):
        model = self.model(made, bool(four), dtype, judge)
        if not Path(made.base).exists():
            self.fetched[made.base] = max(2 * model.count, self.fetched.get(made.base, 0))
        return model

    def training(self, args, kind):
        prompt, answer, longest = self.lengths
        made, rank = self.made_by(args.model or args.init_config), getattr(args, "lora_rank", 0)
        made = self.made[args.out] = Made(made.base, rank)
        sides, group = 1 if kind == "sft" else 2, 2 if kind == "dpo" else 1
        # the prompt of a pair is there once, a question of the judge has two answers
        length, labelled = prompt + sides * answer, sides * answer / (prompt + sides * answer)
        if kind == "compare":       # the pairs of 80% of the problems, in both orders
            examples = int(0.8 * 2 * self.count(args.gold) * (1 + args.wrong_per_problem))
            labelled = 0
        else:
            examples = self.count(args.data)
        if getattr(args, "half", None):
            examples = math.ceil(examples / 2)
        model = self.opened(made, getattr(args, "load_in_4bit", 0), args.dtype, kind == "compare")
        state = state_bytes(OPTIMIZERS[args.optimizer], model.trained,
                            model.model.get_input_embeddings().weight)
        needs = plan(model.model, state, args, labelled,
                     longest + sides // group * answer, group)

        steps = math.ceil(examples / args.batch_size)       # of an epoch
        passes = steps * math.ceil(args.batch_size * length / max(args.micro_tokens, length))
        # attention is within sequences, to the tokens before
        seconds = model.seconds(self.card, examples * length, length / 2, labelled, passes, True,
                                args.gradient_checkpointing)
        trained = sum(p.numel() for p in model.trained)
        moved = STEP_TRAFFIC[model.trained[0].element_size()] * trained
        seconds = args.epochs * (seconds + steps * moved / self.card.memory)
        if kind == "dpo":           # the reference's log-probabilities
            seconds += model.seconds(self.card, examples * length, length / 2, labelled, passes)
        disk = 4 * trained * (1 + len(getattr(args, "save_at", ())))        # exact values
        seconds += START + (2 * model.count + disk) / DISK
        what = {"sft": "records", "dpo": "pairs", "compare": "questions"}[kind]
        words = (f"{model.name}, {examples:,} {what} x {args.epochs}"
                 + (", at most" if kind == "compare" else ""))
        return Cost(needs.total(), disk, seconds, 4 * trained + state, words)

    def answers(self, args, kind):
        prompt, answer, longest = self.lengths
        memory = seconds = 0
        for k, out in enumerate(args.out):
            made = self.made_by(args.model[k % len(args.model)])
            model = self.opened(made, args.load_in_4bit, args.dtype)
            problems = self.count(args.data[k % len(args.data)])
            if args.half:
                problems = math.ceil(problems / 2)
            problems = min(problems, args.limit or problems)
            jobs = self.counts[out] = problems * args.num_samples
            steps = min(args.max_new_tokens, 2 * answer)
            row = row_bytes(model.config, model.size, longest, args.max_new_tokens,
                            args.num_beams)
            rows = batch = min(args.batch_size, jobs)
            while rows > rows_that_fit(self.card.bytes - model.bytes, row, args.num_beams):
                rows = (rows + 1) // 2      # as generate.py
            memory = max(memory, model.bytes + rows * args.num_beams * row)
            alive = answer / steps if args.num_beams == 1 else 1
            calls = math.ceil(jobs / batch) * math.ceil(batch / rows)
            seconds += calls * steps * model.token_seconds(
                self.card, rows * args.num_beams, alive, prompt + steps / 2,
                steps / 2 if args.num_beams > 1 else 0)
            seconds += model.seconds(self.card, problems * prompt, prompt, 1 / prompt, calls)
            seconds += 2 * model.count / DISK
        words = f"{model.name}, {jobs:,} answers"
        words += f" x {len(args.out)}" if len(args.out) > 1 else ""
        words += f", {args.num_beams} beams" if args.num_beams > 1 else ""
        words += f", {rows} of {batch} prompts at once" if rows < batch else ""
        return Cost(memory, 0, seconds + START, 0, words)

    def judging(self, args, kind):
        prompt, answer, longest = self.lengths
        model = self.opened(self.made_by(args.judge), False, args.dtype, True)
        pairs = self.counts[args.out] = self.count(args.a) // (1 if args.b else 2)
        longest += 2 * answer
        memory = model.bytes + reading_bytes(model.config, model.size,
                                             max(args.micro_tokens, 2 * longest), longest)
        seconds = model.seconds(self.card, pairs * (prompt + 4 * answer), prompt / 2 + answer, 0, 0)
        return Cost(memory, 0, seconds + START + 2 * model.count / DISK, 0,
                    f"{model.name}, {pairs:,} pairs in both orders, at most")


def estimate(stages, name):
    """Print a line for each stage, and the totals. Raises InputError for a card not in CARDS."""
    if name not in CARDS:
        raise InputError(f"--estimate={name}: expected one of {' '.join(CARDS)}")
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        raise InputError("--estimate needs torch and transformers: pip install -r requirements.txt")
    card, work, costs = CARDS[name], Estimate(CARDS[name]), []
    print(f"one {card.name}: {card.matrix / 1e12:.0f} TFLOP/s in matrix products, "
          f"{card.attention / 1e12:.0f} in attention, {card.memory / 1e12:.2g} TB/s\n"
          "simulated; an H200 took 1.2 to 1.8 times as long to train a 7B model, 5 times to decode")
    print("memory, GB  disk, GB  hours  stage")
    for stage in stages:
        try:
            cost = work.of(stage)
        except InputError as e:
            print(f"{'-':>10} {'-':>9} {'-':>6}  {stage.name}: not counted, {e}")
            continue
        if cost.words:
            costs.append(cost)
            fits = "" if cost.memory <= card.bytes else "; DOES NOT FIT"
            print(f"{cost.memory / 1e9:10.1f} {cost.disk / 1e9:9.1f} {cost.seconds / 3600:6.2f}  "
                  f"{stage.name}: {cost.words}{fits}")
    memory, state = (max((getattr(c, k) for c in costs), default=0) for k in ("memory", "state"))
    disk, seconds = (sum(getattr(c, k) for c in costs) for k in ("disk", "seconds"))
    print(f"{memory / 1e9:10.1f} {disk / 1e9:9.1f} {seconds / 3600:6.2f}  the most; in all; in all")
    print(f"disk beside that: {sum(work.fetched.values()) / 1e9:.1f} GB of base models, up to "
          f"{2 * state / 1e9:.1f} GB of a training's resumable state, old and new")
    prompt, answer, longest = work.lengths
    print(f"prompts of {prompt} tokens (the longest {longest}), answers of {answer}: {work.words}")
    if os.environ["NPROC"] != "1":
        print("NPROC above 1 is not estimated here: docs/several-gpus.md has a table")
