"""Slow twins of geometry, masks and views: voxel by voxel, in loops, from sections 1 and 4 of the project's design.

Source of every rule: the tables "ladder" and "number" of the design (MiM, arXiv 2404.15580).
"""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np


def ladder(name, view_size, token_size, scale):
    """[(level number 1..3, field of view)], outermost first; a level that would have a single region is left out."""
    fovs = []
    for number in (1, 2, 3):
        fov = []
        for axis in range(3):
            v, p, s = view_size[axis], token_size[axis], scale[axis]
            if name == "published":
                fov.append({1: s * v, 2: v, 3: p}[number])
            else:
                fov.append({1: s * s * v, 2: s * v, 3: v}[number])
        fovs.append(tuple(fov))
    kept = []
    for number in (1, 2, 3):
        if number < 3 and fovs[number - 1] == fovs[number]:
            continue
        kept.append((number, fovs[number - 1]))
    return kept


@functools.cache
def raster(counts):
    """All (i, j, k) of a lattice in C order: the last axis runs fastest."""
    return list(itertools.product(*(range(n) for n in counts)))


def divide(a, b):
    for x, y in zip(a, b, strict=True):
        assert x % y == 0, (a, b)
    return tuple(x // y for x, y in zip(a, b, strict=True))


def tokens_of_regions(view_size, token_size, n_regions):
    """[[token numbers] of every region], by looking where in the view each token's first voxel lies."""
    grid = divide(view_size, token_size)
    extent = divide(view_size, n_regions)
    regions = [[] for _ in raster(n_regions)]
    for token, position in enumerate(raster(grid)):
        corner = [position[a] * token_size[a] for a in range(3)]
        at = tuple(corner[a] // extent[a] for a in range(3))
        regions[raster(n_regions).index(at)].append(token)
    return regions


def n_visible_tokens(view_size, token_size, n_regions, mask_ratio, is_last):
    """Visible tokens and masked units of one view."""
    ratio = Fraction(str(mask_ratio))
    n_tokens = len(raster(divide(view_size, token_size)))
    regions = tokens_of_regions(view_size, token_size, n_regions)
    if not is_last and len(regions[0]) > 1:
        masked_regions = max(1, math.floor(len(regions) * ratio))
        return n_tokens - masked_regions * len(regions[0]), masked_regions
    visible = math.floor(n_tokens * (1 - ratio))
    return visible, n_tokens - visible


@functools.cache
def weights_1d(fov, size):
    """(size, fov) exact weights: how much each voxel of the box contributes to each voxel of the view.

    Down: area average over fov/size voxels. Up: linear interpolation between voxel centres, align_corners=False, the
    outermost centres extended to the edge.
    """
    rows = []
    for i in range(size):
        row = [Fraction(0)] * fov
        if fov >= size:
            factor = fov // size
            for j in range(i * factor, (i + 1) * factor):
                row[j] = Fraction(1, factor)
        else:
            at = (Fraction(2 * i + 1, 2)) * Fraction(fov, size) - Fraction(1, 2)
            at = min(max(at, Fraction(0)), Fraction(fov - 1))
            low = math.floor(at)
            row[low] += 1 - (at - low)
            if at > low:
                row[low + 1] += at - low
        rows.append(row)
    return rows


def resize(box, view_size):
    """(C, *fov) float64 → (C, *view_size), one axis after the other, one output plane after the other."""
    for axis in range(3):
        planes = []
        for row in weights_1d(box.shape[1 + axis], view_size[axis]):
            plane = 0.0
            for j, w in enumerate(row):
                if w:
                    plane = plane + float(w) * np.take(box, j, axis=1 + axis)
            planes.append(plane)
        box = np.stack(planes, axis=1 + axis)
    return box


def fill_padding(crop, valid, fill):
    """(C, X, Y, Z) with every voxel outside [valid[:, 0], valid[:, 1]) set to the fill value of its channel."""
    filled = np.array(crop, dtype=np.float64)
    for x, y, z in raster(crop.shape[1:]):
        inside = all(valid[a][0] <= at < valid[a][1] for a, at in enumerate((x, y, z)))
        if not inside:
            for c in range(crop.shape[0]):
                filled[c, x, y, z] = fill[c]
    return filled


def view(crop, offset, fov, view_size):
    """Cut the box (C, *fov) at `offset` out of one crop and resize it."""
    box = np.asarray(crop, dtype=np.float64)
    for axis in range(3):
        assert 0 <= offset[axis] <= crop.shape[1 + axis] - fov[axis], "a box must lie inside its crop"
        box = np.take(box, range(offset[axis], offset[axis] + fov[axis]), axis=1 + axis)
    return resize(box, view_size)


def token_voxels(image, token_size, token):
    """Voxels of one token of a view (C, X, Y, Z): C order of its voxels, channel last. A plain list."""
    grid = divide(image.shape[1:], token_size)
    position = raster(grid)[token]
    values = []
    for step in raster(tuple(token_size)):
        at = [position[a] * token_size[a] + step[a] for a in range(3)]
        for c in range(image.shape[0]):
            values.append(image[c, at[0], at[1], at[2]])
    return values


def padding_indicator(crop_size, valid):
    """(1, *crop_size) 1 on voxels outside the volume, 0 inside."""
    return fill_padding(np.zeros((1, *crop_size)), valid, [1.0])


def padded_tokens(indicator, offset, fov, view_size, token_size):
    """[bool per token]: the indicator of padding is resized like the image; a token that holds any of it is padded."""
    seen = view(indicator, offset, fov, view_size)
    grid = divide(view_size, token_size)
    return [max(token_voxels(seen, token_size, t)) > 0 for t in range(len(raster(grid)))]


def is_all_padding(indicator, offset, fov):
    """Whether no voxel of the box lies inside the volume."""
    return all(indicator[(0, *(offset[a] + step[a] for a in range(3)))] == 1 for step in raster(tuple(fov)))


def child_offset(parent_offset, parent_fov, n_regions, place):
    """First crop voxel of the box of a child cut from region `place` of its parent."""
    extent = divide(parent_fov, n_regions)
    at = raster(tuple(n_regions))[place]
    return tuple(parent_offset[a] + at[a] * extent[a] for a in range(3))
