"""The volume that a phantom is painted into, and the shapes it is painted with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

HALF = 144.0  # model mm from the middle of the volume to each of its faces
BEND = (2.5, 2.0, 2.5)  # standard deviation (model mm; z, y, x) of the displacement field; twice that is its maximum

Numbers = Sequence[float] | np.ndarray  # a point (x, y, z), radii: model mm
Value = float | np.ndarray  # HU, or a full volume of them
Box = tuple[slice, ...]
FULL: Box = (slice(None),) * 3


class Canvas:
    """The volume being painted: HU, labels, and every voxel's place (x, y, z) in the undeformed body in model mm."""

    def __init__(self, rng: Generator, shape: Sequence[int]) -> None:
        edges = [2 * HALF / n for n in shape]
        self.axes = [
            ((np.arange(n) + 0.5) * edge - HALF).astype(np.float32) for n, edge in zip(shape, edges, strict=True)
        ]
        self.soft = float(np.mean(edges))  # mm over which a surface is blended
        z, y, x = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        self.size = rng.uniform((0.97, 1.02, 0.94), (1.03, 1.22, 1.05))
        bend = [np.clip(_smooth_field(rng, 5, shape), -2, 2) * amount for amount in BEND]
        self.z, self.y, self.x = (
            axis / np.float32(s) + b for axis, s, b in zip((z, y, x), self.size, bend, strict=True)
        )
        self.rough = _smooth_field(rng, 14, shape)  # unit variance, about 20 mm: lumpy surfaces, streaks, bowel content
        self.hu = np.full(shape, -1000, np.float32)  # air
        self.labels = np.zeros(shape, np.uint8)

    def _box(self, low: Numbers, high: Numbers) -> Box:
        """Slices (z, y, x) around a structure between two corners (x, y, z) of the undeformed body."""
        margin = 2.5 * max(BEND) + self.soft
        spans = zip(self.axes, self.size, reversed([*low]), reversed([*high]), strict=True)
        return tuple(slice(*np.searchsorted(a, (lo * s - margin, hi * s + margin))) for a, s, lo, hi in spans)

    def paint(self, f: np.ndarray, value: Value, label: int | None = None, box: Box = FULL) -> None:
        """Paint the value and the label where `f` is negative, blended over one voxel."""
        weight = np.clip(0.5 - f / self.soft, 0, 1)
        hu = self.hu[box]
        hu += weight * ((value[box] if isinstance(value, np.ndarray) else value) - hu)
        if label is not None:
            self.labels[box][f < 0] = label

    def ellipsoid(
        self, centre: Numbers, radii: Numbers, turn: float = 0, lean: float = 0, lumps: float = 0, box: Box = FULL
    ) -> np.ndarray:
        """Ellipsoid, turned by `turn` rad about z, sheared by `lean` mm in x per mm of z, rough by `lumps` mm."""
        x, y, z = (axis[box] - c for axis, c in zip((self.x, self.y, self.z), centre, strict=True))
        x = x - lean * z
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        q = (u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (z / radii[2]) ** 2
        return (np.sqrt(q) - 1) * min(radii) + lumps * self.rough[box]

    def blob(
        self, centre: Numbers, radii: Numbers, value: Value, label: int | None = None, grow: float = 0, **shape: float
    ) -> None:
        """Paint an `ellipsoid`, `grow` mm larger than its radii; shape: its turn, lean and lumps."""
        wide = max(radii[:2]) + abs(shape.get("lean", 0)) * radii[2]
        reach = np.array([wide, wide, radii[2]]) + grow + 2 * shape.get("lumps", 0)
        box = self._box(np.asarray(centre) - reach, np.asarray(centre) + reach)
        self.paint(self.ellipsoid(centre, radii, **shape, box=box) - grow, value, label, box)

    def tube(self, points: Sequence[Numbers], radii: float | Numbers, value: Value, label: int | None = None) -> None:
        """Paint a chain of capsules through points (x, y, z), with one radius or one per point."""
        path = np.asarray(points, float)
        radius = np.broadcast_to(np.asarray(radii, float), len(path))
        for a, b, ra, rb in zip(path[:-1], path[1:], radius[:-1], radius[1:], strict=True):
            box = self._box(np.minimum(a, b) - max(ra, rb), np.maximum(a, b) + max(ra, rb))
            x, y, z = (axis[box] - o for axis, o in zip((self.x, self.y, self.z), a, strict=True))
            d = b - a
            t = np.clip((x * d[0] + y * d[1] + z * d[2]) / (d @ d), 0, 1)
            gap = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)
            self.paint(gap - (ra + t * (rb - ra)), value, label, box)


def oval(x: np.ndarray, y: np.ndarray, a: np.ndarray | float, b: np.ndarray | float, power: float) -> np.ndarray:
    """Implicit superellipse in the axial plane; its half-axes may change with height."""
    r = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power)
    return (r - 1) * np.minimum(a, b)


def _smooth_field(rng: Generator, cells: int, shape: Sequence[int]) -> np.ndarray:
    """Random field (Z, Y, X) float32 of mean 0 and variance 1, with `cells` bumps per axis at every shape."""
    field = rng.standard_normal((cells + 2,) * 3).astype(np.float32)
    for n in shape:  # each pass interpolates the leading axis and moves it to the end
        place = (np.arange(n) + 0.5) / n * cells + 0.5
        weights = np.exp(-0.5 * ((place[:, None] - np.arange(cells + 2)) / 0.6) ** 2)
        weights /= np.sqrt((weights**2).sum(1, keepdims=True))
        field = np.tensordot(field, weights.astype(np.float32), axes=(0, 1))
    return field
