"""The trivial predictors against brute-force loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_mim.config import LevelConfig
from nnunet_mim.geometry import build_levels
from nnunet_mim.pretraining.monitoring.baselines import infill_tokens, trivial_losses
from nnunet_mim.pretraining.objective.views import nested_views


def one_level(token, grid, ratio, channels=1, n=2, seed=0):
    size = tuple(p * g for p, g in zip(token, grid, strict=True))
    levels = build_levels((LevelConfig(size, ratio, 0),), size, token)
    generator = torch.Generator().manual_seed(seed)
    crops = torch.randn(n, channels, *size, generator=generator)
    valid = torch.tensor([[0, s] for s in size]).repeat(n, 1, 1)
    return nested_views(crops, valid, torch.zeros(channels), levels, generator)[0]


@given(
    token=st.tuples(*[st.integers(1, 3)] * 3),
    grid=st.tuples(*[st.integers(1, 3)] * 3).filter(lambda g: max(g) > 1),
    ratio=st.sampled_from([0.3, 0.5]),
    channels=st.integers(1, 2),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=25)
def test_infill_matches_the_loop(reference, token, grid, ratio, channels, seed):
    view = one_level(token, grid, ratio, channels, seed=seed)
    found = infill_tokens(view)
    assert found.shape == view.masked_tokens().shape
    for n, m in [(0, 0), (1, view.ids_masked.shape[1] - 1)]:
        wanted = reference.losses.infill(view.images[n], token, view.ids_keep[n].tolist(), int(view.ids_masked[n, m]))
        np.testing.assert_allclose(found[n, m].numpy(), wanted, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 2**31 - 1), data=st.data())
@settings(max_examples=25)
def test_both_losses_match_the_loop_on_the_same_target_tokens(reference, seed, data):
    token = (2, 1, 3)
    view = one_level(token, (2, 2, 2), 0.5, 2, seed=seed)
    m = view.ids_masked.shape[1]
    is_target = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=2, max_size=2))
    )
    twin, tokens = reference.losses, view.masked_tokens()
    filled = []
    for n in range(2):
        keep = view.ids_keep[n].tolist()
        values = [twin.infill(view.images[n], token, keep, t) for t in view.ids_masked[n].tolist()]
        filled.append([torch.tensor(twin.normalized(v), dtype=torch.float64) for v in values])
    widths = [2.0, 3.0][: view.images.shape[1]]
    found = trivial_losses(view, is_target, torch.tensor(widths))
    assert set(found) == {"token_mean", "infill"}
    zero = torch.zeros_like(tokens)
    for name, prediction in (("token_mean", zero), ("infill", filled)):
        loss, error = found[name]
        assert loss == pytest.approx(float(twin.reconstruction(prediction, tokens, is_target)), rel=1e-4, abs=1e-6)
        expected = twin.voxel_error(prediction, tokens, is_target, widths) / max(1, int(is_target.sum()))
        assert error == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_infill_does_not_see_masked_voxels():
    view = one_level((2, 2, 2), (2, 3, 2), 0.5)
    before = infill_tokens(view)
    number = int(view.ids_masked[0, 0])
    at = np.unravel_index(number, view.level.grid)
    x, y, z = (slice(2 * int(i), 2 * int(i) + 2) for i in at)
    view.images[0, :, x, y, z] = torch.nan
    assert torch.equal(infill_tokens(view), before)


def test_infill_by_hand():
    """A row of three tokens of two voxels, the middle one masked: both neighbours are equally near."""
    view = None
    for seed in range(100):
        view = one_level((1, 1, 2), (1, 1, 3), 0.3, n=1, seed=seed)
        if view.ids_masked.tolist() == [[1]]:
            break
    view.images[0, 0, 0, 0] = torch.tensor([1.0, 2.0, 9.0, 9.0, 10.0, 20.0])
    assert infill_tokens(view).tolist() == [[[6.0, 6.0]]]


def test_infill_is_perfect_where_nothing_changes_along_the_row_of_tokens():
    view = one_level((2, 2, 2), (3, 1, 1), 0.3, n=1)
    pattern = torch.tensor([[1.0, 4.0], [2.0, 0.0]])
    view.images[0, 0] = pattern.repeat(6, 1, 1)
    every = torch.ones(view.ids_masked.shape, dtype=torch.bool)
    found = trivial_losses(view, every, torch.tensor([4.0]))
    assert found["infill"][0] < 1e-10
    assert found["token_mean"][0] == pytest.approx(7 / 8, rel=1e-4)
    assert found["token_mean"][1] == pytest.approx(torch.var(pattern, correction=0).item() / 16, rel=1e-4)
