"""HybridUNet: shapes as nnU-Net's loss wants them, any patch, any stride, buildable by stock nnU-Net."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_mim.config import PRESETS, NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet, _kernel_sizes, plans_architecture

ISOTROPIC = [[1, 1, 1], *[[2, 2, 2]] * 5]
ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
STRIDE_THREE = [[1, 1, 1], [1, 3, 2], [2, 2, 2], [1, 1, 2], [2, 1, 1]]
TINY = {"embed_dims": [6, 6, 12, 12], "depths": [1, 1, 1, 2], "num_heads": 2, "stem_features": 4}


def small_network(strides=ISOTROPIC, channels=1, deep_supervision=True, **kwargs):
    torch.manual_seed(0)
    return HybridUNet(channels, 3, deep_supervision, strides=strides, **{**TINY, **kwargs})


def nnunet_targets(size, strides):
    """Sizes nnU-Net's own transform gives the targets, for the scales its trainer computes from the strides."""
    scales = [list(s) for s in 1 / np.cumprod(np.vstack(strides), axis=0)][:-1]
    targets = DownsampleSegForDSTransform(ds_scales=scales)(segmentation=torch.zeros(1, *size, dtype=torch.uint8))
    return [tuple(t.shape[1:]) for t in targets["segmentation"]]


@pytest.mark.parametrize("strides", [ISOTROPIC, ISOTROPIC[:5], ANISOTROPIC, STRIDE_THREE])
@pytest.mark.parametrize("size", [(32, 32, 32), (64, 32, 32), (20, 28, 41), (9, 50, 33)])
def test_deep_supervision_outputs_have_the_size_of_nnunets_targets(strides, size):
    network = small_network(strides)
    with torch.no_grad():
        outputs = network(torch.randn(1, 1, *size))
    assert [tuple(y.shape) for y in outputs] == [(1, 3, *target) for target in nnunet_targets(size, strides)]


def test_without_deep_supervision_the_full_resolution_logits_only():
    network = small_network(deep_supervision=True).eval()
    x = torch.randn(2, 1, 20, 33, 48)
    with torch.no_grad():
        deep = network(x)
        network.decoder.deep_supervision = False
        single = network(x)
    assert single.shape == (2, 3, 20, 33, 48)
    assert torch.equal(single, deep[0])


def test_padding_is_edge_replication_cropped_back():
    network = small_network(deep_supervision=False).eval()
    x = torch.randn(1, 1, 30, 25, 32)
    padded = F.pad(x, (0, 0, 0, 7, 0, 2), mode="replicate")
    with torch.no_grad():
        assert torch.equal(network(x), network(padded)[..., :30, :25, :])


@pytest.mark.parametrize(
    ("size", "padded"),
    [((16, 16, 16), (16, 16, 48)), ((33, 16, 1), (48, 16, 16)), ((64, 64, 64), (64, 64, 64))],
)
def test_padded_size(size, padded):
    assert small_network().padded_size(size) == padded


@pytest.mark.parametrize("strides", [ISOTROPIC, ISOTROPIC[:5]])
def test_a_single_voxel_can_be_trained_on(strides):
    outputs = small_network(strides).train()(torch.randn(1, 1, 1, 1, 1))
    assert all(torch.isfinite(y).all() for y in outputs)


def test_every_parameter_gets_a_gradient_and_channels_are_free():
    network = small_network(channels=3)
    outputs = network(torch.randn(2, 3, 32, 32, 64))
    sum(y.square().sum() for y in outputs).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_stock_nnunet_builds_it_from_plans(preset):
    architecture = json.loads(json.dumps(plans_architecture(PRESETS[preset], (64, 64, 64))))
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 2, 4,
        allow_init=True, deep_supervision=False,
    )  # fmt: skip
    assert type(network) is HybridUNet
    assert network.encoder.config.embed_dims == PRESETS[preset].embed_dims
    assert network.decoder.deep_supervision is False


def test_state_dict_round_trip_with_and_without_deep_supervision():
    first = small_network(deep_supervision=True).eval()
    torch.manual_seed(1)
    second = HybridUNet(1, 3, False, strides=ISOTROPIC, **TINY).eval()
    second.load_state_dict(first.state_dict(), strict=True)
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(first(x)[0], second(x))


def test_keys_for_nnunets_finetuning_point_at_pretrained_modules():
    network = small_network()
    assert network.get_submodule(HybridUNet.key_to_encoder) is network.encoder
    network.get_submodule(HybridUNet.key_to_stem)
    for key in HybridUNet.keys_to_in_proj:
        assert key.startswith(HybridUNet.key_to_stem + ".")
        assert network.get_submodule(key).weight.shape[1] == 1
    assert HybridUNet.key_to_lpe is None
    assert not any(name.startswith("encoder") for name, _ in network.stem.named_parameters())


def test_compiles_without_graph_breaks():
    network = small_network().eval()
    x = torch.randn(1, 1, 20, 32, 33)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(network(x), compiled(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_kernels_leave_thick_slices_alone_until_they_are_downsampled():
    assert _kernel_sizes(ISOTROPIC) == [(3, 3, 3)] * 6
    assert _kernel_sizes([[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]) == [
        (1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("patch", "last"),
    [((64, 64, 64), [2, 2, 2]), ((32, 64, 96), [1, 2, 2]), ((32, 32, 48), [2, 2, 2]), ((128, 128, 128), [2, 2, 2])],
)
def test_bottleneck_only_where_there_is_room(patch, last):
    strides = plans_architecture(NetworkConfig(), patch)["arch_kwargs"]["strides"]
    assert len(strides) == (5 if max(patch) < 64 else 6)
    assert strides[-1] == last


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strides": ISOTROPIC[:4]}, "five strides"),
        ({"strides": [[1, 1], *[[2, 2]] * 5]}, "3-D"),
        ({"strides": [[2, 2, 2], *ISOTROPIC[1:]]}, "full resolution"),
        ({"decoder_features": [8, 8]}, "decoder_features"),
        ({"num_heads": 5}, "divisible"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kwargs, message):
    with pytest.raises(MiMError, match=message):
        small_network(**kwargs)
