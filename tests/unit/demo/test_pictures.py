"""The pictured views are what the network is given and says, in Hounsfield units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.demo.pictures import reconstruct_case
from nnunet_mim.networks.mask_in_mask import MaskInMask

NETWORK = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 10.0, "std": 250.0}


def make_checkpoint(normalization: str = "CTNormalization") -> dict:
    torch.manual_seed(0)
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32))
    weights = MaskInMask(NETWORK, 1, 2, config.alignment).state_dict()
    head = {name: value for name, value in weights.items() if name.startswith("decoder.head.")}
    assert head
    for value in head.values():
        value.zero_()  # then every token is predicted to be its mean
    provenance = {"normalization": [normalization], "intensity_properties": {"0": WINDOW}, "spacing": [2.0, 2.0, 1.0]}
    return {"mim_config": config.to_dict(), "network_weights": weights, "provenance": provenance}


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 64, 70, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def views(volume):
    return reconstruct_case(make_checkpoint(), volume)


def test_one_view_a_level_with_its_size(views) -> None:
    assert [v.title for v in views] == ["level 1\n128 × 128 × 64 mm", "level 2\n64 × 64 × 32 mm",
                                        "level 3\n32 × 32 × 16 mm"]  # fmt: skip
    for view in views:
        assert view.input.shape == view.mask.shape == view.reconstruction.shape == (32, 32, 32)
        assert view.mask.dtype == bool
        np.testing.assert_array_equal(view.reconstruction[~view.mask], view.input[~view.mask])
        assert 0.3 < view.mask.mean() < 0.7


def test_level_1_is_the_middle_of_the_volume_in_hounsfield_units(views, volume) -> None:
    crop = torch.from_numpy(volume[None, :, :, 3:67])
    expected = F.avg_pool3d(crop, 2)[0, 0].numpy() * 250 + 10
    np.testing.assert_allclose(views[0].input, expected, atol=1e-3)


def test_each_view_is_a_masked_place_of_the_one_before(views) -> None:
    first, second, third = views
    assert first.mask[first.child_box].all()
    np.testing.assert_allclose(
        first.input[first.child_box], F.avg_pool3d(torch.from_numpy(second.input)[None], 2)[0].numpy(), atol=1e-3
    )
    assert second.mask[second.child_box].all()
    token = torch.from_numpy(second.input[second.child_box])[None, None]
    enlarged = F.interpolate(token, scale_factor=2, mode="trilinear", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(third.input, enlarged, atol=1e-3)
    assert third.child_box is None


def test_prediction_is_shown_with_the_true_mean_of_each_token(views) -> None:
    for view in views:
        blocks = [(slice(a, a + 16), slice(b, b + 16), slice(c, c + 16))
                  for a in (0, 16) for b in (0, 16) for c in (0, 16)]  # fmt: skip
        masked = [block for block in blocks if view.mask[block].all()]
        assert masked
        for block in masked:
            np.testing.assert_allclose(view.reconstruction[block], view.input[block].mean(), atol=1e-2)


def test_other_masks_for_another_seed(views, volume) -> None:
    again, other = (reconstruct_case(make_checkpoint(), volume, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again[1].mask, views[1].mask)
    assert any((a.mask != b.mask).any() for a, b in zip(again, other, strict=True))


def test_a_small_volume_is_padded_with_the_lowest_intensity() -> None:
    view = reconstruct_case(make_checkpoint(), np.zeros((1, 30, 30, 30), np.float32))[0]
    assert view.input[0, 0, 0] == pytest.approx(-1000)
    assert view.input[16, 16, 16] == pytest.approx(10)


def test_what_is_not_ct_keeps_its_units() -> None:
    volume = np.random.default_rng(0).normal(size=(1, 40, 64, 64)).astype(np.float32)
    view = reconstruct_case(make_checkpoint("ZScoreNormalization"), volume)[0]
    assert view.input.min() == pytest.approx(volume.min())
    assert abs(view.input[16].mean()) < 0.1
