"""Geometry against loop-written twins, for random view sizes, token sizes and ladders."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nnunet_mim.config import PRESETS, LevelConfig, NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import (
    build_levels,
    ladder_levels,
    levels_of,
    suitable_scale,
    suitable_strides,
    suitable_view,
    views_per_crop,
)


def per_axis(values):
    return st.tuples(values, values, values)


token_sizes = per_axis(st.integers(1, 4))
half_grids = per_axis(st.integers(1, 2))
scales = per_axis(st.sampled_from([1, 2]))
ratios = st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9])
ladders = st.sampled_from(["published", "native"])


@st.composite
def ladder_arguments(draw):
    token = draw(token_sizes)
    view = tuple(2 * p * k for p, k in zip(token, draw(half_grids), strict=True))
    return (
        draw(ladders),
        view,
        token,
        draw(scales),
        (draw(ratios), draw(ratios), draw(ratios)),
        draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
    )


def build(arguments):
    """Geometry of a ladder; an example whose mask would leave nothing visible is refused, and drawn again."""
    _, view, token, *_ = arguments
    try:
        return build_levels(ladder_levels(*arguments), view, token)
    except MiMError as error:
        assume("tokens visible" not in str(error))
        raise


@given(ladder_arguments())
@example(("published", (96, 96, 96), (16, 16, 16), (2, 2, 2), (0.5, 0.6, 0.5), (4, 4)))
@example(("native", (96, 96, 96), (16, 16, 16), (2, 2, 2), (0.5, 0.6, 0.5), (4, 4)))
def test_fields_of_view_match_the_twin(reference, arguments):
    name, view, token, scale, mask_ratios, n_children = arguments
    levels = ladder_levels(*arguments)
    wanted = reference.geometry.ladder(name, view, token, scale)
    assert [level.fov for level in levels] == [fov for _, fov in wanted]
    assert [level.mask_ratio for level in levels] == [mask_ratios[number - 1] for number, _ in wanted]
    assert [level.n_children for level in levels] == [
        n_children[number - 1] if number < 3 else 0 for number, _ in wanted
    ]


@given(ladder_arguments())
def test_regions_and_tokens_match_the_twin(reference, arguments):
    twin = reference.geometry
    levels = build(arguments)
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        fov_below = level.fov if following is None else following.fov
        assert level.n_regions == twin.divide(level.fov, fov_below)
        assert level.grid == twin.divide(level.view_size, level.token_size)
        regions = twin.tokens_of_regions(level.view_size, level.token_size, level.n_regions)
        assert level.tokens_of_region.tolist() == regions
        for region, tokens in enumerate(regions):
            assert all(level.region_of_token[t] == region for t in tokens)
        assert [tuple(o) for o in level.region_offsets] == [
            twin.child_offset((0, 0, 0), level.fov, level.n_regions, place) for place in range(len(regions))
        ]


@given(ladder_arguments())
def test_regions_tile_the_field_of_view(arguments):
    """Every crop voxel of a parent's box lies in exactly one region."""
    levels = build(arguments)
    for level, following in itertools.pairwise(levels):
        covered = np.zeros(level.fov, dtype=int)
        for x, y, z in level.region_offsets:
            covered[x : x + following.fov[0], y : y + following.fov[1], z : z + following.fov[2]] += 1
        assert (covered == 1).all()


@given(ladder_arguments())
def test_counts_match_the_twin(reference, arguments):
    levels = build(arguments)
    for number, level in enumerate(levels):
        last = number == len(levels) - 1
        visible, masked_units = reference.geometry.n_visible_tokens(
            level.view_size, level.token_size, level.n_regions, level.mask_ratio, last
        )
        assert (level.n_visible_tokens, level.n_masked_units) == (visible, masked_units)
        assert level.n_children == (0 if last else min(level.max_children, masked_units))
        assert level.n_tokens == math.prod(level.grid)


@given(n=per_axis(st.integers(1, 6)), ratio=st.integers(1, 99))
def test_visible_tokens_are_rounded_down_exactly(n, ratio):
    """floor(n·(1 − ratio)) for ratios that binary fractions cannot hold, e.g. 10 tokens at 0.7 leave 3, not 2."""
    visible = math.prod(n) * (100 - ratio) // 100
    levels = (LevelConfig(n, ratio / 100, 0),)
    if visible == 0:
        with pytest.raises(MiMError, match="tokens visible"):
            build_levels(levels, n, (1, 1, 1))
    else:
        assert build_levels(levels, n, (1, 1, 1))[0].n_visible_tokens == visible


def test_a_token_seen_by_the_last_level_reads_only_its_own_voxels(reference):
    """Bounds of tokens of an enlarged view, against exact interpolation weights."""
    for fov, view, token in ((2, 8, 2), (3, 9, 3), (2, 12, 2), (1, 4, 1), (3, 12, 3), (4, 4, 2), (8, 4, 2)):
        (level,) = build_levels((LevelConfig((fov,) * 3, 0.5, 0),), (view,) * 3, (token,) * 3)
        weights = reference.geometry.weights_1d(fov, view)
        for t, (low, high) in enumerate(level.token_bounds[1]):
            read = {j for i in range(t * token, (t + 1) * token) for j in range(fov) if weights[i][j]}
            assert (low, high) == (min(read), max(read) + 1), (fov, view, t)


def test_the_published_ladder_of_the_paper():
    config = PretrainConfig()
    levels = levels_of(config)
    assert [level.fov for level in levels] == [(192,) * 3, (96,) * 3, (16,) * 3]
    assert [level.n_regions for level in levels] == [(2,) * 3, (6,) * 3, (1,) * 3]
    assert [level.n_visible_tokens for level in levels] == [108, 86, 108]
    assert [level.down for level in levels] == [(2,) * 3, (1,) * 3, (1,) * 3]
    assert [level.masks_regions for level in levels] == [True, False, False]
    assert views_per_crop(levels) == (1, 4, 16)


def test_the_native_ladder():
    levels = levels_of(PretrainConfig(ladder="native"))
    assert [level.fov for level in levels] == [(384,) * 3, (192,) * 3, (96,) * 3]
    assert [level.n_regions for level in levels] == [(2,) * 3, (2,) * 3, (1,) * 3]
    assert [level.n_visible_tokens for level in levels] == [108, 108, 108]
    assert [level.down for level in levels] == [(4,) * 3, (2,) * 3, (1,) * 3]
    assert views_per_crop(levels) == (1, 4, 16)


@pytest.mark.parametrize(
    ("scale", "n_regions", "n_masked", "views"),
    [
        ((2, 2, 2), 8, 4, (1, 4, 16)),
        ((2, 1, 2), 4, 2, (1, 2, 8)),
        ((1, 1, 2), 2, 1, (1, 1, 4)),
        ((1, 1, 1), None, None, (1, 4)),
    ],
)
def test_thin_axes_of_the_published_ladder(scale, n_regions, n_masked, views):
    """8, 4 or 2 octants, half of them masked; with a single region the level is skipped."""
    levels = levels_of(PretrainConfig(scale=scale))
    assert views_per_crop(levels) == views
    if n_regions is None:
        assert [level.fov for level in levels] == [(96,) * 3, (16,) * 3]
    else:
        assert (levels[0].n_places, levels[0].n_masked_units) == (n_regions, n_masked)


def test_a_native_ladder_without_scale_is_one_level():
    levels = levels_of(PretrainConfig(ladder="native", scale=(1, 1, 1)))
    assert [level.fov for level in levels] == [(96,) * 3]
    assert (levels[0].n_children, views_per_crop(levels)) == (0, (1,))


def test_anisotropic_strides():
    network = NetworkConfig(strides=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)))
    levels = levels_of(PretrainConfig(network=network, view_size=(16, 64, 96), scale=(1, 2, 2)))
    assert levels[0].token_size == (4, 16, 16)
    assert levels[0].grid == (4, 4, 6)
    assert levels[0].n_regions == (1, 2, 2)
    assert levels[1].n_regions == (4, 4, 6)
    assert levels[2].fov == (4, 16, 16)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("view", [32, 64, 96])
def test_every_preset_and_common_view_builds(preset, view):
    levels = levels_of(PretrainConfig(preset=preset, network=PRESETS[preset], view_size=(view,) * 3))
    assert all(0 < level.n_visible_tokens < level.n_tokens for level in levels)


@pytest.mark.parametrize(
    "fovs",
    [
        ((12, 12, 12), (8, 8, 8)),  # the outer field of view is no multiple of the view
        ((16, 16, 16), (8, 8, 8), (3, 3, 3)),  # does not tile its parent
        ((24, 24, 24), (8, 8, 8)),  # three regions would cut tokens
        ((16, 16, 16), (8, 8, 8), (1, 1, 1)),  # regions smaller than a token
    ],
)
def test_a_ladder_that_does_not_divide_is_refused(fovs):
    levels = tuple(LevelConfig(fov, 0.5, 1) for fov in fovs)
    with pytest.raises(MiMError):
        build_levels(levels, (8, 8, 8), (2, 2, 2))


def test_a_view_that_cuts_tokens_is_refused():
    with pytest.raises(MiMError):
        build_levels((LevelConfig((9, 8, 8), 0.5, 0),), (9, 8, 8), (2, 2, 2))


@pytest.mark.parametrize(
    ("ladder", "shape", "scale"),
    [
        ("published", (200, 200, 200), (2, 2, 2)),
        ("published", (60, 175, 175), (1, 2, 2)),
        ("published", (117, 117, 300), (2, 2, 2)),  # tokens of 32 voxels: 86 / 192 twice is 0.2006
        ("published", (116, 117, 300), (1, 2, 2)),  # 0.198
        ("published", (144, 144, 144), (2, 2, 2)),  # 0.204
        ("published", (130, 130, 130), (1, 1, 1)),  # 0.137; all axes alike
        ("native", (200, 300, 300), (1, 2, 2)),
        ("native", (60, 60, 60), (1, 1, 1)),
        ("published", (40, 300, 300), (1, 2, 2)),  # never enough, but two axes are filled
    ],
)
def test_suitable_scale(ladder, shape, scale):
    assert suitable_scale(ladder, (96, 96, 96), shape, (16, 16, 16)) == scale


def test_the_share_of_whole_tokens_is_that_of_random_places():
    """63 voxels anywhere in a box of four tokens of 32: one lies wholly inside. Half full is not half usable."""
    whole = [
        sum(start <= 32 * t and 32 * t + 32 <= start + 63 for t in range(4)) / 4 for start in range(0, 128 - 63 + 1)
    ]
    assert sum(whole) / len(whole) == pytest.approx((63 - 32 + 1) / 128, abs=0.02)
    assert suitable_scale("published", (64, 64, 64), (63, 125, 125), (16, 16, 16)) == (1, 2, 2)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((512, 300, 160), (96, 96, 96)),
        ((128, 128, 128), (64, 64, 64)),
        ((96, 96, 96), (64, 64, 64)),  # for one view; the scale is 1 then
        ((57, 20, 1), (32, 32, 32)),
    ],
)
def test_suitable_view(shape, view):
    assert suitable_view(shape, (16, 16, 16)) == view


def test_suitable_view_in_tokens():
    assert suitable_view((64, 128, 300), (4, 16, 32)) == (24, 64, 128)


@pytest.mark.parametrize(
    ("spacing", "token"),
    [
        ((1.5, 1.5, 1.5), (16, 16, 16)),
        ((4.7, 3.0, 4.7), (16, 16, 16)),
        ((3.27, 0.98, 0.98), (8, 16, 16)),
        ((0.8, 0.8, 5.0), (16, 16, 4)),  # 5 waits at 0.8 and 1.6
        ((20.0, 1.0, 1.0), (1, 16, 16)),
    ],
)
def test_suitable_strides(spacing, token):
    strides = suitable_strides(spacing)
    assert len(strides) == 4
    assert tuple(np.prod(strides, axis=0)) == token
