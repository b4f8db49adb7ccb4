"""The judge: what it reads, what it learns from, how it answers, and what is measured of it."""
import itertools
import json
import math
import random
import statistics
from pathlib import Path

from core.cli import short
from core.distributed import deal, inside_forward, summed
from core.endpoint import Endpoint
from core.human import ask_person
from core.models import count_weights, open_model, pick_device, pick_dtype
from core.packing import hidden_states, pack
from core.precision import set_exact
from core.probe import probe
from core.records import InputError, dumps, read_by_id, read_jsonl, same_prompt
from core.tokens import encode_completion, encode_prompt, open_tokenizer
from core.unfinished import BatchLog

CLASSES = ["keep A", "change to B"]
NO_MODEL = ("oracle", "simulated", "human")        # judges that read no tokens


# ---------------------------------------------------------------- what it reads
def encode_pair(tokenizer, prompt, a, b):
    """Token ids of one question to the judge: BOS + prompt, A + EOS, B + EOS.

    The head reads the last token.
    """
    a, b = encode_completion(tokenizer, a), encode_completion(tokenizer, b)
    return encode_prompt(tokenizer, prompt) + a + b


def both_orders(tokenizer, pairs):
    """[(token ids, class)] of {prompt, better, worse}: each pair in both orders, one after the
    other. Class 1 is "change to B"."""
    examples = []
    for p in pairs:
        prompt, better, worse = p["prompt"], p["better"], p["worse"]
        examples.append((encode_pair(tokenizer, prompt, better, worse), 0))
        examples.append((encode_pair(tokenizer, prompt, worse, better), 1))
    return examples


# ---------------------------------------------------------------- what it learns from
def read_samples(paths, gold_path):
    """The records of a file per checkpoint, each with its problem's demonstration.

    Returns (lists of records with the field `gold_completion`, number of problems).
    """
    gold = read_by_id([gold_path], ("id", "completion", "reference"))
    samples = []
    for path in paths:
        fields = ("id", "prompt", "completion", "reference")
        samples.append(read_jsonl(path, fields, ("id", "sample")))
        for r in samples[-1]:
            if r["id"] not in gold:
                raise InputError(f"{path}: id {r['id']} is not in {gold_path}")
            same_prompt(gold[r["id"]], r)
            r["gold_completion"] = gold[r["id"]]["completion"]
    return samples, len(gold)


def make_pairs(task, samples, seed, wrong_per_problem=1):
    """Training pairs (better, worse) by the rule of the release's generate_evaluator_data.py.

    samples: a list of records per checkpoint, earliest first, each with `gold_completion`.
    Checkpoint i of n is drawn with weight 2^(n-i-1): early ones are the most varied. For each
    problem: the reference over a correct sample; a correct sample or the reference (weight 1,
    as a last checkpoint) over each of up to `wrong_per_problem` different incorrect samples;
    the reference over these if no sample is correct. Unlike in the release, samples that the
    task cannot parse are left out: the first checkpoints of a small model write nothing else,
    and telling them apart teaches nothing about answers.
    A task may have its own rule (`judge_pairs`). A task that is slow to grade must be warm.
    Returns a list of {id, prompt, better, worse}; equal texts make no pair.
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


# ---------------------------------------------------------------- what is compared
def join_files(a_path, b_paths):
    """[(record of A, record of B with its id)], in the order of A; every id must have both."""
    proposals, files, pairs = read_by_id(b_paths, ("id", "completion")), " ".join(b_paths), []
    for a in read_jsonl(a_path, ("id", "prompt", "completion")):
        if a["id"] not in proposals:
            raise InputError(f"{files}: id {a['id']} of {a_path} is missing")
        same_prompt(a, proposals[a["id"]])
        pairs.append((a, proposals.pop(a["id"])))
    if proposals:
        raise InputError(f"{files}: id {next(iter(proposals))} is not in {a_path}")
    return pairs


def pair_samples(path):
    """[(id, k, sample 2k, sample 2k + 1)] of each problem's samples; their number must be even."""
    pairs, samples = [], {}
    for r in read_jsonl(path, ("id", "prompt", "completion", "sample"), ("id", "sample")):
        samples.setdefault(r["id"], []).append(r)
    for id_, answers in samples.items():
        answers.sort(key=lambda r: r["sample"])
        if len(answers) % 2:
            raise InputError(f"{path}: id {id_} has {len(answers)} samples; pairs need an even "
                             "number")
        by_two = zip(answers[0::2], answers[1::2], strict=True)
        pairs += [(id_, k, a, b) for k, (a, b) in enumerate(by_two)]
    return pairs


# ---------------------------------------------------------------- how it answers
def set_padding(model, tokenizer):
    """Name a padding token in a judge's config and tokenizer, in place: never EOS.

    Plain transformers reads the head at the last token that is not padding, and ours at the last
    token, which is EOS. Raises InputError if the model has no such head.
    """
    if not hasattr(model, "score"):
        raise InputError(f"{model.name_or_path}: a judge needs a model whose classifier is one "
                         f"linear layer `score` on the last token; {type(model).__name__} has none")
    config, texts = model.config.get_text_config(), range(len(tokenizer))
    known = model.get_input_embeddings().weight.shape[0]
    # else an ordinary token that is spelled in another way than its text: as a special token it is
    # then found in no text
    spelled = (i for i in reversed(texts)
               if tokenizer.convert_ids_to_tokens(i) != tokenizer.decode([i]))
    candidates = itertools.chain(
        [tokenizer.pad_token_id, config.pad_token_id, tokenizer.unk_token_id,
         tokenizer.bos_token_id], tokenizer.added_tokens_decoder, spelled, texts)
    pad = next(i for i in candidates
               if i is not None and 0 <= i < known and i != tokenizer.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.pad_token_id = config.pad_token_id = pad


def new_head(model):
    """Name the two classes, and let the head start at probability 0.5, whatever the width."""
    import torch
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {name: i for i, name in enumerate(CLASSES)}
    set_exact(model.score.weight, torch.zeros(model.score.weight.shape))


def probe_judge(model, sequences, args, device):
    """`core.probe.probe` for a judge, on sequences of token ids."""
    import torch

    def ours(model, batch):
        owner, logits = judge_logits(model, batch)
        return logits.log_softmax(-1), None, owner
    # a new head is 0 and would say the same of everything: another one stands in for it
    width = model.score.in_features
    stand_in = torch.arange(2 * width, device=device).sin().reshape(width, 2) / width ** 0.5
    model.score.forward = lambda hidden: hidden.float() @ stand_in
    try:
        probe(model, [(ids, None) for ids in sequences], args, device, ours)
    finally:
        del model.score.forward


def average_orders(prob_b_ab, prob_b_ba):
    """prob_b from P(change | A=a, B=b) and P(change | A=b, B=a) (the paper, section 4.2).

    Position bias cancels; the inner brackets make it cancel exactly.
    """
    return (1 + (prob_b_ab - prob_b_ba)) / 2


@inside_forward
def judge_logits(model, batch):
    """The judge's answers to the N sequences of a micro-batch.

    Returns owner int64 (N,) and logits fp32 (N, 2) of [keep A, change to B], read at each
    sequence's last token. No padding token is looked for, so a final EOS is read.
    """
    import torch
    owner = batch["owner"]
    following = torch.cat([owner[:, 1:], torch.full_like(owner[:, :1], -1)], 1)
    last = (owner >= 0) & (owner != following)
    logits = model.score(hidden_states(model, batch)[last]).float()
    assert logits.shape == (int(last.sum()), 2)
    return owner[last], logits


def probabilities(model, sequences, args, device):
    """P(change to B) of each sequence of token ids, as a list of floats.

    sequences: the two orders of a pair follow each other; they may share their prompt.
    args: its micro_tokens is read. Raises FloatingPointError for NaN.
    """
    import torch
    probs = torch.zeros(len(sequences))
    questions = [(ids, [0] * len(ids)) for ids in sequences]
    with torch.no_grad():
        for batch in pack(questions, args.micro_tokens, device, model, 2):
            owner, logits = judge_logits(model, batch)
            probs[owner.cpu()] = logits.softmax(-1)[:, 1].cpu()
    probs = summed(probs, model)
    if not probs.isfinite().all():
        raise FloatingPointError("the judge answers with NaN: its weights are broken")
    return probs.tolist()


def ask_model(args, questions, folder):
    """Ask a judge folder, args.judge, in both orders, in batches by length.

    questions: {key: (prompt, a, b)}; folder: where finished batches are kept.
    Returns {key: (prob_b_ab, prob_b_ba)} and the price. Raises InputError for another folder.
    """
    from tqdm import tqdm
    if not (Path(args.judge) / "judge.json").exists():
        raise InputError(f"--judge {args.judge}: neither oracle, human, a URL nor a folder that "
                         "`compare.py train` wrote")
    device = pick_device(args.device)
    tokenizer = open_tokenizer(args.judge, args.chat_template)
    model = open_model(args.judge, device, "AutoModelForSequenceClassification",
                       dtype=pick_dtype(args.dtype, device)).eval()
    sequences = {i: [encode_pair(tokenizer, prompt, a, b), encode_pair(tokenizer, prompt, b, a)]
                 for i, (prompt, a, b) in questions.items()}
    set_padding(model, tokenizer)
    if questions:
        probe_judge(model, [ids for both in sequences.values() for ids in both], args, device)
    asked = sorted(questions, key=lambda i: (-len(sequences[i][0]), i))
    batches = [asked[k:k + args.batch_size] for k in range(0, len(asked), args.batch_size)]
    log = BatchLog(folder, [len(b) for b in batches])

    def answers(batch):
        probs = probabilities(model, [ids for i in batch for ids in sequences[i]], args, device)
        return [list(row) for row in zip(batch, probs[0::2], probs[1::2], strict=True)]
    with tqdm(total=len(asked), initial=len(log.results), desc=f"score {short(args.out)}",
              unit="pair", mininterval=1) as bar:
        for found in deal(batches[log.batches_done:], answers):
            log.append(found)
            bar.update(len(found))
    price = {"weights": count_weights(model),
             "read_tokens": sum(len(ids) for i in asked for ids in sequences[i])}
    return {i: (ab, ba) for i, ab, ba in log.results}, price


def ask_oracle(task, rows):
    """{key: (prob_b_ab, prob_b_ba)} by the references: 1 if only B is right, 0 if only A is.

    rows: {key: (.., record A, record B, ..)}. A task that is slow to grade must be warm.
    """
    results = {}
    for i, (_, a, b, _) in rows.items():
        a, b = task.grade(a), task.grade(b)
        p = 0.5 if a == b else float(b > a)
        results[i] = (p, 1 - p)
    return results


def ask_simulated(task, rows, accuracy, seed):
    """{key: (prob_b_ab, prob_b_ba)} of a judge with a known error; arguments as of `ask_oracle`.

    The log-odds of B are normal with variance 1 (Thurstone 1927, case V); their mean is 0 where
    both sides or none are right, else so far from it that a share `accuracy` of the pairs is judged
    right. A pair of texts has one judgement, whichever stands first and however often it is asked.
    """
    normal, results = statistics.NormalDist(), {}
    for i, (_, a, b, _) in rows.items():
        better = task.grade(b) - task.grade(a)
        one, two = a["completion"], b["completion"]
        u = random.Random(dumps([seed, "simulated", a["id"], *sorted([one, two])])).random()
        noise = normal.inv_cdf(min(max(u, 1e-16), 1 - 1e-16)) * (1 if one < two else -1)
        if accuracy == 1 and better:
            p = float(better > 0)
        else:
            mean = better * normal.inv_cdf(accuracy) if better else 0.0
            p = 1 / (1 + math.exp(-mean - noise))
        results[i] = (p, 1 - p)
    return results


def ask_human(args, questions, folder):
    """Ask the person at this terminal, each question once, in random order.

    Returns {key: (prob_b_ab, prob_b_ba)} and {key: fields to add to the comparison}.
    """
    order = list(questions)
    random.Random(dumps([args.seed, "human"])).shuffle(order)
    log = ask_person([(i, *questions[i]) for i in order],
                     lambda: BatchLog(folder, [1] * len(order)), args.seconds_per_pair, args.seed)
    return ({i: (ab, ba) for i, ab, ba, _, _ in log.results},
            {i: {"seconds": seconds, "shown": shown} for i, _, _, seconds, shown in log.results})


def ask_endpoint(args, questions):
    """Ask the endpoint at the URL args.judge, in both orders: {key: (prob_b_ab, prob_b_ba)}."""
    endpoint = Endpoint(args.judge, args.judge_model, "ILR_COMPARE")
    return dict(zip(questions, endpoint.preferences(list(questions.values())), strict=True))


def flipped(args, a, b):
    """Whether --flip-share turns the judge's answer around.

    By chance for every question (symmetric), or for all questions about a problem together.
    """
    key = [a["id"]]
    if args.flip_kind == "symmetric":
        key += [a["completion"], b["completion"]]
    return random.Random(dumps([args.seed, "flip", *key])).random() < args.flip_share


# ---------------------------------------------------------------- what is measured of it
def held_out(model, examples, args, device):
    """(mean cross-entropy, accuracy, flip rate) on `both_orders` of held-out pairs.

    Accuracy: after averaging both orders; a tie counts one half. Flip rate: the share of pairs
    whose answer changes with the order.
    """
    model.eval()
    probs = probabilities(model, [ids for ids, _ in examples], args, device)
    model.train()
    likelihoods = [p if c else 1 - p for p, (_, c) in zip(probs, examples, strict=True)]
    loss = -sum(math.log(max(p, 1e-12)) for p in likelihoods) / len(examples)
    keep, change = probs[0::2], probs[1::2]     # asked as (better, worse) and (worse, better)
    right = [average_orders(ab, ba) for ab, ba in zip(change, keep, strict=True)]
    accuracy = sum((p > 0.5) + 0.5 * (p == 0.5) for p in right) / len(right)
    return loss, accuracy, flip_rate(change, keep)


def flip_rate(probs_ab, probs_ba):
    """Share of pairs whose answer changes with the order: both orders say A, or both say B."""
    flips = [(ab - 0.5) * (ba - 0.5) > 0 for ab, ba in zip(probs_ab, probs_ba, strict=True)]
    return sum(flips) / len(flips)


def measure(comparisons, grades=None):
    """What a file of comparisons says of its judge, for the summary beside it.

    grades: (grade of A, grade of B) of each asked comparison, where references exist.
    flip_rate: share of asked pairs whose answer changes with the order.
    position_bias: mean of |P(change | ab) - (1 - P(change | ba))| / 2, the part of a
        probability that the order alone decides.
    unanswered, chose_first: in place of these for a person, who is asked once.
    accuracy: over the `decisive` pairs, of which one side is better, how often the judge
        prefers it; prob_b of 0.5 counts one half.
    calibration: ten bins of prob_b over the decisive pairs, each [mean prob_b, share of pairs
        whose B is the better, pairs]: a reliability diagram (DeGroot & Fienberg 1983).
    """
    asked = [c for c in comparisons if not c["agree"]]
    result = {"pairs": len(comparisons), "asked": len(asked),
              "flip_rate": None, "position_bias": None}
    if asked and "shown" in asked[0]:
        first = [c["prob_b"] == (c["shown"] == "ba") for c in asked if c["prob_b"] != 0.5]
        result.update(unanswered=len(asked) - len(first),
                      chose_first=sum(first) / len(first) if first else None)
    elif asked:
        ab, ba = ([c[f"prob_b_{order}"] for c in asked] for order in ("ab", "ba"))
        result["flip_rate"] = flip_rate(ab, ba)
        bias = sum(abs(p - 1 + q) for p, q in zip(ab, ba, strict=True))
        result["position_bias"] = bias / 2 / len(asked)
    if asked and grades is not None:
        decisive = [(c["prob_b"], b > a)
                    for c, (a, b) in zip(asked, grades, strict=True) if a != b]
        right = [0.5 if p == 0.5 else float((p > 0.5) == b_better) for p, b_better in decisive]
        bins = [[x for x in decisive if min(int(10 * x[0]), 9) == k] for k in range(10)]
        calibration = [[*(sum(x) / len(x) for x in zip(*pairs, strict=True)), len(pairs)] if pairs
                       else [None, None, 0] for pairs in bins]
        result.update(decisive=len(decisive),
                      accuracy=sum(right) / len(right) if right else None,
                      calibration=calibration)
    return result


def describe(result):
    """What `measure` found, in words."""
    said = f"{result['pairs']} pairs, {result['asked']} asked"
    if result["flip_rate"] is not None:
        said += (f", {result['flip_rate']:.1%} flip with the order, position bias "
                 f"{result['position_bias']:.3f}")
    elif "unanswered" in result:
        said += (f", {result['unanswered']} without an answer, the first shown chosen in "
                 f"{result['chose_first'] or 0:.1%} of the others")
    if result.get("decisive"):
        said += (f", accuracy {result['accuracy']:.1%} on the {result['decisive']} with one "
                 "right side")
    return said


def held_out_error(folder):
    """The share of its held-out pairs that a trained judge got wrong.

    Raises InputError for what is no judge folder, and for a judge no better than a coin.
    """
    try:
        about = json.loads((Path(folder) / "judge.json").read_text())
        accuracy = float(about["held_out_accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--judge {folder}: not a folder that `compare.py train` "
                         "wrote") from None
    if not 0.5 < accuracy <= 1:
        raise InputError(f"--judge {folder}: right on {accuracy:.1%} of its held-out pairs, "
                         "no better than a coin: no noise rate")
    return 1 - accuracy
