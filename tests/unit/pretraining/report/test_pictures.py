"""The pictured views are what the network is given and says, in Hounsfield units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnunet_mim.checkpoint.units import Units
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.nnunet.orientation import Orientation
from nnunet_mim.pretraining.monitoring.baselines import infill_tokens
from nnunet_mim.pretraining.objective.losses import normalize_tokens
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.report.pictures import (
    _fill_in,
    _one_view,
    _size_text,
    _tissue_centre,
    crop_start,
    load_network,
    reconstruct_volume,
    upright,
)

NETWORK = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 10.0, "std": 250.0}


def make_checkpoint(normalization: str = "CTNormalization", scale=(2, 2, 2), channels: int = 1) -> dict:
    torch.manual_seed(0)
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32), scale=scale, in_channels=channels)
    weights = MaskInMask(NETWORK, channels, alignment=config.alignment).state_dict()
    head = {name: value for name, value in weights.items() if name.startswith("decoder.head.")}
    assert head
    for value in head.values():
        value.zero_()  # then every token is predicted to be its mean
    provenance = {
        "normalization": [normalization] * channels,
        "intensity_properties": {str(c): WINDOW for c in range(channels)},
        "spacing": [2.0, 2.0, 1.0],
    }
    return {"mim_config": config.to_dict(), "network_weights": weights, "provenance": provenance}


def pictures_of(checkpoint, volume, seed=0):
    return reconstruct_volume(load_network(checkpoint), checkpoint, volume, seed)


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 64, 70, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def pictures(volume):
    return pictures_of(make_checkpoint(), volume)


def tokens_of(mask: np.ndarray):
    """Boxes of the masked tokens."""
    blocks = [(slice(a, a + 16), slice(b, b + 16), slice(c, c + 16))
              for a in (0, 16) for b in (0, 16) for c in (0, 16)]  # fmt: skip
    return [block for block in blocks if mask[block].all()]


def test_one_view_a_level_with_its_size(pictures) -> None:
    assert [p.name for p in pictures] == ["level1", "level2", "level3"]
    assert [p.step for p in pictures] == [(2, 2, 2), (1, 1, 1), (0.5, 0.5, 0.5)]
    for picture in pictures:
        assert picture.input.shape == picture.mask.shape == picture.reconstruction.shape == (32, 32, 32)
        assert picture.mask.dtype == bool
        for filled in (picture.reconstruction, picture.given, picture.infill):
            np.testing.assert_array_equal(filled[~picture.mask], picture.input[~picture.mask])
        assert 0.3 < picture.mask.mean() < 0.7


def test_level_1_is_the_middle_of_the_body_in_hounsfield_units(pictures, volume) -> None:
    assert pictures[0].start == (0, 3, 0)
    crop = torch.from_numpy(volume[None, :, :, 3:67])
    expected = F.avg_pool3d(crop, 2)[0, 0].numpy() * 250 + 10
    np.testing.assert_allclose(pictures[0].input, expected, atol=1e-3)


def test_each_view_is_a_masked_place_of_the_one_before(pictures) -> None:
    first, second, third = pictures
    assert first.mask[first.child_box].all()
    np.testing.assert_allclose(
        first.input[first.child_box], F.avg_pool3d(torch.from_numpy(second.input)[None], 2)[0].numpy(), atol=1e-3
    )
    assert second.mask[second.child_box].all()
    token = torch.from_numpy(second.input[second.child_box])[None, None]
    enlarged = F.interpolate(token, scale_factor=2, mode="trilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(third.input, enlarged, atol=1e-3)
    assert third.child_box is None


def test_start_says_where_a_view_lies_in_the_volume(pictures, volume) -> None:
    second = pictures[1]
    part = volume[0][tuple(slice(s, s + 32) for s in second.start)]
    np.testing.assert_allclose(second.input, part * 250 + 10, atol=1e-3)
    third = pictures[2]
    assert third.start == tuple(s + box.start for s, box in zip(second.start, second.child_box, strict=True))


def test_prediction_is_shown_with_the_true_mean_of_each_token(pictures) -> None:
    for picture in pictures:
        masked = tokens_of(picture.mask)
        assert masked
        for block in masked:
            for filled in (picture.reconstruction, picture.given):
                np.testing.assert_allclose(filled[block], picture.input[block].mean(), atol=1e-2)


def test_infill_has_the_true_mean_and_spread_of_each_token(pictures) -> None:
    for block in tokens_of(pictures[1].mask):
        made, true = pictures[1].infill[block], pictures[1].input[block]
        assert made.mean() == pytest.approx(true.mean(), abs=0.1)
        assert made.std() == pytest.approx(true.std(), rel=1e-3)


def test_prediction_and_infill_are_those_that_the_loss_compares(volume) -> None:
    checkpoint = make_checkpoint()
    torch.nn.init.normal_(checkpoint["network_weights"]["decoder.head.weight"])
    model, config = load_network(checkpoint), PretrainConfig.from_dict(checkpoint["mim_config"])
    crop, valid = torch.from_numpy(volume[None, :, :, :64]), torch.tensor([[[0, 64]] * 3])
    views = nested_views(crop, valid, torch.zeros(1), levels_of(config), torch.Generator().manual_seed(0))
    view = _one_view(views[1], 2)
    with torch.no_grad():
        mask, made, _, infill = _fill_in(model, view)
        expected = model([views[1].masked()])[0].prediction[2]
    blocks = tokens_of(mask.numpy())
    assert len(blocks) == len(expected)
    nearest = normalize_tokens(infill_tokens(view))[0]
    for block, prediction, copied in zip(blocks, expected, nearest, strict=True):
        true = view.images[0, 0][block]
        restored = (made[block] - true.mean()) / true.std()
        np.testing.assert_allclose(restored.flatten(), prediction, atol=1e-3)
        np.testing.assert_allclose(((infill[block] - true.mean()) / true.std()).flatten(), copied, atol=1e-3)


def test_other_masks_for_another_seed(pictures, volume) -> None:
    again, other = (pictures_of(make_checkpoint(), volume, seed) for seed in (0, 1))
    np.testing.assert_array_equal(again[1].mask, pictures[1].mask)
    assert any((a.mask != b.mask).any() for a, b in zip(again, other, strict=True))


def test_air_is_not_chosen_where_there_is_tissue() -> None:
    volume = np.full((1, 64, 64, 64), -4.04, np.float32)
    random = np.random.default_rng(0)
    volume[0, 32:, 32:, 32:] = random.normal(0, 0.3, (32, 32, 32))  # tissue in one octant
    volume[0, :32, :32, :32] = random.normal(0, 0.3, (32, 32, 32))
    for seed in range(4):
        first, second, third = pictures_of(make_checkpoint(), volume, seed)
        masked_tissue = first.mask[20, 20, 20] or first.mask[10, 10, 10]
        assert (second.input.mean() > -200) == masked_tissue
        if masked_tissue:
            assert third.input.mean() > -200


def test_a_small_volume_is_padded_with_the_lowest_intensity() -> None:
    picture = pictures_of(make_checkpoint(), np.zeros((1, 30, 30, 30), np.float32))[0]
    assert picture.start == (-17, -17, -17)
    assert picture.input[0, 0, 0] == pytest.approx(-1000)
    assert picture.input[16, 16, 16] == pytest.approx(10)


def test_what_is_not_ct_keeps_its_units_and_has_robust_grey() -> None:
    volume = np.random.default_rng(0).normal(size=(1, 40, 64, 64)).astype(np.float32)
    picture = pictures_of(make_checkpoint("ZScoreNormalization"), volume)[0]
    assert picture.input.min() == pytest.approx(volume.min())
    assert abs(picture.input[16].mean()) < 0.1
    volume[0, 0, 0, 0] = 1e6  # one hot voxel
    low, high = Units(("ZScoreNormalization",), {}).grey(volume[0])
    assert (low, high) == pytest.approx((-2.33, 2.58), abs=0.1)


def test_ladders_with_fewer_levels_and_several_channels(volume) -> None:
    pictures = pictures_of(make_checkpoint(scale=(1, 1, 1)), volume)
    assert [p.name for p in pictures] == ["level2", "level3"]
    two = np.concatenate([volume, volume + 1])
    pictures = pictures_of(make_checkpoint(channels=2), two)
    expected = F.avg_pool3d(torch.from_numpy(volume[None, :, :, 3:67]), 2)[0, 0].numpy() * 250 + 10
    np.testing.assert_allclose(pictures[0].input, expected, atol=1e-3)


def test_drawing_leaves_random_numbers_alone(volume) -> None:
    checkpoint = make_checkpoint()
    before = torch.get_rng_state()
    pictures_of(checkpoint, volume)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_another_network_are_refused() -> None:
    checkpoint = make_checkpoint()
    del checkpoint["network_weights"]["encoder.norm.weight"]
    with pytest.raises(MiMError, match="take another copy"):
        load_network(checkpoint)


def test_crop_lies_around_the_body() -> None:
    volume = np.full((40, 40, 100), -4.0, np.float32)
    volume[8:16, 20:28, 80:96] = 0.5
    centre = _tissue_centre(volume, Units(("CTNormalization",), {"0": WINDOW}))
    np.testing.assert_allclose(centre, (12, 24, 88), atol=2)
    assert crop_start(np.array([40, 40, 100]), np.array([32, 64, 32]), centre).tolist() == [0, -12, 68]


def test_upright_views_are_turned_with_their_boxes_and_spacing(pictures) -> None:
    views = upright(pictures, (2.0, 3.0, 1.0), Orientation((1, 0, 2), (False, True, False)))
    assert views[0].title == "level 1\n64 × 128 × 192 mm"
    assert views[1].spacing == (3, 2, 1)
    np.testing.assert_array_equal(views[0].input, pictures[0].input.transpose(1, 0, 2)[:, ::-1])
    np.testing.assert_array_equal(views[0].input[views[0].child_box], pictures[0].input[pictures[0].child_box]
                                  .transpose(1, 0, 2)[:, ::-1])  # fmt: skip
    assert _size_text((10.2, 9.9, 10)) == "10 mm wide"
