"""What the report claims: comparisons of last rounds, and whether the paper's findings hold here.

"A beats B" is said only where every interval of `paired` excludes 0.
"""
from report.methods import METHODS, last_of, rounds_of
from report.statistics import over_seeds, paired, widest

# What to look for: (finding, a point or method, the one it is compared with, whether the first is
# to be better or no better). The first four are in the abstract of arXiv 2501.07886; its method
# rests on the others.
FINDINGS = [
    ("SFT on unreliable labels keeps some of its effect: better than the weak model that wrote "
     "them", "sft", "weak", True),
    ("DPO fails to improve on SFT", "dpo", "sft", False),
    ("ILR improves on SFT", "ilr", "sft", True),
    ("ILR improves on DPO", "ilr", "dpo", True),
    ("the comparisons matter: ILR improves on replacing labels at random", "ilr", "naive", True),
    ("what replaces a label matters: ILR improves on dropping it", "ilr", "filter", True)]


def claims(data):
    """[{a, b, and what `paired` finds of them}], a and b being names for the report.

    Compared are the last rounds of all methods with SFT; ILR's with every other method's and with
    DPO's best round; DPO's with DPO that reads its judge in another way.
    """
    last = {m: point for m, (_, point) in last_of(data).items()}
    names = {m: f"{METHODS[m].NAME} (round {k})" for m, (k, _) in last_of(data).items()}
    wanted = [(names[m], last[m], "SFT", "sft") for m in last]
    if "ilr" in last:
        wanted += [(names["ilr"], last["ilr"], names[m], last[m]) for m in last if m != "ilr"]
    if "ilr" in last and "dpo" in last:
        def accuracy(k):
            return over_seeds(data["tests"][f"dpo_{k}"])[0], k
        best = max(rounds_of(data, "dpo"), key=accuracy)
        if f"dpo_{best}" != last["dpo"]:
            name = f"DPO (round {best}, its best on these problems, a choice in DPO's favor)"
            wanted.append((names["ilr"], last["ilr"], name, f"dpo_{best}"))
    if "dpo" in last:
        wanted += [(names["dpo"], last["dpo"], names[m], last[m])
                   for m in ("dpo-release", "dpo-coin") if m in last]
    found = []
    for a, point, b, other in wanted:
        if difference := paired(data["answers"], point, other):
            found.append({"a": a, "b": b, **difference})
    return found


def sentence(claim):
    """A claim in words. The winner comes first where it is established; else the difference is
    said as it was asked for."""
    lost = claim["established"] and claim["mean"] < 0
    sign = -1 if lost else 1
    a, b = (claim["b"], claim["a"]) if lost else (claim["a"], claim["b"])
    if nothing_differs(claim):
        return f"- {a} against {b}: every problem is graded alike, which leaves no interval."
    if claim["established"]:
        what = f"**{a} beats {b} by {abs(claim['mean']):.1f} points**"
    else:
        what = f"{a} against {b}: {claim['mean']:+.1f} points, not established"
    said = []
    for name, key in (("bootstrap", "bootstrap"), ("Student's t", "student")):
        if claim[key]:
            low, high = sorted(sign * x for x in claim[key])
            said.append(f"{name} {low:+.1f} to {high:+.1f}")
    intervals = ", ".join(said)
    seeds = ""
    if len(claim["per_seed"]) > 1:
        seeds = "; by seed " + ", ".join(f"{sign * d:+.1f}" for d in claim["per_seed"])
    return f"- {what} ({intervals}{seeds})."


def nothing_differs(found):
    """Whether no problem is graded otherwise at one point than at the other. The bootstrap is then
    a single 0, which says nothing of other problems."""
    return not any(found["per_seed"]) and not any(found["bootstrap"])


def verdict(found, better):
    """Whether a finding holds. better: the first point is to be above the second; else it is not
    to be above it, which holds only where it is established to be below."""
    if not found["established"]:
        return "not established" if better else "no gain established"
    return "holds" if better == (found["mean"] > 0) else "does not hold"


def findings(data):
    """[(finding, its difference and interval here, verdict)] of the FINDINGS that the run can
    speak about. Compared are last rounds; the interval is the widest of the claims' intervals."""
    settings = data.get("settings", {})
    last = {"sft": "sft", **{m: point for m, (_, point) in last_of(data).items()}}
    # with noise or a clean start the weak model is not the one who wrote, or sorted, the labels
    if not settings.get("LABEL_NOISE") and settings.get("CLEAN_START") != "1":
        last["weak"] = "weak"
    rows = []
    for finding, a, b, better in FINDINGS:
        found = a in last and b in last and paired(data["answers"], last[a], last[b])
        if found:
            low, high = widest(found)
            difference = f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f})"
            if nothing_differs(found):
                difference = "+0.0 (no problem is graded otherwise)"
            rows.append((finding, difference, verdict(found, better)))
    return rows
