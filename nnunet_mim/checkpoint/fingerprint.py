"""Fingerprints of CT images, which tell a copy although its voxels are not the same.

A SHA-256 misses a copy that was resampled, mirrored, padded, rounded or cropped by a few voxels. A fingerprint says
where tissue is, blurred, in coordinates that the tissue defines: on each axis the origin is its centre of mass and the
unit its standard deviation. So spacing and padding cancel. The description is an expansion in Hermite functions:
mirroring changes signs of its coefficients, a new order of the axes changes their order, and a small shift or stretch
along an axis, as a crop causes, adds known combinations of them.

Settings and thresholds were chosen on one half of the cases; `benchmarks/leak_guard.py` scores them on others.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Sequence

import numpy as np

from nnunet_mim.nnunet.intensities import Intensities

TISSUE_HU = ((-80.0, 150.0), (-10.0, 150.0))
"""Two measures of tissue, which rise from 0 to 1 between these. The first one tells patients apart better, the second
one fits into more CT windows: it counts only where one of two images lacks the first."""
THRESHOLDS = (0.99, 0.985)
"""similarities by the two measures from which on two images are probably the same: among 30,000 pairs of patients 0.2
are expected to reach them, by an exponential fit to the tail of the 3,655 pairs that they were chosen on"""
GATES = (0.96, 0.93)
"""similarities before shifts and stretches are allowed for; pairs below are not looked at. Copies had 0.977 and 0.949
or more (but for shifted HU in a narrow window, see SHIFTS_HU)"""
SHIFTS_HU = (-16.0, 16.0)
"""HU that a copy may have been moved by: the second measure
is tried with each, as a narrow CT window hides such copies"""
AIR_HU = 0.1
"""voxels so near to the lower end of a CT window have been cut off there: they may be air, and count as no tissue"""
DEGREE = 12
"""maximum total degree of the Hermite functions"""
SCALE = 2.5
"""argument of the Hermite functions at one standard deviation from the centre: larger is finer, and sees less far"""
MIN_MM = 60.0
"""an image that is shorter than this on an axis shows too little of a body to be compared"""
SAMPLES = 128
"""about so many voxels per axis are looked at; of larger images every second, third, … one"""
ROWS_AT_ONCE = 512
"""fingerprints that are compared with all others in one product of matrices"""

_DEGREES = np.array([d for d in itertools.product(range(DEGREE + 1), repeat=3) if sum(d) <= DEGREE])
N_COEFFICIENTS = len(_DEGREES)
FINGERPRINT_SHAPE = (len(TISSUE_HU), N_COEFFICIENTS)
_PLACES = {tuple(degrees): place for place, degrees in enumerate(_DEGREES.tolist())}
_AXIS_ORDERS = [
    np.array([_PLACES[tuple(degrees)] for degrees in _DEGREES[:, list(order)].tolist()])
    for order in itertools.permutations(range(3))
]
"""for each order of the axes, where the coefficients of the reordered image stand"""
_MIRRORINGS = np.array(
    [np.prod(np.where(_DEGREES % 2, signs, 1), axis=1) for signs in itertools.product((1, -1), repeat=3)], np.float32
)
"""(8, N_COEFFICIENTS) signs that mirroring gives the coefficients: odd functions change theirs"""
_LOWER = np.diag(np.sqrt(np.arange(1, DEGREE + 1) / 2), 1)
_CHANGES = (_LOWER - _LOWER.T, (_LOWER + _LOWER.T) @ (_LOWER - _LOWER.T))
"""matrices that give the coefficients of f' and x f', on one axis: how f changes when it is shifted or stretched"""


def fingerprint(voxels: np.ndarray, intensities: Intensities, spacing: Sequence[float]) -> np.ndarray:
    """Describe the first channel of a preprocessed case.

    Args:
        voxels: (C, X, Y, Z) normalised.
        intensities: how they were normalised.
        spacing: mm per axis.

    Returns:
        FINGERPRINT_SHAPE int8: coefficients for both measures of tissue. All 0 where one cannot be taken: the CT window
        lacks a part of it, the channel is no CT, or the image is too small or shows no tissue.
    """
    return _fingerprints(voxels, intensities, spacing, ())[0]


def fingerprints_of_copy(voxels: np.ndarray, intensities: Intensities, spacing: Sequence[float]) -> np.ndarray:
    """Describe a case that may be a copy of others, for `copied_from`; arguments as of `fingerprint`.

    Returns (1 + len(SHIFTS_HU), *FINGERPRINT_SHAPE) int8: its fingerprint, and it with each shift of the second one.
    """
    return _fingerprints(voxels, intensities, spacing, SHIFTS_HU)


def _fingerprints(
    voxels: np.ndarray, intensities: Intensities, spacing: Sequence[float], shifts: Sequence[float]
) -> np.ndarray:
    """(1 + len(shifts), *FINGERPRINT_SHAPE) int8: what `fingerprints_of_copy` returns, for these shifts."""
    rows = np.zeros((1 + len(shifts), *FINGERPRINT_SHAPE), np.int8)
    window = intensities.hounsfield_window()
    if window is None or min(n * mm for n, mm in zip(voxels.shape[1:], spacing, strict=True)) < MIN_MM:
        return rows
    std, mean = intensities.scale()
    steps = tuple(slice(None, None, max(1, round(n / SAMPLES))) for n in voxels.shape[1:])
    hounsfield = np.asarray(voxels[0][steps], np.float32) * np.float32(std) + np.float32(mean)
    for measure, (low, high) in enumerate(TISSUE_HU):
        if window[0] <= low and high <= window[1]:
            rows[:, measure] = _row((hounsfield - low) / (high - low))
            for row, shift in enumerate(shifts if measure == len(TISSUE_HU) - 1 else (), 1):
                tissue = (hounsfield - low - shift) / (high - low)
                if low + shift < window[0]:
                    tissue[hounsfield <= window[0] + AIR_HU] = 0
                rows[row, measure] = _row(tissue)
    return rows


def _row(tissue: np.ndarray) -> np.ndarray:
    """(N_COEFFICIENTS,) int8 of a measure of tissue (X, Y, Z), which is cut off below 0 and above 1."""
    coefficients = _expansion(tissue.clip(0, 1))
    return np.rint(coefficients * (127 / max(np.abs(coefficients).max(), 1e-9))).astype(np.int8)


def _expansion(tissue: np.ndarray) -> np.ndarray:
    """(N_COEFFICIENTS,) of tissue (X, Y, Z) in its own coordinates; zeros where it has no extent."""
    functions = []
    for axis in range(3):
        profile = tissue.sum(axis=tuple(other for other in range(3) if other != axis), dtype=np.float64)
        if not profile.sum() > 0:  # NaN too
            return np.zeros(N_COEFFICIENTS)
        places = np.arange(len(profile)) - np.average(np.arange(len(profile)), weights=profile)
        deviation = np.sqrt(np.average(places**2, weights=profile))
        if deviation < 1:
            return np.zeros(N_COEFFICIENTS)
        functions.append(_hermite_functions(SCALE * places / deviation).astype(np.float32))
    coefficients = functions[1] @ (tissue @ functions[2].T)  # (X, degree, degree)
    return np.tensordot(functions[0], coefficients, 1)[tuple(_DEGREES.T)]


def _hermite_functions(x: np.ndarray) -> np.ndarray:
    """(DEGREE + 1, len(x)) values of the orthonormal Hermite functions, by their recurrence."""
    values = [np.pi**-0.25 * np.exp(-(x**2) / 2)]
    values.append(np.sqrt(2) * x * values[0])
    for n in range(1, DEGREE):
        values.append(np.sqrt(2 / (n + 1)) * x * values[n] - np.sqrt(n / (n + 1)) * values[n - 1])
    return np.stack(values)


def copied_from(copies: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Find for every image the one that it is probably a copy of, also where its HU were shifted.

    Args:
        copies: (N, 1 + len(SHIFTS_HU), *FINGERPRINT_SHAPE) int8 of `fingerprints_of_copy`.
        known: (M, *FINGERPRINT_SHAPE) int8.

    Returns:
        (N,) places in `known`; -1 where there is none.
    """
    found = np.full(len(copies), -1)
    for rows in np.moveaxis(copies, 1, 0):
        found = np.where(found < 0, most_similar(rows, known), found)
    return found


def most_similar(first: np.ndarray, second: np.ndarray, only_earlier: bool = False) -> np.ndarray:
    """Find for every image its most similar one, whatever the order and direction of their axes.

    Args:
        first: (N, *FINGERPRINT_SHAPE) int8.
        second: (M, *FINGERPRINT_SHAPE) int8.
        only_earlier: compare image n of `first` with the first n of `second` only.

    Returns:
        (N,) places in `second`; -1 where no image is similar enough to be probably the same.
    """
    found, highest = np.full(len(first), -1), np.zeros(len(first))
    with_both = [np.asarray(rows[:, 0].any(axis=1)) for rows in (first, second)]
    for measure, (gate, threshold) in enumerate(zip(GATES, THRESHOLDS, strict=True)):
        ours, theirs = _unit_vectors(first[:, measure]), _unit_vectors(second[:, measure])
        for start, order in itertools.product(range(0, len(ours), ROWS_AT_ONCE), _AXIS_ORDERS):
            rows, turned = np.arange(start, min(start + ROWS_AT_ONCE, len(ours))), theirs[:, order]
            possible = np.abs(ours[rows]) @ np.abs(turned).T > gate  # a bound of all mirrorings
            if only_earlier:
                possible &= np.arange(len(theirs)) < rows[:, None]
            if measure > 0:
                possible &= ~(with_both[0][rows, None] & with_both[1])
            for row in rows[possible.any(axis=1)]:
                columns = np.flatnonzero(possible[row - start])
                values = _similarities(ours[row], turned[columns])
                best = values.argmax()
                if values[best] >= max(threshold, highest[row]):
                    found[row], highest[row] = columns[best], values[best]
    return found


def _similarities(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(K,) cosines of `one` (N_COEFFICIENTS,), shifted and stretched to fit best, and `others` (K, N_COEFFICIENTS),
    mirrored to fit best; all of length 1.
    """
    mirrored = others * _MIRRORINGS[((others * one) @ _MIRRORINGS.T).argmax(axis=1)]
    cube = np.zeros((DEGREE + 1,) * 3)
    cube[tuple(_DEGREES.T)] = one
    changes = [
        np.moveaxis(np.tensordot(matrix, cube, (1, axis)), 0, axis)[tuple(_DEGREES.T)]
        for matrix in _CHANGES
        for axis in range(3)
    ]
    directions, _ = np.linalg.qr(np.stack([one, *changes], axis=1))
    return np.linalg.norm(mirrored @ directions, axis=1)


def _unit_vectors(rows: np.ndarray) -> np.ndarray:
    """Float32 rows of length 1; rows of 0 stay as they are."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)


def to_text(rows: np.ndarray) -> str:
    """A fingerprint as text for JSON; empty for one that is 0."""
    return base64.b64encode(rows.tobytes()).decode() if rows.any() else ""


def from_text(text: str | None) -> np.ndarray:
    """Inverse of `to_text`; zeros also for what is no fingerprint of this version."""
    try:
        content = base64.b64decode(text or "", validate=True)
    except (binascii.Error, ValueError, TypeError):
        content = b""
    if len(content) != FINGERPRINT_SHAPE[0] * FINGERPRINT_SHAPE[1]:
        return np.zeros(FINGERPRINT_SHAPE, np.int8)
    return np.frombuffer(content, np.int8).reshape(FINGERPRINT_SHAPE)
