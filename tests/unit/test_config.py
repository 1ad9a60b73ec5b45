"""Presets and defaults say what the design says; bad values are refused in one line."""

import dataclasses
import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.config import (
    DEFAULT_LEARNING_RATE,
    FLAT_FRACTION,
    PRESETS,
    LevelConfig,
    NetworkConfig,
    PretrainConfig,
    network_from_dict,
)
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of

HALVED = ((2, 2, 2),) * 4


@pytest.mark.parametrize(
    ("name", "embed_dims", "num_heads", "decoder"),
    [
        ("tiny", (12, 24, 48, 96), 3, (192, 4, 6)),
        ("small", (24, 48, 96, 192), 6, (288, 4, 6)),
        ("base", (48, 96, 192, 384), 12, (576, 8, 16)),
        ("large", (96, 192, 384, 768), 12, (576, 8, 16)),
    ],
)
def test_presets(name, embed_dims, num_heads, decoder):
    network = PRESETS[name]
    assert (network.embed_dims, network.num_heads) == (embed_dims, num_heads)
    assert (network.decoder_embed_dim, network.decoder_depth, network.decoder_num_heads) == decoder
    assert (network.depths, network.strides, network.mlp_ratio) == ((2, 2, 2, 11), HALVED, 4)
    assert network.token_size == (16, 16, 16)


def test_presets_are_four_and_base_is_the_default():
    assert list(PRESETS) == ["tiny", "small", "base", "large"]
    assert PRESETS["base"] == NetworkConfig() == PretrainConfig().network
    assert DEFAULT_LEARNING_RATE == {"tiny": 5e-4, "small": 5e-4, "base": 2e-4, "large": 2e-4}


def test_defaults_are_the_numbers_of_the_method():
    config = PretrainConfig()
    assert config.view_size == (96, 96, 96)
    assert config.ladder == "published"
    assert config.mask_ratios == (0.5, 0.6, 0.5)
    assert config.n_children == (4, 4)
    assert (config.alignment, config.alignment_weight, config.temperature) == ("infonce", 0.1, 0.2)
    assert config.level_weights == (1, 1, 1)
    assert FLAT_FRACTION == 0.005
    assert (config.betas, config.weight_decay, config.grad_clip) == ((0.9, 0.95), 0.05, 1.0)
    assert (config.learning_rate, config.warmup_fraction) == (2e-4, 0.05)
    assert config.mirror_axes == ()


def test_token_size_is_the_product_of_the_strides():
    assert NetworkConfig(strides=((1, 2, 2), (2, 2, 1), (1, 3, 2), (2, 1, 2))).token_size == (4, 12, 8)


@pytest.mark.parametrize("cls", [NetworkConfig, PretrainConfig])
def test_frozen(cls):
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"embed_dims": (12, 24, 48)},
        {"depths": (1, 1, 1, 1, 1)},
        {"strides": ((2, 2, 2),) * 3},
        {"strides": ((2, 2, 2),) * 3 + ((0, 2, 2),)},
        {"num_heads": 7},
        {"embed_dims": (48, 96, 192, 400), "num_heads": 4},  # not divisible by 6
        {"decoder_num_heads": 7},
        {"decoder_embed_dim": 64, "decoder_num_heads": 8},
    ],
)
def test_networks_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(MiMError) as error:
        NetworkConfig(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ladder": "spiral"},
        {"alignment": "byol"},
        {"view_size": (96, 96, 80)},
        {"view_size": (16, 96, 96)},
        {"view_size": (0, 96, 96)},
        {"view_size": (96, 96, 528)},
        {"n_children": (4, 65)},
        {"scale": (2, 2, 3)},
        {"iterations": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"warmup_fraction": 1.0},
        {"mask_ratios": (0.5, 0.6)},
        {"level_weights": (1.0,)},
        {"level_weights": (1.0, -1.0, 1.0)},
        {"mask_ratios": (0.5, 0.6, 1.0)},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"grad_clip": 0.0},
        {"body_fraction": 1.5},
        {"temperature": 0.0},
        {"alignment_weight": -1.0},
        {"n_children": (4, 4, 4)},
        {"n_children": (0, 4)},
    ],
)
def test_runs_that_cannot_be_computed_are_refused(wrong):
    with pytest.raises(MiMError) as error:
        PretrainConfig(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5])
def test_mask_ratio_lies_between_0_and_1(ratio):
    with pytest.raises(MiMError):
        LevelConfig((8, 8, 8), ratio, 1)


def test_a_mask_that_leaves_no_token_visible_is_refused():
    """At 32 voxels a view has 8 tokens: floor(8 · (1 − 0.9)) = 0 would be encoded."""
    with pytest.raises(MiMError):
        levels_of(PretrainConfig(view_size=(32, 32, 32), mask_ratios=(0.5, 0.9, 0.5)))


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    view=st.tuples(*[st.sampled_from([32, 64, 96])] * 3),
    scale=st.tuples(*[st.sampled_from([1, 2])] * 3),
    ladder=st.sampled_from(["published", "native"]),
    alignment=st.sampled_from(["infonce", "cosine", "none"]),
    n_children=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_a_checkpoint_keeps_the_configuration(preset, view, scale, ladder, alignment, n_children):
    config = PretrainConfig(
        preset=preset, network=PRESETS[preset], view_size=view, scale=scale, ladder=ladder, alignment=alignment,
        n_children=n_children, mirror_axes=(0, 1),
    )  # fmt: skip
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    file = io.BytesIO()
    torch.save(config.to_dict(), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    assert PretrainConfig.from_dict(stored) == config
    assert network_from_dict(stored["network"]) == config.network


def test_settings_of_another_version_are_refused():
    with pytest.raises(MiMError, match="wavelet"):
        PretrainConfig.from_dict({**PretrainConfig().to_dict(), "wavelet": 1})


def test_network_settings_of_another_version_are_refused():
    stored = PretrainConfig().to_dict()
    stored["network"]["wavelet"] = 1
    with pytest.raises(MiMError, match="wavelet"):
        PretrainConfig.from_dict(stored)
