"""What the comparisons share: real texts, models of stated sizes, runs that alternate, one table and one JSON file."""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
DATA = next((f for f in map(Path, (os.environ.get("GSM8K", ROOT / "data/gsm8k"), ROOT / "data/gsm8k", ROOT.parent / "shared/data/gsm8k"))
             if (f / "train.jsonl").exists()), ROOT)         # train.jsonl, test.jsonl: question, answer
SIZES = {"3M": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2),
         "13M": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3),
         "60M": dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10, num_key_value_heads=5)}


def problems(split, count):
    """The first `count` GSM8K problems as records with prompt and completion."""
    from tasks import user_prompt
    if not (DATA / f"{split}.jsonl").exists():
        sys.exit("GSM8K names no folder with train.jsonl and test.jsonl (python tasks/gsm8k.py fetches them into data/gsm8k)")
    rows = [json.loads(line) for line in (DATA / f"{split}.jsonl").open()][:count]
    return [{"id": i, "prompt": user_prompt(r["question"]), "completion": r["answer"], "reference": r["answer"].rpartition("####")[2].strip()}
            for i, r in enumerate(rows)]


def make_model(folder, size, seed=0):
    """A folder with a random Llama and a byte-level BPE of 8,192 tokens trained on GSM8K's training texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator((r["prompt"] + r["completion"] for r in problems("train", 8000)), trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
                         eos_token_id=2, **SIZES[size])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def add_flags(parser):
    parser.add_argument("--size", default="3M", choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each side, after one that is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a run")
    parser.add_argument("--batch", type=int, default=32, help="records a step")


def settle(args):
    """Threads, and no chatter."""
    import torch
    import transformers
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    os.environ["TQDM_DISABLE"] = "1"


def check_gradients(name, ours, theirs, tolerance=1e-4):
    """Exit unless loss and gradients of a first step agree: fp32 sums in another order carry about 1e-6."""
    scale = max(g.abs().max().item() for g in ours["gradients"].values())
    worst = max((ours["gradients"][n] - theirs["gradients"][n]).abs().max().item() for n in ours["gradients"]) / scale
    gap = abs(ours["loss"] - theirs["loss"])
    print(f"{name}: losses differ by {gap:.1e}, gradients by {worst:.1e} of the largest", file=sys.stderr)
    if worst > tolerance or gap > tolerance:
        sys.exit(f"{name} does not compute what we compute: nothing is timed")


def alternate(sides, repeats):
    """{name: [rate of each run]}: the sides in turn, once uncounted."""
    rates = {name: [] for name in sides}
    for k in range(repeats + 1):
        for name, run in sides.items():
            rate = run()
            print(f"run {k}, {name}: {rate:.4g}", file=sys.stderr)
            if k:
                rates[name].append(rate)
    return rates


def race(args, ours, variants, work):
    """Rates of loops that return (time of every step, {loss and gradients of the first}): `work` done in the steps after the first,
    per second, once all variants {name: loop} have been seen to compute what ours does."""
    expected = ours()[1]
    for name, run in variants.items():
        check_gradients(name, expected, run()[1])

    def rate(run):
        marks, _ = run()
        return work / (marks[-1] - marks[0])
    return alternate({name: lambda run=run: rate(run) for name, run in {"ours": ours, **variants}.items()}, args.repeats)


def matrix_rate(repeats=20):
    """Floating-point operations per second of fp32 products of 1024 x 1024 matrices, the best of `repeats`."""
    import torch
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(times)


def memory_rate(repeats=20):
    """Bytes per second read from 256 MB of memory, the best of `repeats`."""
    import torch
    x = torch.ones(1 << 26)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return 4 * x.numel() / min(times)


def operations(size, lengths, predicted, backward=True, vocabulary=8192):
    """Floating-point operations that sequences of `lengths` tokens need at least: forward 2 for each weight of the layers and token, 2 for each
    weight of the head and predicted token, and 2 each to compare and to mix every pair of tokens, causality counted; backward twice that."""
    c = SIZES[size]
    h, kv = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * c["intermediate_size"]
    forward = c["num_hidden_layers"] * (2 * layer * sum(lengths) + 2 * h * sum(n * n for n in lengths)) + 2 * h * vocabulary * predicted
    return (3 if backward else 1) * forward


def floor(needed, per, rate):
    """A sentence on how near `rate` (per second) comes to what the processor can do, `needed` operations being one `per`."""
    return f"Floor: {needed / 1e6:.3g} MFLOP per {per}; ours run at {needed * rate / matrix_rate():.0%} of the rate of a 1024 x 1024 fp32 product on the same threads."


def spread(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def about():
    """Machine, versions, commit, date and command of this run."""
    import torch
    import transformers
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    found = {"cpu": cpu, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "commit": git, "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv])}
    try:
        import trl
        found["trl"] = trl.__version__
    except ImportError:
        pass
    return found


def report(name, title, unit, tables, more=""):
    """Print a Markdown table and write results/NAME.json. tables: {row: {"ours": rates, other: rates}}, paired run by run."""
    where = about()
    lines = [f"**{title}** ({unit}; medians, lowest to highest; the ratio is that of neighbouring runs)", "",
             "| | ours | against | theirs | ratio |", "| --- | --- | --- | --- | --- |"]
    results = {}
    for row, rates in tables.items():
        ours = rates["ours"]
        for other, theirs in list(rates.items())[1:]:
            ratios = [a / b for a, b in zip(ours, theirs)]
            lines.append(f"| {row} | {spread(ours)} | {other} | {spread(theirs)} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |")
            results.setdefault(row, {})[other] = {"ours": ours, "theirs": theirs, "ratio": statistics.median(ratios)}
    text = "\n".join(lines) + "\n\n" + ", ".join(f"{k} {v}" for k, v in where.items()) + ("\n\n" + more if more else "")
    print(text)
    out = Path(__file__).resolve().parent / "results"
    out.mkdir(exist_ok=True)
    (out / f"{name}.md").write_text(text + "\n")
    (out / f"{name}.json").write_text(json.dumps({"about": where, "unit": unit, "results": results}, indent=2) + "\n")
