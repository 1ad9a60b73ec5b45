"""Paired comparison of two arms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class Comparison:
    """One arm minus its control. NaN where there is nothing to compute it from."""

    difference: float
    """mean over seeds and cases"""
    interval: tuple[float, float]
    """95 %, for other seeds and other cases; with one seed for other cases only"""
    bootstrap: tuple[float, float]
    """95 %, for other cases and these trainings"""
    p: float
    """Wilcoxon signed-rank test over cases, each the mean over seeds: for these trainings"""


def compare(arm: np.ndarray, control: np.ndarray, seed: int = 0) -> Comparison:
    """Compare two arms, (seeds, cases) of a metric each; cases with NaN are left out. `seed`: of the bootstrap."""
    differences = arm - control
    differences = differences[:, np.isfinite(differences).all(axis=0)]
    if not differences.size:
        return Comparison(math.nan, NO_INTERVAL, NO_INTERVAL, math.nan)
    by_case = differences.mean(axis=0)
    bootstrap = NO_INTERVAL
    if len(by_case) > 1:
        draws = np.random.default_rng(seed).integers(len(by_case), size=(RESAMPLES, len(by_case)))
        low, high = np.percentile(by_case[draws].mean(axis=1), [2.5, 97.5])
        bootstrap = float(low), float(high)
    return Comparison(float(differences.mean()), _t_interval(differences), bootstrap, wilcoxon(by_case))


def interval_text(interval: tuple[float, float], digits: int) -> str:
    """`[-1.20, +3.40]`, or `(no interval)` where there is none, as with a single case."""
    low, high = interval
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]" if math.isfinite(low + high) else "(no interval)"


def _t_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of a crossed design in which seeds and cases are both random.

    A bootstrap over three seeds is far too narrow (it holds the truth in about 80 %). The variance of the mean is
    estimated from the mean squares of seeds, cases and their interaction, with Satterthwaite's degrees of freedom; with
    two seeds that is still a little too narrow (about 90 %). `differences` are (seeds, cases), all finite. NaN with a
    single value.
    """
    seeds, cases = differences.shape
    mean = differences.mean()
    by_seed, by_case = differences.mean(axis=1), differences.mean(axis=0)
    if cases < 2 and seeds < 2:
        return NO_INTERVAL
    if seeds < 2 or cases < 2:
        values = by_case if seeds < 2 else by_seed
        variance, freedom = values.var(ddof=1) / len(values), len(values) - 1.0
    else:
        squares = cases * by_seed.var(ddof=1), seeds * by_case.var(ddof=1)
        rest = differences - by_seed[:, None] - by_case + mean
        noise = (rest**2).sum() / ((seeds - 1) * (cases - 1))
        variance = max(squares[0] + squares[1] - noise, *squares, noise) / (seeds * cases)
        spread = squares[0] ** 2 / (seeds - 1) + squares[1] ** 2 / (cases - 1)
        spread += noise**2 / ((seeds - 1) * (cases - 1))
        freedom = (variance * seeds * cases) ** 2 / spread if spread else 1.0
    half = stats.t.ppf(0.975, max(freedom, 1.0)) * math.sqrt(variance)
    return float(mean - half), float(mean + half)


def wilcoxon(by_case: np.ndarray) -> float:
    """p of the two-sided signed-rank test of (cases,) differences."""
    if len(by_case) < 2 or not by_case.any():
        return math.nan
    return float(stats.wilcoxon(by_case).pvalue)


def mean_sd(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds of the means over cases, and their standard deviation (NaN with one seed).

    `values` are (seeds, cases); NaN are left out.
    """
    means = np.array([row[np.isfinite(row)].mean() for row in values if np.isfinite(row).any()])
    if not means.size:
        return NO_INTERVAL
    return float(means.mean()), float(means.std(ddof=1)) if len(means) > 1 else math.nan
