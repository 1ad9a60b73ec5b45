"""Paired comparison of two arms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """One arm minus its control."""

    difference: float
    """mean over seeds and cases"""
    low: float
    high: float
    """95 % interval by bootstrap"""
    p: float
    """Wilcoxon signed-rank test over cases, each the mean over seeds; NaN where it cannot be computed"""


def compare(arm: np.ndarray, control: np.ndarray, seed: int = 0) -> Comparison:
    """Compare two arms on the same seeds and cases.

    The interval resamples seeds and cases, both with replacement and independently of each other, since a training has
    luck and a case is hard for all seeds alike. With one seed it shows the spread over cases only.

    Args:
        arm, control: (seeds, cases) of a metric; NaN where there is none.
        seed: of the resampling.
    """
    differences = arm - control
    seeds, cases = differences.shape
    random = np.random.default_rng(seed)
    rows = random.integers(seeds, size=(RESAMPLES, seeds))
    columns = random.integers(cases, size=(RESAMPLES, cases))
    weights = np.array([np.bincount(r, minlength=seeds) for r in rows])  # how often each seed is drawn
    case_weights = np.array([np.bincount(c, minlength=cases) for c in columns])
    known, filled = np.isfinite(differences), np.nan_to_num(differences)
    totals, counts = (np.einsum("rs,sc,rc->r", weights, part, case_weights, optimize=True) for part in (filled, known))
    means = totals[counts > 0] / counts[counts > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return Comparison(float(np.nanmean(differences)), float(low), float(high), wilcoxon(differences))


def wilcoxon(differences: np.ndarray) -> float:
    """p of the two-sided signed-rank test over cases.

    Args:
        differences: (seeds, cases).
    """
    by_case = np.array([np.nanmean(case) for case in differences.T if np.isfinite(case).any()])
    if len(by_case) < 2 or not by_case.any():
        return float("nan")
    return float(stats.wilcoxon(by_case).pvalue)


def mean_sd(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds of the means over cases, and their standard deviation (NaN with one seed).

    Args:
        values: (seeds, cases).
    """
    means = np.nanmean(values, axis=1)
    return float(means.mean()), float(means.std(ddof=1)) if len(means) > 1 else float("nan")
