"""What the report claims: comparisons of points, and whether the paper's findings hold here.

Two methods are compared at the last round that both have, a method and SFT at the method's last.
"A beats B" is said only where every interval of `paired` excludes 0.
"""
from report.methods import METHODS, method_and_round, methods_of, rounds_of
from report.statistics import over_seeds, paired, widest

# What to look for: (finding, a method or point, the one it is compared with, whether the first is
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


# ---------------------------------------------------------------- which points are compared
def name_of(point):
    """'ILR (round 2)' of the point ilr_2, 'SFT' of sft."""
    if found := method_and_round(point):
        return f"{METHODS[found[0]].NAME} (round {found[1]})"
    return {"sft": "SFT", "weak": "the weak model"}[point]


def points_to_compare(data, a, b):
    """(point of a, point of b); a and b are methods, or the points sft and weak. Of two methods,
    the last round that both have; of a method and a point, the method's last. None where no seed
    has both."""
    of_methods = {m: rounds_of(data, m) for m in (a, b) if m in METHODS}
    rounds = set.intersection(*map(set, of_methods.values())) if of_methods else {0}
    for k in sorted(rounds, reverse=True):
        points = tuple(of_methods[x][k] if x in of_methods else x for x in (a, b))
        seeds = [set(data["tests"].get(point, ())) for point in points]
        if set.intersection(*seeds):
            return points
    return None


def unequal_rounds(data, points):
    """[(ILR's point, the other's, the other's name)] of the comparisons whose rounds differ: with
    DPO's best round, and of ILR's last round with a method that has fewer by its own definition.
    points: {method: what `points_to_compare` found for ILR and it}."""
    found = []
    if "dpo" in points:
        def accuracy(k):
            return over_seeds(data["tests"][f"dpo_{k}"])[0], k
        ilr, dpo = points["dpo"]
        best = max(rounds_of(data, "dpo"), key=accuracy)
        if f"dpo_{best}" != dpo:
            found.append((ilr, f"dpo_{best}", f"DPO (round {best}: the rounds differ; its best on "
                          "these problems, a choice in DPO's favor)"))
    for m, (ilr, point) in points.items():
        last = list(rounds_of(data, "ilr").values())[-1]
        if hasattr(METHODS[m], "ROUNDS") and last != ilr:
            name = name_of(point).replace(")", ": the rounds differ; it has no more)")
            found.append((last, point, name))
    return found


def compared(data, a, b):
    """What `paired` finds of two points, and `of`, the number of seeds with any answers. Where only
    one of several has both, nothing is established: no interval says anything of the others."""
    found = paired(data["answers"], a, b)
    if found:
        found["of"] = len({seed for by_seed in data["answers"].values() for seed in by_seed})
        found["established"] &= not len(found["per_seed"]) == 1 < found["of"]
    return found


def claims(data):
    """[{a, b, and what `paired` finds of them}], a and b being names for the report, with rounds.

    Compared are all methods with SFT; ILR with every other method; DPO with DPO that reads its
    judge in another way; and ILR with what `unequal_rounds` lists.
    """
    methods = methods_of(data)
    wanted = [points_to_compare(data, m, "sft") for m in methods]
    with_ilr = {m: points_to_compare(data, "ilr", m)
                for m in methods if "ilr" in methods and m != "ilr"}
    with_ilr = {m: points for m, points in with_ilr.items() if points}
    wanted += with_ilr.values()
    named = [(*points, name_of(points[1])) for points in wanted if points]
    named += unequal_rounds(data, with_ilr)
    if "dpo" in methods:
        readings = [points_to_compare(data, "dpo", m)
                    for m in ("dpo-release", "dpo-coin") if m in methods]
        named += [(*points, name_of(points[1])) for points in readings if points]
    found = []
    for point, other, name in named:
        if difference := compared(data, point, other):
            found.append({"a": name_of(point), "b": name, **difference})
    return found


# ---------------------------------------------------------------- in words
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
    return f"- {what} ({intervals}{seeds}{of_seeds(claim)})."


def of_seeds(found):
    """'; 1 of 2 seeds' where a difference lacks seeds."""
    n = len(found["per_seed"])
    return f"; {n} of {found['of']} seeds" if n < found.get("of", n) else ""


def nothing_differs(found):
    """Whether no problem is graded otherwise at one point than at the other. The bootstrap is then
    a single 0, which says nothing of other problems."""
    return not any(found["per_seed"]) and not any(found["bootstrap"])


# ---------------------------------------------------------------- the paper's findings
def verdict(found, better):
    """Whether a finding holds, in a few words. better: the first point is to be above the second;
    else it is not to be above it."""
    gains = found["mean"] > 0
    if better:
        said = "holds" if gains else "does not hold: worse"
        return said if found["established"] else "not established"
    said = "does not hold: gains" if gains else "holds: worse"
    return said if found["established"] else "no gain established"


# what the verdicts on DPO mean: a sentence for the pages
NO_GAIN = ("Of DPO the paper says that it does not improve on SFT. *No gain established* fits that "
           "and does not prove it: the gain may be as large as the interval's upper end. *Holds: "
           "worse* is said where DPO loses, *does not hold: gains* where it improves.")


def contrasts(data):
    """[(finding, point, other point, better)] of the FINDINGS that the run can speak about: both
    points are graded in some seed. The points are those of `points_to_compare`."""
    settings = data.get("settings", {})
    # with noise or a clean start the weak model is not the one who wrote, or sorted, the labels
    of_weak = not settings.get("LABEL_NOISE") and settings.get("CLEAN_START") != "1"
    found = []
    for finding, a, b, better in FINDINGS:
        points = points_to_compare(data, a, b)
        if points and (of_weak or b != "weak"):
            found.append((finding, *points, better))
    return found


def findings(data):
    """[(finding, what is compared with its difference and interval here, verdict)] of the FINDINGS
    that the run can speak about. The interval is the widest of the claims' intervals."""
    rows = []
    for finding, a, b, better in contrasts(data):
        found = compared(data, a, b)
        low, high = widest(found)
        difference = f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f}{of_seeds(found)})"
        if nothing_differs(found):
            difference = "+0.0 (no problem is graded otherwise)"
        rows.append((finding, difference, verdict(found, better)))
    return rows
