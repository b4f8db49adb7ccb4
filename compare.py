"""The judge: train it on an unreliable model's samples; ask it which of two completions is better.

    python compare.py train --model google/gemma-2b --task arithmetic --data samples_*.jsonl --gold gt.jsonl --out judge
    python compare.py score --judge judge --task arithmetic --a labels.jsonl --b proposals.jsonl --out comparisons.jsonl
    python compare.py score --judge judge --task arithmetic --a samples.jsonl --out pairs.jsonl   # samples 0-1, 2-3, ... of a prompt
    python compare.py score --judge human --seconds-per-pair 30 ...        # a person; or oracle, or the URL of an OpenAI-compatible endpoint

Training pairs come from what the checkpoints of the weak model (--data, earliest first) answered to problems whose
references are known. A copy of the weak model with a 2-way head reads prompt, A and B, in both orders, and says "keep A"
or "change to B". Problems are cut in three: 80% train, 10% decide when to stop, 10% measure the accuracy that is reported.

A score asks twice: prob_b = (P(change | A, B) + 1 - P(change | B, A)) / 2, so a judge that sees only the position says 0.5.

Unlike the paper's release: the two orders really differ in every use, the stopping problems are not the reported ones, no
problem is on both sides of a cut, pairs are packed and not judged one at a time, and nothing is pickled.
"""
import math
import random
from pathlib import Path

from sft import Training, add_training_flags, apply_gradients, cosine_lr, hidden_states, make_optimizers, pack
from tasks import (BatchLog, InputError, dumps, fields_for_grading, get_task, make_parser, partial_path, positive, rate,
                   read_jsonl, refuse_existing, run_stage, share, short, warm, whole, write_json, write_jsonl)
from tasks._judges import Endpoint, ask_person, average_orders, is_url, measure
from tasks._memory import attempts, check_memory
from tasks._models import agreements, count_weights, encode_completion, encode_prompt, open_model, open_tokenizer, pick_device, save_model
from tasks._parallel import deal, first, inside_forward, rank, shard, summed, world


# ---------------------------------------------------------------- what the judge reads
def encode_pair(tokenizer, prompt, a, b):
    """Token ids of one question to the judge: BOS + prompt, A + EOS, B + EOS. The head reads the last one."""
    return encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, a) + encode_completion(tokenizer, b)


@inside_forward
def judge_logits(model, batch):
    """(owner (N,), fp32 logits (N, 2) of [keep A, change to B]) of the N packed sequences, read at each one's last token.
    Packing needs no padding token, so a text that ends in EOS is read to its end."""
    import torch
    owner = batch["owner"]
    following = torch.cat([owner[:, 1:], torch.full_like(owner[:, :1], -1)], 1)
    last = (owner >= 0) & (owner != following)
    logits = model.score(hidden_states(model, batch)[last]).float()
    assert logits.shape == (int(last.sum()), 2)
    return owner[last], logits


def probabilities(model, sequences, args, device):
    """P(change to B) of each sequence, as a list of floats."""
    import torch
    probs = torch.zeros(len(sequences))
    with torch.no_grad():
        for batch in pack([(ids, [0] * len(ids)) for ids in sequences], args.row_tokens, args.micro_tokens, device, model):
            owner, logits = judge_logits(model, batch)
            probs[owner.cpu()] = logits.softmax(-1)[:, 1].cpu()
    probs = summed(probs, model)
    if not probs.isfinite().all():
        raise FloatingPointError("the judge answers with NaN: its weights are broken")
    return probs.tolist()


# ---------------------------------------------------------------- train
def make_pairs(task, samples, seed, wrong_per_problem=1):
    """Training pairs (better, worse) of each problem, the rule of the release's generate_evaluator_data.py.

    samples: one list of records per checkpoint, earliest first. Checkpoint i of n is drawn with weight 2^(n-i-1), early
    ones being the most varied. Reference over a correct sample; a correct sample or the reference (weight 1, as a last
    checkpoint) over each of up to `wrong_per_problem` different incorrect ones; where no sample is correct, reference over
    them. Unlike the release's, samples that the task cannot parse are left out: they are all the first checkpoints of a
    small model write, and to tell them apart teaches nothing about answers.
    A task may have a rule of its own. Returns a list of {id, prompt, better, worse}; equal texts make no pair.
    """
    problems, rngs = {}, {}
    for records in samples:
        for r in sorted(records, key=lambda r: r.get("sample", 0)):
            problems.setdefault(r["id"], []).append(r)

    def draw(id_, texts):
        rng = rngs.setdefault(id_, random.Random(dumps([seed, "pairs", id_])))
        return rng.choices(texts, [2.0 ** -i for i in range(len(texts))])[0]

    if hasattr(task, "judge_pairs"):
        drawn = task.judge_pairs(problems, draw)
    else:
        drawn = []
        warm(task, *samples)
        for id_, answers in problems.items():
            gold = answers[0]["gold_completion"]
            graded = [(r["completion"], task.grade(r)) for r in answers]
            right = [text for text, grade in graded if grade == 1]
            wrong = [text for text, grade in graded if grade != 1 and task.is_well_formed(text)]
            if right:
                drawn.append((id_, gold, draw(id_, right)))
            for _ in range(wrong_per_problem):
                if wrong:
                    drawn.append((id_, draw(id_, right + [gold]), draw(id_, wrong)))
                    wrong = [text for text in wrong if text != drawn[-1][2]]
    return [{"id": id_, "prompt": problems[id_][0]["prompt"], "better": better, "worse": worse}
            for id_, better, worse in drawn if better != worse]


def three_splits(pairs, seed):
    """(train 80%, stop 10%, test 10%) of the pairs, cut by problem."""
    ids = sorted({p["id"] for p in pairs}, key=dumps)
    random.Random(dumps([seed, "splits"])).shuffle(ids)
    a, b = len(ids) * 8 // 10, len(ids) * 9 // 10
    groups = set(ids[:a]), set(ids[a:b]), set(ids[b:])
    return [[p for p in pairs if p["id"] in group] for group in groups]


def both_orders(tokenizer, pairs):
    """[(token ids, class)] with class 1 = change to B, each pair in both orders."""
    return [x for p in pairs for x in ((encode_pair(tokenizer, p["prompt"], p["better"], p["worse"]), 0),
                                       (encode_pair(tokenizer, p["prompt"], p["worse"], p["better"]), 1))]


def held_out(model, examples, args, device):
    """(mean cross-entropy, accuracy after averaging both orders, rate of answers that flip with the order)"""
    model.eval()
    probs = probabilities(model, [ids for ids, _ in examples], args, device)
    model.train()
    loss = -sum(math.log(max(p if c else 1 - p, 1e-12)) for p, (_, c) in zip(probs, examples)) / len(examples)
    keep, change = probs[0::2], probs[1::2]     # (better, worse) and (worse, better)
    right = [average_orders(ab, ba) for ab, ba in zip(change, keep)]
    accuracy = sum((p > 0.5) + 0.5 * (p == 0.5) for p in right) / len(right)
    return loss, accuracy, sum((ab - 0.5) * (ba - 0.5) > 0 for ab, ba in zip(change, keep)) / len(right)


def train(args):
    task = get_task(args.task)
    folder = partial_path(args.out, vars(args), [args.model, args.gold, *args.data])
    gold = {r["id"]: r["completion"] for r in read_jsonl(args.gold, ("id", "completion", "reference"))}
    samples = []
    for path in args.data:
        samples.append(read_jsonl(path, ("id", "prompt", "completion", "reference"), ("id", "sample")))
        for r in samples[-1]:
            if r["id"] not in gold:
                raise InputError(f"{path}: id {r['id']} is not in {args.gold}")
            r["gold_completion"] = gold[r["id"]]
    splits = three_splits(first(lambda: make_pairs(task, samples, args.seed, args.wrong_per_problem)), args.seed)
    if not all(splits):
        raise InputError(f"{args.gold}: {len(gold)} problems are too few for three splits of training pairs")

    import numpy as np
    import torch
    from tqdm import tqdm
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.model, args.chat_template)
    model = open_model(args.model, device, "AutoModelForSequenceClassification", shards=True, num_labels=2)
    model.config.id2label, model.config.label2id = {0: "keep A", 1: "change to B"}, {"keep A": 0, "change to B": 1}
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.nn.init.zeros_(model.score.weight)     # starts at probability 0.5, whatever the width
    shard(model, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    examples, stopping, reported = [both_orders(tokenizer, s) for s in splits]
    optimizers = make_optimizers(model, args.optimizer, args.lr, device)
    check_memory(model, optimizers, args, device, 0)
    training = Training(folder, model, optimizers, args.state_every)
    best, history = training.state.get("best", math.inf), training.state.get("history", [])
    reached, checks = training.state.get("reached", False), training.state.get("checks", 0)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    total, done = steps_per_epoch * args.epochs, training.state.get("step", 0)
    check_every = math.ceil(steps_per_epoch / 4)      # for --stop-accuracy; the loss is looked at after whole epochs

    bar = tqdm(total=total, initial=done, desc=f"judge {short(args.out)}", unit="step", mininterval=1)
    for epoch in range(done // steps_per_epoch, args.epochs):
        if reached or (len(history) > 1 and history[-1] > history[-2]):
            break
        order = np.random.default_rng([args.seed, epoch]).permutation(len(examples))
        for k in range(done % steps_per_epoch, steps_per_epoch):
            batch = [examples[i] for i in order[k * args.batch_size:(k + 1) * args.batch_size]]
            classes = torch.tensor([c for _, c in batch], device=device)
            for attempt in attempts(model, args):       # again with smaller micro-batches when memory runs out
                with attempt:
                    loss, logits, micro_loss = 0.0, None, None      # lets go of what a try that failed has computed
                    for micro in pack([(ids, [0] * len(ids)) for ids, _ in batch], args.row_tokens, args.micro_tokens, device, model):
                        owner, logits = judge_logits(model, micro)
                        # ABLATION: the judge's loss
                        micro_loss = torch.nn.functional.cross_entropy(logits, classes[owner], reduction="sum") / len(batch)
                        micro_loss.backward()
                        loss += micro_loss.item()
            loss = summed(loss, model)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done + 1}: lower --lr")
            lr = args.lr * cosine_lr(done, total, args.warmup)
            norm = apply_gradients(model, optimizers, lr)
            done += 1
            training.log(step=done, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, tokens=sum(len(ids) for ids, _ in batch))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if args.stop_accuracy and done % check_every == 0:
                check = held_out(model, stopping, args, device)
                reached, checks = check[1] >= args.stop_accuracy, checks + 1
                if reached:
                    break
            if done % steps_per_epoch:
                training.save_state(done, best=best, history=history, checks=checks)
        checks += not reached
        stop_loss, stop_accuracy, _ = check if reached else held_out(model, stopping, args, device)
        if not math.isfinite(stop_loss):
            raise FloatingPointError(f"the loss on the stopping problems is {stop_loss} after epoch {epoch + 1}: lower --lr")
        history = history + [stop_loss]
        training.log(step=done, epoch=epoch, stop_loss=stop_loss, stop_accuracy=stop_accuracy)
        if reached or stop_loss < best:
            best = stop_loss
            save_model(model, tokenizer, folder)
        training.save_state(done, always=True, best=best, history=history, reached=reached, checks=checks)
    bar.close()
    model = open_model(folder, device, "AutoModelForSequenceClassification", shards=True)
    shard(model, device)
    _, accuracy, flips = held_out(model, reported, args, device)
    first(lambda: write_json(folder / "judge.json", {
        "held_out_accuracy": accuracy, "held_out_pairs": len(reported) // 2, "held_out_flip_rate": flips,
        "train_pairs": len(examples) // 2, "epochs": round(done / steps_per_epoch, 2), "stop_losses": history}))
    training.finish(args.out, read_tokens=checks * sum(len(ids) for ids, _ in stopping) + sum(len(ids) for ids, _ in reported))
    print(f"{args.out}: accuracy {accuracy:.1%} on {len(reported) // 2} held-out pairs, {flips:.1%} of them flip with the "
          f"order; {len(examples) // 2} training pairs, {done / steps_per_epoch:.1f} of {args.epochs} epochs")


# ---------------------------------------------------------------- score
def make_comparisons(args, task):
    """One comparison per id of --a and --b, or per two consecutive samples of a prompt in --a."""
    if args.b:
        proposals = {}
        for path in args.b:
            for r in read_jsonl(path, ("id", "completion")):
                if r["id"] in proposals:
                    raise InputError(f"{path}: id {r['id']} stands already in another file of --b")
                proposals[r["id"]] = r
        pairs = []
        for a in read_jsonl(args.a, ("id", "prompt", "completion")):
            if a["id"] not in proposals:
                raise InputError(f"{' '.join(args.b)}: id {a['id']} of {args.a} is missing")
            pairs.append((a, proposals.pop(a["id"])))
        if proposals:
            raise InputError(f"{' '.join(args.b)}: id {next(iter(proposals))} is not in {args.a}")
        return [({"id": a["id"]}, a, b, same) for (a, b), same in zip(pairs, agreements(args, task, pairs))]
    rows, samples = [], {}
    for r in read_jsonl(args.a, ("id", "prompt", "completion", "sample"), ("id", "sample")):
        samples.setdefault(r["id"], []).append(r)
    for id_, answers in samples.items():
        answers.sort(key=lambda r: r["sample"])
        if len(answers) % 2:
            raise InputError(f"{args.a}: id {id_} has {len(answers)} samples; pairs need an even number")
        for pair, (a, b) in enumerate(zip(answers[0::2], answers[1::2])):
            rows.append(({"id": id_, "pair": pair}, a, b, a["completion"] == b["completion"]))
    return rows


def score(args):
    task = get_task(args.task)
    first(lambda: refuse_existing(args.out))
    if world() > 1 and (args.judge in ("oracle", "human") or is_url(args.judge)):
        raise InputError(f"--judge {args.judge} runs no model here: start it without torchrun")
    rows = make_comparisons(args, task)
    asked = [i for i, row in enumerate(rows) if not row[3]]
    folder = partial_path(args.out, {**vars(args), "asked": asked}, [args.a, *(args.b or []), args.judge])
    results, more, cost = {}, {}, {}
    if args.judge == "oracle":
        warm(task, *([rows[i][side] for i in asked] for side in (1, 2)))
        for i in asked:
            _, a, b, _ = rows[i]
            a, b = task.grade(a), task.grade(b)
            p = 0.5 if a == b else float(b > a)
            results[i] = (p, 1 - p)
    elif args.judge == "human":
        random.Random(dumps([args.seed, "human"])).shuffle(asked)
        log = ask_person([(i, *texts(rows[i])) for i in asked], lambda: BatchLog(folder, [1] * len(asked)), args.seconds_per_pair, args.seed)
        results = {i: (ab, ba) for i, ab, ba, _, _ in log.results}
        more = {i: {"seconds": seconds, "shown": order} for i, _, _, seconds, order in log.results}
    elif is_url(args.judge):
        endpoint = Endpoint(args.judge, args.judge_model, "ILR_COMPARE")
        results = dict(zip(asked, endpoint.preferences([texts(rows[i]) for i in asked])))
    else:
        results, cost = ask_model(args, rows, asked, folder)
        if rank():
            return

    comparisons = []
    for i, (key, a, b, agree) in enumerate(rows):
        ab, ba = results.get(i, (None, None))
        if not agree and flipped(args, a, b):
            ab, ba = 1 - ab, 1 - ba
        comparisons.append({**key, "prompt": a["prompt"], "completion_a": a["completion"], "completion_b": b["completion"],
                            **fields_for_grading(task, a),
                            "agree": agree, "prob_b_ab": ab, "prob_b_ba": ba,
                            "prob_b": None if agree else average_orders(ab, ba), **more.get(i, {})})
    result = measure(task, comparisons)
    write_json(f"{args.out}.summary", {**result, **cost})
    write_jsonl(args.out, comparisons)
    folder.unlink(missing_ok=True)
    said = (f", {result['flip_rate']:.1%} flip with the order, position bias {result['position_bias']:.3f}" if result["flip_rate"] is not None
            else f", {result['unanswered']} without an answer, the first shown chosen in {result['chose_first'] or 0:.1%} of the others"
            if "unanswered" in result else "")
    print(f"{args.out}: {result['pairs']} pairs, {result['asked']} asked{said}" + (f", accuracy {result['accuracy']:.1%} on the {result['decisive']} with one right "
                                                   "side" if result.get("decisive") else ""))


def flipped(args, a, b):
    """Whether --flip-share turns the judge's answer round: by chance for each question, or for every question about the same problems."""
    about = [a["id"]] if args.flip_kind == "systematic" else [a["id"], a["completion"], b["completion"]]
    return random.Random(dumps([args.seed, "flip", *about])).random() < args.flip_share


def texts(row):
    _, a, b, _ = row
    return a["prompt"], a["completion"], b["completion"]


def ask_model(args, rows, asked, folder):
    """({row: (prob_b_ab, prob_b_ba)}, its price) from a judge folder, batched by length."""
    from tqdm import tqdm
    if not (Path(args.judge) / "judge.json").exists():
        raise InputError(f"--judge {args.judge}: neither oracle, human, a URL nor a folder that `compare.py train` wrote")
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.judge, args.chat_template)
    model = open_model(args.judge, device, "AutoModelForSequenceClassification").eval()
    sequences = {}
    for i in asked:
        prompt, a, b = texts(rows[i])
        sequences[i] = [encode_pair(tokenizer, prompt, a, b), encode_pair(tokenizer, prompt, b, a)]
    asked = sorted(asked, key=lambda i: (-len(sequences[i][0]), i))
    batches = [asked[k:k + args.batch_size] for k in range(0, len(asked), args.batch_size)]
    log = BatchLog(folder, [len(b) for b in batches])
    with tqdm(total=len(asked), initial=len(log.results), desc=f"score {short(args.out)}", unit="pair", mininterval=1) as bar:
        def asked_about(batch):
            probs = probabilities(model, [ids for i in batch for ids in sequences[i]], args, device)
            return [[i, ab, ba] for i, ab, ba in zip(batch, probs[0::2], probs[1::2])]
        for found in deal(batches[log.batches_done:], asked_about):
            log.append(found)
            bar.update(len(found))
    cost = {"weights": count_weights(model), "read_tokens": sum(len(ids) for i in asked for ids in sequences[i])}
    return {i: (ab, ba) for i, ab, ba in log.results}, cost


def main(args):
    (train if args.command == "train" else score)(args)


def parser():
    p = make_parser(__doc__, prog="compare.py")
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("train", help="samples of the weak model's checkpoints -> judge", description=__doc__,
                            formatter_class=p.formatter_class)
    t.add_argument("--model", required=True, help="folder or hub name of the weak base model")
    t.add_argument("--task", required=True)
    t.add_argument("--data", required=True, nargs="+", help="samples, a file per checkpoint, earliest first")
    t.add_argument("--gold", required=True, help="the same problems with their demonstrations")
    t.add_argument("--out", required=True, help="folder to write")
    t.add_argument("--wrong-per-problem", type=positive, default=1, help="pairs with an incorrect sample, per problem")
    t.add_argument("--stop-accuracy", type=share, default=0, help="train a judge of this accuracy on the stopping problems (looked "
                   "at four times an epoch) and no better; 0: as good as it gets")
    add_training_flags(t, lr=1e-6, batch_size=16, epochs=5)
    s = commands.add_parser("score", help="two completions of each problem -> comparisons", description=__doc__,
                            formatter_class=p.formatter_class)
    s.add_argument("--judge", required=True, help="folder of a trained judge, oracle, human, or an OpenAI-compatible endpoint's URL")
    s.add_argument("--judge-model", help="model behind the URL, whose key is in ILR_COMPARE_KEY")
    s.add_argument("--seconds-per-pair", type=rate, default=60, help="for human: a pair without an answer by then counts as 0.5")
    s.add_argument("--seed", type=whole, default=0, help="of the flips; for human, of the order of the pairs and of A and B")
    s.add_argument("--flip-share", type=share, default=0, help="turn this share of the judge's answers round, to study a worse judge")
    s.add_argument("--flip-kind", default="symmetric", choices=["symmetric", "systematic"], help="which: by chance, or all about the same problems")
    s.add_argument("--embedder", help="for tasks that compare answers by embeddings: folder or hub name of a model, or an endpoint's URL")
    s.add_argument("--task", required=True)
    s.add_argument("--a", required=True, help="records: the present completions (or samples)")
    s.add_argument("--b", nargs="+", help="records: the proposed completions; left out, --a's samples are paired two by two")
    s.add_argument("--out", required=True, help="file to write")
    s.add_argument("--batch-size", type=positive, default=256, help="pairs appended together")
    s.add_argument("--row-tokens", type=positive, default=2048, help="tokens per packed row")
    s.add_argument("--micro-tokens", type=positive, default=16384, help="tokens per forward pass")
    s.add_argument("--chat-template", action="store_true", help="prompts in the judge's own chat format, as it was trained")
    s.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
