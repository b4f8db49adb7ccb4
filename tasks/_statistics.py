"""The intervals of evaluate.py's report: one sample, means over seeds, paired differences. Each names its source."""
import math

from tasks import InputError

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom (standard table); beyond 30 the normal's 1.96.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def wilson(mean, n):
    """95% interval (low, high) of a proportion `mean` of n problems (Wilson 1927)."""
    z = 1.959964
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(values):
    """(mean, half width of Student's 95% interval) of independent values; the half width is None for fewer than two."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, (T975[n - 2] if n - 2 < len(T975) else 1.96) * sd / math.sqrt(n)


def bootstrap(differences, draws=10_000):
    """95% interval (low, high) of the mean over seeds of a paired difference: percentiles of a two-stage bootstrap, which draws
    seeds with replacement and, within each drawn seed, its problems with replacement.

    differences: for each seed an array of its problems' differences. Percentiles: Efron & Tibshirani 1993, An Introduction to
    the Bootstrap, chapter 13; two stages: Davison & Hinkley 1997, Bootstrap Methods, section 3.8. To draw n problems is to
    draw how often each distinct difference comes up, and there are few of them: one multinomial draw in place of n indices.
    """
    import numpy as np
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(differences), size=(draws, len(differences)))
    means = np.empty(seeds.shape)
    for k, of_problems in enumerate(differences):
        values, counts = np.unique(of_problems, return_counts=True)
        drawn = seeds == k
        means[drawn] = rng.multinomial(len(of_problems), counts / len(of_problems), size=int(drawn.sum())) @ values / len(of_problems)
    return tuple(float(q) for q in np.percentile(means.mean(1), (2.5, 97.5)))


def seed_means(by_seed):
    """{seed: mean of its retrains}: retrains share their data, so only seeds count as independent."""
    return {seed: sum(shares) / len(shares) for seed, shares in by_seed.items()}


def over_seeds(by_seed):
    """`mean_interval` of the seeds' means, in percent."""
    return mean_interval([100 * v for v in seed_means(by_seed).values()])


def paired(answers, a, b):
    """Points a - b in percentage points, over the seeds that have both and problem by problem, retrains averaged first:
    {mean, per_seed, bootstrap, student (None for one seed), established}; None where no seed has both."""
    import numpy as np
    differences = []
    for seed in [s for s in answers.get(a, {}) if s in answers.get(b, {})]:
        retrains = answers[a][seed], answers[b][seed]
        ids = list(retrains[0][0])
        if any(c.keys() != set(ids) for side in retrains for c in side):
            raise InputError(f"seed {seed}: the graded answers of {a} and {b} are not of the same problems")
        x, y = (np.mean([[c[i] for i in ids] for c in side], axis=0) for side in retrains)
        differences.append(100 * (x - y))
    if not differences:
        return None
    per_seed = [float(d.mean()) for d in differences]
    mean, half = mean_interval(per_seed)
    intervals = bootstrap(differences), None if half is None else (mean - half, mean + half)
    return {"mean": mean, "per_seed": per_seed, "bootstrap": intervals[0], "student": intervals[1],
            "established": all(i[0] > 0 or i[1] < 0 for i in intervals if i)}


def widest(found):
    """(low, high): the outer ends of what `paired` says, both intervals together."""
    intervals = [i for i in (found["bootstrap"], found["student"]) if i]
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def reliability(calibrations):
    """[(mean prob_b, share of pairs whose B is better, half widths of its Wilson interval below and above)] of the ten bins of several
    `measure`s of compare.py together, of those that hold ten pairs or more."""
    found = []
    for same in zip(*calibrations):
        n = sum(count for _, _, count in same)
        if n >= 10:
            x, y = (sum(b[k] * b[2] for b in same if b[2]) / n for k in (0, 1))
            low, high = wilson(y, n)
            found.append((x, y, y - low, high - y))
    return found
