"""Logistic regression on standardised features, its strength and calibration chosen inside the training cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from nnunet_mim.classification.folds import grouped_split

STRENGTHS = tuple(10.0**power for power in range(-5, 2))
"""values of C, the inverse of the penalty, that are tried"""
INNER_FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression: probabilities are softmax((standardised features · coefficients + intercept) / T).
    """

    mean: np.ndarray
    """(F,)"""
    scale: np.ndarray
    """(F,)"""
    coefficients: np.ndarray
    """(F, K)"""
    intercept: np.ndarray
    """(K,)"""
    strength: float
    """C"""
    temperature: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(N, F) → (N, K), before calibration; missing features (NaN) are taken as the training cases' mean."""
        return standardised(features, self.mean, self.scale) @ self.coefficients + self.intercept

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Probe:
        """Inverse of `to_dict`. Raises ValueError for values that are not those of a logistic regression."""
        arrays = {name: np.array(stored[name], np.float64) for name in ("mean", "scale", "coefficients", "intercept")}
        found = cls(**arrays, strength=float(stored["strength"]), temperature=float(stored["temperature"]))
        mean, scale, coefficients, intercept = arrays.values()
        if mean.shape != scale.shape or coefficients.shape != (*mean.shape, *intercept.shape) or mean.ndim != 1:
            raise ValueError("its arrays do not fit each other")
        finite = math.isfinite(found.temperature) and all(np.isfinite(values).all() for values in arrays.values())
        if not finite or (scale <= 0).any() or found.temperature <= 0:
            raise ValueError("it holds NaN, infinite values, or a scale or temperature that is not above 0")
        return found


@dataclass(frozen=True)
class FittedProbe:
    """A probe, and what it says about its own training cases when they are left out."""

    probe: Probe
    held_out_logits: np.ndarray
    """(N, K) logits of each training case by a probe of the chosen strength that has not seen its patient"""


def fit_probe(
    features: np.ndarray, labels: np.ndarray, patients: Sequence[str], n_classes: int, seed: int
) -> FittedProbe:
    """Fit a probe on training cases.

    Strength: the lowest cross-entropy of inner folds that keep patients together. Temperature: fitted on the same
    held-out logits.

    Args:
        features: (N, F) float; NaN where missing.
        labels: (N,) classes, all known.
        patients: (N,).
        n_classes: K; a class may be absent.
        seed: of the inner folds.
    """
    n_patients = min(len(set(np.array(patients)[labels == k])) for k in np.unique(labels))
    inner = grouped_split(labels, patients, max(2, min(INNER_FOLDS, n_patients)), seed)
    held_out = np.zeros((len(STRENGTHS), len(labels), n_classes))
    for train, val in inner:
        design = Design.of(features[train])
        for i, strength in enumerate(STRENGTHS):
            held_out[i, val] = design.fit(labels[train], n_classes, strength).logits(features[val])
    losses = [cross_entropy(logits, labels) for logits in held_out]
    best = int(np.argmin(losses))
    temperature = fit_temperature(held_out[best], labels)
    probe = Design.of(features).fit(labels, n_classes, STRENGTHS[best], temperature)
    return FittedProbe(probe, held_out[best])


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T > 0 of the lowest cross-entropy of logits / T (arXiv 1706.04599): (N, K), (N,) → T.

    At most 20 and at least 1/20.
    """
    limit = np.log(20.0)
    fitted = minimize_scalar(
        lambda log_t: cross_entropy(logits / np.exp(log_t), labels), bounds=(-limit, limit), method="bounded"
    )
    return float(np.exp(fitted.x))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy (nats) of logits (N, K) and classes (N,)."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax of logits (N, K) / temperature."""
    return softmax(logits / temperature, axis=1)


def standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N, F) features minus mean over scale, float64; NaN becomes 0."""
    return np.nan_to_num((features.astype(np.float64) - mean) / scale, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Design:
    """Standardised features of training cases, rotated: the penalty does not see a rotation, and with fewer cases than
    features the problem becomes as small as the cases.
    """

    mean: np.ndarray
    """(F,)"""
    scale: np.ndarray
    """(F,) deviation; 1 where a feature does not vary"""
    basis: np.ndarray
    """(min(N, F), F) orthonormal rows"""
    rotated: np.ndarray
    """(N, min(N, F))"""

    @classmethod
    def of(cls, features: np.ndarray) -> Design:
        """From features (N, F), NaN where missing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column without any value
            mean = np.nan_to_num(np.nanmean(features, axis=0, dtype=np.float64))
            deviation = np.nan_to_num(np.nanstd(features, axis=0, dtype=np.float64))
        scale = np.where(deviation > 1e-9, deviation, 1.0)
        x = standardised(features, mean, scale)
        basis = np.linalg.svd(x, full_matrices=False)[2] if len(x) < x.shape[1] else np.eye(x.shape[1])
        return cls(mean, scale, basis, x @ basis.T)

    def fit(self, labels: np.ndarray, n_classes: int, strength: float, temperature: float = 1.0) -> Probe:
        """Fit classes (N,). A class that no case has gets half a case's share and no coefficients."""
        coefficients = np.zeros((self.basis.shape[1], n_classes))
        present = np.unique(labels)
        intercept = np.full(n_classes, np.log(0.5 / len(labels)))
        if len(present) == 1:
            intercept[present] = 0.0
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=strength, max_iter=300).fit(self.rotated, labels)
            # of two classes scikit-learn gives the second's row only
            rows = np.column_stack([model.coef_ @ self.basis, model.intercept_])
            rows = np.concatenate([np.zeros_like(rows), rows]) if len(present) == 2 else rows
            coefficients[:, present], intercept[present] = rows[:, :-1].T, rows[:, -1]
        return Probe(self.mean, self.scale, coefficients, intercept, strength, temperature)
