"""The methods that a report compares: what each is called, what it is, and what it cost.

What a stage cost stands beside what it made: MODEL/price.json of a training, OUT.jsonl.price of generated answers, and the
summary of comparisons. A file that is missing leaves a number out, and never a guess in its place.
"""
from tasks import read_json

# What a report knows of, in its order: {folder name: (name, what it is)}.
METHODS = {
    "ilr": ("ILR", "models of one half of the labels propose labels for the other; the judge's surest replace theirs, then the base model is "
                   "retrained (arXiv 2501.07886)"),
    "dpo": ("DPO", "on pairs of the policy's own samples, those that the judge is surest of (arXiv 2305.18290)"),
    "naive": ("naive", "a random share of the labels is replaced, no judge"),
    "dpo-labels": ("DPO-labels", "DPO on ILR's own pairs, label against proposal"),
    "sft-chosen": ("SFT-chosen", "SFT on what the judge chose of DPO's pairs, from SFT's model on"),
    "filter": ("filter", "labels that the judge rejects are dropped, nothing is added"),
    "rft": ("RFT", "accepted proposals stand beside the labels instead of replacing them (arXiv 2308.01825)"),
    "ensemble": ("ensemble", "the two half-models of round 1 vote at test time, no refinement"),
    "steer": ("steer", "SFT of labels and proposals conditioned on the judge's score, agreed labels without one, asked for the best at test time (arXiv 2310.05344)"),
    "spin": ("SPIN", "DPO of the demonstration over the policy's own sample, no comparisons (arXiv 2401.01335)"),
    "dpo-release": ("DPO-release", "DPO that reads the judge as the paper's release does, both of its prompts in one order"),
    "dpo-coin": ("DPO-coin", "DPO that tosses a coin in place of the judge")}
# What to look for: (finding, the point that is compared with the other, whether it is to be better or no better). The first four are the
# abstract's of arXiv 2501.07886; the rest is what its method stands on.
FINDINGS = [("SFT on unreliable labels keeps some of its effect: better than the weak model that wrote them", "sft", "weak", True),
            ("DPO fails to improve on SFT", "dpo", "sft", False),
            ("ILR improves on SFT", "ilr", "sft", True),
            ("ILR improves on DPO", "ilr", "dpo", True),
            ("the comparisons matter: ILR improves on replacing labels at random", "ilr", "naive", True),
            ("what replaces a label matters: ILR improves on dropping it", "ilr", "filter", True)]
CHAINS = ("dpo", "dpo-labels", "sft-chosen", "spin", "dpo-release", "dpo-coin")       # each round trains the policy of the one before
SOURCES = ("naive", "dpo", "spin", "dpo-release", "dpo-coin")      # make proposals or samples of their own; ILR makes the others', or DPO
PRICES = {"asked": "comparisons asked", "generated": "generated tokens", "trained": "trained tokens", "read": "read tokens",
          "flops": "FLOPs", "seconds": "seconds"}
# what costs something: a training, a file of generated answers, a file of comparisons; and what of it each does not do
ZEROS = {"model": ("asked", "generated_tokens"), "file": ("asked", "trained_tokens", "trained_weights"),
         "asked": ("generated_tokens", "trained_tokens", "trained_weights")}


def points_of(data, method):
    """The points of a method in order, {round: name}: the SFT start is round 0."""
    rounds = {int(p.rpartition("_")[2]): p for p in data["tests"] if p.rpartition("_")[0] == method and p.rpartition("_")[2].isdigit()}
    return dict(sorted({**({0: "sft"} if "sft" in data["tests"] else {}), **rounds}.items()))


def methods_of(data):
    return [m for m in METHODS if set(points_of(data, m)) - {0}]


def last_of(data):
    """{method: (round, point)} of the last round of each method."""
    return {m: list(points_of(data, m).items())[-1] for m in methods_of(data)}


def labels_of(data):
    """{method: {round: {seed: [share correct]}}} of the methods that refine labels; round 0 is what SFT trains on."""
    start = next((data["labels"][p] for p in ("noise", "clean", "weak") if p in data["labels"]), {})
    refined = {m: {k: data["labels"][p] for k, p in points_of(data, m).items() if p in data["labels"]} for m in METHODS}
    return {m: {0: start, **rounds} for m, rounds in refined.items() if rounds or m == "ilr"} if start else {}


def pieces(method, k):
    """What "METHOD through round k" needs that costs something: (kind, path, stage), each once.

    Those who train on labels need the cross-labelling of all rounds and the training of the last; chains of policies need all
    that they trained. Who reuses another's half-models, samples or comparisons (its source's) carries their cost.
    """
    source = method if method in SOURCES else "dpo" if method == "sft-chosen" else "ilr"
    parts = []
    for j in range(1, k + 1):
        folder = f"{source}_{j}"
        if source in CHAINS:
            parts.append(("file", f"{folder}/samples.jsonl", f"{folder}/sample"))
        else:
            parts += [("model", f"{folder}/half_{h}", f"{folder}/half_{h}") for h in (1, 2)]
            if method != "ensemble":
                parts += [("file", f"{folder}/proposals_{h}.jsonl", f"{folder}/propose") for h in (1, 2)]
        if method not in ("naive", "spin", "ensemble", "dpo-coin"):
            parts.append(("asked", folder, f"{folder}/compare"))
        if method == "sft-chosen" and j < k:        # DPO's policy of this round draws the next one's samples
            parts.append(("model", f"dpo_{j}/model_1", f"dpo_{j}/train"))
        if method in CHAINS or (j == k and method != "ensemble"):
            parts.append(("model", f"{method}_{j}/model_1", f"{method}_{j}/train"))
    return parts


def price_of(data, seed, parts):
    """{column: number, or None where a file that says it is missing} of one seed's pieces.

    FLOPs: a forward pass of N weights takes 2N a token, read, generated or trained on; training 2N more for the gradient of
    the activations and 2M for that of the M trained weights (Kaplan et al. 2020, arXiv 2001.08361, table 1: 6N where all are
    trained). Attention's own part, which grows with length, is left out.
    """
    rows, free = [], data["settings"].get("JUDGE") in ("oracle", "human")        # judges that read no tokens
    for kind, path, _ in parts:
        path = data["run"] / f"seed_{seed}" / path
        file = {"model": path / "price.json", "file": f"{path}.price", "asked": path / "comparisons.jsonl.summary"}[kind]
        p = {**dict.fromkeys([*ZEROS[kind], *(("read_tokens", "weights") if free and kind == "asked" else ())], 0), **read_json(file)}
        asked, generated, trained, read, n, m = (p.get(x) for x in (
            "asked", "generated_tokens", "trained_tokens", "read_tokens", "weights", "trained_weights"))
        flops = None if None in (generated, trained, read, n, m) else 2 * n * (read + generated + 2 * trained) + 2 * m * trained
        rows.append((asked, generated, trained, read, flops, 0))
    rows += [(0, 0, 0, 0, 0, data["seconds"].get(f"seed_{seed}/{stage}")) for stage in dict.fromkeys(s for _, _, s in parts)]
    return {c: None if None in column else sum(column) for c, column in zip(PRICES, zip(*rows))}


def prices(data):
    """{name of a row: its price}, mean over seeds: what all methods share, then each point of each method. A column is None
    where any of the seeds lacks it."""
    def mean(seeds, parts):
        found = [price_of(data, s, parts(s)) for s in seeds]
        return {c: None if any(p[c] is None for p in found) else sum(p[c] for p in found) / len(found) for c in PRICES}

    def judge(seed):
        folder = data["run"] / f"seed_{seed}/judge"
        return [*(("file", f"judge/{p.name}", f"judge/sample_{k % 2}") for k, p in enumerate(sorted(folder.glob("samples_*.jsonl")))),
                *(("model", f"judge/{m}", f"judge/{stage}") for m, stage in (
                    ("general", "train_general"), ("safety", "train_safety"), ("model", "train")) if (folder / m).exists())]

    def there(folder):
        return [s for s in data["seeds"] if (data["run"] / f"seed_{s}" / folder).exists()]

    shared = {"weak": ("weak", lambda s: [("model", "weak/model", "weak/train"), ("file", "weak/labels.jsonl", "weak/label")]),
              "judge": ("judge", judge), "sft": ("sft", lambda s: [("model", "sft/model_1", "sft/train")])}
    found = {name: mean(there(folder), parts) for name, (folder, parts) in shared.items() if there(folder)}
    return {**found, **{p: mean(data["tests"][p], lambda s: pieces(m, k)) for m in methods_of(data) for k, p in points_of(data, m).items() if k}}


def within(data, price, method, column, budget):
    """The last round of a method that costs at most `budget`; 0 where none does, None where a price is missing."""
    costs = {k: price[p][column] for k, p in points_of(data, method).items() if k}
    return None if budget is None or None in costs.values() else max((k for k, cost in costs.items() if cost <= budget), default=0)


def number(column, value):
    return "" if value is None else f"{value:.2e}" if column == "flops" else f"{value:,.0f}"
