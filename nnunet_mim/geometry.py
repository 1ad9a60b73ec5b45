"""Arithmetic of voxels, tokens and regions, which no other module does.

A view of level l shows the box `fov` of a crop, resized to `view_size` voxels. It is a grid of tokens of `token_size`
voxels, numbered in raster (C) order. The views of level l+1 tile the box. Such a tile is a region of one or several
tokens; regions are numbered in raster order too. All sizes are per axis, in array order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul

import numpy as np

from nnunet_mim.config import LevelConfig, PretrainConfig, Size3
from nnunet_mim.errors import MiMError


def ladder_levels(
    ladder: str,
    view_size: Size3,
    token_size: Size3,
    scale: Size3 = (2, 2, 2),
    mask_ratios: tuple[float, ...] = (0.5, 0.6, 0.5),
    n_children: tuple[int, ...] = (4, 4),
) -> tuple[LevelConfig, ...]:
    """The levels of a ladder, outermost first; three or fewer.

    A level is skipped if it would have a single region, because the next level would show the same box.

    Args:
        ladder: `published` (fields of view scale*V, V, p) or `native` (scale²*V, scale*V, V).
        view_size, token_size: V and p.
        scale: factor between levels per axis: 2, or 1 where the data is too thin.
        mask_ratios: per level.
        n_children: per edge, that is, pair of adjacent levels.
    """
    wide = _mul(scale, view_size)
    fovs = [wide, view_size, token_size] if ladder == "published" else [_mul(scale, wide), wide, view_size]
    kept = [i for i in range(3) if i == 2 or fovs[i] != fovs[i + 1]]
    return tuple(LevelConfig(fovs[i], mask_ratios[i], n_children[i] if i < 2 else 0) for i in kept)


@dataclass(frozen=True)
class Level:
    """Geometry of one level of a ladder; fields as in config.LevelConfig and PretrainConfig."""

    fov: Size3
    view_size: Size3
    token_size: Size3
    n_regions: Size3
    """regions per axis; (1, 1, 1) on the last level"""
    mask_ratio: float
    max_children: int

    @property
    def grid(self) -> Size3:
        """Number of tokens per axis."""
        return _div(self.view_size, self.token_size, "view size", "token size")

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def n_places(self) -> int:
        """Number of regions of a view, the places that a child can be cut from."""
        return math.prod(self.n_regions)

    @property
    def tokens_per_region(self) -> Size3:
        return _div(self.grid, self.n_regions, "token grid", "regions")

    @property
    def masks_regions(self) -> bool:
        """True if whole regions are masked, because they are larger than a token; False if single tokens are."""
        return self.max_children > 0 and math.prod(self.tokens_per_region) > 1

    @property
    def n_units(self) -> int:
        """Number of units of a view, regions or tokens, each of which is masked or visible as a whole."""
        return self.n_places if self.masks_regions else self.n_tokens

    @property
    def n_masked_units(self) -> int:
        if self.masks_regions:
            return max(1, math.floor(self.n_units * self.mask_ratio + 1e-6))
        return self.n_tokens - math.floor(self.n_tokens * (1 - self.mask_ratio) + 1e-6)

    @property
    def n_visible_tokens(self) -> int:
        per_unit = math.prod(self.tokens_per_region) if self.masks_regions else 1
        return self.n_tokens - self.n_masked_units * per_unit

    @property
    def n_children(self) -> int:
        return min(self.max_children, self.n_masked_units)

    @property
    def down(self) -> Size3:
        """Factor of area averaging per axis; 1 for native and enlarged views."""
        return tuple(max(f // v, 1) for f, v in zip(self.fov, self.view_size, strict=True))  # type: ignore[return-value]

    @cached_property
    def region_of_token(self) -> np.ndarray:
        """(n_tokens,) int64: raster number of the region of each token."""
        index = np.stack(np.meshgrid(*(np.arange(g) for g in self.grid), indexing="ij"), axis=-1)
        region = np.moveaxis(index // np.array(self.tokens_per_region), -1, 0)
        return np.ravel_multi_index(tuple(region), self.n_regions).reshape(-1)

    @cached_property
    def tokens_of_region(self) -> np.ndarray:
        """(n_places, tokens per region) int64: raster numbers of the tokens of each region, ascending."""
        return np.argsort(self.region_of_token, kind="stable").reshape(self.n_places, -1)

    @cached_property
    def region_offsets(self) -> np.ndarray:
        """(n_places, 3) int64: first voxel of each region, counted in the crop from the level's first voxel."""
        child_fov = np.array(_div(self.fov, self.n_regions, "field of view", "regions"))
        return np.stack(np.unravel_index(np.arange(self.n_places), self.n_regions), axis=-1) * child_fov

    @cached_property
    def token_bounds(self) -> tuple[np.ndarray, ...]:
        """Voxels of the level's box that tokens are made of: per axis (g, 2) int64, first and one past the last.

        Tokens of an enlarged view are made of the voxels that trilinear interpolation (align_corners=False) reads.
        """
        bounds = []
        for f, v, p, g in zip(self.fov, self.view_size, self.token_size, self.grid, strict=True):
            first, last = np.arange(g) * p, (np.arange(g) + 1) * p - 1
            if f >= v:
                low, high = first * (f // v), (last + 1) * (f // v)
            else:
                low = np.floor(np.clip((first + 0.5) * f / v - 0.5, 0, f - 1)).astype(np.int64)
                high = np.ceil(np.clip((last + 0.5) * f / v - 0.5, 0, f - 1)).astype(np.int64) + 1
            bounds.append(np.stack([low, high], axis=-1).astype(np.int64))
        return tuple(bounds)

    @property
    def token_extent(self) -> Size3:
        """Voxels of the crop per axis that a case needs for a token without padding in it."""
        return tuple(int((bounds[:, 1] - bounds[:, 0]).min()) for bounds in self.token_bounds)  # type: ignore[return-value]


def build_levels(levels: tuple[LevelConfig, ...], view_size: Size3, token_size: Size3) -> tuple[Level, ...]:
    """Check the levels of a ladder and compute their geometry.

    Raises:
        MiMError: a field of view is no multiple or integer fraction of the view, does not tile its parent's, or cuts
            tokens; or a mask leaves no token visible.
    """
    built = []
    for i, level in enumerate(levels):
        n_regions, n_children = (1, 1, 1), 0  # of the last level
        if i < len(levels) - 1:
            n_regions = _div(level.fov, levels[i + 1].fov, f"level {i + 1} field of view", "the next one")
            n_children = level.n_children
        for f, v in zip(level.fov, view_size, strict=True):
            if f % v and v % f:
                raise MiMError(
                    f"level {i + 1}: field of view {level.fov} and view {view_size} must divide on every axis "
                    "(the plans' order of axes)"
                )
        built.append(Level(level.fov, view_size, token_size, n_regions, level.mask_ratio, n_children))
        if built[-1].n_visible_tokens < 1:
            raise MiMError(
                f"level {i + 1}: mask ratio {level.mask_ratio} leaves none of {built[-1].n_tokens} tokens visible: "
                "lower it, or use larger views"
            )
    return tuple(built)


def level_number(position: int, n_levels: int) -> int:
    """Number (1 to 3) of the level at a position among n_levels: outer levels are the ones that are skipped."""
    return position + 4 - n_levels


def crop_start(shape: np.ndarray, size: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """First voxel of a box of `size` around `centre` of a volume; in the middle where the volume is smaller."""
    room = shape - size
    return np.where(room > 0, np.clip(np.rint(centre - size / 2), 0, np.maximum(room, 0)), room // 2).astype(np.int64)


def levels_of(config: PretrainConfig) -> tuple[Level, ...]:
    """Geometry of the levels of a run."""
    token_size = config.network.token_size
    ladder = ladder_levels(
        config.ladder, config.view_size, token_size, config.scale, config.mask_ratios, config.n_children
    )
    return build_levels(ladder, config.view_size, token_size)


MINIMUM_INSIDE = 0.2
"""share of the outermost view's tokens that must lie wholly in the median case; only those are learnt from"""
MAXIMUM_TOKENS, USUAL_TOKENS = 6, 4
"""tokens per axis of a view that is chosen for the data: maximum, and number for cases with room for one such view"""


def suitable_scale(ladder: str, view_size: Size3, median_shape: tuple[float, ...], token_size: Size3) -> Size3:
    """Choose the factor between levels per axis: 2, or 1 where the data is too thin.

    On average over the places of the median case in the outermost view, a fifth of that view's tokens must lie wholly
    in the case. As long as fewer do, the axes with the smallest share get 1; those that the case fills keep 2.

    Args:
        ladder: as in `ladder_levels`; `native` applies the scale twice.
        view_size, token_size: voxels per axis.
        median_shape: median voxels per axis of the cases.
    """

    def share_inside(n: float, v: int, p: int, s: int) -> float:
        """Share of the tokens along an axis that lie in n voxels."""
        return 1.0 if n >= v * s else max(0.0, n - p * s + 1) / (v * s)

    steps = 2 if ladder == "native" else 1
    scale = [2, 2, 2]
    while 2 in scale:
        axes = zip(median_shape, view_size, token_size, scale, strict=True)
        shares = [share_inside(n, v, p, s**steps) for n, v, p, s in axes]
        if math.prod(shares) >= MINIMUM_INSIDE:
            break
        smallest = min(share for share, s in zip(shares, scale, strict=True) if s == 2)
        if smallest == 1:
            break
        scale = [1 if s == 2 and share == smallest else s for share, s in zip(shares, scale, strict=True)]
    return tuple(scale)  # type: ignore[return-value]


def suitable_view(median_shape: tuple[float, ...], token_size: Size3) -> Size3:
    """Choose a view size such that two views, the `published` ladder's outermost box, are as long as the median case.

    Views have an even number of tokens per axis, at most six. They have four where the case has room for one such view
    but not for two.

    Args:
        median_shape: median voxels per axis of the cases.
        token_size: voxels per axis.
    """
    view = []
    for n, p in zip(median_shape, token_size, strict=True):
        tokens = 2 * int(1.2 * n / (4 * p))
        if tokens < USUAL_TOKENS and n >= 0.9 * USUAL_TOKENS * p:
            tokens = USUAL_TOKENS
        view.append(p * min(MAXIMUM_TOKENS, max(2, tokens)))
    return tuple(view)  # type: ignore[return-value]


def suitable_strides(spacing: tuple[float, ...]) -> tuple[Size3, ...]:
    """Choose strides of the four stages that make tokens about as long as wide.

    An axis is not downsampled while its voxels (spacing in mm) are more than twice as large as the smallest.
    """
    size, strides = list(spacing), []
    for _ in range(4):
        strides.append(tuple(1 if s > 2 * min(size) else 2 for s in size))
        size = [s * k for s, k in zip(size, strides[-1], strict=True)]
    return tuple(strides)  # type: ignore[return-value, arg-type]


def cumulative_strides(strides: Sequence[Sequence[int]]) -> list[Size3]:
    """Voxels of the image per voxel of each stage's map, per axis."""
    return [tuple(math.prod(s[axis] for s in strides[: i + 1]) for axis in range(3)) for i in range(len(strides))]  # type: ignore[misc]


def views_per_crop(levels: tuple[Level, ...]) -> tuple[int, ...]:
    """Number of views of each level in a crop, such as (1, 4, 16)."""
    return tuple(accumulate((level.n_children for level in levels[:-1]), mul, initial=1))


def _mul(a: Size3, b: Size3) -> Size3:
    return tuple(x * y for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _div(a: Size3, b: Size3, name_a: str, name_b: str) -> Size3:
    if any(x % y for x, y in zip(a, b, strict=True)):
        raise MiMError(f"{name_a} {a} is not divisible by {name_b} {b} (the plans' order of axes)")
    return tuple(x // y for x, y in zip(a, b, strict=True))  # type: ignore[return-value]
