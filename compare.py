"""The judge: train it on an unreliable model's samples; ask it which of two completions is better.

    python compare.py train --model google/gemma-2b --task arithmetic \\
        --data samples_1.jsonl samples_2.jsonl --gold gt.jsonl --out judge
    python compare.py score --judge judge --task arithmetic \\
        --a labels.jsonl --b proposals.jsonl --out comparisons.jsonl

Without --b, score pairs the samples 0 and 1, 2 and 3, ... of each prompt in --a.

train: samples of the weak model's checkpoints, earliest first, on problems with known references
-> a judge folder. A copy of the weak model with a 2-way head reads prompt, A and B, in both
orders, and says "keep A" or "change to B". Problems are split in three: 80% to train, 10% to
decide when to stop, 10% for the accuracy that is reported.

score: two completions of each problem -> comparisons. Each pair is asked in both orders:
prob_b = (P(change | A, B) + 1 - P(change | B, A)) / 2, which is 0.5 for a judge that sees only
the position. --judge is a judge folder, oracle (the references), simulated (the references with
errors), human (a person at this terminal) or the URL of an OpenAI-compatible endpoint.

Unlike the paper's release: the two orders really differ in every use, the stopping problems are
not the reported ones, no problem is on both sides of a split, pairs are packed rather than judged
one at a time, and nothing is pickled.
"""
import math

from core import judge
from core.cli import make_parser, positive, rate, run_stage, share, short, whole
from core.distributed import first, rank, shard, summed, world
from core.embeddings import alike
from core.endpoint import Endpoint, embedder, is_url
from core.memory import attempts, check_memory
from core.models import add_device_flags, open_model, pick_device, pick_dtype, save_model
from core.optimizers import apply_gradients, cosine_lr, make_optimizers
from core.packing import pack
from core.records import InputError, check_fields, marks, write_json, write_jsonl
from core.tokens import open_tokenizer
from core.training import Training, add_training_flags
from core.unfinished import finished, partial_path, refuse_existing
from tasks import fields_for_grading, get_task, may_grade, warm, why_no_pairs


# ---------------------------------------------------------------- train
def training_pairs(args, task, samples):
    """(the judge's pairs, why they teach it nothing of right and wrong: "" if they can)."""
    if not hasattr(task, "judge_pairs"):
        warm(task, *samples)
    pairs = judge.make_pairs(task, samples, args.seed, args.wrong_per_problem)
    return pairs, why_no_pairs(args.task, samples)


def train(args):
    folder = partial_path(__file__, args.out, vars(args), [args.model, args.gold, *args.data])
    task = get_task(args.task)
    samples, problems = judge.read_samples(args.data, args.gold)
    pairs, why = first(lambda: training_pairs(args, task, samples))
    splits = judge.three_splits(pairs, args.seed)
    if not all(splits):
        raise InputError(f"{args.gold}: {problems} problems are too few for three splits of "
                         f"training pairs: {why or f'they give {len(pairs)}'}")
    if why:
        print(f"note: {why}")

    import numpy as np
    import torch
    from tqdm import tqdm
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.model, args.chat_template)
    dtype = pick_dtype(args.dtype, device)
    model = open_model(args.model, device, "AutoModelForSequenceClassification", shards=True,
                       dtype=dtype, trains="weights", num_labels=2)
    judge.set_padding(model, tokenizer)
    judge.new_head(model)
    shard(model, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    examples, stopping, reported = [judge.both_orders(tokenizer, s) for s in splits]
    judge.probe_judge(model, [ids for ids, _ in examples], args, device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, device)
    questions = [(ids, [0] * len(ids)) for ids, _ in examples]
    check_memory(model, optimizers, args, device, questions)
    training = Training(folder, model, optimizers, args.state_every)
    state = training.state
    best, history = state.get("best", math.inf), state.get("history", [])
    reached, checks = state.get("reached", False), state.get("checks", 0)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total, done = steps_per_epoch * args.epochs, state.get("step", 0)
    check_every = math.ceil(steps_per_epoch / 4)    # for --stop-accuracy

    bar = tqdm(total=total, initial=done, desc=f"judge {short(args.out)}", unit="step",
               mininterval=1)
    for epoch in range(done // steps_per_epoch, args.epochs):
        if reached or (len(history) > 1 and history[-1] > history[-2]):
            break
        order = np.random.default_rng([args.seed, epoch]).permutation(len(examples))
        for k in range(done % steps_per_epoch, steps_per_epoch):
            batch = order[k * args.batch_size:(k + 1) * args.batch_size]
            sequences = [questions[i] for i in batch]
            classes = torch.tensor([examples[i][1] for i in batch], device=device)
            for attempt in attempts(model, args):   # again, in smaller parts, if memory runs out
                with attempt:
                    # None: frees what a failed try has computed
                    loss, logits, micro_loss = 0.0, None, None
                    for micro in pack(sequences, args.micro_tokens, device, model):
                        owner, logits = judge.judge_logits(model, micro)
                        # ABLATION: the judge's loss
                        micro_loss = torch.nn.functional.cross_entropy(
                            logits, classes[owner], reduction="sum") / len(batch)
                        micro_loss.backward()
                        loss += micro_loss.item()
            loss = summed(loss, model)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done + 1}: lower --lr")
            lr = args.lr * cosine_lr(done, total, args.warmup)
            norm = apply_gradients(model, optimizers, lr)
            done += 1
            training.log(step=done, epoch=epoch, loss=loss, lr=lr, grad_norm=norm,
                         tokens=sum(len(ids) for ids, _ in sequences))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if args.stop_accuracy and done % check_every == 0:
                check = judge.held_out(model, stopping, args, device)
                reached, checks = check[1] >= args.stop_accuracy, checks + 1
                if reached:
                    break
            if done % steps_per_epoch:
                training.save_state(done, best=best, history=history, checks=checks)
        checks += not reached
        # ABLATION: when to stop, and which epoch to keep
        stop_loss, stop_accuracy, _ = (check if reached else
                                       judge.held_out(model, stopping, args, device))
        if not math.isfinite(stop_loss):
            raise FloatingPointError(f"the loss on the stopping problems is {stop_loss} after "
                                     f"epoch {epoch + 1}: lower --lr")
        history = history + [stop_loss]
        training.log(step=done, epoch=epoch, stop_loss=stop_loss, stop_accuracy=stop_accuracy)
        if reached or stop_loss < best:
            best = stop_loss
            save_model(model, tokenizer, folder)
        training.save_state(done, always=True, best=best, history=history, reached=reached,
                            checks=checks)
    bar.close()
    model = open_model(folder, device, "AutoModelForSequenceClassification", shards=True,
                       dtype=dtype)
    shard(model, device)
    judge.probe_judge(model, [ids for ids, _ in examples], args, device)
    _, accuracy, flips = judge.held_out(model, reported, args, device)
    first(lambda: write_json(folder / "judge.json", {
        "held_out_accuracy": accuracy, "held_out_pairs": len(reported) // 2,
        "held_out_flip_rate": flips, "train_pairs": len(examples) // 2,
        "epochs": round(done / steps_per_epoch, 2), "stop_losses": history}))
    training.finish(args.out, read_tokens=checks * sum(len(ids) for ids, _ in stopping)
                    + sum(len(ids) for ids, _ in reported))
    if accuracy <= 0.5:
        print(f"note: {args.out}: no better than a coin on its held-out pairs: it has learnt "
              "nothing that holds for other problems")
    print(f"{args.out}: accuracy {accuracy:.1%} on {len(reported) // 2} held-out pairs, "
          f"{flips:.1%} of them flip with the order; {len(examples) // 2} training pairs, "
          f"{done / steps_per_epoch:.1f} of {args.epochs} epochs")


# ---------------------------------------------------------------- score
def read_rows(args, task):
    """[(key of the comparison, record A, record B, whether they agree)]."""
    if args.b:
        pairs = judge.join_files(args.a, args.b)
        agree = agreements(args, task, pairs)
        return [({"id": a["id"]}, a, b, same) for (a, b), same in zip(pairs, agree, strict=True)]
    return [({"id": id_, "pair": pair}, a, b, a["completion"] == b["completion"])
            for id_, pair, a, b in judge.pair_samples(args.a)]


def agreements(args, task, pairs):
    """Whether the two records of each pair give the same answer, by the task's rule if it has one,
    else by their embeddings."""
    def by_rule():
        warm(task, *zip(*pairs, strict=True))
        return [task.agree(a, b) for a, b in pairs]
    # ABLATION: which pairs count as agreeing, and are not asked
    if hasattr(task, "agree"):
        return first(by_rule)
    return alike(args.embedder, [[r["completion"] for r in pair] for pair in pairs], args.device)


def score(args):
    task = get_task(args.task)
    first(lambda: refuse_existing(args.out))
    rows = read_rows(args, task)
    asked = {i: row for i, row in enumerate(rows) if not row[3]}
    questions = {i: (a["prompt"], a["completion"], b["completion"])
                 for i, (_, a, b, _) in asked.items()}
    folder = partial_path(__file__, args.out, {**vars(args), "asked": list(asked)},
                          [args.a, *(args.b or []), args.judge])
    results, more, cost = {}, {}, {}
    if args.judge in ("oracle", "simulated"):
        sides = [r for _, a, b, _ in asked.values() for r in (a, b)]
        for r in sides:
            check_fields(r, ("reference",), r.place)
        warm(task, sides)
        results = (judge.ask_oracle(task, asked) if args.judge == "oracle" else
                   judge.ask_simulated(task, asked, args.judge_accuracy, args.seed))
    elif args.judge == "human":
        results, more = judge.ask_human(args, questions, folder)
    elif is_url(args.judge):
        results = judge.ask_endpoint(args, questions)
    else:
        results, cost = judge.ask_model(args, questions, folder)
        if rank():
            return

    comparisons = []
    for i, (key, a, b, agree) in enumerate(rows):
        ab, ba = results.get(i, (None, None))
        if not agree and judge.flipped(args, a, b):
            ab, ba = 1 - ab, 1 - ba
        comparisons.append({
            **key, "prompt": a["prompt"], "completion_a": a["completion"],
            "completion_b": b["completion"],
            **marks(truncated_a=a.get("truncated"), truncated_b=b.get("truncated")),
            **fields_for_grading(task, a), "agree": agree,
            "prob_b_ab": ab, "prob_b_ba": ba,
            "prob_b": None if agree else judge.average_orders(ab, ba), **more.get(i, {})})
    result = judge.measure(comparisons, grades_of(task, comparisons))
    write_json(f"{args.out}.summary", {**result, **cost})
    write_jsonl(args.out, comparisons)
    folder.unlink(missing_ok=True)
    finished(folder)
    print(f"{args.out}: {judge.describe(result)}")


def grades_of(task, comparisons):
    """[(grade of A, grade of B)] of the asked comparisons, for the summary; None without
    references."""
    asked = [c for c in comparisons if not c["agree"]]
    a, b = ([{**c, "completion": c[f"completion_{side}"]} for c in asked] for side in "ab")
    if not asked or not may_grade(task, a, b):
        return None
    return [(task.grade(x), task.grade(y)) for x, y in zip(a, b, strict=True)]


# ---------------------------------------------------------------- the command line
def check(args):
    task = get_task(args.task)
    if args.command == "train":
        return
    if args.b and not hasattr(task, "agree") and not args.embedder:
        raise InputError(f"--task {args.task} compares answers by their embeddings: name an "
                         "--embedder")
    if args.judge in ("oracle", "simulated") and not args.task:
        raise InputError(f"--judge {args.judge} needs --task, whose grades are its answers")
    if (args.judge == "simulated") != (args.judge_accuracy is not None):
        raise InputError("--judge simulated and --judge-accuracy go together")
    if args.judge == "simulated" and args.judge_accuracy < 0.5:
        raise InputError(f"--judge-accuracy {args.judge_accuracy}: expected 0.5 (a coin) to 1")
    if is_url(args.judge):
        Endpoint(args.judge, args.judge_model, "ILR_COMPARE")
    if world() > 1 and (args.judge in judge.NO_MODEL or is_url(args.judge)):
        raise InputError(f"--judge {args.judge} runs no model here: start it without torchrun")


def endpoints(args):
    """The endpoints that main(args) asks. A run tries them before it trains anything."""
    if args.command == "train":
        return []
    found = [Endpoint(args.judge, args.judge_model, "ILR_COMPARE")] if is_url(args.judge) else []
    embeds = args.b and not hasattr(get_task(args.task), "agree") and is_url(args.embedder)
    return found + ([embedder(args.embedder)] if embeds else [])


def main(args):
    check(args)
    (train if args.command == "train" else score)(args)


def parser():
    p = make_parser(__doc__, prog="compare.py")
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="samples of the weak model's checkpoints -> judge",
                            description=__doc__, formatter_class=p.formatter_class)
    t.add_argument("--model", required=True, help="folder or hub name of the weak base model")
    t.add_argument("--task", required=True)
    t.add_argument("--data", required=True, nargs="+",
                   help="samples, a file per checkpoint, earliest first")
    t.add_argument("--gold", required=True, help="the same problems with their demonstrations")
    t.add_argument("--out", required=True, help="folder to write")
    t.add_argument("--wrong-per-problem", type=positive, default=1,
                   help="pairs with an incorrect sample, per problem")
    t.add_argument("--stop-accuracy", type=share, default=0,
                   help="stop at this accuracy on the stopping problems, which is looked at four "
                   "times an epoch; 0: as good as it gets")
    add_training_flags(t, lr=1e-6, batch_size=16, epochs=5)
    s = commands.add_parser("score", help="two completions of each problem -> comparisons",
                            description=__doc__, formatter_class=p.formatter_class)
    s.add_argument("--judge", required=True, help="folder of a trained judge, oracle, simulated, "
                   "human, or the URL of an OpenAI-compatible endpoint")
    s.add_argument("--judge-accuracy", type=share, help="for simulated: the share of pairs with "
                   "one right side that it judges right")
    s.add_argument("--judge-model", help="model behind the URL, whose key is in ILR_COMPARE_KEY")
    s.add_argument("--seconds-per-pair", type=rate, default=60,
                   help="for human: a pair without an answer by then counts as 0.5")
    s.add_argument("--seed", type=whole, default=0,
                   help="of the flips and of simulated errors; for human, of the order of the "
                   "pairs and of A and B")
    s.add_argument("--flip-share", type=share, default=0,
                   help="turn this share of the judge's answers around, to study a worse judge")
    s.add_argument("--flip-kind", default="symmetric", choices=["symmetric", "systematic"],
                   help="which: by chance, or all about the same problems")
    s.add_argument("--embedder", help="for tasks that compare answers by embeddings: folder or "
                   "hub name of a model, or an endpoint's URL")
    s.add_argument("--task", help="whose rule says which completions agree; without it the same "
                   "text agrees, and nothing is graded")
    s.add_argument("--a", required=True, help="records: the present completions (or samples)")
    s.add_argument("--b", nargs="+", help="records: the proposed completions; without it, the "
                   "samples of --a are paired two by two")
    s.add_argument("--out", required=True, help="file to write")
    s.add_argument("--batch-size", type=positive, default=256, help="pairs appended together")
    s.add_argument("--micro-tokens", type=positive, default=16384, help="tokens per forward pass")
    s.add_argument("--chat-template", action="store_true",
                   help="prompts in the judge's own chat format, as it was trained")
    add_device_flags(s)
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
