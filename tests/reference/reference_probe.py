"""Slow twins of pretraining/probe.py: least squares on an augmented system, Dice of every threshold, interpolation."""

import math

import numpy as np


def ridge(features, targets, weights, strength):
    """Coefficients (F, K): rows √share · [standardised features, 1] → √share · targets, then rows √strength · b = 0."""
    share = weights / weights.sum()
    mean = np.average(features, axis=0, weights=share)
    deviation = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=share))
    n_features = features.shape[1]
    rows, sides = [], []
    for x, t, w in zip(features, targets, share, strict=True):
        rows.append(math.sqrt(w) * np.append((x - mean) / deviation, 1.0))
        sides.append(math.sqrt(w) * t)
    for f in range(n_features):
        row = np.zeros(n_features + 1)
        row[f] = math.sqrt(strength)
        rows.append(row)
        sides.append(np.zeros(targets.shape[1]))
    solution = np.linalg.lstsq(np.array(rows), np.array(sides), rcond=None)[0]
    return solution[:-1] / deviation[:, None]


def best_dice(scores, is_label):
    """The largest of the Dice of all thresholds, each counted by itself."""
    best = 0.0
    for threshold in set(scores):
        both = sum(1 for s, inside in zip(scores, is_label, strict=True) if s >= threshold and inside)
        chosen = sum(1 for s in scores if s >= threshold)
        best = max(best, 2 * both / (chosen + sum(is_label)))
    return best


def interpolated(grid, stride, voxel):
    """Value of a 3-D map at a voxel of the image; the map's voxel i lies at (i + 1/2) stride, edges are continued."""
    value = 0.0
    at = [(v + 0.5) / s - 0.5 for v, s in zip(voxel, stride, strict=True)]
    for corner in np.ndindex(2, 2, 2):
        weight, index = 1.0, []
        for a, c, n in zip(at, corner, grid.shape, strict=True):
            low = math.floor(a)
            weight *= a - low if c else 1 - (a - low)
            index.append(min(max(low + c, 0), n - 1))
        value += weight * grid[tuple(index)]
    return value
