"""Paired comparison: known answers, and coverage of the interval by simulation."""

import math

import numpy as np
import pytest

from nnunet_mim.benchmarking import statistics
from nnunet_mim.benchmarking.statistics import compare, mean_sd, wilcoxon


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


def test_a_constant_gain_has_no_spread():
    control = np.random.default_rng(0).random((3, 8))
    found = compare(control + 0.02, control)
    assert (found.difference, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))


def test_wilcoxon_by_hand():
    """Six cases, all better: both tails of 2^-6."""
    assert wilcoxon(np.arange(1.0, 7.0)[None]) == pytest.approx(2 / 2**6)
    assert math.isnan(wilcoxon(np.zeros((2, 6))))
    assert math.isnan(wilcoxon(np.ones((1, 1))))


def test_cases_without_a_value_are_left_out():
    arm, control = np.array([[0.5, np.nan, 0.7, 0.9]]), np.array([[0.4, 0.3, 0.6, np.nan]])
    assert compare(arm, control).difference == pytest.approx(0.1)


def test_the_interval_knows_that_trainings_have_luck():
    """Seeds shift all cases alike: 95 % of intervals hold the truth only if seeds are resampled too."""
    random, hits, narrow = np.random.default_rng(0), 0, 0
    for trial in range(120):
        luck, case = random.normal(0, 1, (8, 1)), random.normal(0, 1, (1, 14))
        differences = luck + case + random.normal(0, 0.3, (8, 14))
        found = compare(differences, np.zeros_like(differences), seed=trial)
        hits += found.low <= 0 <= found.high
        by_case = differences.mean(axis=0)
        half = 1.96 * by_case.std(ddof=1) / math.sqrt(14)
        narrow += abs(by_case.mean()) <= half
    assert hits >= 0.86 * 120
    assert hits > narrow


def test_mean_and_sd_over_seeds():
    assert mean_sd(np.array([[1.0, 3.0], [3.0, 5.0]])) == pytest.approx((3.0, math.sqrt(2)))
    mean, sd = mean_sd(np.array([[1.0, 3.0]]))
    assert mean == 2
    assert math.isnan(sd)
