"""Paired comparison: known answers, and coverage of the intervals by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from nnunet_mim.benchmarking import statistics
from nnunet_mim.benchmarking.statistics import _t_interval, compare, interval_text, mean_sd, wilcoxon


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)


def test_a_constant_gain_has_no_spread():
    control = np.random.default_rng(0).random((3, 8))
    found = compare(control + 0.02, control)
    assert found.difference == pytest.approx(0.02)
    assert found.interval == pytest.approx((0.02, 0.02))
    assert found.bootstrap == pytest.approx((0.02, 0.02))


def test_a_single_case_has_a_difference_and_no_interval():
    found = compare(np.array([[0.7]]), np.array([[0.5]]))
    assert found.difference == pytest.approx(0.2)
    assert [interval_text(bounds, 1) for bounds in (found.interval, found.bootstrap)] == ["(no interval)"] * 2
    assert interval_text((-1.25, 3.5), 2) == "[-1.25, +3.50]"


def test_wilcoxon_by_hand():
    """Six cases, all better: both tails of 2^-6."""
    assert wilcoxon(np.arange(1.0, 7.0)) == pytest.approx(2 / 2**6)
    assert math.isnan(wilcoxon(np.zeros(6)))
    assert math.isnan(wilcoxon(np.ones(1)))


def test_cases_without_a_value_are_left_out():
    arm, control = np.array([[0.5, np.nan, 0.7, 0.9]]), np.array([[0.4, 0.3, 0.6, np.nan]])
    assert compare(arm, control).difference == pytest.approx(0.1)
    nothing = compare(np.array([[np.nan]]), np.array([[0.3]]))
    assert math.isnan(nothing.difference)
    assert math.isnan(nothing.p)


def test_with_one_seed_it_is_the_t_interval_over_cases():
    values = np.random.default_rng(0).normal(1, 2, (1, 9))
    low, high = stats.t.interval(0.95, 8, values.mean(), values.std(ddof=1) / 3)
    assert _t_interval(values) == pytest.approx((low, high))
    assert _t_interval(values.T) == pytest.approx((low, high)), "and over seeds with one case"
    assert all(map(math.isnan, _t_interval(values[:, :1])))


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize(("luck", "hardness", "noise"), [(1.0, 0.3, 0.3), (0.3, 1.0, 0.3), (0.1, 0.1, 1.0)])
def test_the_interval_holds_the_truth_in_95_percent(seeds, luck, hardness, noise):
    """Trainings have luck, cases are hard, and both together have some noise. With two seeds it is about 90 %."""
    random, trials = np.random.default_rng(seeds), 400
    hits = 0
    for _ in range(trials):
        parts = random.normal(0, luck, (seeds, 1)), random.normal(0, hardness, (1, 14))
        low, high = _t_interval(sum(parts) + random.normal(0, noise, (seeds, 14)))
        hits += low <= 0 <= high
    assert hits >= (0.88 if seeds == 2 else 0.91) * trials


def test_a_bootstrap_over_cases_does_not_know_that_trainings_have_luck():
    random, hits = np.random.default_rng(0), np.zeros(2)
    for trial in range(200):
        differences = random.normal(0, 1, (3, 1)) + random.normal(0, 0.3, (3, 14))
        found = compare(differences, np.zeros_like(differences), seed=trial)
        hits += [low <= 0 <= high for low, high in (found.interval, found.bootstrap)]
    assert hits[0] > 0.9 * 200 > 0.5 * 200 > hits[1]


def test_mean_and_sd_over_seeds():
    """Of one seed the mean over the cases that have a value, as nnU-Net's: 2 and 3."""
    assert mean_sd(np.array([[1.0, 3.0, np.nan], [3.0, 5.0, 1.0]])) == pytest.approx((2.5, math.sqrt(0.5)))
    mean, sd = mean_sd(np.array([[1.0, 3.0]]))
    assert mean == 2
    assert math.isnan(sd)
