"""Weight transfer: what is transferred computes what it computed in pretraining."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.config import NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.trainers.transfer import _is_patch_kernel, _resize_kernel, check_architecture, transfer_weights


def unet(network, channels=1, patch=(64, 32, 32)):
    torch.manual_seed(11)
    return HybridUNet(channels, 2, True, **plans_architecture(network, patch)["arch_kwargs"])


def assert_same_features(network, encoder, x, x_encoder=None):
    with torch.no_grad():
        ours = network.encoder.forward_features(x)
        theirs = encoder.forward_features(x if x_encoder is None else x_encoder)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_all_encoder_weights_arrive_and_compute_the_same(make_checkpoint, network_config):
    path, encoder = make_checkpoint()
    network = unet(network_config)
    outside = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("encoder.")}
    report = transfer_weights(network, PretrainedCheckpoint.load(path))
    assert_same_features(network, encoder, torch.randn(2, 1, 32, 48, 64))
    assert report.loaded == [f"encoder.{k}" for k in encoder.state_dict()]
    assert report.adapted == {}
    assert set(report.fresh) == set(outside)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in outside.items())
    loaded = sum(p.numel() for p in encoder.parameters())
    said = report.lines()
    assert len(said) == 3
    assert f" loaded: {len(report.loaded)} ({loaded:,} values), adapted: 0 (0 values), fresh: " in said[1]


def test_one_channel_fits_any_number_of_channels(make_checkpoint, network_config):
    path, encoder = make_checkpoint()
    network = unet(network_config, channels=3)
    report = transfer_weights(network, PretrainedCheckpoint.load(path))
    assert list(report.adapted) == ["encoder.stages.0.embed.proj.weight"]
    x = torch.randn(1, 1, 32, 32, 32)
    assert_same_features(network, encoder, x.expand(-1, 3, -1, -1, -1), x)


def test_other_strides_answer_to_an_enlarged_image_as_before(make_checkpoint, network_config):
    """Axis 0 is downsampled half as much in stage 1: the image enlarged twofold there must give the same features."""
    path, encoder = make_checkpoint()
    network = unet(replace(network_config, strides=((1, 2, 2), *[(2, 2, 2)] * 3)))
    report = transfer_weights(network, PretrainedCheckpoint.load(path))
    assert list(report.adapted) == ["encoder.stages.0.embed.proj.weight"]
    assert "(2, 2, 2) → (1, 2, 2)" in report.adapted["encoder.stages.0.embed.proj.weight"]
    x = torch.randn(1, 1, 16, 32, 32)
    assert_same_features(network, encoder, x, x.repeat_interleave(2, dim=2))


def test_kernels_of_every_strided_layer_are_adapted(make_checkpoint, network_config):
    path, _ = make_checkpoint()
    strides = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 3))
    network = unet(replace(network_config, strides=strides))
    report = transfer_weights(network, PretrainedCheckpoint.load(path))
    assert set(report.adapted) == {
        "encoder.token_embed.proj.weight", *[f"encoder.stages.{s}.to_token.weight" for s in range(3)],
    }  # fmt: skip


def loop_resize(weight, size):
    """Spread every value over the new cells by overlap, one at a time."""
    out = torch.zeros(*weight.shape[:2], *size, dtype=torch.float64)
    old = weight.shape[2:]
    for source in product(*map(range, old)):
        for cell in product(*map(range, size)):
            share = 1.0
            for i, j, n, m in zip(source, cell, old, size, strict=True):
                low, high = max(i / n, j / m), min((i + 1) / n, (j + 1) / m)
                share *= max(0.0, high - low) * n
            out[(..., *cell)] += weight[(..., *source)].double() * share
    return out


@pytest.mark.parametrize("size", [(2, 2, 2), (1, 2, 4), (3, 1, 5), (8, 2, 3), (4, 4, 4)])
def test_resize_kernel_equals_its_loop(size):
    weight = torch.randn(3, 2, 2, 2, 2) if size != (4, 4, 4) else torch.randn(3, 2, 3, 2, 1)
    resized = _resize_kernel(weight, size)
    assert resized.shape == (3, 2, *size)
    torch.testing.assert_close(resized.double(), loop_resize(weight, size), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(resized.sum((2, 3, 4)), weight.sum((2, 3, 4)), rtol=1e-4, atol=1e-5)


def test_patch_kernels_are_all_the_layers_whose_kernel_is_a_stride(network_config):
    names = [
        name
        for name, _ in HybridEncoder(1, network_config).named_parameters()
    ]
    found = {name for name in names if _is_patch_kernel(name)}
    assert found == {
        *[f"stages.{s}.{layer}.weight" for s in range(3) for layer in ("embed.proj", "to_token")],
        "token_embed.proj.weight",
    }


@pytest.mark.parametrize("change", ["drop", "add", "shape"])
def test_a_state_dict_that_does_not_fit_is_an_error(make_checkpoint, network_config, change):
    path, _ = make_checkpoint()
    checkpoint = PretrainedCheckpoint.load(path)
    if change == "drop":
        del checkpoint.encoder["norm.weight"]
    elif change == "add":
        checkpoint.encoder["extra.weight"] = torch.zeros(1)
    else:
        checkpoint.encoder["norm.weight"] = torch.zeros(7)
    with pytest.raises(MiMError, match=r"norm\.weight|extra\.weight"):
        transfer_weights(unet(network_config), checkpoint)


@pytest.mark.parametrize(
    "other",
    [
        NetworkConfig((6, 12, 12, 12), (1, 1, 1, 2), num_heads=2),
        NetworkConfig((6, 6, 12, 12), (1, 1, 1, 3), num_heads=2),
        NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=1),
        NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2, mlp_ratio=2.0),
    ],
)
def test_another_architecture_is_named_before_anything_is_copied(make_checkpoint, network_config, other):
    path, _ = make_checkpoint(network=other)
    kwargs = plans_architecture(network_config, (32, 32, 32))["arch_kwargs"]
    with pytest.raises(MiMError, match="another architecture") as error:
        check_architecture(PretrainedCheckpoint.load(path), kwargs, 1)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_several_channels_must_be_the_datasets(make_checkpoint, network_config):
    path, _ = make_checkpoint(in_channels=2)
    kwargs = plans_architecture(network_config, (32, 32, 32))["arch_kwargs"]
    check_architecture(PretrainedCheckpoint.load(path), kwargs, 2)
    with pytest.raises(MiMError, match="2 channels, the dataset has 3"):
        check_architecture(PretrainedCheckpoint.load(path), kwargs, 3)
