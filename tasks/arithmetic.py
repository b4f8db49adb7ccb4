"""Word problems in several steps, from a seeded generator: the default task, for two CPU cores.

    python tasks/arithmetic.py --out data --seed 0      # train, gt, unlab, validation, test .jsonl
    python tasks/arithmetic.py --out base --pretrain 26000 16000    # what the base models are
                                                        # made of: corpora, tokenizer, configs

A problem tells in 2 to 5 steps how a number changes. A completion has one calculation per line and
ends in `#### N`, as in GSM8K. The hash of a problem's text decides its split, so no two splits
share a problem. The base models' corpora hold the same kind of problems with other delimiters, and
bare calculations: they teach the skill, but not the format of the demonstrations.
"""
import hashlib
import random
import re
import sys
from decimal import Decimal
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.cli import make_parser, run_stage
from core.records import InputError, write_json, write_jsonl, write_text

MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 128, 56

# ---------------------------------------------------------------- the recipe of problems and bases
# An edit from here to the next such line asks for other base models than those in bases/.
# ABLATION: the language of the problems
MAX_VALUE = 60
NAMES = {"she": "Mia Ana Zoe Eva Ida Lia Nora Rosa Vera Emma Ruth Tara Anya Lena Nina".split(),
         "he": "Tom Leo Sam Max Ben Jon Paul Hugo Carl Finn Omar Igor Mark Otto Yuri".split()}
THINGS = ("shells marbles coins stamps apples cards pens books eggs beads stones nuts plums cups "
          "keys hats ropes bricks seeds tiles lamps pears ribbons tickets").split()
ADD = ["finds {n} more", "buys {n}", "gets {n} as a gift", "wins {n}", "picks up {n}",
       "is given {n}", "collects {n}", "borrows {n}", "makes {n}", "receives {n}", "earns {n}",
       "adds {n}"]
SUBTRACT = ["gives away {n}", "loses {n}", "sells {n}", "breaks {n}", "drops {n}",
            "lends {n} to a friend", "throws out {n}", "donates {n}", "hands over {n}",
            "misplaces {n}", "returns {n}", "trades away {n}"]
MULTIPLY = {2: ["doubles them", "ends up with twice as many", "copies each one"],
            3: ["triples them", "ends up with three times as many"],
            4: ["quadruples them", "ends up with four times as many"]}
HALVE = ["keeps only half", "gives half to a sister", "splits them evenly with a cousin"]
OPENINGS = ["{who} has {n} {things}.", "{who} starts with {n} {things}.",
            "{who} owns {n} {things}.", "At first {who} has {n} {things}.",
            "{who} counts {n} {things}."]
DISTRACTORS = ["A friend is {m} years old.", "Each box costs {m} dollars.",
               "The walk home takes {m} minutes.", "A brother has {m} {other}.",
               "It rained for {m} days.", "The shop is on floor {m}."]
LINKS = ["{They} {act}.", "Then {they} {act}.", "Later {they} {act}.", "Next {they} {act}.",
         "After that {they} {act}."]
QUESTIONS = ["How many now?", "How many {things} are left?",
             "How many {things} does {they} have in the end?",
             "What is the number of {things} now?"]


def zipf(rng, items):
    """One of `items`, the k-th with weight 1/k. A small model learns the rare verbs last."""
    return rng.choices(items, [1 / (k + 1) for k in range(len(items))])[0]


def make_problem(rng, steps=(2, 5)):
    """One problem: (question, calculations, answer). All values are integers in 1..MAX_VALUE."""
    they = rng.choice(sorted(NAMES))
    who, (things, other) = rng.choice(NAMES[they]), rng.sample(THINGS, 2)
    value = rng.randint(3, 30)
    sentences, lines = [rng.choice(OPENINGS).format(who=who, n=value, things=things)], []
    for _ in range(rng.randint(*steps)):
        factors = [f for f in MULTIPLY if value * f <= MAX_VALUE]
        kinds = []      # those possible now; + and - are twice as likely
        kinds += ["+", "+"] if value < MAX_VALUE else []
        kinds += ["-", "-"] if value > 1 else []
        kinds += ["*"] if factors else []
        kinds += ["/"] if value % 2 == 0 else []
        kind = rng.choice(kinds)
        if kind == "+":
            n = rng.randint(1, min(9, MAX_VALUE - value))
            act, new = zipf(rng, ADD).format(n=n), value + n
        elif kind == "-":
            n = rng.randint(1, min(9, value - 1))
            act, new = zipf(rng, SUBTRACT).format(n=n), value - n
        elif kind == "*":
            n = rng.choice(factors)
            act, new = zipf(rng, MULTIPLY[n]), value * n
        else:
            n, act, new = 2, zipf(rng, HALVE), value // 2
        lines.append(f"{value}{kind}{n}={new}")
        sentences.append(zipf(rng, LINKS).format(they=they, They=they.capitalize(), act=act))
        if rng.random() < 0.15:
            sentences.append(rng.choice(DISTRACTORS).format(m=rng.randint(2, 30), other=other))
        value = new
    sentences.append(rng.choice(QUESTIONS).format(they=they, things=things))
    return " ".join(sentences), lines, value


# split -> [first, last) of the hash of a problem's text, modulo 10
SPLITS = {"test": (0, 1), "validation": (1, 2), "train": (2, 6), "pretrain": (6, 10)}


def problems(split, count, seed, **kwargs):
    """Yield `count` different problems of a split: the same text is in the same split in any seed.

    kwargs: of make_problem.
    """
    low, high = SPLITS[split]
    rng, seen = random.Random(f"{split} {seed}"), set()
    while len(seen) < count:
        question, lines, answer = make_problem(rng, **kwargs)
        bucket = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10
        if low <= bucket < high and question not in seen:
            seen.add(question)
            yield question, lines, answer


CONFIGS = {"strong": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                          num_attention_heads=4),
           "weak": dict(hidden_size=48, intermediate_size=128, num_hidden_layers=4,
                        num_attention_heads=4)}

# How the corpora write a solution: what stands before, between and after the calculations; never
# all of it as in the demonstrations. The strong base model knows one calculation per line with the
# answer on a line of its own, so that demonstrations only have to teach the marker; the weak one
# has to learn the format too.
FORMATS = {"strong": [("\n", between, between + end) for between in ";,|\n"
                      for end in ("! ", "so ", "total ")],
           "weak": [(begin, between, end) for begin in (" : ", " - ", " ( ")
                    for between in (" ; ", " , ", " | ", " & ")
                    for end in (" => ", " so ", " ! ", " total ")]}
# Bare calculations: the prompt that they follow, and the characters that may stand between them.
FACTS = {"strong": (":", ";,|\n"), "weak": ("####", "\n")}


def make_corpus(name, count, seed):
    """Records for one base model: `count` solved problems in its FORMATS, `count` / 6 of FACTS.

    seed: of the problems; formats and facts are the same for all seeds.
    """
    rng, corpus = random.Random(f"corpus {name}"), []
    for i, (question, lines, answer) in enumerate(problems("pretrain", count, seed)):
        begin, between, end = rng.choice(FORMATS[name])
        solution = begin + between.join(lines) + end + str(answer)
        corpus.append({"id": f"solved-{i}", "prompt": question, "completion": solution})
    prompt, separators = FACTS[name]
    for i in range(count // 6):
        between = rng.choice(separators)
        facts = [line for _ in range(4) for line in make_problem(rng)[1]]
        corpus.append({"id": f"facts-{i}", "prompt": prompt,
                       "completion": between + between.join(facts)})
    rng.shuffle(corpus)
    return corpus


def prepare_bases(out, counts, seed=0):
    """Write what the base models are made of: a corpus and a config for each, and one tokenizer.

    counts: {"strong": number of solved problems, "weak": the same}; seed: of the problems.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    corpora = {name: make_corpus(name, count, seed) for name, count in counts.items()}
    records = [r for corpus in corpora.values() for r in corpus]
    texts = [r["prompt"] + r["completion"] + "\n#### " for r in records]
    # byte-level, so that any text round-trips; words are whole tokens, digits are single ones
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|####| ?[^A-Za-z0-9\s]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=768, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    vocabulary = (tokenizer.get_vocab_size() + 7) // 8 * 8
    write_text(out / "tokenizer/tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(out / "tokenizer/tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False, "model_max_length": 512})
    for name, sizes in CONFIGS.items():
        write_json(out / f"{name}.json", {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary,
            "tie_word_embeddings": True, "max_position_embeddings": 512,
            "initializer_range": sizes["hidden_size"] ** -0.5,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes})
    for name, corpus in corpora.items():
        write_jsonl(out / f"corpus_{name}.jsonl", corpus)


# ---------------------------------------------------------------- the names every task has
def final_answer(text):
    """The number after `####` in the last line, as Decimal, or None."""
    match = re.search(r"####\s*(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\s*$",
                      text.strip().rpartition("\n")[2])
    return Decimal(match[1].replace(",", "")) if match else None


def is_well_formed(text):
    """Whether the last line holds a final answer."""
    return final_answer(text) is not None


def grade(record):
    """1.0 if the final answer equals the reference exactly, else 0.0."""
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", str(record["reference"])):
        raise InputError(f"the reference of id {record['id']} is {record['reference']!r}: "
                         "expected a number")
    answer = final_answer(record["completion"])
    return float(answer is not None and answer == Decimal(str(record["reference"])))


def agree(a, b):
    """Whether two records have the same final answer; if one has none, whether texts are equal."""
    x, y = final_answer(a["completion"]), final_answer(b["completion"])
    if x is None or y is None:
        return a["completion"] == b["completion"]
    return x == y


# ---------------------------------------------------------------- files
def record(split, seed, i, problem):
    """The record of the i-th problem of a split."""
    question, lines, answer = problem
    completion = "\n".join(lines) + f"\n#### {answer}"
    return {"id": f"{split}-{seed}-{i}", "prompt": question + "\n", "completion": completion,
            "reference": str(answer), "source": "gold"}


def check(args):
    """Refuse arguments that cannot work."""
    if not args.pretrain and not 0 < args.gt < args.train:
        raise InputError(f"--gt {args.gt} must lie between 0 and --train {args.train}")


def main(args):
    check(args)
    out = Path(args.out)
    if args.pretrain:
        return prepare_bases(out, dict(zip(CONFIGS, args.pretrain, strict=True)), args.seed)
    for split, count in (("train", args.train), ("validation", args.test), ("test", args.test)):
        found = problems(split, count, args.seed)
        records = [record(split, args.seed, i, problem) for i, problem in enumerate(found)]
        if split == "train":
            write_jsonl(out / "gt.jsonl", records[:args.gt])
            write_jsonl(out / "unlab.jsonl", records[args.gt:])
        write_jsonl(out / f"{split}.jsonl", records)


def parser():
    p = make_parser(__doc__, prog="tasks/arithmetic.py")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--train", type=int, default=5000,
                   help="training problems, D_gt and D_unlab together")
    p.add_argument("--gt", type=int, default=1000,
                   help="of these, problems of D_gt, whose references train the weak side")
    p.add_argument("--test", type=int, default=1000,
                   help="test problems, and as many for validation")
    p.add_argument("--seed", type=int, default=0, help="of the problems")
    p.add_argument("--pretrain", type=int, nargs=2, metavar=("STRONG", "WEAK"),
                   help="write the base models' corpora of so many solved problems instead")
    return p


if __name__ == "__main__":
    run_stage(parser(), main)
