"""Nested views against a voxel-by-voxel twin, and, for each ladder, against cuts made here with torch alone."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.geometry import build_levels, ladder_levels, levels_of, views_per_crop
from nnunet_mim.pretraining.objective.masks import mask_of
from nnunet_mim.pretraining.objective.views import _fill_padding, nested_views


@dataclass(frozen=True)
class Case:
    """Crops of a random ladder, some of them partly outside the volume."""

    ladder: str
    view: tuple
    token: tuple
    scale: tuple
    n_children: tuple
    shares: tuple
    """per crop and axis (low, high): where the volume begins and ends, in hundredths of the crop"""
    channels: int
    seed: int

    def levels(self):
        ladder = ladder_levels(self.ladder, self.view, self.token, self.scale, n_children=self.n_children)
        return build_levels(ladder, self.view, self.token)

    def inputs(self):
        size = self.levels()[0].fov
        generator = torch.Generator().manual_seed(self.seed)
        crops = torch.randn(len(self.shares), self.channels, *size, dtype=torch.float64, generator=generator)
        valid = []
        for crop in self.shares:
            low = [min(lo * n // 100, n - 1) for (lo, _), n in zip(crop, size, strict=True)]
            high = [max(hi * n // 100, lo + 1) for (_, hi), lo, n in zip(crop, low, size, strict=True)]
            valid.append([list(pair) for pair in zip(low, high, strict=True)])
        return crops, torch.tensor(valid), -4.0 - torch.arange(self.channels, dtype=torch.float64)

    def views(self, crops=None):
        own, valid, fill = self.inputs()
        return nested_views(
            own if crops is None else crops, valid, fill, self.levels(), torch.Generator().manual_seed(self.seed)
        )


bounds = st.one_of(st.just((0, 100)), st.tuples(st.integers(0, 70), st.integers(30, 100)))


@st.composite
def cases(draw):
    token = draw(st.sampled_from([(1, 2, 2), (2, 2, 2), (2, 1, 3), (3, 2, 1), (1, 1, 1)]))
    return Case(
        ladder=draw(st.sampled_from(["published", "native"])),
        view=tuple(2 * p * draw(st.integers(1, 2)) for p in token),
        token=token,
        scale=draw(st.tuples(*[st.sampled_from([1, 2])] * 3)),
        n_children=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        shares=tuple(draw(st.lists(st.tuples(bounds, bounds, bounds), min_size=1, max_size=2))),
        channels=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


MOSTLY_PADDING = (((0, 100), (60, 100), (0, 30)), ((0, 100),) * 3)


@given(case=cases())
@example(Case("published", (4, 8, 8), (2, 2, 2), (2, 2, 2), (4, 4), MOSTLY_PADDING, 2, 0))
@example(Case("native", (4, 4, 6), (1, 2, 3), (2, 1, 2), (2, 2), MOSTLY_PADDING, 1, 1))
@settings(max_examples=60)
def test_every_view_matches_the_twin(reference, case):
    """Voxels, place in the crop, order in the batch, padded tokens, views that are all padding."""
    twin, levels = reference.geometry, case.levels()
    crops, valid, fill = case.inputs()
    filled = [twin.fill_padding(c.numpy(), v.tolist(), fill.tolist()) for c, v in zip(crops, valid, strict=True)]
    indicators = [twin.padding_indicator(crops.shape[2:], v.tolist()) for v in valid]
    views = case.views()
    assert len(views) == len(levels)

    wanted = [(crop, (0, 0, 0)) for crop in range(len(crops))]
    for number, (view, level) in enumerate(zip(views, levels, strict=True)):
        assert view.level == level
        assert view.images.shape == (len(wanted), case.channels, *case.view)
        assert view.crop.tolist() == [crop for crop, _ in wanted]
        assert [tuple(o) for o in view.offset.tolist()] == [offset for _, offset in wanted]
        for n, (crop, offset) in enumerate(wanted):
            image = twin.view(filled[crop], offset, level.fov, case.view)
            np.testing.assert_allclose(view.images[n].numpy(), image, rtol=0, atol=1e-12)
            padded = twin.padded_tokens(indicators[crop], offset, level.fov, case.view, case.token)
            assert view.padded[n].tolist() == padded
            assert bool(view.outside[n]) == twin.is_all_padding(indicators[crop], offset, level.fov)
        children = []
        for n, (crop, offset) in enumerate(wanted):  # child i of view n is view n*n_children + i
            for place in view.places[n].tolist():
                children.append((crop, twin.child_offset(offset, level.fov, level.n_regions, place)))
        wanted = children
        assert (len(wanted) > 0) == (number < len(levels) - 1)


@given(case=cases())
@settings(max_examples=25)
def test_masked_tokens_are_c_order_channel_last(reference, case):
    for view in case.views():
        tokens = view.masked_tokens()
        n_voxels = case.token[0] * case.token[1] * case.token[2] * case.channels
        assert tokens.shape == (*view.ids_masked.shape, n_voxels)
        for n in (0, tokens.shape[0] - 1):
            for m, token in enumerate(view.ids_masked[n].tolist()):
                wanted = reference.geometry.token_voxels(view.images[n], case.token, token)
                assert torch.equal(tokens[n, m], torch.stack(wanted))


@given(case=cases(), garbage=st.sampled_from([float("nan"), float("inf"), 1e9, -1e9]))
@settings(max_examples=25)
def test_nothing_under_the_padding_reaches_a_view(case, garbage):
    crops, valid, _ = case.inputs()
    changed = crops.clone()
    for crop, box in zip(changed, valid.tolist(), strict=True):
        inside = tuple(slice(low, high) for low, high in box)
        kept = crop[(slice(None), *inside)].clone()
        crop[:] = garbage
        crop[(slice(None), *inside)] = kept
    before = changed.clone()
    for a, b in zip(case.views(), case.views(changed), strict=True):
        for name in ("images", "crop", "offset", "ids_keep", "ids_masked", "places", "padded", "outside"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(changed.nan_to_num(), before.nan_to_num())  # inputs are left as they are


def test_fill_is_per_channel():
    crops = torch.zeros(1, 2, 2, 2, 2)
    filled = _fill_padding(crops, torch.tensor([[[0, 2], [1, 2], [0, 2]]]), torch.tensor([-4.0, 7.0]))
    assert filled[0, 0, :, 0].unique().tolist() == [-4]
    assert filled[0, 1, :, 0].unique().tolist() == [7]
    assert filled[0, :, :, 1].unique().tolist() == [0]


def test_views_of_a_crop_are_1_4_16():
    case = Case("published", (8, 12, 8), (2, 2, 2), (2, 2, 2), (4, 4), (((0, 100),) * 3,) * 3, 1, 0)
    assert [view.images.shape[0] for view in case.views()] == [3, 12, 48]
    assert views_per_crop(case.levels()) == (1, 4, 16)


PUBLISHED = PretrainConfig(
    network=NetworkConfig((6, 6, 6, 6), num_heads=1, strides=((1, 2, 2), (2, 2, 2), (2, 2, 1), (1, 1, 1))),
    view_size=(16, 16, 24),
)  # token (4, 8, 4), grid (4, 2, 6)
NATIVE = PretrainConfig(network=PUBLISHED.network, view_size=(8, 16, 16), ladder="native", scale=(2, 1, 2))


def full_views(config, channels=2, seed=0):
    """Crops without padding, and their views."""
    levels = levels_of(config)
    torch.manual_seed(seed)
    crops = torch.randn(2, channels, *levels[0].fov)
    valid = torch.tensor([[0, n] for n in levels[0].fov]).repeat(2, 1, 1)
    return crops, nested_views(crops, valid, torch.full((channels,), -4.0), levels, torch.Generator().manual_seed(seed))


def raw_box(crops, view, n):
    """The view's field of view, cut from the raw crop."""
    x, y, z = (slice(o, o + f) for o, f in zip(view.offset[n].tolist(), view.level.fov, strict=True))
    return crops[int(view.crop[n]), :, x, y, z]


def region_of_parent(parent, n, place):
    """Voxels (C, …) of region `place` of view n, cut from its image."""
    size = [v // r for v, r in zip(parent.level.view_size, parent.level.n_regions, strict=True)]
    at = np.unravel_index(place, parent.level.n_regions)
    x, y, z = (slice(int(i) * s, int(i + 1) * s) for i, s in zip(at, size, strict=True))
    return parent.images[n, :, x, y, z]


@pytest.mark.parametrize("config", [PUBLISHED, NATIVE], ids=["published", "native"])
def test_level_1_is_the_area_average_of_its_crop(config):
    crops, views = full_views(config)
    factor = [f // v for f, v in zip(views[0].level.fov, config.view_size, strict=True)]
    for n in range(2):
        image, averages = views[0].images[n], torch.zeros(2, *config.view_size)
        for i in range(factor[0]):
            for j in range(factor[1]):
                for k in range(factor[2]):
                    averages += crops[n, :, i :: factor[0], j :: factor[1], k :: factor[2]]
        torch.testing.assert_close(image, averages / (factor[0] * factor[1] * factor[2]))


def test_published_level_2_is_native_and_lies_under_the_masked_region():
    crops, (parent, child, _) = full_views(PUBLISHED)
    n_children = parent.places.shape[1]
    hidden = mask_of(parent.ids_masked, parent.level.n_tokens).reshape(-1, *parent.level.grid)
    voxel_mask = F.interpolate(hidden[:, None].float(), size=PUBLISHED.view_size, mode="nearest")[:, 0]
    for n in range(child.images.shape[0]):
        assert torch.equal(child.images[n], raw_box(crops, child, n))
        p, place = n // n_children, int(parent.places[n // n_children, n % n_children])
        shown = region_of_parent(parent, p, place)
        torch.testing.assert_close(F.avg_pool3d(child.images[n], 2), shown)
        x, y, z = (
            slice(o // 2, o // 2 + v // 2) for o, v in zip(child.offset[n].tolist(), PUBLISHED.view_size, strict=True)
        )
        assert torch.equal(parent.images[p, :, x, y, z], shown)
        assert (voxel_mask[p, x, y, z] == 1).all()  # every voxel of it is masked in the parent


def test_published_level_3_is_a_masked_token_of_its_parent_enlarged():
    crops, (_, parent, child) = full_views(PUBLISHED)
    n_children = parent.places.shape[1]
    tokens = parent.masked_tokens()
    for n in range(child.images.shape[0]):
        p, place = n // n_children, int(parent.places[n // n_children, n % n_children])
        box = raw_box(crops, child, n)
        enlarged = F.interpolate(box[None], size=PUBLISHED.view_size, mode="trilinear", align_corners=False)[0]
        assert torch.equal(child.images[n], enlarged)
        assert place in parent.ids_masked[p].tolist()
        assert place not in parent.ids_keep[p].tolist()
        assert torch.equal(region_of_parent(parent, p, place), box)
        m = parent.ids_masked[p].tolist().index(place)
        assert torch.equal(tokens[p, m], box.permute(1, 2, 3, 0).flatten())  # what the parent has to reconstruct


def test_published_level_3_is_cut_before_it_is_enlarged():
    """Neighbouring voxels must not leak into it through the interpolation."""
    crops, (_, _, child) = full_views(PUBLISHED)
    assert child.images[0].amin() >= raw_box(crops, child, 0).amin()
    assert child.images[0].amax() <= raw_box(crops, child, 0).amax()


def test_native_levels_lie_under_masked_regions():
    crops, views = full_views(NATIVE)
    assert [view.level.fov for view in views] == [(32, 16, 64), (16, 16, 32), (8, 16, 16)]
    assert torch.equal(views[2].images[0], raw_box(crops, views[2], 0))
    for parent, child in itertools.pairwise(views):
        n_children = parent.places.shape[1]
        for n in range(child.images.shape[0]):
            p, place = n // n_children, int(parent.places[n // n_children, n % n_children])
            torch.testing.assert_close(F.avg_pool3d(child.images[n], (2, 1, 2)), region_of_parent(parent, p, place))
            tokens = parent.level.tokens_of_region[place].tolist()
            assert set(tokens) <= set(parent.ids_masked[p].tolist())


def test_the_generator_alone_decides():
    case = Case("published", (4, 4, 8), (2, 2, 2), (2, 2, 2), (3, 2), (((0, 100),) * 3,) * 2, 1, 5)
    first, again = case.views(), case.views()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids_keep, b.ids_keep)
    crops, valid, fill = case.inputs()
    other = nested_views(crops, valid, fill, case.levels(), torch.Generator().manual_seed(6))
    assert not torch.equal(first[0].ids_keep, other[0].ids_keep)


@pytest.mark.parametrize("config", [PUBLISHED, NATIVE], ids=["published", "native"])
def test_children_prefer_places_with_tissue(reference, config):
    """docs/adr/0001: air only where no other masked place is left; masks as without the rule."""
    levels = levels_of(replace(config, n_children=(2, 1)))
    torch.manual_seed(0)
    crops = torch.randn(6, 1, *levels[0].fov)
    crops[:, :, levels[0].fov[0] // 3 :] *= 0.001  # air beyond the first third
    valid = torch.tensor([[0, n] for n in levels[0].fov]).repeat(6, 1, 1)

    def make(threshold):
        return nested_views(crops, valid, torch.tensor([-4.0]), levels, torch.Generator().manual_seed(1), threshold)

    views = make(torch.tensor([0.04]))
    assert torch.equal(views[0].ids_keep, make(None)[0].ids_keep)
    avoided = 0
    for view in views[:-1]:
        for n in range(view.images.shape[0]):
            image, hidden, empty = view.images[n], set(view.ids_masked[n].tolist()), set()
            places = [p for p, tokens in enumerate(view.level.tokens_of_region.tolist()) if set(tokens) <= hidden]
            for place in places:
                tokens = view.level.tokens_of_region[place].tolist()
                voxels = [reference.geometry.token_voxels(image, view.level.token_size, t) for t in tokens]
                if all(reference.losses.is_flat(v, [0.04]) for v in voxels):
                    empty.add(place)
            chosen = view.places[n].tolist()
            assert sum(p not in empty for p in chosen) == min(len(places) - len(empty), len(chosen))
            avoided += len(empty) - len(empty & set(chosen))
    assert avoided > 0


def test_a_token_on_the_edge_of_the_volume():
    """A volume that ends exactly on a token's border leaves that token whole; one voxel less does not."""
    level = levels_of(PretrainConfig(network=PUBLISHED.network, view_size=(8, 16, 8), scale=(1, 1, 1)))[0]
    crops = torch.zeros(2, 1, 8, 16, 8)
    valid = torch.tensor([[[4, 8], [0, 16], [0, 8]], [[5, 8], [0, 16], [0, 8]]])
    (view,) = nested_views(crops, valid, torch.zeros(1), (level,), torch.Generator().manual_seed(0))
    assert view.padded.reshape(2, 2, 2, 2)[0].tolist() == [[[True] * 2] * 2, [[False] * 2] * 2]
    assert view.padded[1].all()
