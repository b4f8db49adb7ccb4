"""The methods that a report compares: the paper's three, then every file of baselines/.

A method has NAME, WHAT (what it is, in one sentence), STYLE (colour, marker and dash of its line)
and price(k): the paths below a seed's folder that "this method through round k" has to pay for.
baselines/__init__.py describes the same names. Its name in METHODS is that of its folders:
METHODS["ilr"] has the points ilr_1, ilr_2, ... of a run.

`data` is what `collect` of report/collect.py returns.
"""
import re

import baselines


class ILR:
    NAME = "ILR"
    WHAT = ("models of one half of the labels propose labels for the other; the judge's surest "
            "replace theirs, then the base model is retrained (arXiv 2501.07886)")
    STYLE = ("#12427e", "o", "-")

    @staticmethod
    def price(k):
        return [*baselines.cross_labelling(k), f"ilr_{k}/model_1"]


class DPO:
    NAME = "DPO"
    WHAT = ("on pairs of the policy's own samples, those that the judge is surest of "
            "(arXiv 2305.18290)")
    STYLE = ("#d9722e", "s", "--")

    @staticmethod
    def price(k):
        files = ("samples.jsonl", "comparisons.jsonl", "model_1")
        return [f"dpo_{j}/{file}" for j in range(1, k + 1) for file in files]


class Naive:
    NAME = "naive"
    WHAT = "a random share of the labels is replaced, no judge"
    STYLE = ("#2f7d4f", "^", "-.")

    @staticmethod
    def price(k):
        return [*baselines.cross_labelling(k, "naive"), f"naive_{k}/model_1"]


# In the order of tables and figures.
METHODS = {"ilr": ILR, "dpo": DPO, "naive": Naive,
           **{name: baselines.load(name) for name in baselines.names()}}


POINTS = ("weak", "sft", "gold")        # points of every run, of no method


def method_and_round(point):
    """("ilr", 2) of the point "ilr_2"; None for a name that is no point of a known method."""
    method, _, round_ = point.rpartition("_")
    if method in METHODS and re.fullmatch("[1-9][0-9]*", round_):
        return method, int(round_)
    return None


def points_of(data, method):
    """The points of a method in order, {round: name of the point}. Round 0 is the SFT start."""
    points = {0: "sft"} if "sft" in data["tests"] else {}
    for point in data["tests"]:
        name, round_ = method_and_round(point) or ("", 0)
        if name == method:
            points[round_] = point
    return dict(sorted(points.items()))


def rounds_of(data, method):
    """`points_of` without round 0."""
    return {k: point for k, point in points_of(data, method).items() if k}


def methods_of(data):
    """The methods that have a round in this run."""
    return [m for m in METHODS if rounds_of(data, m)]


def last_of(data):
    """{method: (round, point)} of the last round of each method."""
    return {m: list(points_of(data, m).items())[-1] for m in methods_of(data)}


def labels_of(data):
    """{method: {round: {seed: [share correct]}}} of the methods that write one label per problem.
    Round 0 is what SFT trains on; {} where that was not graded."""
    graded = data["labels"]
    start = next((graded[p] for p in ("noise", "clean", "weak") if p in graded), {})
    if not start:
        return {}
    found = {}
    for m in METHODS:
        refined = {k: graded[p] for k, p in points_of(data, m).items() if p in graded}
        if refined:
            found[m] = {0: start, **refined}
    return found or {"ilr": {0: start}}


def labels_name(method, rounds):
    """What tables and figures call the labels of a method of `labels_of`."""
    return f"{METHODS[method].NAME}'s labels" if max(rounds) else "first labels"
