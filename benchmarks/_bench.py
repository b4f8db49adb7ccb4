"""What the benchmarks share: real texts, models of stated sizes, runs in turn, one table."""
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SIZES = {
    "3M": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4,
               num_attention_heads=6, num_key_value_heads=2),
    "13M": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                num_attention_heads=6, num_key_value_heads=3),
    "60M": dict(hidden_size=640, intermediate_size=1728, num_hidden_layers=10,
                num_attention_heads=10, num_key_value_heads=5)}
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3)
# imitates a CPU without AVX512, for torch and oneDNN; must be set before torch is imported
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# what takes a few minutes on two cores: records a step, steps a run, runs
WORK = {"3M": (32, 5, 5), "13M": (16, 4, 5), "60M": (16, 3, 5), "135M": (8, 3, 3)}


# ---------------------------------------------------------------- texts and models
def problems(split, count):
    """The first `count` GSM8K problems as records with prompt, completion and reference."""
    from core.tokens import user_prompt
    folders = [Path(os.environ.get("GSM8K", ROOT / "data/gsm8k")), ROOT / "data/gsm8k",
               ROOT.parent / "shared/data/gsm8k"]
    folder = next((f for f in folders if (f / "train.jsonl").exists()), None)
    if not folder:
        sys.exit("GSM8K names no folder with train.jsonl and test.jsonl (python tasks/gsm8k.py "
                 "fetches them into data/gsm8k)")
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:count]
    return [{"id": i, "prompt": user_prompt(r["question"]), "completion": r["answer"],
             "reference": r["answer"].rpartition("####")[2].strip()} for i, r in enumerate(rows)]


def preferences(records):
    """Preference records: a problem's own answer over the next problem's."""
    return [{"id": r["id"], "prompt": r["prompt"], "chosen": r["completion"],
             "rejected": other["completion"]}
            for r, other in zip(records, records[1:] + records[:1], strict=True)]


def model_folder(args, folder):
    """The folder of the model to be timed, its number of weights, and its words for a title.

    A random Llama of a stated size in `folder`; for 135M SmolLM2-135M, which _weights.py fetches,
    from --weights. Exits, with the reason, where that is absent.
    """
    from safetensors import safe_open
    if args.size != "135M":
        count = make_model(folder, args.size)
        return Path(folder), f"Llama of {count / 1e6:.1f}M random weights"
    if not args.weights or not (args.weights / "model.safetensors").exists():
        print("skipped: 135M needs the folder of SmolLM2-135M in fp32 as --weights; "
              "real_weights.py makes one")
        sys.exit(0)
    with safe_open(args.weights / "model.safetensors", "pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return args.weights, f"SmolLM2 of {count / 1e6:.1f}M pretrained weights"


def make_tokenizer(folder):
    """Write and return a byte-level BPE of 8,192 tokens, trained on GSM8K's texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    texts = (r["prompt"] + r["completion"] for r in problems("train", 8000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def make_model(folder, size, seed=0):
    """Write a random Llama with `make_tokenizer`'s tokenizer. Returns the number of weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    fast = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096,
                         tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         **SIZES[size])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- running
def add_flags(parser, real=False):
    """real: whether it can also run SmolLM2-135M, by `model_folder`."""
    parser.add_argument("--size", default="3M", choices=[*SIZES, *["135M"][:real]])
    if real:
        parser.add_argument("--weights", type=Path, help="for 135M: the folder of SmolLM2-135M")
        parser.add_argument("--micro-tokens", type=int, default=1024, help="of ours, a pass")
    parser.add_argument("--repeats", type=int,
                        help="counted runs of each side, after one that is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, help="optimizer steps a run")
    parser.add_argument("--batch", type=int, help="records a step")


def settle(args):
    """Fill in the flags that depend on the size; set the number of threads; silence progress bars
    and warnings."""
    import torch
    import transformers
    batch, steps, repeats = WORK[args.size]
    args.batch, args.steps = args.batch or batch, args.steps or steps
    args.repeats = args.repeats or repeats
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    os.environ["TQDM_DISABLE"] = "1"


def run_main(stage, *words):
    """Run a stage in this process with the arguments `words`."""
    stage.main(stage.parser().parse_args([str(word) for word in words]))


def train(stage, folder, data, batch, more):
    """One epoch of sft.py or dpo.py (the module `stage`) with fused AdamW.

    Returns (time at the end of every step, {loss and gradients of the first step}).
    """
    from core.training import Training
    marks, first = [], {}
    log, apply_gradients = Training.log, stage.apply_gradients

    def timed(self, **row):
        marks.append(time.perf_counter())
        first.setdefault("loss", row["loss"])
        return log(self, **row)

    def spy(model, *args, **kwargs):
        if not first:
            first["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters()}
        return apply_gradients(model, *args, **kwargs)
    with (tempfile.TemporaryDirectory() as out, mock.patch.object(Training, "log", timed),
          mock.patch.object(stage, "apply_gradients", spy)):
        run_main(stage, "--model", folder, "--data", data, "--out", f"{out}/m",
                 "--batch-size", batch, "--epochs", 1, "--lr", 1e-4, "--optimizer", "adamw",
                 "--state-every", 1e9, *more)
    return marks, first


def tolerance_of(args):
    """How far losses and gradients of two sides may be apart: fp32 sums in another order differ
    by about 1e-6 in a random model, and by 5e-5 from float64 in SmolLM2 whoever computes them."""
    return 3e-4 if args.size == "135M" else 1e-4


def check_gradients(name, ours, theirs, tolerance):
    """Exit unless loss and gradients of a first step agree; gradients relative to the largest."""
    a, b = ours["gradients"], theirs["gradients"]
    scale = max(g.abs().max().item() for g in a.values())
    worst = max((a[n] - b[n]).abs().max().item() for n in a) / scale
    gap = abs(ours["loss"] - theirs["loss"])
    print(f"{name}: losses differ by {gap:.1e}, gradients by {worst:.1e} of the largest",
          file=sys.stderr)
    if worst > tolerance or gap > tolerance:
        sys.exit(f"{name} does not compute what we compute: nothing is timed")


def alternate(sides, repeats, warm=False):
    """{name: [rate of each run]}: the sides run in turn; the first turn is not counted, unless
    they are warm."""
    rates = {name: [] for name in sides}
    for k in range(bool(warm), repeats + 1):
        for name, run in sides.items():
            rate = run()
            print(f"run {k}, {name}: {rate:.4g}", file=sys.stderr)
            if k:
                rates[name].append(rate)
    return rates


def race(args, ours, variants, work):
    """Rates of training loops: `work` divided by the seconds of the steps after the first.

    ours, and each of variants {name: loop}: a function that returns what `train` returns. Nothing
    is timed unless every variant computes what ours does.
    """
    expected = ours()[1]
    for name, run in variants.items():
        check_gradients(name, expected, run()[1], tolerance_of(args))

    def rate(run):
        marks, _ = run()
        return work / (marks[-1] - marks[0])
    sides = {"ours": ours, **variants}
    return alternate({name: lambda run=run: rate(run) for name, run in sides.items()},
                     args.repeats, warm=True)


# ---------------------------------------------------------------- floors
def best_seconds(run, repeats):
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_rate(repeats=20):
    """Floating-point operations per second of an fp32 product of 1024 x 1024 matrices, by MKL or
    oneDNN, whichever is faster."""
    import torch

    from core.linear import use_onednn
    layer, x = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False)), torch.randn(1024, 1024)
    with torch.no_grad():
        seconds = best_seconds(lambda: layer(x), repeats)
        use_onednn(layer)
        seconds = min(seconds, best_seconds(lambda: layer(x), repeats))
    return 2 * 1024 ** 3 / seconds


def memory_rate(repeats=20):
    """Bytes per second read from 256 MB of memory."""
    import torch
    x = torch.ones(1 << 26)
    return 4 * x.numel() / best_seconds(x.sum, repeats)


def operations(size, lengths, predicted, backward=True, shared=()):
    """Floating-point operations that sequences of `lengths` tokens need at least.

    shared: lengths of beginnings that two of them have in common, and that count once.

    Forward: 2 for each weight of the layers and token, 2 for each weight of the head and predicted
    token, and attention: 2 to compare and 2 to mix, for every value of a causal pair of tokens.
    Backward takes twice as many.
    """
    c, vocabulary = (SMOLLM2, 49152) if size == "135M" else (SIZES[size], 8192)
    h, inner = c["hidden_size"], c["intermediate_size"]
    kv = h // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * inner
    pairs = (sum(n * n for n in lengths) - sum(n * n for n in shared)) / 2
    tokens = sum(lengths) - sum(shared)
    forward = c["num_hidden_layers"] * (2 * layer * tokens + 4 * h * pairs)
    forward += 2 * h * vocabulary * predicted
    return (3 if backward else 1) * forward


def floor(needed, per, rate):
    """A sentence: how near `rate` (per second) is to what the processor can do.

    needed: operations of one `per`.
    """
    return (f"Floor: {needed / 1e6:.3g} MFLOP per {per}; ours run at "
            f"{needed * rate / matrix_rate():.0%} of the rate of a 1024 x 1024 fp32 product on "
            "the same threads.")


# ---------------------------------------------------------------- results
def spread(values, digits=".4g"):
    """A median with the lowest and the highest value."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def ratio_cell(ratios):
    """`spread` with two decimals, the median in bold."""
    median, _, rest = spread(ratios, ".2f").partition(" ")
    return f"**{median}** {rest}"


def about():
    """Machine, versions, commit, date and command of this run."""
    import torch
    import transformers
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True)
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines
                  if line.startswith("model name")]
    found = {"cpu": models[0] if models else platform.machine(),
             "threads": torch.get_num_threads(), "cores": os.cpu_count(),
             "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "commit": git.stdout.strip(),
             "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv])}
    if imitates_avx2():
        found["imitating"] = "AVX2"
    try:
        import trl
        found["trl"] = trl.__version__
    except ImportError:
        pass
    return found


def imitates_avx2():
    """Whether this process was started with the variables of AVX2."""
    return AVX2.items() <= os.environ.items()


def in_words(where):
    """`about()` as one line."""
    return ", ".join(f"{k} {v}" for k, v in where.items())


def report(name, title, unit, tables, more=""):
    """Print a Markdown table; write results/NAME.md and .json, or NAME_avx2 where that is imitated.

    tables: {row: {"ours": rates, other: rates}}, paired run by run.
    """
    where, results = about(), {}
    lines = [f"**{title}** ({unit}; medians, lowest to highest; the ratio is that of neighbouring "
             "runs)", "",
             "| | ours | against | theirs | ratio |", "| --- | --- | --- | --- | --- |"]
    for row, rates in tables.items():
        ours = rates["ours"]
        for other, theirs in list(rates.items())[1:]:
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            lines.append(f"| {row} | {spread(ours)} | {other} | {spread(theirs)} | "
                         f"{ratio_cell(ratios)} |")
            results.setdefault(row, {})[other] = {"ours": ours, "theirs": theirs,
                                                  "ratio": statistics.median(ratios)}
    text = "\n".join(lines) + "\n\n" + in_words(where) + ("\n\n" + more if more else "")
    print(text)
    save(name + "_avx2" * imitates_avx2(), text,
         {"about": where, "unit": unit, "results": results}, indent=2)


def save(name, text, found, indent):
    """Write NAME.md and NAME.json below results/; an absolute NAME stays where it is."""
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.md").write_text(text + "\n")
    Path(f"{path}.json").write_text(json.dumps(found, indent=indent) + "\n")
