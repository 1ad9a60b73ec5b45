"""Schedules as arrays indexed by iteration, so that a resumed run needs no state of them."""

from __future__ import annotations

import numpy as np


def learning_rates(iterations: int, peak: float, warmup_fraction: float) -> np.ndarray:
    """Linear warm-up to `peak`, then a half cosine to 0.

    Args:
        iterations: optimiser steps of the whole run.
        peak: absolute learning rate at the end of the warm-up.
        warmup_fraction: share of the steps spent in warm-up (at least one step).

    Returns:
        (iterations,) float64; the first step already learns, the last one is above 0.
    """
    warmup = max(1, round(iterations * warmup_fraction))
    step = np.arange(iterations)
    rising = peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, iterations - warmup)
    return np.where(step < warmup, rising, peak * 0.5 * (1 + np.cos(np.pi * progress)))
