"""What each method cost: comparisons, tokens, floating-point operations, seconds.

What a stage cost is written beside what it made: MODEL/price.json of a training, FILE.jsonl.price
of generated answers, comparisons.jsonl.summary of comparisons. A missing file or number leaves the
column blank; nothing is guessed.
"""
from core.judge import NO_MODEL
from core.records import read_json
from report.methods import METHODS, methods_of, rounds_of

# The columns: {key: heading}.
PRICES = {"asked": "comparisons asked", "generated": "generated tokens",
          "trained": "trained tokens", "read": "read tokens", "flops": "FLOPs",
          "seconds": "seconds"}


def price_file(path):
    """The file that holds the price of a path (a Path)."""
    if path.name == "comparisons.jsonl":
        return path.with_name("comparisons.jsonl.summary")
    if path.suffix == ".jsonl":
        return path.with_name(f"{path.name}.price")
    return path / "price.json"


def free_of(path, judge):
    """The numbers that work of this kind never has, {name: 0}. judge: the setting JUDGE."""
    if path.name == "comparisons.jsonl":
        names = ["generated_tokens", "trained_tokens", "trained_weights"]
        if judge in NO_MODEL:            # they read no tokens
            names += ["read_tokens", "weights"]
    elif path.suffix == ".jsonl":
        names = ["asked", "trained_tokens", "trained_weights"]
    else:
        names = ["asked", "generated_tokens"]
    return dict.fromkeys(names, 0)


def flops_of(price):
    """Floating-point operations of one piece of work; None where a number of it is missing.

    A forward pass of N weights takes 2N a token, read, generated or trained on; training takes 2N
    more for the gradients of the activations and 2M for those of the M trained weights (Kaplan et
    al. 2020, arXiv 2001.08361, table 1: 6N where all are trained). Attention's own part, which
    grows with the length, is left out.
    """
    generated, trained, read, n, m = (price.get(name) for name in (
        "generated_tokens", "trained_tokens", "read_tokens", "weights", "trained_weights"))
    if None in (generated, trained, read, n, m):
        return None
    return 2 * n * (read + generated + 2 * trained) + 2 * m * trained


def total(numbers):
    """The sum, or None where a number is missing."""
    return None if None in numbers else sum(numbers)


def price_of(data, seed, paths):
    """{column: number or None} of what stands at `paths` below one seed's folder.

    The seconds are those of the stages that made the paths; a stage that made several counts once.
    """
    work, stages = [], {}
    for name in paths:
        path = data["run"] / f"seed_{seed}" / name
        free = free_of(path, data["settings"].get("JUDGE"))
        work.append({**free, **read_json(price_file(path))})
        stage, seconds = data["seconds"].get(f"seed_{seed}/{name}", (name, None))
        stages.setdefault(stage, seconds)
    return {"asked": total([p.get("asked") for p in work]),
            "generated": total([p.get("generated_tokens") for p in work]),
            "trained": total([p.get("trained_tokens") for p in work]),
            "read": total([p.get("read_tokens") for p in work]),
            "flops": total([flops_of(p) for p in work]),
            "seconds": total(stages.values())}


def judge_paths(folder):
    """What the trained judge of a seed has to pay for: samples and trainings that are there."""
    samples = [f"judge/{p.name}" for p in sorted(folder.glob("judge/samples_*.jsonl"))]
    models = [f"judge/{m}" for m in ("general", "safety", "model")]
    return samples + [m for m in models if (folder / m).exists()]


def prices(data):
    """{row: its price, mean over seeds}: what all methods share (weak, judge, sft), then each point
    of each method. A column is None where any of the seeds lacks it."""
    folders = {s: data["run"] / f"seed_{s}" for s in data["seeds"]}

    def mean(paths):
        """paths: {seed: paths to pay for}."""
        by_seed = [price_of(data, seed, found) for seed, found in paths.items()]
        sums = {c: total([p[c] for p in by_seed]) for c in PRICES}
        return {c: None if sums[c] is None else sums[c] / len(by_seed) for c in PRICES}

    found = {}
    for name in ("weak", "judge", "sft"):
        paths = {}
        for seed, folder in folders.items():
            if (folder / name).exists():
                paths[seed] = {"weak": ["weak/model", "weak/labels.jsonl"],
                               "judge": judge_paths(folder), "sft": ["sft/model_1"]}[name]
        if paths:
            found[name] = mean(paths)
    for m in methods_of(data):
        for k, point in rounds_of(data, m).items():
            found[point] = mean(dict.fromkeys(data["tests"][point], METHODS[m].price(k)))
    return found


def within(data, price, method, column, budget):
    """The last round of a method that costs at most `budget`; 0 where none does, None where a
    price is missing."""
    costs = {k: price[point][column] for k, point in rounds_of(data, method).items()}
    if budget is None or None in costs.values():
        return None
    return max((k for k, cost in costs.items() if cost <= budget), default=0)


def number(column, value):
    """A price as the table shows it."""
    if value is None:
        return ""
    return f"{value:.2e}" if column == "flops" else f"{value:,.0f}"
