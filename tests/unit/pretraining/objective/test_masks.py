"""Masks: how many, of what shape, where children come from, and that nothing but the generator decides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.config import LevelConfig, PretrainConfig
from nnunet_mim.geometry import build_levels, ladder_levels, levels_of
from nnunet_mim.pretraining.objective.masks import mask_of, random_masks

CPU = torch.device("cpu")


@st.composite
def ladders(draw):
    """Levels of a random ladder, with the views' sizes."""
    token = draw(st.tuples(*[st.integers(1, 3)] * 3))
    view = tuple(2 * p * draw(st.integers(1, 2)) for p in token)
    ratios = tuple(draw(st.sampled_from([0.25, 0.4, 0.5, 0.6, 0.75])) for _ in range(3))
    levels = ladder_levels(
        draw(st.sampled_from(["published", "native"])), view, token, draw(st.tuples(*[st.sampled_from([1, 2])] * 3)),
        ratios, (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
    )  # fmt: skip
    return build_levels(levels, view, token)


def draw_masks(n, level, seed):
    return random_masks(n, level, CPU, torch.Generator().manual_seed(seed))


@given(levels=ladders(), n=st.integers(1, 4), seed=st.integers(0, 2**31 - 1))
def test_masks_follow_the_rules(reference, levels, n, seed):
    twin = reference.geometry
    for number, level in enumerate(levels):
        last = number == len(levels) - 1
        keep, masked, places = draw_masks(n, level, seed)
        assert keep.dtype == masked.dtype == places.dtype == torch.int64
        regions = twin.tokens_of_regions(level.view_size, level.token_size, level.n_regions)
        visible, masked_units = twin.n_visible_tokens(
            level.view_size, level.token_size, level.n_regions, level.mask_ratio, last
        )
        n_children = 0 if last else min(level.max_children, masked_units)
        assert places.shape == (n, n_children)
        for row in range(n):
            kept, hidden = keep[row].tolist(), masked[row].tolist()
            assert sorted(kept + hidden) == list(range(level.n_tokens))  # every token once
            assert kept == sorted(kept)
            assert hidden == sorted(hidden)
            assert len(kept) == visible
            if not last and len(regions[0]) > 1:  # whole regions
                whole = [set(region) <= set(hidden) for region in regions]
                assert all(w or not set(region) & set(hidden) for w, region in zip(whole, regions, strict=True))
                assert sum(whole) == masked_units
            children = places[row].tolist()
            assert len(set(children)) == n_children  # distinct
            for place in children:
                assert set(regions[place]) <= set(hidden)  # in masked places only


@pytest.mark.parametrize(("scale", "masked"), [((2, 2, 2), 4), ((1, 2, 2), 2), ((1, 1, 2), 1)])
def test_half_of_the_regions_rounded_down_at_least_one(scale, masked):
    level = levels_of(PretrainConfig(scale=scale))[0]
    keep, _, places = draw_masks(5, level, 0)
    assert keep.shape[1] == level.n_tokens - masked * level.n_tokens // math.prod(scale)
    assert places.shape[1] == min(4, masked)


def test_three_regions_mask_one_and_one_half_is_one():
    levels = build_levels((LevelConfig((12, 4, 4), 0.5, 4), LevelConfig((4, 4, 4), 0.5, 0)), (12, 4, 4), (2, 2, 2))
    keep, masked, places = draw_masks(2, levels[0], 0)
    assert (keep.shape[1], masked.shape[1], places.shape[1]) == (16, 8, 1)


def test_the_same_generator_state_gives_the_same_masks():
    level = levels_of(PretrainConfig())[1]
    first, again, other = draw_masks(3, level, 7), draw_masks(3, level, 7), draw_masks(3, level, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_masks_do_not_touch_the_global_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    draw_masks(3, levels_of(PretrainConfig())[0], 7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [0, 1])
def test_every_place_is_masked_and_cut_equally_often(number):
    level = levels_of(PretrainConfig(view_size=(64, 64, 64)))[number]
    n = 4000
    _, masked, places = draw_masks(n, level, 0)
    share = mask_of(masked, level.n_tokens).double().mean(dim=0)
    expected = 1 - level.n_visible_tokens / level.n_tokens
    deviation = math.sqrt(expected * (1 - expected) / n)
    assert (share - expected).abs().max() < 5 * deviation
    cuts = torch.bincount(places.flatten(), minlength=level.n_places) / n
    chance = level.n_children / level.n_places
    assert (cuts - chance).abs().max() < 5 * math.sqrt(chance * (1 - chance) / n)
    for child in range(level.n_children):  # each child on its own, not only all together
        one = torch.bincount(places[:, child], minlength=level.n_places) / n
        assert (one - 1 / level.n_places).abs().max() < 5 / math.sqrt(n * level.n_places)


def test_views_are_masked_independently():
    keep, _, _ = draw_masks(50, levels_of(PretrainConfig())[1], 0)
    assert len({tuple(row) for row in keep.tolist()}) == 50


def test_mask_of_marks_masked_tokens_true():
    assert mask_of(torch.tensor([[0, 2], [3, 1]]), 4).tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]


@given(
    levels=ladders(), n=st.integers(1, 4), seed=st.integers(0, 2**31 - 1), share=st.sampled_from([0.0, 0.3, 0.7, 1.0])
)
def test_places_to_avoid_come_last_and_leave_the_mask_alone(levels, n, seed, share):
    for level in levels[:-1]:
        avoid = torch.rand(n, level.n_units, generator=torch.Generator().manual_seed(seed)) < share
        generator = torch.Generator().manual_seed(seed)
        keep, masked, places = random_masks(n, level, CPU, generator, avoid)
        plain_keep, plain_masked, plain_places = draw_masks(n, level, seed)
        assert torch.equal(keep, plain_keep)
        assert torch.equal(masked, plain_masked)
        assert places.shape == plain_places.shape
        for row in range(n):
            hidden = {int(level.region_of_token[t]) for t in masked[row].tolist()}
            good = [place for place in hidden if not avoid[row, place]]
            chosen = places[row].tolist()
            assert len(set(chosen)) == len(chosen)
            assert set(chosen) <= hidden
            assert sum(place in good for place in chosen) == min(len(good), len(chosen))
        if share == 0.0:
            assert torch.equal(places, plain_places)


def test_among_the_places_not_avoided_chance_decides():
    level = levels_of(PretrainConfig())[0]
    avoid = torch.zeros(2000, 8, dtype=torch.bool)
    avoid[:, :2] = True
    _, _, places = random_masks(2000, level, CPU, torch.Generator().manual_seed(0), avoid)
    first = torch.bincount(places[:, 0], minlength=8)
    assert first[:2].sum() == 0  # 4 of 8 are masked, so at least two that need not be avoided
    assert (first[2:] - 2000 / 6).abs().max() < 5 * (2000 / 6) ** 0.5
