"""Intervals of the report: one sample, means over seeds, paired differences. Each names its source.

Shapes: `answers` is {point: {seed: [{id: correct} of each retrain]}}; `by_seed` is
{seed: [share correct of each retrain]}. Functions of shares and differences say their unit.
"""
import math

from core.records import InputError

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom (standard table).
# Beyond 30: 1.96, the normal distribution's.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def wilson(mean, n):
    """95% interval (low, high) of a proportion `mean` of n problems (Wilson 1927)."""
    z = 1.959964
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at 0 and at 1 the mean is a border, which rounding would move past it
    return max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half))


def t975(df):
    """The 97.5% quantile of Student's t for df degrees of freedom (1 or more)."""
    return T975[df - 1] if df <= len(T975) else 1.96


def mean_interval(values):
    """(mean, half width of Student's 95% interval) of independent values.

    The half width is None for fewer than two values."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, t975(n - 1) * sd / math.sqrt(n)


def within_groups(groups):
    """Half width of the 95% interval of the mean of the groups' means, for these groups: what
    other values from the same groups would give. None where no group has two values.

    groups: R lists of n_r independent values, n_r at least 1. The groups are fixed, and the values
    of all scatter equally around their group's mean. Their pooled variance s^2 has sum(n_r - 1)
    degrees of freedom; the mean of the R means has the variance s^2 sum(1 / n_r) / R^2.
    Source: a linear combination of means in the one-way analysis of variance, Montgomery, Design
    and Analysis of Experiments, chapter 3.
    """
    df = sum(len(values) - 1 for values in groups)
    if not df:
        return None
    squares = sum((v - sum(values) / len(values)) ** 2 for values in groups for v in values)
    spread = math.sqrt(squares / df * sum(1 / len(values) for values in groups))
    return t975(df) * spread / len(groups)


def over_groups(groups):
    """(mean of the groups' means, half width of its 95% interval over groups): what other groups
    would give. The half width is None for one group.

    groups: as for `within_groups`, but drawn themselves: Student's t over their means. In the
    one-way random-effects model a group's mean has the variance s_b^2 + s_w^2 / n, and the scatter
    of the means estimates the sum: the interval covers values within groups too. It is exact for
    normal effects where all groups have equally many values.
    Source: Searle, Casella & McCulloch 1992, Variance Components, chapter 3.
    """
    return mean_interval([sum(values) / len(values) for values in groups])


def pooled(groups):
    """{mean, within, over, established} of the groups of `within_groups`; the half widths are None
    where they are not known. Established: the interval over groups excludes 0, and so does the one
    within them, if there is one. Where neither has a width, grades came out alike because they come
    in steps: that establishes nothing."""
    within, (mean, over) = within_groups(groups), over_groups(groups)
    known = [half for half in (within, over) if half is not None]
    return {"mean": mean, "within": within, "over": over,
            "established": over is not None and any(known)
            and all(abs(mean) > half for half in known)}


def bootstrap(differences, draws=10_000):
    """95% interval (low, high) of the mean over seeds of a paired difference.

    differences: one array per seed, with the difference of each problem. The interval is the
    percentiles of a two-stage bootstrap: seeds are drawn with replacement and, within each drawn
    seed, its problems with replacement. Percentiles: Efron & Tibshirani 1993, An Introduction to
    the Bootstrap, chapter 13. Two stages: Davison & Hinkley 1997, Bootstrap Methods, section 3.8.

    A problem's difference takes few distinct values, so n drawn problems are one multinomial draw
    of how often each value comes up, instead of n drawn indices.
    """
    import numpy as np
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(differences), size=(draws, len(differences)))
    means = np.empty(seeds.shape)
    for k, of_problems in enumerate(differences):
        n = len(of_problems)
        values, counts = np.unique(of_problems, return_counts=True)
        drawn = seeds == k
        means[drawn] = rng.multinomial(n, counts / n, size=int(drawn.sum())) @ values / n
    return tuple(float(q) for q in np.percentile(means.mean(1), (2.5, 97.5)))


def seed_means(by_seed):
    """{seed: mean of its retrains}. Retrains share their data: only seeds are independent."""
    return {seed: sum(shares) / len(shares) for seed, shares in by_seed.items()}


def over_seeds(by_seed):
    """`mean_interval` of the seeds' means, in percent."""
    return mean_interval([100 * v for v in seed_means(by_seed).values()])


def paired(answers, a, b):
    """Point a minus point b in percentage points, over the seeds that have both, problem by
    problem. A problem's grades are averaged over retrains first.

    Returns {mean, per_seed, bootstrap, student (None for one seed), established}, or None where no
    seed has both points. Raises InputError where the two were graded on different problems.
    """
    import numpy as np
    differences = []
    for seed in [s for s in answers.get(a, {}) if s in answers.get(b, {})]:
        retrains = answers[a][seed], answers[b][seed]
        ids = list(retrains[0][0])
        if any(c.keys() != set(ids) for side in retrains for c in side):
            raise InputError(
                f"seed {seed}: the graded answers of {a} and {b} are not of the same problems")
        x, y = (np.mean([[c[i] for i in ids] for c in side], axis=0) for side in retrains)
        differences.append(100 * (x - y))
    if not differences:
        return None
    per_seed = [float(d.mean()) for d in differences]
    mean, half = mean_interval(per_seed)
    student = None if half is None else (mean - half, mean + half)
    intervals = [bootstrap(differences)] + ([student] if student else [])
    return {"mean": mean, "per_seed": per_seed, "bootstrap": intervals[0], "student": student,
            "established": all(low > 0 or high < 0 for low, high in intervals)}


def widest(found):
    """(low, high): the outer ends of the intervals that `paired` found, together."""
    intervals = [i for i in (found["bootstrap"], found["student"]) if i]
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def reliability(calibrations):
    """The judge's calibration, pooled over several results of core/judge.py's `measure`.

    calibrations: of each, ten bins (mean prob_b, share of pairs whose B is better, pairs).
    Returns [(mean prob_b, share whose B is better, half widths of its Wilson interval below and
    above)] of the bins that hold ten pairs or more.
    """
    found = []
    for same in zip(*calibrations, strict=True):
        n = sum(count for _, _, count in same)
        if n < 10:
            continue
        filled = [(prob, share, count) for prob, share, count in same if count]
        x = sum(prob * count for prob, _, count in filled) / n
        y = sum(share * count for _, share, count in filled) / n
        low, high = wilson(y, n)
        found.append((x, y, y - low, high - y))
    return found


def average(summaries, key, error=False):
    """The mean of one number of several summaries {seed: summary}, over the seeds that have it;
    None where none has. error: the mean of 1 minus it."""
    values = [s[key] for s in summaries.values() if s.get(key) is not None]
    if error:
        values = [1 - value for value in values]
    return sum(values) / len(values) if values else None
