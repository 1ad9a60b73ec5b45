"""Tokens and the grid they are cut from, against slices."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.networks.token_layout import (
    grid_from_rows,
    grid_from_tokens,
    rows_from_grid,
    tokens_from_grid,
    voxel_rows,
)

small_grids = st.tuples(*[st.integers(1, 3)] * 3)


@given(n=st.integers(1, 2), grid=small_grids, token=small_grids, channels=st.integers(1, 3))
def test_tokens_are_in_c_order(n, grid, token, channels):
    size = [g * t for g, t in zip(grid, token, strict=True)]
    image = torch.arange(n * size[0] * size[1] * size[2] * channels).reshape(n, *size, channels)
    tokens = tokens_from_grid(image, token)
    for number, (i, j, k) in enumerate(itertools.product(*(range(g) for g in grid))):
        x, y, z = (slice(at * t, (at + 1) * t) for at, t in zip((i, j, k), token, strict=True))
        assert torch.equal(tokens[:, number], image[:, x, y, z])
    assert torch.equal(grid_from_tokens(tokens, grid), image)


@given(data=st.data(), grid=small_grids, token=small_grids, rim=st.integers(0, 2), channels=st.integers(1, 3))
def test_rows_of_some_tokens(data, grid, token, rim, channels):
    """Tokens written to their rows lie where slices say, all else is zero; reading the rows gives them back."""
    n_tokens = grid[0] * grid[1] * grid[2]
    n_visible = data.draw(st.integers(1, n_tokens))
    ids = torch.stack([torch.randperm(n_tokens)[:n_visible] for _ in range(2)])
    tokens = 1 + torch.rand(2, n_visible, *token, channels)

    wanted = torch.zeros(2, *(g * t + 2 * rim for g, t in zip(grid, token, strict=True)), channels)
    places = list(itertools.product(*(range(g) for g in grid)))
    for view, row in enumerate(ids.tolist()):
        for number, at in enumerate(row):
            x, y, z = (slice(rim + a * t, rim + (a + 1) * t) for a, t in zip(places[at], token, strict=True))
            wanted[view, x, y, z] = tokens[view, number]

    rows = voxel_rows(ids, grid, token, rim)
    found = grid_from_rows(tokens, rows, grid, rim)
    assert torch.equal(found, wanted)
    assert torch.equal(rows_from_grid(found, rows).view(tokens.shape), tokens)
