"""The learning-rate schedule by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.pretraining.step import learning_rates


def test_by_hand():
    rates = learning_rates(iterations=10, peak=2.0, warmup_fraction=0.2)
    falling = [1 + math.cos(math.pi * k / 8) for k in range(8)]  # from 2 towards 0 in the 8 steps after the warm-up
    np.testing.assert_allclose(rates, [1.0, 2.0, *falling], rtol=1e-12)


def test_published_proportions():
    rates = learning_rates(2000, 5e-4, 0.05)
    assert len(rates) == 2000
    assert rates[99] == pytest.approx(5e-4)
    assert rates[49] == pytest.approx(2.5e-4)
    assert rates[100 + 950] == pytest.approx(2.5e-4)  # half way down
    assert 0 < rates[-1] < 5e-4 * 1e-5


@given(iterations=st.integers(1, 300), fraction=st.floats(0, 0.9))
def test_one_peak_first_step_learns_last_is_smallest(iterations, fraction):
    rates = learning_rates(iterations, 3e-4, fraction)
    assert rates.shape == (iterations,)
    assert (rates > 0).all()
    assert rates.max() == pytest.approx(3e-4)
    warmup = int((rates > 3e-4 * (1 - 1e-12)).argmax()) + 1  # steps up to the first at the peak
    assert abs(warmup - max(1, iterations * fraction)) <= 0.5
    np.testing.assert_allclose(rates[:warmup], 3e-4 * np.arange(1, warmup + 1) / warmup, rtol=1e-12)  # a straight line
    assert (np.diff(rates[warmup:]) < 0).all()
